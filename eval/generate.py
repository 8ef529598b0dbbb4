"""Model + samples -> predictions, through the code that `region-chat` answers with; over several processes. An
interrupted run resumes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch.distributed
from PIL import Image
from tqdm.auto import tqdm

from alpha_clip_commands.command_line import one_line
from eval.predictions import record_of, write_predictions
from eval.views import show
from mllm.data.samples import ImageSource, RegionSample
from mllm.inference import ChatRequest, RegionChat
from mllm.lost_process import lost_process
from mllm.resume import journal, read_journal


@dataclasses.dataclass(frozen=True)
class Settings:
    """How samples are put to a model.

    Attributes:
        region_input: One of `eval.views.INPUTS`.
        prompt: What is asked; "{question}" in it stands for the sample's question. None: the question as it is, and
            for a description the model's own wording.
        batch_size: Answers made at once.
        max_new_tokens: Longest answer, in tokens.
    """

    region_input: str = "box"
    prompt: str | None = None
    batch_size: int = 32
    max_new_tokens: int = 64

    def question(self, sample: RegionSample) -> str | None:
        """What the model is asked about a sample; None asks for a description in the model's own wording."""
        return sample.question if self.prompt is None else self.prompt.replace("{question}", sample.question or "")


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those that share a run."""

    rank: int = 0
    count: int = 1

    @classmethod
    def start(cls) -> Processes:
        """Join the processes that `torchrun` has started; alone without it."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count > 1 and not torch.distributed.is_initialized():
            # gloo, on a GPU too: nothing is exchanged but "I am here"; the slowest may take its time
            with _lost_processes_as_os_errors():
                torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        return cls(int(os.environ.get("RANK", "0")), count)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """All processes leave this block together, and if one of them fails, all do.

        Raises:
            ValueError: If another process failed.
            OSError: If another process is gone: killed, say.
        """
        failure: ValueError | OSError | None = None
        try:
            yield
        except (ValueError, OSError) as error:
            failure = error
        problems: list[str | None] = [None] * self.count
        if self.count > 1:
            try:
                with _lost_processes_as_os_errors():
                    torch.distributed.all_gather_object(problems, None if failure is None else one_line(failure))
            except OSError:
                if failure is None:
                    raise
        if failure is not None:
            raise failure
        for rank, problem in enumerate(problems):
            if problem is not None:
                raise ValueError(f"process {rank} of this run failed: {problem}")


@contextlib.contextmanager
def _lost_processes_as_os_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if (lost := lost_process(error)) is None:
            raise
        raise OSError(f"{lost}; rerun the same command to resume") from error


def generate(
    chat: RegionChat,
    samples: Sequence[RegionSample],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    label: str = "answers",
) -> list[str]:
    """Answer every sample about the region it has, greedily, in order.

    Args:
        chat: The model behind `region-chat`.
        samples: Each with one region; a sample without a question asks for a description.
        batch_size: Answers made in one `generate` call.
        max_new_tokens: Longest answer, in tokens.
        label: Name on the progress bar.

    Raises:
        ValueError: If a picture cannot be read or a region does not fit it.
    """
    settings = Settings("box", None, batch_size, max_new_tokens)
    predictions: list[str] = []
    for start in tqdm(range(0, len(samples), batch_size), desc=label, unit="batch"):
        for answer in _answers(chat, samples[start : start + batch_size], settings):
            if "error" in answer:
                raise ValueError(answer["error"])
            predictions.append(answer["prediction"])
    return predictions


