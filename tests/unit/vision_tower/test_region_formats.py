"""Regions as text and JSON: every form and separator, COCO annotations; coordinates of the wrong unit are errors."""

import json

import numpy as np
import pytest

from tests.files import write_json
from vision_tower import Region

FRACTIONS = {
    "box": {"box": [0.1, 0.1, 0.5, 0.5]},
    "box to the edge": {"box": [0, 0, 1, 0.5]},
    "box a little over": {"box": [-0.0005, 0.1, 1.0005, 0.5]},
    "xywh": {"xywh": [0.1, 0.1, 0.5, 0.5]},
    "xywh over the edge": {"xywh": [0.7, 0.7, 0.5, 0.5]},
    "polygon": {"polygon": [[0.1, 0.1], [0.9, 0.1], [0.9, 0.9]]},
    "polygons": {"polygon": [[0, 0, 1, 0, 1, 0.5], [0.1, 0.1, 0.2, 0.2, 0.3, 0.1]]},
    "COCO": {"rle": {"segmentation": [[0.1, 0.1, 0.9, 0.1, 0.9, 0.9]]}},
    "points": {"points": [[0.5, 0.5]], "radius": 6},
    "stroke": {"stroke": [[0.1, 0.2], [0.5, 0.6]], "width": 4},
}
TEXTS = [
    "box:0.1,0.1,0.5,0.5",
    "xywh:.1 .1 .5 .5",
    "polygon:0,0,1,0,1,0.5",
    "points:0.5,0.5@6",
    "stroke:0.1,0.2;0.5,0.6@4",
]


@pytest.mark.parametrize("written", [*FRACTIONS.values(), *TEXTS], ids=str)
def test_fractions_as_pixels_are_an_error_in_every_format(written):
    with pytest.raises(ValueError, match="in pixels, got .*fractions of the image must be (passed as nbox|multiplied)"):
        Region.parse(written) if isinstance(written, str) else Region.from_json(written)


def test_pixels_on_the_corners_of_the_first_pixel_are_pixels():
    assert Region.from_box(0, 0, 1, 1).mask(3, 3).sum() == Region.from_xywh(0, 0, 1, 1).mask(3, 3).sum() == 1
    assert Region.from_points([[0, 0]], radius=1).mask(3, 3).any()
    Region.from_box(0.1, 0.1, 0.5, 0.5, normalized=True)


@pytest.mark.parametrize(
    "region",
    [
        Region.from_box(700, 700, 900, 900),
        Region.from_xywh(700, 700, 200, 200),
        Region.from_polygon([700, 700, 900, 700, 900, 900]),
        Region.from_points([[800, 800]], radius=10),
        Region.from_stroke([[700, 700], [900, 900]], width=4),
    ],
    ids=lambda region: region.kind,
)
def test_coordinates_up_to_1000_are_an_error_that_suggests_nbox(region, caplog):
    with pytest.raises(ValueError, match="outside the image of 640 x 480 .*from 0 to 1000, divide .* nbox"):
        region.mask(480, 640)
    region.mask(795, 795)  # partly outside: cut off, with the same advice
    assert "is clipped; if its coordinates are from 0 to 1000" in caplog.text
    with pytest.raises(ValueError, match="pixels$"):
        Region.from_box(2000, 2000, 2100, 2100).mask(480, 640)


def test_xywh_is_the_box_of_coco():
    box = Region.from_box(10, 20, 40, 60)
    assert Region.from_xywh(10, 20, 30, 40) == Region.parse("xywh:10,20,30,40") == box
    assert Region.from_json({"xywh": [10, 20, 30, 40], "strength": 0.5}) == Region.parse("box:10,20,40,60*0.5")
    with pytest.raises(ValueError, match="use xywh for x,y,width,height"):
        Region.from_box(100, 120, 30, 40)
    for size in ((0, 5), (5, -1)):
        with pytest.raises(ValueError, match="width and height above 0"):
            Region.from_xywh(1, 2, *size)


