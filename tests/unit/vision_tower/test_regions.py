"""Regions: exact coverage, every form's round trip, every error. RLE is judged by pycocotools, polygons by boxes and
areas.
"""

import json
import logging
import pickle

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from tests.alpha_maps import iou
from tests.files import encoded_mask, read_json, write_json
from vision_tower import regions as regions_module
from vision_tower.region_values import ROUNDING
from vision_tower.regions import Region

coordinates = st.floats(-50, 150, allow_nan=False).map(lambda v: round(v, 3))
strengths = st.floats(0, 1, allow_nan=False)


def first_pixel(values):
    """Within it coordinates are taken for fractions."""
    return np.min(values) >= -ROUNDING and np.max(values) <= 1 + ROUNDING


@st.composite
def boxes(draw):
    x0, y0 = draw(coordinates), draw(coordinates)
    x1, y1 = x0 + draw(st.floats(0.01, 80)), y0 + draw(st.floats(0.01, 80))
    assume(not first_pixel((x0, y0, x1, y1)))
    return Region.from_box(x0, y0, x1, y1, strength=draw(strengths))


@st.composite
def masks(draw):
    height, width = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    pixels = draw(st.binary(min_size=height * width, max_size=height * width))
    array = np.frombuffer(pixels, np.uint8).reshape(height, width)
    array = array / 255 if draw(st.booleans()) else (array > 127).astype(np.uint8)
    if not array.any():
        array = array + array.dtype.type(1)
    return Region.from_mask(array, strength=draw(strengths))


@st.composite
def normalized_boxes(draw):
    x0, y0 = draw(st.floats(0, 0.9)), draw(st.floats(0, 0.9))
    x1, y1 = draw(st.floats(x0 + 0.01, 1)), draw(st.floats(y0 + 0.01, 1))
    return Region.from_box(x0, y0, x1, y1, normalized=True, strength=draw(strengths))


@st.composite
def polygons(draw):
    """One to three quadrangles that turn around a centre, so that none is flat."""
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        x, y = draw(coordinates), draw(coordinates)
        right, down, left, up = (draw(st.floats(0.05, 40)) for _ in range(4))
        parts.append([[x + right, y], [x, y + down], [x - left, y], [x, y - up]])
    assume(not first_pixel(parts))
    return Region.from_polygon(parts, strength=draw(strengths))


points = st.lists(st.tuples(coordinates, coordinates), min_size=1, max_size=5).filter(lambda p: not first_pixel(p))
regions = st.one_of(
    boxes(),
    normalized_boxes(),
    polygons(),
    masks(),
    st.builds(lambda p, r, s: Region.from_points(p, radius=r, strength=s), points, st.floats(0.01, 20), strengths),
    st.builds(lambda p, w, s: Region.from_stroke(p, width=w, strength=s), points, st.floats(0.01, 20), strengths),
    st.just(Region.whole()),
)


@given(regions)
def test_json_round_trip(region):
    again = Region.from_json(json.loads(json.dumps(region.to_json())))
    assert again == region
    assert hash(again) == hash(region)
    assert pickle.loads(pickle.dumps(region)) == region


@given(regions, st.integers(1, 60), st.integers(1, 60))
@settings(deadline=None)
def test_alpha_is_in_range_and_never_empty(region, height, width):
    if region.kind == "mask":
        height, width = region.data[:2]
    try:
        mask = region.mask(height, width)
    except ValueError as error:
        assert "outside the image" in str(error)
        return
    alpha = region.to_alpha(height, width)
    assert alpha.shape == (height, width) and alpha.dtype == np.float32
    assert 0 <= alpha.min() and alpha.max() <= 1
    assert mask.max() > 0
    np.testing.assert_allclose(alpha, 1 - region.strength * (1 - mask), atol=1e-6)


