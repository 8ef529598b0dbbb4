"""Whatever stands for a region, in every processor of the tower; images and regions that do not match."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.tiny import build_tiny_clip, noise_image
from vision_tower import AlphaCLIPImageProcessor, Region
from vision_tower.image_sources import fetch
from vision_tower.region_arguments import as_region, flatten_pairs, match_regions, region_list

BOX, FAR = Region.from_box(2, 2, 20, 20), Region.from_box(20, 10, 38, 38)
IMAGE = noise_image(40, 40)
CLIP = build_tiny_clip()[1]
PROCESSOR = AlphaCLIPImageProcessor.for_size(32, "pad")
MASK = np.zeros((40, 40))
MASK[3:20, 5:30] = 1
SOFT = Region.from_mask(MASK * 0.5 + np.eye(40) * 0.3, strength=0.5)


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A `Region` of code loaded with `trust_remote_code`."""

    kind: str
    data: tuple
    strength: float


REGIONS = [
    BOX,
    Region.from_box(0.1, 0.1, 0.5, 0.5, normalized=True, strength=0.5),
    Region.from_polygon([[1, 1], [30, 1], [30, 30]]),
    Region.from_points([[10, 10], [20, 20]], radius=3),
    Region.from_stroke([[10, 10], [20, 20]], width=3),
    Region.from_mask(MASK > 0),
    SOFT,
    Region.whole(),
]


@pytest.mark.parametrize("region", REGIONS, ids=str)
def test_all_region_types_give_the_same_pixels(region):
    forms = [region.to_json(), dataclasses.asdict(region), Foreign(region.kind, region.data, region.strength)]
    assert all(as_region(form) == region for form in forms)
    forms.append({"points": None, "radius": None, "soft": None} | region.to_json())  # a row of `datasets`
    expected = PROCESSOR(IMAGE, region, return_tensors="pt")["pixel_values"]
    for form in forms:
        assert torch.equal(PROCESSOR(IMAGE, form, return_tensors="pt")["pixel_values"], expected)
        assert torch.equal(PROCESSOR([[IMAGE]], [[[form]]], return_tensors="pt")["pixel_values"], expected)
        assert torch.equal(CLIP(IMAGE, "a", form, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize(
    "value",
    [
        5,
        [1, 2, 3, 4],
        (BOX,),
        Region,
        {},
        {"box": None},
        {"kind": "box"},
        {"kind": "foo", "data": []},
        {"kind": "mask", "data": [40, 40, "binary", b"no zlib"], "strength": 1.0},
        {"kind": "mask", "data": [40, 41, "binary", Region.from_mask(MASK > 0).data[3]], "strength": 1.0},
        {"kind": "mask", "data": [10**9, 10**9, "soft", b""], "strength": 1.0},
        {"kind": "mask", "data": ["a", 1, "soft", b""], "strength": 1.0},
        {"kind": "box", "data": [1, 2, 3, 4], "strength": 2},
        np.ones((40, 40)),
        "somewhere",
        "{",
    ],
    ids=lambda value: str(value)[:40],
)
def test_invalid_regions_are_a_one_line_error(value):
    with pytest.raises(ValueError) as caught:
        as_region(value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("images", "regions", "expected"),
    [
        ("a", None, [None]),
        ("a", BOX, [BOX]),
        ("a", [BOX, FAR], [BOX, FAR]),
        ("a", [[BOX, FAR]], [BOX, FAR]),
        (["a"], BOX, [BOX]),
        (["a"], [[BOX, FAR]], [BOX, FAR]),
        (["a", "b"], [[BOX, None], FAR], [BOX, None, FAR]),
        ([["a"], ["b"]], [BOX, FAR], [BOX, FAR]),
        ([["a", "b"], [], ["c"]], [BOX, FAR, BOX], [BOX, FAR, BOX]),
        ([["a", "b"], [], ["c"]], [[BOX, [FAR, BOX]], [], None], [BOX, FAR, BOX, None]),
        ([["a", "b"], ["c"]], [None, FAR], [None, None, FAR]),
    ],
)
def test_images_are_paired_with_their_regions(images, regions, expected):
    pairs = match_regions(images, regions)
    assert [region for _, entry in flatten_pairs(pairs) for region in entry] == [
        as_region(region) for region in expected
    ]


@pytest.mark.parametrize(
    ("images", "regions"),
    [
        (["a"], [BOX, FAR]),
        (["a", "b"], BOX),
        (["a", "b"], [BOX]),
        (["a", "b"], [[BOX, FAR]]),
        ([["a"]], [[BOX, FAR]]),
        ([["a", "b"], ["c"]], [BOX, FAR]),
        ([["a"], ["b"]], [[BOX, FAR], []]),
        ([], BOX),
        ([[]], [BOX]),
    ],
)
def test_different_numbers_of_images_and_regions_are_an_error(images, regions):
    with pytest.raises(ValueError, match="expected one entry of regions for each of"):
        match_regions(images, regions)


def test_lists_of_regions():
    assert region_list([BOX, None]) == [BOX, Region.whole()] and region_list(None) == [Region.whole()]
    with pytest.raises(ValueError, match="empty list"):
        region_list([])


@pytest.mark.parametrize("name", ["region", "masks", "bbox", "mm_processor_kwargs", "images_kwargs", "audio_kwargs"])
def test_arguments_that_would_be_ignored_are_an_error(name):
    with pytest.raises(ValueError, match="would be ignored; pass regions as regions="):
        CLIP(IMAGE, "a", **{name: {"region": BOX} if name.endswith("kwargs") else BOX})


@pytest.mark.parametrize("url", ["data:image/png;base64,", "data:image/png,abc", "DATA:image/png;base64,%%%"])
def test_a_data_url_without_an_image_is_an_error(url):
    with pytest.raises(ValueError, match="expected an image as data:image"):
        fetch(url)
