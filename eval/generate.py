"""Model and samples -> predictions, with the inference code of `region-chat`, on one or more processes.

An interrupted run can be resumed.
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

import msgspec
import torch.distributed
from PIL import Image
from tqdm.auto import tqdm

from alpha_clip_commands.command_line import one_line
from eval.predictions import PREDICTIONS_FILE, prediction_of, write_predictions
from eval.results import FORMER_VIEWS
from eval.views import apply_view
from mllm.data.samples import ImageSource, RegionSample
from mllm.inference import ChatRequest, RegionChat
from mllm.journal import journal, read_journal
from mllm.lost_process import lost_process


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """How a model is asked about samples.

    Attributes:
        view: One of `eval.views.VIEWS`.
        prompt: The prompt, in which "{question}" is replaced with the sample's question. None: the question itself, or
            the model's default prompt for a description.
        batch_size: Samples per batch.
        max_new_tokens: Maximum length of an answer, in tokens.
    """

    view: str = "box"
    prompt: str | None = None
    batch_size: int = 32
    max_new_tokens: int = 64

    def question(self, sample: RegionSample) -> str | None:
        """The question about a sample; None asks for a description with the model's default prompt."""
        return sample.question if self.prompt is None else self.prompt.replace("{question}", sample.question or "")


@dataclasses.dataclass(frozen=True)
class Processes:
    """The rank of this process and the number of processes of the run."""

    rank: int = 0
    count: int = 1

    @classmethod
    def start(cls) -> Processes:
        """Join the processes started by `torchrun`; a single process without it."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count > 1 and not torch.distributed.is_initialized():
            # gloo also on GPUs: only status messages are exchanged; a long timeout, as processes may differ in speed
            with _lost_processes_as_os_errors():
                torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        return cls(int(os.environ.get("RANK", "0")), count)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Synchronize all processes at the end of this block. If one of them fails, all fail.

        Raises:
            ValueError: If another process failed.
            OSError: If another process was killed.
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
    """Answer the samples with greedy decoding, in order.

    Args:
        chat: The model.
        samples: Each with one region; without a question, a description is requested.
        batch_size: Samples per `generate` call.
        max_new_tokens: Maximum length of an answer, in tokens.
        label: Of the progress bar.

    Raises:
        ValueError: If an image cannot be read or a region does not fit it.
    """
    settings = GenerationSettings("box", None, batch_size, max_new_tokens)
    predictions: list[str] = []
    for start in tqdm(range(0, len(samples), batch_size), desc=label, unit="batch"):
        for answer in _answers(chat, samples[start : start + batch_size], settings):
            if answer.prediction is None:
                raise ValueError(answer.error)
            predictions.append(answer.prediction)
    return predictions


def run(
    chat: RegionChat,
    samples: Sequence[RegionSample],
    folder: Path,
    settings: GenerationSettings,
    *,
    data: Path,
    processes: Processes = Processes(),  # noqa: B008, immutable
) -> int:
    """Answer the samples and write `folder`/predictions.jsonl; returns the number of samples without an answer.

    Batches are formed over all samples and distributed unchanged, so that the merged file does not depend on the number
    of processes and interruptions. Answered batches are stored in `folder`/parts, one per line. A batch in which a
    sample has no answer is answered again by the next run.

    Raises:
        ValueError: If the model does not support the view, or a file in parts is damaged or from another run.
        OSError: If a file cannot be written.
    """
    batches = [samples[start : start + settings.batch_size] for start in range(0, len(samples), settings.batch_size)]
    parts = folder / "parts"
    own = parts / f"{processes.rank}.jsonl"
    with processes.together():  # all processes read before one of them writes
        parts.mkdir(parents=True, exist_ok=True)
        if settings.view == "no_image":  # fails now if it is not supported
            chat.answers([(None, None, settings.question(samples[0]))], max_new_tokens=1)
        done = {batch for batch, answers in _read_parts(parts, batches, settings).items() if not _failed(answers)}
    left = [batch for batch in range(len(batches)) if batch not in done]
    with (
        processes.together(),
        journal(own) as append,
        tqdm(
            total=len(samples),
            initial=sum(len(batches[batch]) for batch in done),
            desc=settings.view,
            unit="sample",
            disable=processes.rank > 0,
        ) as progress,
    ):
        for position in range(0, len(left) - processes.rank, processes.count):
            batch = left[position + processes.rank]
            answers = _answers(chat, batches[batch], settings)
            append(
                {"batch": batch, "samples": _digest(batches[batch], settings), "answers": msgspec.to_builtins(answers)}
            )
            # assumes that the other processes progress at the same speed
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
    answers: Sequence[_Answer],
    folder: Path,
    settings: GenerationSettings,
    data: Path,
) -> None:
    """Write predictions.jsonl in the order of the samples."""
    prompts: dict[str | None, str] = {}

    def prompt(sample: RegionSample) -> str:
        question = settings.question(sample)
        if question not in prompts:
            prompts[question] = chat.prompt(question, with_image=settings.view != "no_image")
        return prompts[question]

    predictions = (
        prediction_of(
            sample, prompt(sample), data, text=answer.prediction, truncated=answer.truncated, error=answer.error
        )
        for sample, answer in zip(samples, answers, strict=True)
    )
    write_predictions(folder / PREDICTIONS_FILE, predictions)


def _answers(chat: RegionChat, samples: Sequence[RegionSample], settings: GenerationSettings) -> list[_Answer]:
    """The answers of a batch, with an error for each sample that cannot be answered."""
    images: dict[ImageSource, Image.Image] = {}  # each image of a batch is decoded once
    asked: list[ChatRequest | ValueError] = []
    for sample in samples:
        try:
            if settings.view != "no_image" and sample.image not in images:
                images[sample.image] = sample.open_image()
            image, region = apply_view(sample, settings.view, images.get(sample.image))
            asked.append((image, region, settings.question(sample)))
        except (ValueError, OSError) as error:
            asked.append(ValueError(one_line(error)))
    return [
        _Answer(error=one_line(answer))
        if isinstance(answer, ValueError)
        else _Answer(prediction=answer.text, truncated=answer.truncated)
        for answer in chat.answer_each(asked, max_new_tokens=settings.max_new_tokens)
    ]


class _Answer(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """The answer to a sample, or why there is none."""

    prediction: str | None = None
    truncated: bool = False
    error: str | None = None
    cut: bool = False  # `truncated` in version 0.1.0

    def __post_init__(self) -> None:
        self.truncated, self.cut = self.truncated or self.cut, False
        if (self.prediction is None) == (self.error is None):
            raise ValueError("expected a prediction or an error")


class _Part(msgspec.Struct, forbid_unknown_fields=True):
    """A line of a file in parts: a batch with the hash of its samples and settings (`_digest`)."""

    batch: int
    samples: str
    answers: list[_Answer]


def _read_parts(
    parts: Path, batches: Sequence[Sequence[RegionSample]], settings: GenerationSettings
) -> dict[int, list[_Answer]]:
    """The answers of all processes and earlier runs, by batch; of a batch answered again, those without errors.

    Raises:
        ValueError: If a file is damaged or has a batch of another run.
    """
    by_batch: dict[int, list[_Answer]] = {}
    former = [dataclasses.replace(settings, view=old) for old, view in FORMER_VIEWS.items() if view == settings.view]
    digests = [{_digest(batch, kind) for kind in (settings, *former)} for batch in batches]
    for file in sorted(parts.glob("*.jsonl")):
        for part in read_journal(file, _Part):
            known = 0 <= part.batch < len(batches) and part.samples in digests[part.batch]
            if not known or len(part.answers) != len(batches[part.batch]):
                raise ValueError(f"{file} has answers of another run or version; choose another --out, or delete it")
            if part.batch not in by_batch or _failed(by_batch[part.batch]):
                by_batch[part.batch] = part.answers
    return by_batch


def _digest(samples: Sequence[RegionSample], settings: GenerationSettings) -> str:
    """A hash of a batch and its settings, because run.json does not identify the parts of each view."""
    content = [dataclasses.astuple(settings), [[sample.id, settings.question(sample)] for sample in samples]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _failed(answers: Sequence[_Answer]) -> int:
    return sum(answer.error is not None for answer in answers)