@pytest.mark.parametrize(
    "text", ["24,3,60,39", "24 3 60 39", " 24, 3, 60, 39 ", "24 ,3 60,  39", "24\t3\n60 39", "+24 3. 6e1 39.0"]
)
def test_numbers_are_separated_by_commas_or_spaces(text):
    assert Region.parse(f"box:{text}") == Region.from_box(24, 3, 60, 39)
    assert Region.parse(f"xywh:{text} * 0.5") == Region.from_xywh(24, 3, 60, 39, strength=0.5)
    assert Region.parse(f"stroke:{text}@ 4") == Region.from_stroke([[24, 3], [60, 39]], width=4)
    assert Region.parse(f"polygon:{text}, 5 6") == Region.from_polygon([24, 3, 60, 39, 5, 6])
    assert Region.parse("points:24 3 ; 60, 39@2") == Region.from_points([[24, 3], [60, 39]], radius=2)


@pytest.mark.parametrize("text", ["box:24,,3,60,39", "box:24,3,60,39,", "box:24;3;60;39", "points:1,2,3@4", "box:"])
def test_missing_numbers_are_an_error(text):
    with pytest.raises(ValueError, match="cannot read the region"):
        Region.parse(text)


MASK = np.zeros((40, 60), bool)
MASK[5:20, 10:30] = True
RLE = Region.from_mask(MASK).to_json()["rle"]
RUNS = {"size": [40, 60], "counts": [405, *[15, 25] * 19, 15, 40 * 60 - 405 - 40 * 19 - 15]}
OUTLINE = [[10, 5, 30, 5, 30, 20, 10, 20]]


@pytest.mark.parametrize("segmentation", [RLE, RUNS, OUTLINE, OUTLINE * 2], ids=["RLE", "runs", "polygon", "polygons"])
def test_a_coco_annotation_or_its_segmentation_is_a_region(segmentation, tmp_path):
    annotation = {"id": 1, "image_id": 2, "category_id": 3, "bbox": [10, 5, 20, 15], "segmentation": segmentation}
    for written in (annotation, segmentation):
        write_json(tmp_path / "a.json", written)
        for region in (
            Region.from_coco(written),
            Region.from_json({"rle": written}),
            Region.parse(f"rle:{tmp_path / 'a.json'}"),
            Region.parse(f"rle:{json.dumps(written)}"),
        ):
            assert np.array_equal(region.mask(40, 60) > 0, MASK)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"images": [], "annotations": []}, "one COCO annotation, got a complete COCO file"),
        ([{"segmentation": RLE}], "one COCO annotation, got a list of 1"),
        ({"segmentation": [], "bbox": [1, 2, 3, 4]}, "no segmentation; pass its bbox as xywh"),
        ({"segmentation": None}, "no segmentation"),
        ({"bbox": [1, 2, 3, 4], "category_id": 1}, "no segmentation; pass its bbox"),
        ({"segmentation": {"segmentation": RLE}}, "expected an RLE"),
        ({"counts": [1]}, "expected an RLE"),
        ({}, "expected an RLE"),
        (5, "expected a polygon"),
        ([1, 2, 3, 4], "3 different vertices"),
    ],
)
def test_invalid_annotations_are_an_error(written, message):
    for read in (Region.from_coco, lambda value: Region.from_json({"rle": value})):
        with pytest.raises(ValueError, match=message) as raised:
            read(written)
        assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    "text",
    [
        "box:1,2,30,40",
        "nbox:0.1,0.2,0.5,0.6",
        "polygon:1,2,30,2,30,40",
        "polygon:1,2,30,2,30,40;50,50,60,50,60,60",
        "points:30,20;5,6@5",
        "stroke:1,2;30,40@2.5",
        "whole",
    ],
)
def test_str_and_parse_are_inverse(text):
    assert str(Region.parse(text)) == text


def test_errors_contain_the_expected_format():
    with pytest.raises(ValueError, match=r"expected 4 numbers, got 2; expected nbox:x0,y0,x1,y1$"):
        Region.parse("nbox:1,2")


@pytest.mark.parametrize("kind", ["box:1,2,3,4", [1, 2, 3, 4], None])
def test_an_unknown_kind_is_an_error(kind):
    with pytest.raises(ValueError, match="expected a region kind .* create regions with Region.from_box"):
        Region(kind)
