"""95 % intervals by bootstrap: of one system's scores, and of the difference of two systems on the same samples."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from eval.metrics.captions import BLEU, CaptionScores, bleu_of_counts
from eval.metrics.java import meteor_of_statistics

RESAMPLES = 1000
_LEVEL = 95.0  # per cent
_AT_ONCE = 8_000_000  # random numbers drawn at once: 64 MB


class Interval(NamedTuple):
    """The ends of a 95 % interval, and how it was made."""

    low: float
    high: float
    how: str


class Difference(NamedTuple):
    """The mean of b - a, its 95 % interval, and the two-sided p of no difference."""

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
        groups: The picture of each item: pictures are drawn instead of items, as the regions of one picture are not
            independent.
        resamples: How often is drawn.
        seed: Same seed, same interval.
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
    """The interval of a caption metric: BLEU is computed anew from the drawn counts; CIDEr with the document
    frequencies of all items; METEOR, whose corpus value is no mean of items, by itself from its drawn statistics.

    Args: as `interval_of_mean`.
    """
    if name in _OF_TOTALS:
        columns, of_totals = _OF_TOTALS[name]
        totals = resampled_totals(columns(scores), groups, resamples, seed)
        return _interval(of_totals(totals), _unit(groups), resamples)
    found = interval_of_mean(scores.items[name], groups, resamples, seed)
    return found._replace(how=found.how + (", document frequencies fixed" if name == "CIDEr" else ""))


def value_of_part(scores: CaptionScores, name: str, rows: Sequence[int]) -> float:
    """The value of a caption metric for some of the items (indices), as of a corpus of these alone; of CIDEr with the
    document frequencies of all.
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
        ValueError: If there are not as many of both.
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
    """The difference b - a of a caption metric: of BLEU and METEOR between the values of each drawn corpus, as these
    are no means of items.

    Raises:
        ValueError: As `paired_difference`.
    """
    value_of = _OF_TOTALS.get(name)
    if value_of is None:
        return paired_difference(a.items[name], b.items[name], groups, resamples, seed)
    columns, of_totals = value_of
    if len(columns(a)) != len(columns(b)):
        raise ValueError(f"expected scores of the same items, got {len(columns(a))} and {len(columns(b))}")
    # side by side, so that both are made of the same drawn items
    totals = resampled_totals(np.concatenate([columns(a), columns(b)], 1), groups, resamples, seed)
    half = totals.shape[1] // 2
    return _difference(b.corpus[name] - a.corpus[name], of_totals(totals[:, half:]) - of_totals(totals[:, :half]))


def resampled_totals(columns: np.ndarray, groups: Sequence[Hashable] | None, resamples: int, seed: int) -> np.ndarray:
    """The sums (R, K) of the columns (N, K) over items, or groups of items, drawn with replacement R times."""
    if groups is not None:
        _, index = np.unique(np.asarray(list(map(str, groups))), return_inverse=True)
        summed = np.zeros((index.max() + 1, columns.shape[1]))
        np.add.at(summed, index, columns)
        columns = summed
    return np.concatenate([weights @ columns for weights in _weights(len(columns), resamples, seed)])


def _weights(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of `count` units is drawn, (some of the resamples, count)."""
    rng = np.random.default_rng(seed)
    at_once = max(1, _AT_ONCE // count)
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = rng.integers(count, size=(rows, count))
        yield np.stack([np.bincount(row, minlength=count) for row in drawn]).astype(np.float64)


def _interval(drawn: np.ndarray, unit: str, resamples: int) -> Interval:
    return Interval(*_ends(drawn), f"95 % percentile bootstrap over {unit}, {resamples:,} resamples")


def _difference(value: float, drawn: np.ndarray) -> Difference:
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    # so many draws cannot show less than one in so many
    return Difference(value, *_ends(drawn), float(min(1.0, 2 * (tail + 1) / (len(drawn) + 1))))


def _ends(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(drawn, [(100 - _LEVEL) / 2, (100 + _LEVEL) / 2])
    return float(low), float(high)


def _unit(groups: Sequence[Hashable] | None) -> str:
    return "items" if groups is None else "pictures"


def _bleu(order: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda totals: bleu_of_counts(totals)[:, order]


# metric that is no mean of items -> what of the items is added up, and the value (R,) of the sums (R, K)
_OF_TOTALS: dict[str, tuple[Callable, Callable]] = {
    **{name: (lambda scores: scores.bleu_counts, _bleu(order)) for order, name in enumerate(BLEU)},
    "METEOR": (lambda scores: scores.meteor_statistics, meteor_of_statistics),
}