def run(
    chat: RegionChat,
    samples: Sequence[RegionSample],
    folder: Path,
    settings: Settings,
    *,
    data: Path,
    processes: Processes = Processes(),  # noqa: B008, immutable
) -> int:
    """Answer every sample into `folder`/predictions.jsonl; returns how many could not be answered.

    Batches are formed once over all samples and dealt out whole: however many processes there are and however often
    they were killed, the same batches are computed, and the merged file is the same. What is done is kept in
    `folder`/parts, a batch a line; a batch with an unanswered sample is answered again by the next run.

    Raises:
        ValueError: If the model cannot be asked in this way at all, or a file of parts is damaged or of another run.
        OSError: If something cannot be written.
    """
    batches = [samples[start : start + settings.batch_size] for start in range(0, len(samples), settings.batch_size)]
    parts = folder / "parts"
    own = parts / f"{processes.rank}.jsonl"
    with processes.together():  # nobody writes before all have read
        parts.mkdir(parents=True, exist_ok=True)
        if settings.region_input == "blind":
            chat.answers([(None, None, settings.question(samples[0]))], max_new_tokens=1)  # refused at once
        done = {batch for batch, answers in _read_parts(parts, batches, settings).items() if not _failed(answers)}
    left = [batch for batch in range(len(batches)) if batch not in done]
    with (
        processes.together(),
        journal(own) as append,
        tqdm(
            total=len(samples),
            initial=sum(len(batches[batch]) for batch in done),
            desc=settings.region_input,
            unit="sample",
            disable=processes.rank > 0,
        ) as progress,
    ):
        for position in range(0, len(left) - processes.rank, processes.count):
            batch = left[position + processes.rank]
            answers = _answers(chat, batches[batch], settings)
            append({"batch": batch, "samples": _digest(batches[batch], settings), "answers": answers})
            # the other processes are about as far
            progress.update(sum(len(batches[other]) for other in left[position : position + processes.count]))
    failed = 0
    with processes.together():
        if processes.rank == 0:
            answered = _read_parts(parts, batches, settings)
            answers = [answer for batch in range(len(batches)) for answer in answered[batch]]
            failed = _failed(answers)
            _write(chat, samples, answers, folder, settings, data)
    return failed


def _write(
    chat: RegionChat,
    samples: Sequence[RegionSample],
    answers: Sequence[dict[str, Any]],
    folder: Path,
    settings: Settings,
    data: Path,
) -> None:
    """Write predictions.jsonl, in the order of the samples."""
    prompts: dict[str | None, str] = {}

    def prompt(sample: RegionSample) -> str:
        question = settings.question(sample)
        if question not in prompts:
            prompts[question] = chat.prompt(question, with_image=settings.region_input != "blind")
        return prompts[question]

    write_predictions(
        folder / "predictions.jsonl",
        (record_of(sample, prompt(sample), answer, data) for sample, answer in zip(samples, answers, strict=True)),
    )


def _answers(chat: RegionChat, samples: Sequence[RegionSample], settings: Settings) -> list[dict[str, Any]]:
    """The answers of a batch; a sample that cannot be answered gets its error instead, and the others are answered."""
    pictures: dict[ImageSource, Image.Image] = {}  # one decoding for all regions of a picture in a batch
    asked: list[ChatRequest | ValueError] = []
    for sample in samples:
        try:
            if settings.region_input != "blind" and sample.image not in pictures:
                pictures[sample.image] = sample.open_image()
            image, region = show(sample, settings.region_input, pictures.get(sample.image))
            asked.append((image, region, settings.question(sample)))
        except (ValueError, OSError) as error:
            asked.append(ValueError(one_line(error)))
    return [
        {"error": one_line(answer)}
        if isinstance(answer, ValueError)
        else {"prediction": answer.text, **({"cut": True} if answer.truncated else {})}
        for answer in chat.answer_each(asked, max_new_tokens=settings.max_new_tokens)
    ]


class _Answered(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    prediction: str | None = None
    cut: bool = False
    error: str | None = None

    def __post_init__(self) -> None:
        if (self.prediction is None) == (self.error is None):
            raise ValueError("expected a prediction or an error")


class _Part(msgspec.Struct, forbid_unknown_fields=True):
    """A line of a file of parts: a batch, and what it is of (`_digest`)."""

    batch: int
    samples: str
    answers: list[_Answered]


def _read_parts(
    parts: Path, batches: Sequence[Sequence[RegionSample]], settings: Settings
) -> dict[int, list[dict[str, Any]]]:
    """The answers by batch of all processes that ever worked on a run; of a batch done again those without errors.

    Raises:
        ValueError: If a file is damaged, or holds a batch of another run.
    """
    by_batch: dict[int, list[dict[str, Any]]] = {}
    digests = [_digest(batch, settings) for batch in batches]
    for file in sorted(parts.glob("*.jsonl")):
        for part in read_journal(file, _Part):
            known = 0 <= part.batch < len(batches) and part.samples == digests[part.batch]
            if not known or len(part.answers) != len(batches[part.batch]):
                raise ValueError(f"{file} holds answers of another run or version; choose another --out, or delete it")
            if part.batch not in by_batch or _failed(by_batch[part.batch]):
                by_batch[part.batch] = msgspec.to_builtins(part.answers)
    return by_batch


def _digest(samples: Sequence[RegionSample], settings: Settings) -> str:
    """What a batch is of. The settings of the run are in its run.json; this tells files of parts apart."""
    content = [dataclasses.astuple(settings), [[sample.id, settings.question(sample)] for sample in samples]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _failed(answers: Sequence[dict[str, Any]]) -> int:
    return sum("error" in answer for answer in answers)
