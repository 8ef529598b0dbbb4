"""Predictions -> metric values, with intervals and a breakdown by properties of the samples."""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from alpha_clip_commands.task_names import check_metric_names
from eval.metrics import captions, java, questions, similarity
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
from eval.metrics.literal_match import literal_matches
from eval.predictions import Prediction
from eval.results import DOCUMENT_FREQUENCIES_OF_ALL, MetricValue, Scores

CORRECTNESS_METRICS = ("literal_match", "exact_match")  # those that are 1 for a correct and 0 for an incorrect answer
# Upper limits of the region's share of the image. Absolute sizes, as COCO has them, would depend on the images.
_AREAS = ((0.01, "under 1%"), (0.1, "1% to 10%"), (float("inf"), "over 10%"))
_MANY = 3  # other objects of the same class; larger numbers are counted together
_LONG = 100  # words; no caption of a region is as long
_COUNT_LABELS = {
    "empty_predictions": "empty predictions",
    "truncated_predictions": "predictions truncated at the token limit",
    "long_predictions": f"predictions longer than {_LONG} words",
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """The values of metrics for a list of predictions.

    Attributes:
        values: For all predictions, by metric.
        items: Of each prediction (N,), by metric. BLEU and METEOR in `values` are not the means of these.
        captions: What the bootstrap of the caption metrics needs; None without such a metric.
    """

    values: dict[str, float]
    items: dict[str, np.ndarray]
    captions: captions.CaptionScores | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader has to know to interpret the values."""
        return self.captions.notes if self.captions else ()

    @property
    def correctness_metric(self) -> str | None:
        """The first of the measured metrics that decides whether an answer is correct, or None."""
        return next((name for name in self.values if name in CORRECTNESS_METRICS), None)

    def correct(self, predictions: Sequence[Prediction]) -> dict[str, bool]:
        """Whether each of the measured predictions is correct, by id; empty if no metric decides that."""
        if self.correctness_metric is None:
            return {}
        scores = self.items[self.correctness_metric]
        return {prediction.id: bool(score) for prediction, score in zip(predictions, scores, strict=True)}

    def interval(self, name: str, groups: Sequence | None, seed: int) -> Interval:
        """The 95% interval of a metric, over groups of items if given."""
        if self.captions and name in self.captions.corpus:
            return interval_of_captions(self.captions, name, groups, seed=seed)
        return interval_of_mean(self.items[name], groups, seed=seed)

    def part(self, name: str, rows: Sequence[int]) -> tuple[str, float]:
        """The id and value of a metric for some of the items, scored as a separate corpus.

        CIDEr is the exception: it keeps the document frequencies of all items, and has another id.
        """
        if self.captions and name in self.captions.corpus:
            part_name = DOCUMENT_FREQUENCIES_OF_ALL if name == "cider" else name
            return part_name, value_of_part(self.captions, name, rows)
        return name, float(self.items[name][rows].mean())

    def difference(
        self, other: Measured, name: str, groups: Sequence | None, resamples: int = RESAMPLES, seed: int = 0
    ) -> Difference:
        """`other` minus this, for the same items in the same order."""
        if self.captions and name in self.captions.corpus:
            return difference_of_captions(self.captions, other.captions, name, groups, resamples, seed)
        return paired_difference(self.items[name], other.items[name], groups, resamples, seed)


def measure(
    predictions: Sequence[Prediction], metrics: Sequence[str], sentence_model: str | os.PathLike | None = None
) -> Measured:
    """Compute metrics.

    Args:
        predictions: Each with text.
        metrics: Ids from `alpha_clip_commands.task_names.METRICS`.
        sentence_model: Directory of the model for semantic similarity.

    Raises:
        ValueError: If there are no predictions, a metric is unknown, or what it requires is not found (Java).
    """
    if not predictions:
        raise ValueError("nothing to score: no predictions")
    check_metrics(metrics, sentence_model)
    texts = [prediction.text for prediction in predictions]
    references = [prediction.references for prediction in predictions]
    items: dict[str, np.ndarray] = {}
    if "literal_match" in metrics:
        items["literal_match"] = literal_matches(texts, references)
    if set(metrics) & set(questions.ANSWER_METRICS):
        items |= questions.score_answers(texts, references)
    if "vqa_accuracy" in metrics:
        pairs = zip(texts, references, strict=True)
        items["vqa_accuracy"] = np.array([questions.vqa_accuracy(text, answers) for text, answers in pairs])
    if similarity.S_IOU in metrics:
        items[similarity.S_IOU] = similarity.semantic_iou(texts, references)
    if similarity.SEMANTIC in metrics:
        items[similarity.SEMANTIC] = similarity.semantic_similarity(texts, references, sentence_model)
    values = {name: float(scores.mean()) for name, scores in items.items()}
    caption_metrics = [name for name in metrics if name in captions.METRICS]
    if not caption_metrics:
        return Measured(values, items)
    scored = captions.score_captions(texts, references, caption_metrics)
    return Measured(values | scored.corpus, items | scored.items, scored)


def score(
    predictions: Sequence[Prediction],
    measured: Measured,
    metrics: Sequence[str],
    *,
    with_intervals: bool = True,
    seed: int = 0,
) -> Scores:
    """Assemble the scores of predictions from measured metrics.

    Args:
        predictions: Those that were measured.
        measured: Their metrics, from `measure`.
        metrics: Which of them.
        with_intervals: Whether to compute 95% bootstrap intervals, over images if `meta` has an `image_id`, because the
            regions of one image are not independent.
        seed: Of the bootstrap.
    """
    words = [len(prediction.text.split()) for prediction in predictions]
    counts = {
        "empty_predictions": words.count(0),
        "truncated_predictions": sum(prediction.truncated for prediction in predictions),
        "long_predictions": sum(length > _LONG for length in words),
    }
    reference_words = (len(text.split()) for prediction in predictions for text in prediction.references)
    return Scores(
        items=len(predictions),
        metrics=metric_values(predictions, measured, metrics, with_intervals=with_intervals, seed=seed),
        by=_breakdown(predictions, metrics, measured),
        length={
            "words_per_prediction": statistics.fmean(words),
            "words_per_reference": statistics.fmean(reference_words),
        },
        counts=counts,
        notes=[*measured.notes, *(f"{count:,} {_COUNT_LABELS[name]}" for name, count in counts.items() if count)],
    )


def metric_values(
    predictions: Sequence[Prediction], measured: Measured, metrics: Sequence[str], *, with_intervals: bool, seed: int
) -> dict[str, MetricValue]:
    """The values of measured metrics, with their intervals; arguments as in `score`."""
    if not with_intervals:
        return {name: MetricValue(measured.values[name]) for name in metrics}
    groups = image_groups(predictions)
    intervals = {name: measured.interval(name, groups, seed) for name in metrics}
    return {name: MetricValue(measured.values[name], *interval) for name, interval in intervals.items()}


def check_metrics(metrics: Sequence[str], sentence_model: str | os.PathLike | None = None) -> None:
    """Raise ValueError if a metric is unknown or what it requires is not found, before answers are generated."""
    check_metric_names(metrics, sentence_model)
    if set(metrics) & set(captions.METRICS):
        java.java()


def image_groups(predictions: Sequence[Prediction]) -> list | None:
    """The image id of each prediction, for intervals over images; None if any has no id."""
    images = [prediction.meta.get("image_id") for prediction in predictions]
    return None if None in images else images


def _breakdown(
    predictions: Sequence[Prediction], metrics: Sequence[str], measured: Measured
) -> dict[str, dict[str, dict[str, int | float]]]:
    """Values by groups of samples, for each property that has more than one group."""
    result = {}
    for name, group_of in _PROPERTIES.items():
        members: dict[str, list[int]] = defaultdict(list)
        for index, prediction in enumerate(predictions):
            if (group := group_of(prediction)) is not None:
                members[group].append(index)
        if len(members) > 1:
            result[name] = {
                group: {"items": len(rows), **dict(measured.part(metric, rows) for metric in metrics)}
                for group, rows in sorted(members.items(), key=lambda pair: _ORDER.get(pair[0], len(_ORDER)))
            }
    return result


def _area(prediction: Prediction) -> str | None:
    area = prediction.meta.get("area")
    return None if area is None else next(name for end, name in _AREAS if area < end)


def _same_class(prediction: Prediction) -> str | None:
    count = prediction.meta.get("same_class")
    return None if count is None else f"{count}" if count < _MANY else f"{_MANY} or more"


def _question_word(prediction: Prediction) -> str | None:
    return questions.question_word(prediction.question) if prediction.question else None


_PROPERTIES: dict[str, Callable[[Prediction], str | None]] = {
    "area": _area,
    "same_class": _same_class,
    "question_word": _question_word,
    "type": lambda prediction: prediction.meta.get("type"),
}
_ORDER = {name: position for position, (_, name) in enumerate(_AREAS)}
