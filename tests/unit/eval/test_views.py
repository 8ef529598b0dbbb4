"""Exactly right answers and the controls, on cases small enough to count by hand."""

import numpy as np
import pytest
from PIL import Image

from eval.metrics.literal_match import literal_match
from eval.views import (
    VIEWS,
    apply_view,
    crop,
    majority_baseline,
    other_region_references,
    with_other_region,
    with_whole_image,
)
from mllm.data.samples import RegionSample
from vision_tower import Region


def sample(image_id, number, answer, kind=None):
    meta = {"image_id": image_id, **({"type": kind} if kind else {})}
    region = Region.from_box(number, 0, number + 1, 1)
    return RegionSample(f"{image_id}-{number}-{kind}", "x.png", (region,), None, (answer,), meta=meta)


def test_exactly_right_counts_letters():
    assert literal_match(["a", "b", "C"], [("a",), ("x", "b"), ("c",)]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError):
        literal_match([], [])
    with pytest.raises(ValueError):
        literal_match(["a"], [])


def test_wrong_region_is_another_one_of_the_same_picture():
    samples = [sample(1, 0, "a"), sample(1, 1, "b"), sample(1, 2, "c"), sample(2, 0, "alone")]
    wrong = with_other_region(samples)
    assert [w.regions for w in wrong] == [samples[1].regions, samples[2].regions, samples[0].regions]
    assert [w.references for w in wrong] == [("a",), ("b",), ("c",)]
    assert other_region_references(samples) == [("b",), ("c",), ("a",)]
    assert [w.meta["shown_references"] for w in wrong] == [["b"], ["c"], ["a"]]


def test_wrong_region_is_of_another_place():
    def at(box, answer, **size):
        return RegionSample(answer, "x.png", (Region.from_box(*box),), None, (answer,), meta={"image_id": 1, **size})

    boxes = {"a": (0, 0, 10, 10), "a again": (1, 0, 10, 10), "b": (50, 0, 60, 10)}
    for size in ({}, {"width": 100, "height": 50}):
        samples = [at(box, answer, **size) for answer, box in boxes.items()]
        assert other_region_references(samples) == [("b",), ("b",), ("a",)]


def test_the_other_region_is_asked_the_same_where_it_can_be():
    def asked(x, question, answer):
        return RegionSample(
            answer, "x.png", (Region.from_box(x, 0, x + 9, 9),), question, (answer,), meta={"image_id": 1}
        )

    samples = [
        asked(0, "colour?", "red"),
        asked(0, "size?", "big"),
        asked(50, "size?", "small"),
        asked(50, "colour?", "blue"),
    ]
    wrong = with_other_region([*samples, asked(90, "who?", "me")])
    assert [w.meta.get("shown_references") for w in wrong] == [["blue"], ["small"], ["big"], ["red"], None]
    assert [w.regions[0].data[0] for w in wrong] == [50, 50, 0, 0, 0]


def test_wrong_region_needs_no_size_of_the_picture():
    box = Region.from_box(0.1, 0.1, 0.2, 0.2, normalized=True)
    mask = np.zeros((20, 30), bool)
    mask[10:, 10:] = True
    regions = {
        "box": box,
        "mask": Region.from_mask(mask),
        "other box": Region.from_box(0.6, 0.6, 0.9, 0.9, normalized=True),
    }
    samples = [RegionSample(name, "x.png", (region,), None, (name,)) for name, region in regions.items()]
    assert other_region_references(samples) == [("mask",), ("other box",), ("box",)]


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))


def shown(picture, view):
    region = Region.from_box(10, 20, 40, 50)
    image, alpha = apply_view(RegionSample("1", "x.png", (region,), None, ("a",)), view, picture)
    return region, image, alpha


def test_every_input_shows_what_it_says(picture):
    pixels = np.asarray(picture)
    for name in ("box", "mask", "other_region"):
        region, image, alpha = shown(picture, name)
        assert image is picture and alpha == region
    assert shown(picture, "whole")[1:] == (picture, Region.whole())
    assert shown(picture, "no_image")[1:] == (None, None)
    _, cropped, alpha = shown(picture, "crop")
    assert alpha.is_whole and np.array_equal(np.asarray(cropped), pixels[20:50, 10:40])
    _, blurred, alpha = shown(picture, "blur")
    changed = (np.asarray(blurred) != pixels).any(-1)
    inside = np.zeros((60, 80), bool)
    inside[20:50, 10:40] = True
    assert alpha.is_whole and not changed[inside].any() and changed[~inside].mean() > 0.95
    _, boxed, alpha = shown(picture, "red_box")
    red = (np.asarray(boxed) == (255, 0, 0)).all(-1)
    outline = np.zeros((60, 80), bool)
    outline[20:51, [10, 40]] = outline[[20, 50], 10:41] = True  # PIL's rectangle includes both ends
    assert alpha.is_whole and np.array_equal(red, outline)
    with pytest.raises(ValueError, match=", ".join(VIEWS)):
        shown(picture, "circle")


@pytest.mark.parametrize(
    "box, pixels",
    [
        ((10.3, 20.6, 39.2, 49.7), (10, 20, 40, 50)),
        ((10, 20, 39.01, 50), (10, 20, 40, 50)),
        ((5.2, 5.2, 5.7, 5.9), (5, 5, 6, 6)),
    ],
)
def test_a_crop_holds_every_pixel_that_the_box_touches(picture, box, pixels):
    left, top, right, bottom = pixels
    cropped = np.asarray(crop(picture, Region.from_box(*box)))
    assert np.array_equal(cropped, np.asarray(picture)[top:bottom, left:right])


def test_whole_image():
    (whole,) = with_whole_image([sample(1, 0, "a")])
    assert whole.regions == (Region.whole(),) and whole.references == ("a",)


def test_majority_baseline_by_hand():
    # picture 1: red twice of three; picture 2: one of two; sizes: 1 of 1
    samples = [sample(1, 0, "red", "colour"), sample(1, 1, "red", "colour"), sample(1, 2, "blue", "colour")]
    samples += [sample(2, 0, "red", "colour"), sample(2, 1, "blue", "colour"), sample(2, 0, "large", "size")]
    assert majority_baseline(samples) == pytest.approx((2 + 1 + 1) / 6)
