"""Model + samples -> predictions, through the code that `region-chat` answers with; over several processes, and
continuing where a killed run stopped.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed
from PIL import Image
from tqdm.auto import tqdm

from eval.controls import show
from eval.predictions import record_of, write_predictions
from mllm.answering import RegionChat
from mllm.data.samples import ImageSource, RegionSample


@dataclasses.dataclass(frozen=True)
class Settings:
    """How samples are put to a model.

    Attributes:
        region_input: One of `eval.controls.INPUTS`.
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


class Processes(NamedTuple):
    """This process among those that share a run."""

    rank: int = 0
    count: int = 1

    @classmethod
    def start(cls) -> Processes:
        """Join the processes that `torchrun` has started; alone without it."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count > 1 and not torch.distributed.is_initialized():
            # gloo, on a GPU too: nothing is exchanged but "I am here"; the slowest may take its time
            torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        return cls(int(os.environ.get("RANK", "0")), count)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()


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
        answers = _answers(chat, samples[start : start + batch_size], settings)
        predictions.extend(answer["prediction"] for answer in answers)
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
    they were killed, the same batches are computed, and the merged file is the same. What is done stands in
    `folder`/parts, a batch a line; a batch with an unanswered sample is done again by the next run.

    Raises:
        ValueError: If the model cannot be asked in this way at all.
    """
    parts = folder / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    if settings.region_input == "blind":
        chat.answers([(None, None, settings.question(samples[0]))], max_new_tokens=1)  # refused before the long run
    _cut_torn_line(own := parts / f"{processes.rank}.jsonl")
    processes.wait()
    starts = range(0, len(samples), settings.batch_size)
    done = {batch for batch, answers in _read_parts(parts).items() if not _failed(answers)}
    processes.wait()  # nobody writes before all have read

    def size(batch: int) -> int:
        return min(settings.batch_size, len(samples) - starts[batch])

    left = [batch for batch in range(len(starts)) if batch not in done]
    with (
        open(own, "a", encoding="utf-8", newline="\n") as part,
        tqdm(
            total=len(samples),
            initial=sum(map(size, done)),
            desc=settings.region_input,
            unit="sample",
            disable=processes.rank > 0,
        ) as progress,
    ):
        for position in range(0, len(left) - processes.rank, processes.count):
            batch = left[position + processes.rank]
            chosen = samples[starts[batch] : starts[batch] + settings.batch_size]
            part.write(json.dumps({"batch": batch, "answers": _answer_each(chat, chosen, settings)}) + "\n")
            part.flush()
            os.fsync(part.fileno())
            # the other processes are about as far
            progress.update(sum(size(other) for other in left[position : position + processes.count]))
    processes.wait()
    failed = 0
    if processes.rank == 0:
        failed = _merge(chat, samples, folder, settings, data)
    processes.wait()
    return failed


def _merge(chat: RegionChat, samples: Sequence[RegionSample], folder: Path, settings: Settings, data: Path) -> int:
    """Write the predictions of all processes in the order of the samples; returns how many are missing."""
    by_batch = _read_parts(folder / "parts")
    answers = [answer for batch in sorted(by_batch) for answer in by_batch[batch]]
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
    return _failed(answers)


def _answer_each(chat: RegionChat, samples: Sequence[RegionSample], settings: Settings) -> list[dict[str, Any]]:
    """The answers of a batch; a sample that cannot be answered gets its error instead, and the others are answered."""
    try:
        return _answers(chat, samples, settings)
    except ValueError as error:
        if len(samples) == 1:
            return [{"error": str(error)}]
        return [answer for sample in samples for answer in _answer_each(chat, [sample], settings)]


def _answers(chat: RegionChat, samples: Sequence[RegionSample], settings: Settings) -> list[dict[str, Any]]:
    pictures: dict[ImageSource, Image.Image] = {}  # one decoding for all regions of a picture in a batch
    requests = []
    for sample in samples:
        if settings.region_input != "blind" and sample.image not in pictures:
            pictures[sample.image] = sample.open_image()
        image, region = show(sample, settings.region_input, pictures.get(sample.image))
        requests.append((image, region, settings.question(sample)))
    answers = chat.answers(requests, max_new_tokens=settings.max_new_tokens)
    return [{"prediction": answer.text, **({"cut": True} if answer.cut else {})} for answer in answers]


def _cut_torn_line(part: Path) -> None:
    """Take off what a killed process left of a line, so that the next one begins on its own."""
    if part.exists():
        content = part.read_bytes()
        os.truncate(part, content.rfind(b"\n") + 1)


def _read_parts(parts: Path) -> dict[int, list[dict[str, Any]]]:
    """The answers by batch of all processes that ever worked on a run; of a batch done again those without errors."""
    by_batch: dict[int, list[dict[str, Any]]] = {}
    for part in sorted(parts.glob("*.jsonl")):
        with open(part, encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line) if line.endswith("\n") else {"batch": -1}  # torn by a kill
                batch = row["batch"]
                if batch >= 0 and (batch not in by_batch or _failed(by_batch[batch])):
                    by_batch[batch] = row["answers"]
    return by_batch


def _failed(answers: Sequence[dict[str, Any]]) -> int:
    return sum("error" in answer for answer in answers)
