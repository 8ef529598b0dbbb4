"""Published results with their sources and protocols, and which of them are comparable with a task."""

from __future__ import annotations

import functools
from importlib.resources import files

import msgspec
import yaml

from mllm.data.schemas import validate

# Dataset of `published.yaml` -> how the names of its tasks begin
_DATASETS = {"RefCOCOg": "refcocog-", "Visual Genome": "vg-test/"}
# Protocol -> what it scores, for the reason why its results are not comparable with another task
_SCORED = {
    "refcocog-umd-val/ungrouped": "4,896 expressions, each an item with one reference",
    "refcocog-umd-val/grouped": "2,573 regions, all expressions as references: METEOR is about 1.5 times as high",
    "refcocog-google-val/grouped": "5,000 regions of another split, with all their expressions as references",
    "vg-test/subset5k": "5,000 regions that score 15 to 20 CIDEr more than all of them",
    "vg-test/full": "all 232,935 regions",
}


class PublishedResult(msgspec.Struct, frozen=True, kw_only=True):
    """A published result.

    Attributes:
        system: Name of the system.
        source: Where the values are printed.
        protocol: A task of `region-eval`, or "unknown".
        trained: "zero-shot" or "fine-tuned" on this dataset; None if not stated.
        meteor: Times 100, as papers print it; None if not stated.
        cider: The same.
        verified: Whether the values were seen in the source itself, not on a secondary page.
        note: What a reader has to know.
        excluded: Why the result is not comparable although its protocol is known.
    """

    system: str
    source: str
    protocol: str
    trained: str | None = None
    meteor: float | None = None
    cider: float | None = None
    verified: bool = True
    note: str | None = None
    excluded: str | None = None


def comparable(task: str) -> list[PublishedResult]:
    """The results that were obtained with the protocol `task`, lowest CIDEr first."""
    return [row for row in _of_dataset(task) if _reason(row, task) is None]


def not_comparable(task: str) -> list[tuple[PublishedResult, str]]:
    """The results on the dataset of `task` that are not comparable with it, each with the reason."""
    reasons = ((row, _reason(row, task)) for row in _of_dataset(task))
    return [(row, reason) for row, reason in reasons if reason is not None]


def _of_dataset(task: str) -> list[PublishedResult]:
    found = [row for name, start in _DATASETS.items() if task.startswith(start) for row in read_published()[name]]
    return sorted(found, key=lambda row: row.cider or 0)


def _reason(row: PublishedResult, task: str) -> str | None:
    """Why a result is not comparable with `task`; None if it is."""
    if not row.verified:
        return "seen on a secondary page only"
    if row.protocol == "unknown":
        return "the scored items and references are not stated"
    if row.protocol != task:
        return f"{row.protocol}: {_SCORED[row.protocol]}"
    return row.excluded


@functools.cache
def read_published() -> dict[str, list[PublishedResult]]:
    """All results of `published.yaml` by dataset."""
    content = yaml.safe_load((files("eval") / "published.yaml").read_text("utf-8"))
    return validate(content, dict[str, list[PublishedResult]])