@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 20), st.integers(1, 20))
def test_integer_boxes_are_exact_and_half_open(x, y, width, height):
    expected = np.zeros((40, 40), np.float32)
    expected[y : y + height, x : x + width] = 1
    assert np.array_equal(Region.from_box(x, y, x + width, y + height).mask(40, 40), expected)
    corners = [[x, y], [x + width, y], [x + width, y + height], [x, y + height]]
    np.testing.assert_allclose(Region.from_polygon(corners).mask(40, 40), expected, atol=1e-6)


@given(boxes())
def test_box_coverage_sums_to_its_area_inside(region):
    x0, y0, x1, y1 = (np.clip(v, 0, 60) for v in region.data)
    area = (x1 - x0) * (y1 - y0)
    if area > 1e-6:
        assert region.mask(60, 60).sum() == pytest.approx(area, rel=1e-4, abs=1e-4)


@pytest.mark.compatibility("pycocotools", "COCO RLE read and written", "equal")
@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_rle_agrees_with_pycocotools(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 70, 2)
    mask = rng.random((height, width)) < rng.random()
    mask[: height // 2, : width // 3] = rng.random() < 0.5
    mask[-1, -1] = True
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    ours = Region.from_rle(encoded_mask(mask))
    assert np.array_equal(ours.mask(height, width), mask)
    assert ours == Region.from_rle(rle) == Region.from_mask(mask)
    written = ours.to_json()["rle"]
    assert np.array_equal(coco_mask.decode(coco_mask.frPyObjects(written, *written["size"])), mask)


def test_polygon_areas_and_union():
    triangle = Region.from_polygon([[2, 2], [30, 2], [2, 30]])
    assert triangle.mask(40, 40).sum() == pytest.approx(28 * 28 / 2, rel=0.01)
    two = Region.from_polygon([[0, 0, 4, 0, 4, 4, 0, 4], [10, 10, 14, 10, 14, 14, 10, 14]])
    assert two.mask(20, 20).sum() == pytest.approx(32, abs=1e-4)
    assert two == Region.from_polygon([[[0, 0], [4, 0], [4, 4], [0, 4]], [[10, 10], [14, 10], [14, 14], [10, 14]]])


def test_many_polygons_equal_one_by_one():
    parts = [[[7.5 * i, 3], [7.5 * i + 9, 5.25], [7.5 * i - 2, 40]] for i in range(20)]
    one_by_one = np.maximum.reduce([Region.from_polygon(part).mask(50, 160) for part in parts])
    np.testing.assert_allclose(Region.from_polygon(parts).mask(50, 160), one_by_one, atol=1e-6)


def test_a_polygon_that_passes_a_corner_covers_nothing_there():
    corner = [[-10, 5], [5, -10], [-10, -10]]
    with pytest.raises(ValueError, match="outside the image"):
        Region.from_polygon(corner).mask(20, 20)
    square = [[10, 10], [12, 10], [12, 12], [10, 12]]
    assert Region.from_polygon([corner, square]).mask(20, 20).sum() == pytest.approx(4, abs=1e-4)


def test_a_polygon_between_the_scan_lines_leaves_its_area():
    assert Region.from_polygon([[1, 3.51], [9, 3.51], [9, 3.53], [1, 3.53]]).mask(10, 10).sum() == pytest.approx(0.16)


def test_a_figure_of_eight_is_a_region():
    assert Region.from_polygon([[0, 0], [4, 4], [4, 0], [0, 4]]).mask(5, 5).sum() == pytest.approx(8, abs=1e-4)


def test_polygon_of_a_real_photo_agrees_with_pycocotools(shared_data):
    (record,) = read_json(shared_data / "photos/quokka_annotations.json")["polygons"]
    points = [(point["x"], point["y"]) for point in record["keypoints"]]
    height, width = Image.open(shared_data / "photos/quokka.jpg").size[::-1]
    ours = Region.from_polygon(points).mask(height, width) >= 0.5
    flat = [float(v) for point in points for v in point]
    theirs = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([flat], height, width))) > 0
    assert iou(ours, theirs) > 0.99


