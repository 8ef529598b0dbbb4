"""95% bootstrap intervals of the scores of a system, and of the difference of two systems on the same samples."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from eval.metrics.captions import BLEU, CaptionScores, bleu_of_counts
from eval.metrics.java import meteor_of_statistics

RESAMPLES = 1000
_LEVEL = 95.0  # percent
_CHUNK = 8_000_000  # random numbers per call: 64 MB


class Interval(NamedTuple):
    """The ends of a 95% interval, and a description of how it was computed."""

    low: float
    high: float
    method: str


class Difference(msgspec.Struct, frozen=True):
    """The mean of b - a, its 95% interval, and the two-sided p-value of no difference."""

    value: float
    low: float
    high: float
    p: float


def interval_of_mean(
    items: np.ndarray, groups: Sequence[Hashable] | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The interval of the mean of item scores (N,).

    Args:
        items: A score for each item.
        groups: The image of each item. If given, images are resampled instead of items, because the regions of one
            image are not independent.
        resamples: Number of resamples.
        seed: Of the resampling.
    """
    columns = np.stack([items, np.ones(len(items))], 1)
    totals = resampled_totals(columns, groups, resamples, seed)
    return _interval(totals[:, 0] / totals[:, 1], _unit(groups), resamples)


def interval_of_captions(
    scores: CaptionScores,
    name: str,
    groups: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The interval of a caption metric.

    BLEU and METEOR of a corpus are not means of items: they are recomputed for each resample from the counts and
    statistics of its items. CIDEr keeps the document frequencies of all items.

    Args:
        scores: Of all items.
        name: The metric.
        groups: As in `interval_of_mean`.
        resamples: Number of resamples.
        seed: Of the resampling.
    """
    if name in _OF_TOTALS:
        columns, of_totals = _OF_TOTALS[name]
        totals = resampled_totals(columns(scores), groups, resamples, seed)
        return _interval(of_totals(totals), _unit(groups), resamples)
    found = interval_of_mean(scores.items[name], groups, resamples, seed)
    return found._replace(method=found.method + (", document frequencies fixed" if name == "cider" else ""))


def value_of_part(scores: CaptionScores, name: str, rows: Sequence[int]) -> float:
    """The value of a caption metric for a subset of the items (indices), scored as a separate corpus.

    CIDEr is the exception: it keeps the document frequencies of all items.
    """
    if name not in _OF_TOTALS:
        return float(scores.items[name][rows].mean())
    columns, of_totals = _OF_TOTALS[name]
    return float(of_totals(columns(scores)[rows].sum(0, keepdims=True))[0])


def paired_difference(
    a_items: np.ndarray,
    b_items: np.ndarray,
    groups: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """The mean difference b - a of two systems' scores (N,) of the same items in the same order.

    Raises:
        ValueError: If the numbers of scores differ or are 0.
    """
    if len(a_items) != len(b_items) or not len(a_items):
        raise ValueError(f"expected scores of the same items, got {len(a_items)} and {len(b_items)}")
    difference = np.asarray(b_items, float) - np.asarray(a_items, float)
    totals = resampled_totals(np.stack([difference, np.ones(len(difference))], 1), groups, resamples, seed)
    return _difference(float(difference.mean()), totals[:, 0] / totals[:, 1])


def difference_of_captions(
    a: CaptionScores,
    b: CaptionScores,
    name: str,
    groups: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """The difference b - a of a caption metric; BLEU and METEOR are recomputed for each resample.

    Raises:
        ValueError: As in `paired_difference`.
    """
    if name not in _OF_TOTALS:
        return paired_difference(a.items[name], b.items[name], groups, resamples, seed)
    columns, of_totals = _OF_TOTALS[name]
    if len(columns(a)) != len(columns(b)):
        raise ValueError(f"expected scores of the same items, got {len(columns(a))} and {len(columns(b))}")
    # concatenated, so that both use the same resamples
    totals = resampled_totals(np.concatenate([columns(a), columns(b)], 1), groups, resamples, seed)
    half = totals.shape[1] // 2
    return _difference(b.corpus[name] - a.corpus[name], of_totals(totals[:, half:]) - of_totals(totals[:, :half]))


def resampled_totals(columns: np.ndarray, groups: Sequence[Hashable] | None, resamples: int, seed: int) -> np.ndarray:
    """The sums (R, K) of the columns (N, K) over R resamples of the items, or of groups of items."""
    if groups is not None:
        _, index = np.unique(np.asarray(list(map(str, groups))), return_inverse=True)
        summed = np.zeros((index.max() + 1, columns.shape[1]))
        np.add.at(summed, index, columns)
        columns = summed
    return np.concatenate([weights @ columns for weights in _weights(len(columns), resamples, seed)])


def _weights(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of `count` units occurs in each resample, in chunks of (resamples of the chunk, count)."""
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // count)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = rng.integers(count, size=(rows, count))
        yield np.stack([np.bincount(row, minlength=count) for row in drawn]).astype(np.float64)


def _interval(resampled: np.ndarray, unit: str, resamples: int) -> Interval:
    return Interval(*_ends(resampled), f"95% percentile bootstrap over {unit}, {resamples:,} resamples")


def _difference(value: float, resampled: np.ndarray) -> Difference:
    tail = min((resampled <= 0).sum(), (resampled >= 0).sum())
    # R resamples cannot show a p-value below 2 / (R + 1)
    return Difference(value, *_ends(resampled), float(min(1.0, 2 * (tail + 1) / (len(resampled) + 1))))


def _ends(resampled: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(resampled, [(100 - _LEVEL) / 2, (100 + _LEVEL) / 2])
    return float(low), float(high)


def _unit(groups: Sequence[Hashable] | None) -> str:
    return "items" if groups is None else "images"


def _bleu(order: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda totals: bleu_of_counts(totals)[:, order]


# metric that is not a mean of items -> the columns (N, K) that are summed, and the values (R,) of the sums (R, K)
_OF_TOTALS: dict[str, tuple[Callable, Callable]] = {
    **{name: (lambda scores: scores.bleu_counts, _bleu(order)) for order, name in enumerate(BLEU)},
    "meteor": (lambda scores: scores.meteor_statistics, meteor_of_statistics),
}
