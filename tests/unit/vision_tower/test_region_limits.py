"""Regions with many parts: rasterizing in strips changes nothing, and regions that would take minutes are errors."""

import numpy as np
import pytest

from vision_tower import Region, rasterization


def test_strips_change_nothing(monkeypatch):
    random = np.random.default_rng(0)
    polygon = random.random((30, 2)) * [40, 30]
    regions = [
        Region.from_polygon(polygon),
        Region.from_points(polygon, radius=3),
        Region.from_stroke(polygon, width=3),
    ]
    whole = [region.mask(30, 40) for region in regions]
    monkeypatch.setattr(rasterization, "_STRIP", 50)
    for region, expected in zip(regions, whole, strict=True):
        assert np.array_equal(region.mask(30, 40), expected)


def test_too_long_an_outline_is_an_error():
    zigzag = [[i % 1000, 999 * (i % 2)] for i in range(1500)]
    assert Region.from_polygon(zigzag).mask(100, 1000).any()
    with pytest.raises(ValueError, match="too long an outline"):
        Region.from_polygon([[0, 0], [3, 7.5], *zigzag]).mask(1000, 1000)


@pytest.mark.parametrize(
    "region",
    [
        Region.from_polygon([[0, 0, 99, 0, 99, 99]] * 9),
        Region.from_points([[50, 50]] * 9, radius=90),
        Region.from_stroke([[0, 0], [99, 99]] * 9, width=9),
    ],
)
def test_too_many_large_parts_are_an_error(region, monkeypatch):
    assert region.mask(100, 100).any()
    monkeypatch.setattr(rasterization, "MAX_DRAWN", 80_000)
    with pytest.raises(ValueError, match="too many large parts"):
        region.mask(100, 100)


def test_strengths_can_be_numpy_numbers():
    region = Region.from_box(1, 2, 3, 4, strength=np.float32(0.5))
    assert region == Region.from_box(1, 2, 3, 4, strength=0.5) and type(region.strength) is float
    assert str(Region.from_box(1, 2, 3, 4, strength=-0.0).to_json()["strength"]) == "0.0"
    for strength in (float("nan"), np.float32("nan"), np.bool_(True), 10**400, 1j, "0.5"):
        with pytest.raises(ValueError, match="expected a strength"):
            Region.from_box(1, 2, 3, 4, strength=strength)