def test_points_and_strokes_have_their_areas():
    assert Region.from_points([[50, 50]], radius=10).mask(100, 100).sum() == pytest.approx(np.pi * 100, rel=0.02)
    stroke = Region.from_stroke([[20, 50], [80, 50]], width=10).mask(100, 100)
    assert stroke.sum() == pytest.approx(60 * 10 + np.pi * 25, rel=0.02)


def test_a_line_from_edge_to_edge_covers_all_of_its_rows():
    mask = Region.from_stroke([[0, 5], [20, 5]], width=4).mask(10, 20)
    assert (mask[4:6] == 1).all() and mask[:2].max() == mask[8:].max() == 0


@pytest.mark.parametrize(
    "region",
    [
        Region.from_points([[7.3, 4.9]], radius=0.05),
        Region.from_stroke([[7.3, 4.9]], width=0.05),
        Region.from_polygon([[7.3, 4.9], [7.31, 4.9], [7.3, 4.91]]),
        Region.from_box(7.3, 4.9, 7.31, 4.91),
    ],
)
def test_tiny_regions_are_visible(region):
    mask = region.mask(10, 10)
    assert mask[4, 7] > 0
    assert np.unravel_index(mask.argmax(), mask.shape) == (4, 7)


def test_strength():
    region = Region.from_box(0, 0, 2, 2, strength=0.25)
    assert region.to_alpha(4, 4)[3, 3] == np.float32(0.75)
    assert region.to_alpha(4, 4)[0, 0] == 1
    assert Region.from_box(0, 0, 2, 2, strength=0).is_whole
    assert not region.is_whole
    assert (Region.whole().to_alpha(3, 5) == 1).all()


def test_all_mask_dtypes_give_the_same_region():
    mask = np.zeros((6, 8), bool)
    mask[1:3, 2:5] = True
    expected = Region.from_mask(mask)
    for same in (
        mask.astype(np.uint8),
        mask.astype(np.uint8) * np.uint8(255),
        mask.astype(np.int64),
        mask.astype(np.float32),
        Image.fromarray(mask.astype(np.uint8) * 255),
        Image.fromarray(mask),
        Image.fromarray(np.dstack([mask.astype(np.uint8) * 255] * 3)),
    ):
        assert Region.from_mask(same) == expected
    edges = np.array([[0, 51], [102, 255]], np.uint8)
    soft = Region.from_mask(edges, soft=True)
    np.testing.assert_allclose(soft.mask(2, 2), [[0, 0.2], [0.4, 1]], atol=1e-6)
    for same in (edges / 255, (edges / 255).astype(np.float32), torch.tensor(edges / 255).half().float()):
        assert Region.from_mask(same) == soft
    assert Region.from_mask(edges.astype(np.uint16) * np.uint16(257), soft=True) == soft
    assert Region.from_mask(Image.fromarray(edges), soft=True) == soft


def test_mask_files(tmp_path):
    mask = np.zeros((5, 4), np.uint8)
    mask[2, 1] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    assert Region.from_mask(tmp_path / "m.png") == Region.parse(f"mask:{tmp_path / 'm.png'}") == Region.from_mask(mask)
    assert Region.parse(f"mask:{tmp_path / 'm.png'}*0.5") == Region.from_mask(mask, strength=0.5)
    write_json(tmp_path / "r.json", Region.from_mask(mask).to_json()["rle"])
    assert Region.parse(f"rle:{tmp_path / 'r.json'}") == Region.from_mask(mask)


def test_mask_of_another_size_is_never_the_whole_image(shared_data):
    folder = shared_data / "masks_with_traps"
    image = Image.open(folder / "image.png")
    region = Region.from_mask(folder / "dress_mask.png")
    with pytest.raises(ValueError, match=r"mask has \d+ x \d+ pixels, its image \d+ x \d+"):
        region.mask(image.height, image.width)


