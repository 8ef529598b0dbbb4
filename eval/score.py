"""Records of predictions -> the numbers of metrics.json: with intervals, by kind of region, and what to know."""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from alpha_clip_commands.task_names import check_metric_names
from eval.metrics import captions, java, questions, similarity
from eval.metrics.exactly_right import exactly_right_each
from eval.metrics.intervals import (
    RESAMPLES,
    Difference,
    Interval,
    difference_of_captions,
    interval_of_captions,
    interval_of_mean,
    paired_difference,
    value_of_part,
)

LETTERS = "exactly right"  # letter for letter: for the drawn world, whose answers are canonical
CIDER_OF_PART = "CIDEr (df of all items)"
RIGHT_OR_WRONG = (LETTERS, "exact match")  # metrics by which an answer is one or the other
METRICS = (LETTERS, *captions.METRICS, *questions.METRICS, *similarity.METRICS)
# Upper ends of the buckets of a region's share of its picture. Absolute sizes, as COCO's, would depend on the pictures.
_AREAS = ((0.01, "under 1 % of the picture"), (0.1, "1 to 10 %"), (float("inf"), "over 10 %"))
_MANY = 3  # neighbours of the same class; more are counted with them
_LONG = 100  # words; no caption of a region is as long


def score(
    records: Sequence[Mapping[str, Any]],
    metrics: Sequence[str],
    *,
    with_intervals: bool = True,
    seed: int = 0,
    measured: Measured | None = None,
    sentence_model: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Score predictions that are all there.

    Args:
        records: As `eval.predictions.read_predictions` gives them.
        metrics: Out of `METRICS`.
        with_intervals: Whether 95 % intervals are bootstrapped: over pictures where `meta` names them, as the regions
            of one picture are not independent.
        seed: Of the bootstrap.
        measured: What `measure` gave for these, if it is there already.
        sentence_model: As `measure`.

    Returns:
        "items", "metrics" by name ({"value", "low", "high", "interval"}), "by" (values by kind of region or question,
        see `Measured.part`), "length" (mean words), "counts" and "notes". Values are as the reference scorers give
        them: METEOR .195, CIDEr .600.

    Raises:
        ValueError: If there is no record, a metric is unknown, or it needs Java where there is none.
    """
    found = measure(records, metrics, sentence_model) if measured is None else measured
    groups = picture_of_each(records)
    result: dict[str, Any] = {"items": len(records), "metrics": {}, "by": _by_kind(records, metrics, found)}
    for name in metrics:
        entry: dict[str, Any] = {"value": found.values[name], "low": None, "high": None, "interval": None}
        if with_intervals:
            interval = found.interval(name, groups, seed)
            entry.update(low=interval.low, high=interval.high, interval=interval.how)
        result["metrics"][name] = entry
    words = [len(record["prediction"].split()) for record in records]
    counts = {
        "empty predictions": words.count(0),
        "predictions cut at the token limit": sum(bool(record.get("cut")) for record in records),
        f"predictions of over {_LONG} words": sum(length > _LONG for length in words),
    }
    result["length"] = {
        "words a prediction": statistics.fmean(words),
        "words a reference": statistics.fmean(len(text.split()) for r in records for text in r["references"]),
    }
    result["counts"] = counts
    result["notes"] = [*found.notes, *(f"{count:,} {what}" for what, count in counts.items() if count)]
    return result


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the metrics say of some records.

    Attributes:
        values: Of all of them, by metric.
        items: Of each (N,), by metric. The values of BLEU and METEOR are not the means of these.
        captions: What the bootstrap of the caption metrics needs; None without such a metric.
    """

    values: dict[str, float]
    items: dict[str, np.ndarray]
    captions: captions.CaptionScores | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of the values."""
        return self.captions.notes if self.captions else ()

    @property
    def verdict(self) -> str | None:
        """The metric that calls an answer right or wrong, the first of those measured; None without one."""
        return next((name for name in self.values if name in RIGHT_OR_WRONG), None)

    def right(self, records: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
        """Whether each of the records measured is right, by id; empty where no metric says so."""
        if self.verdict is None:
            return {}
        return {record["id"]: bool(score) for record, score in zip(records, self.items[self.verdict], strict=True)}

    def interval(self, name: str, groups: Sequence | None, seed: int) -> Interval:
        """The 95 % interval of a metric, over groups of items where there are any."""
        if self.captions and name in self.captions.corpus:
            return interval_of_captions(self.captions, name, groups, seed=seed)
        return interval_of_mean(self.items[name], groups, seed=seed)

    def part(self, name: str, rows: Sequence[int]) -> tuple[str, float]:
        """The value of a metric for some of the items, and what it is called: that of the items as a corpus of their
        own, as the whole has it. Only CIDEr keeps the document frequencies of the whole, and says so.
        """
        if self.captions and name in self.captions.corpus:
            return (CIDER_OF_PART if name == "CIDEr" else name), value_of_part(self.captions, name, rows)
        return name, float(self.items[name][rows].mean())

    def difference(
        self, other: Measured, name: str, groups: Sequence | None, resamples: int = RESAMPLES, seed: int = 0
    ) -> Difference:
        """`other` minus this, of the same items in the same order."""
        if self.captions and name in self.captions.corpus:
            return difference_of_captions(self.captions, other.captions, name, groups, resamples, seed)
        return paired_difference(self.items[name], other.items[name], groups, resamples, seed)


def measure(
    records: Sequence[Mapping[str, Any]], metrics: Sequence[str], sentence_model: str | os.PathLike | None = None
) -> Measured:
    """The values of metrics; `sentence_model` is the directory that semantic similarity needs.

    Raises:
        ValueError: As `score`.
    """
    if not records:
        raise ValueError("there is nothing to score: no predictions")
    check_metrics(metrics, sentence_model)
    predictions = [record["prediction"] for record in records]
    references = [record["references"] for record in records]
    items: dict[str, np.ndarray] = {}
    if LETTERS in metrics:
        items[LETTERS] = exactly_right_each(predictions, references)
    if set(metrics) & set(questions.METRICS[:3]):
        items |= questions.score_answers(predictions, references)
    if "VQA accuracy" in metrics:
        pairs = zip(predictions, references, strict=True)
        items["VQA accuracy"] = np.array([questions.vqa_accuracy(prediction, answers) for prediction, answers in pairs])
    if similarity.S_IOU in metrics:
        items[similarity.S_IOU] = similarity.semantic_iou(predictions, references)
    if similarity.SEMANTIC in metrics:
        items[similarity.SEMANTIC] = similarity.semantic_similarity(predictions, references, sentence_model)
    values = {name: float(scores.mean()) for name, scores in items.items()}
    wanted = [name for name in metrics if name in captions.METRICS]
    if not wanted:
        return Measured(values, items)
    found = captions.score_captions(predictions, references, wanted)
    return Measured(values | found.corpus, items | found.items, found)


def check_metrics(metrics: Sequence[str], sentence_model: str | os.PathLike | None = None) -> None:
    """Raise ValueError if a metric is unknown, or needs what is not there: before an hour of answers."""
    check_metric_names(metrics, sentence_model)
    if set(metrics) & set(captions.METRICS):
        java.java()


def picture_of_each(records: Sequence[Mapping[str, Any]]) -> list | None:
    """The picture of each record, over which intervals are drawn; None where a record does not name it."""
    pictures = [record["meta"].get("image_id") for record in records]
    return None if None in pictures else pictures


def _by_kind(
    records: Sequence[Mapping[str, Any]], metrics: Sequence[str], found: Measured
) -> dict[str, dict[str, dict[str, float]]]:
    """Values by what is known of the regions or questions."""
    result = {}
    for kind, bucket_of in _KINDS.items():
        members: dict[str, list[int]] = defaultdict(list)
        for index, record in enumerate(records):
            if (bucket := bucket_of(record)) is not None:
                members[bucket].append(index)
        if len(members) > 1:
            result[kind] = {
                bucket: {"items": len(rows), **dict(found.part(name, rows) for name in metrics)}
                for bucket, rows in sorted(members.items(), key=lambda pair: _ORDER.get(pair[0], len(_ORDER)))
            }
    return result


def _area(record: Mapping[str, Any]) -> str | None:
    area = record["meta"].get("area")
    return None if area is None else next(name for end, name in _AREAS if area < end)


def _same_class(record: Mapping[str, Any]) -> str | None:
    count = record["meta"].get("same_class")
    return None if count is None else f"{count}" if count < _MANY else f"{_MANY} or more"


def _question_word(record: Mapping[str, Any]) -> str | None:
    return questions.question_word(record["question"]) if record.get("question") else None


_KINDS: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    "area": _area,
    "same class": _same_class,
    "question word": _question_word,
    "type": lambda record: record["meta"].get("type"),
}
_ORDER = {name: position for position, (_, name) in enumerate(_AREAS)}
