"""Intervals against scipy-free theory: what the bootstrap must give is known for means."""

import numpy as np
import pytest

from eval.metrics.captions import score_captions
from eval.metrics.intervals import (
    difference_of_captions,
    interval_of_captions,
    interval_of_mean,
    paired_difference,
    resampled_totals,
)

GOOD = ["a red bus on the road", "two dogs play with a ball", "a man in a coat", "a cup of tea on a table"] * 8
POOR = ["a bus", "two cats play", "a man in the yellow coat", "the table"] * 8
REFERENCES = [
    ["a red bus on the wet road"],
    ["two dogs play with the ball"],
    ["the man in a coat"],
    ["a cup of tea"],
] * 8


@pytest.fixture(scope="module")
def items():
    return np.random.default_rng(1).normal(0.4, 0.2, 2000)


def test_the_interval_of_a_mean_is_the_normal_one(items):
    found = interval_of_mean(items, resamples=4000)
    half = 1.96 * items.std() / np.sqrt(len(items))
    assert (found.low, found.high) == pytest.approx((items.mean() - half, items.mean() + half), abs=0.05 * half)
    assert "over items, 4,000 resamples" in found.method


def test_pictures_are_drawn_whole(items):
    """Ten equal items a picture are worth one: the interval is wider by the root of ten."""
    repeated = np.repeat(items[:200], 10)
    groups = np.repeat(np.arange(200), 10).tolist()
    alone, clustered = interval_of_mean(repeated), interval_of_mean(repeated, groups)
    assert (clustered.high - clustered.low) / (alone.high - alone.low) == pytest.approx(np.sqrt(10), rel=0.15)
    assert "over images" in clustered.method


def test_the_seed_decides(items):
    assert interval_of_mean(items, seed=3) == interval_of_mean(items, seed=3) != interval_of_mean(items, seed=4)


def test_pairing_removes_what_both_share(items):
    noise = np.random.default_rng(2).normal(0.01, 0.01, len(items))
    found = paired_difference(items, items + noise)
    assert found.value == pytest.approx(noise.mean()) and 0.009 < found.low < found.high < 0.011
    assert found.p == pytest.approx(2 / 1001)  # no resample is on the other side: so many draws say no less
    assert paired_difference(items, items).p == 1


def test_other_items_are_refused(items):
    with pytest.raises(ValueError, match="2000 and 1999"):
        paired_difference(items, items[1:])


def test_totals_are_sums_of_drawn_items():
    columns = np.array([[1.0, 1], [10, 1], [100, 1]])
    totals = resampled_totals(columns, None, 500, 0)
    assert (totals[:, 1] == 3).all()
    assert set(np.unique(totals[:, 0])) <= {a + b + c for a in (1, 10, 100) for b in (1, 10, 100) for c in (1, 10, 100)}
    grouped = resampled_totals(columns, ["x", "y", "x"], 500, 0)
    assert set(map(tuple, grouped)) == {(202, 4), (111, 3), (20, 2)}


@pytest.fixture(scope="module")
def captions():
    return [score_captions(texts, REFERENCES) for texts in (GOOD, POOR)]


@pytest.mark.parametrize("name", ["bleu_1", "bleu_4", "meteor", "rouge_l", "cider"])
def test_the_difference_of_captions_is_paired_and_has_a_sign(captions, name):
    good, poor = captions
    interval, found = interval_of_captions(good, name), difference_of_captions(poor, good, name)
    assert interval.low < good.corpus[name] < interval.high
    assert found.value == pytest.approx(good.corpus[name] - poor.corpus[name])
    assert 0 < found.low < found.value < found.high and found.p < 0.01
    back = difference_of_captions(good, poor, name)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low)) and back.p == found.p
    same = difference_of_captions(good, good, name)
    assert (same.value, same.low, same.high) == (0, 0, 0) and same.p == 1


@pytest.mark.parametrize("name", ["bleu_4", "meteor"])
def test_captions_of_other_items_are_refused(captions, name):
    with pytest.raises(ValueError, match="32 and 31"):
        difference_of_captions(captions[0], score_captions(GOOD[1:], REFERENCES[1:], [name]), name)