@pytest.mark.parametrize(
    ("text", "region"),
    [
        ("box:10,20,200,180", Region.from_box(10, 20, 200, 180)),
        ("box:10,20,200,180*0.5", Region.from_box(10, 20, 200, 180, strength=0.5)),
        ("nbox:0.1,0.2,0.5,0.6", Region.from_box(0.1, 0.2, 0.5, 0.6, normalized=True)),
        ("polygon:0,0,9,0,9,9", Region.from_polygon([[0, 0], [9, 0], [9, 9]])),
        ("polygon:0,0,9,0,9,9;20,20,30,20,30,30", Region.from_polygon([[0, 0, 9, 0, 9, 9], [20, 20, 30, 20, 30, 30]])),
        ("points:5,6;7,8@2.5", Region.from_points([[5, 6], [7, 8]], radius=2.5)),
        ("stroke:5,6;7,8@3", Region.from_stroke([[5, 6], [7, 8]], width=3)),
        ("points:5,6;7,8@2.5*0.25", Region.from_points([[5, 6], [7, 8]], radius=2.5, strength=0.25)),
        ('rle:{"size":[1,2],"counts":[1,1]}', Region.from_mask(np.array([[0, 1]]))),
        ('rle:{"size":[1,2],"counts":[1,1]}*0.5', Region.from_mask(np.array([[0, 1]]), strength=0.5)),
        ("whole", Region.whole()),
    ],
)
def test_parse(text, region):
    assert Region.parse(text) == region


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Region.parse("circle:1,2,3"), "expected a region box:"),
        (lambda: Region.parse("box:1,2,3"), "expected 4 numbers, got 3; expected box:x0,y0,x1,y1$"),
        (lambda: Region.parse("box:1,2,3,4*strong"), "could not convert.*expected box:x0"),
        (lambda: Region.from_json({"box": "1234"}), "expected four numbers"),
        (lambda: Region.from_box(0, 0, 1e12, 1), "finite numbers up to"),
        (lambda: Region.from_box(10, 20, 200, 180, normalized=True), "fractions from 0 to 1"),
        (lambda: Region.parse("points:1,2"), "expected @ and a size"),
        (lambda: Region.parse("mask:nothing.png"), "mask file not found"),
        (lambda: Region.from_box(0, 0, float("nan"), 3), "finite"),
        (lambda: Region.from_box(0, 0, float("inf"), 3), "finite"),
        (lambda: Region.from_box(5, 0, 5, 3), "x0 < x1"),
        (lambda: Region.from_box(0, 0, 1, 1, strength=1.5), "strength from 0 to 1"),
        (lambda: Region.from_box(0, 0, 1, 1, strength=float("nan")), "strength from 0 to 1"),
        (lambda: Region.from_polygon([]), "empty list"),
        (lambda: Region.from_polygon([[0, 0], [1, 1]]), "3 different vertices"),
        (lambda: Region.from_polygon([[0, 0], [1, 1], [2, 2]]), "some area"),
        (lambda: Region.from_polygon([[0, 0], [1, 0.1], [2, 0.2], [3, 0.3]]), "some area"),
        (lambda: Region.from_polygon([0, 0, 1]), "x and y"),
        (lambda: Region.from_points([], radius=2), "expected points"),
        (lambda: Region.from_points([[1, 1]], radius=0), "radius above 0"),
        (lambda: Region.from_stroke([[1, 1]], width=-1), "width above 0"),
        (lambda: Region.from_mask(np.zeros((4, 4), bool)), "empty"),
        (lambda: Region.from_mask(np.full((4, 4), 7)), "expected a mask of"),
        (lambda: Region.from_mask(np.full((4, 4), np.nan)), "expected a mask of"),
        (lambda: Region.from_mask(np.array([[-0.5, 1.0]])), "expected a mask of"),
        (lambda: Region.from_mask(np.array([[-1, 0]])), "expected a mask of"),
        (lambda: Region.from_mask(np.ones((4, 4), complex)), "expected a mask of"),
        (lambda: Region.from_mask(np.array([[None, 1]])), "expected a mask of"),
        (lambda: Region.from_mask(np.ones((4, 4, 3))), "expected a mask \\(H, W\\)"),
        (lambda: Region.from_rle({"size": [4, 4], "counts": [3, 4]}), "add up to 7, expected 4"),
        (lambda: Region.from_rle({"size": [4, 4], "counts": "garbage!"}), "RLE"),
        (lambda: Region.from_rle({"size": [4, 4], "counts": [16]}), "empty"),
        (lambda: Region.from_rle({"size": [4, 4], "counts": [2**62] * 4 + [16]}), "inconsistent"),
        (lambda: Region.from_rle({"size": [4, 4], "counts": [-1, 17]}), "inconsistent"),
        (lambda: Region.from_rle({"size": [4, 4], "counts": []}), "inconsistent"),
        (lambda: Region.from_rle({"size": [4, 4], "counts": [0.9, 16.2]}), "expected an RLE"),
        (lambda: Region.from_rle({"counts": [16]}), "expected an RLE"),
        (lambda: Region.from_json({"box": [0, 0, 1, 1], "whole": True}), "exactly one of"),
        (lambda: Region.from_json({}), "exactly one of"),
        (lambda: Region.from_json({"box": [0, 0, 1, 1], "blur": 3}), "unknown keys"),
        (lambda: Region.from_json({"points": [[0, 0]]}), "radius"),
        (lambda: Region.from_json({"whole": False}), "'whole': true"),
        (lambda: Region.from_json({"box": 3}), "cannot read 'box'"),
        (lambda: Region.from_box(100, 100, 120, 120).mask(50, 60), "outside the image of 60 x 50"),
        (lambda: Region.from_box(100, 100, 120, 120).bounding_box(50, 60), "outside the image of 60 x 50"),
        (lambda: Region.from_points([[-30, 5]], radius=2).mask(50, 50), "outside the image"),
    ],
)
def test_errors_contain_what_was_expected(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert len(str(caught.value)) < 500


def test_partly_outside_is_clipped_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        mask = Region.from_box(-5, -5, 5, 5).mask(10, 10)
    assert mask.sum() == 25
    assert "clipped" in caplog.text


def test_rounding_gives_no_warning(caplog):
    with caplog.at_level(logging.WARNING):
        assert Region.from_box(-1e-9, 0, 1 + 1e-9, 1, normalized=True).mask(10, 10).all()
    assert not caplog.records


def test_the_bounding_box_is_clipped_to_the_image():
    assert Region.from_box(-5, 2, 5.5, 90).bounding_box(50, 60) == (0, 2, 5.5, 50)
    assert Region.from_mask(np.eye(4)[:3]).bounding_box(3, 4) == (0, 0, 3, 3)


SQUARE = [[10, 10], [14, 10], [14, 14], [10, 14]]


@pytest.mark.parametrize(
    "polygon",
    [
        np.array(SQUARE),
        np.array(SQUARE)[:, None],  # OpenCV
        [np.array(SQUARE, np.int32)[:, None]],
        (np.array(SQUARE, np.int32)[:, None],),
        [[point] for point in SQUARE],
        torch.tensor(SQUARE),
        torch.tensor(SQUARE, requires_grad=False).bfloat16(),
        [torch.tensor(point) for point in SQUARE],
        [[torch.tensor(x), np.float32(y)] for x, y in SQUARE],
        np.array(SQUARE).ravel(),
        [np.array(SQUARE).ravel()],
        [SQUARE],
        np.array([SQUARE]),
        tuple(map(tuple, SQUARE)),
    ],
)
def test_all_polygon_nestings(polygon):
    assert Region.from_polygon(polygon) == Region.from_polygon(SQUARE)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


DEEP = nested(100_000)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Region.parse("nbox:0,0,500,500"),
        lambda: Region.parse("nbox:0.1,0.1,1.5,0.9"),
        lambda: Region.parse("nbox:-0.1,0.1,0.5,0.9"),
        lambda: Region.from_json({"nbox": [0, 0, 1.002, 1]}),
        lambda: Region.from_box(0, -0.01, 1, 1, normalized=True),
        lambda: Region.from_box(0, 0, "5", 5),
        lambda: Region.from_box(0, 0, None, 5),
        lambda: Region.from_box(0, 0, True, 5),
        lambda: Region.from_box(0, 0, 10**400, 5),
        lambda: Region.from_box(0, 0, DEEP, 5),
        lambda: Region.from_box(0, 0, torch.ones(2), 5),
        lambda: Region.from_polygon(DEEP),
        lambda: Region.from_polygon(5),
        lambda: Region.from_polygon("1,2,3"),
        lambda: Region.from_polygon([[1, 2], 3, [4, 5]]),
        lambda: Region.from_polygon([[[1, 2], [3, 4]], 5]),
        lambda: Region.from_polygon([[], SQUARE]),
        lambda: Region.from_polygon(np.zeros((0, 1, 2))),
        lambda: Region.from_points(None, radius=3),
        lambda: Region.from_points([[1, 2]], radius=DEEP),
        lambda: Region.from_stroke({"x": 1}, width=3),
        lambda: Region.from_rle(DEEP),
        lambda: Region.from_rle({"size": DEEP, "counts": DEEP}),
        lambda: Region.from_rle({"size": [4, 4], "counts": None}),
        lambda: Region.from_rle({"size": "44", "counts": [16]}),
        lambda: Region.from_rle({"size": [4, True], "counts": [16]}),
        lambda: Region.from_rle({"size": [4, 4, 1], "counts": [16]}),
        lambda: Region.from_rle({"size": [4, 4], "counts": ["16"]}),
        lambda: Region.from_rle({"size": [4, 4], "counts": "o" * 100_000}),
        lambda: Region.from_rle({"size": [4, 4], "counts": "é"}),
        lambda: Region.from_rle({"size": [10**5, 10**5], "counts": [0, 10**10]}),
        lambda: Region.parse("rle:" + "[" * 100_000),
        lambda: Region.parse('rle:{"size":' + "[" * 100_000),
        lambda: Region.parse(None),
        lambda: Region.parse("box:1,2,3,4*1e400"),
        lambda: Region.from_json(DEEP),
        lambda: Region.from_json({"box": DEEP}),
        lambda: Region.from_json({"polygon": DEEP}),
        lambda: Region.from_json({"points": DEEP, "radius": DEEP}),
        lambda: Region.from_json({"box": [1, 2, 3, 4], "strength": DEEP}),
        lambda: Region.from_json({"box": [1, 2, 3, 4], "strength": "1"}),
        lambda: Region.from_json({"box": [1, 2, 3, 4], "strength": True}),
        lambda: Region.from_json({"mask": DEEP}),
        lambda: Region.from_json({"mask": None}),
        lambda: Region.from_json({"whole": DEEP}),
        lambda: Region.from_json({"box": [1, 2, 3, 4], 5: 1, "b": 2}),
        lambda: Region.from_box(0, 0, 9, 9).mask(65500, 65500),
        lambda: Region.whole().mask(65500, 65500),
    ],
)
def test_wrong_units_types_and_depths(make):
    with pytest.raises(ValueError) as caught:
        make()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_an_rle_file_with_a_byte_order_mark(tmp_path):
    rle = Region.from_mask(np.eye(4)).to_json()["rle"]
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "r.json").write_text(json.dumps(rle), encoding=encoding)
        assert Region.parse(f"rle:{tmp_path / 'r.json'}") == Region.from_mask(np.eye(4))


def test_bugs_are_not_reported_as_invalid_records(monkeypatch):
    def broken(*args, **kwargs):
        raise TypeError("a bug")

    for name in ("finite", "to_points", "read_mask", "decode_rle"):
        monkeypatch.setattr(regions_module, name, broken)
    for record in (
        {"box": [1, 2, 3, 4]},
        {"polygon": SQUARE},
        {"mask": "x.png"},
        {"rle": {"size": [1, 1], "counts": "01"}},
        {"points": SQUARE, "radius": 3},
    ):
        with pytest.raises(TypeError, match="a bug"):
            Region.from_json(record)
