"""Exact match and the controls, on cases small enough to count by hand."""

import pytest

from eval.controls import best_blind_score, references_of_shown_region, with_whole_image, with_wrong_region
from eval.metrics.exact_match import exact_match
from mllm.data.samples import RegionSample
from vision_tower import Region


def sample(image_id, number, answer, kind=None):
    meta = {"image_id": image_id, **({"type": kind} if kind else {})}
    region = Region.from_box(number, 0, number + 1, 1)
    return RegionSample(f"{image_id}-{number}-{kind}", "x.png", (region,), None, (answer,), meta=meta)


def test_exact_match_counts_letters():
    assert exact_match(["a", "b", "C"], [("a",), ("x", "b"), ("c",)]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError):
        exact_match([], [])
    with pytest.raises(ValueError):
        exact_match(["a"], [])


def test_wrong_region_is_another_one_of_the_same_picture():
    samples = [sample(1, 0, "a"), sample(1, 1, "b"), sample(1, 2, "c"), sample(2, 0, "alone")]
    wrong = with_wrong_region(samples)
    assert [w.regions for w in wrong] == [samples[1].regions, samples[2].regions, samples[0].regions]
    assert [w.references for w in wrong] == [("a",), ("b",), ("c",)]
    assert references_of_shown_region(samples) == [("b",), ("c",), ("a",)]


def test_whole_image():
    (whole,) = with_whole_image([sample(1, 0, "a")])
    assert whole.regions == (Region.whole(),) and whole.references == ("a",)


def test_best_blind_score_by_hand():
    # picture 1: red twice of three; picture 2: one of two; sizes: 1 of 1
    samples = [sample(1, 0, "red", "colour"), sample(1, 1, "red", "colour"), sample(1, 2, "blue", "colour")]
    samples += [sample(2, 0, "red", "colour"), sample(2, 1, "blue", "colour"), sample(2, 0, "large", "size")]
    assert best_blind_score(samples) == pytest.approx((2 + 1 + 1) / 6)
