"""Masks as regions: all supported image modes and dtypes; ambiguous masks are errors."""

import base64
import json

import numpy as np
import pytest
import torch
from PIL import Image

from vision_tower.regions import Region


def test_palette_masks_with_several_objects_are_an_error():
    image = Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    with pytest.raises(ValueError, match="several objects"):
        Region.from_mask(image)


def test_a_label_map_is_not_a_soft_mask():
    labels = np.array([[0, 1], [2, 0]], np.uint8)
    for mask in (labels, Image.fromarray(labels)):
        with pytest.raises(ValueError, match="label map"):
            Region.from_mask(mask)
    assert Region.from_mask(labels == 2).mask(2, 2).tolist() == [[0, 0], [1, 0]]


LABELS = [
    np.array([[0, 92], [0, 181]], np.uint8),
    np.array([[0, 1], [2, 255]], np.uint8),  # with a void border, as in Pascal VOC
    np.array([[0, 200], [0, 200]], np.uint8),
    np.array([[128, 255], [255, 255]], np.uint8),
    np.array([[0, 300], [0, 65535]], np.uint16),
    np.array([[0, 3], [0, 0]], np.int32),
    np.array([[-1, 0], [1, 0]]),
]


@pytest.mark.parametrize("labels", LABELS, ids=lambda labels: f"{labels.dtype} {labels.tolist()}")
def test_a_label_map_is_an_error_in_every_format(tmp_path, labels):
    forms = [labels, torch.tensor(labels.astype(np.int32)), labels.tolist()]
    if labels.dtype != np.int64:
        Image.fromarray(labels).save(tmp_path / "m.png" if labels.dtype != np.int32 else tmp_path / "m.tif")
        (path,) = tmp_path.iterdir()
        forms += [path, Image.open(path), path.read_bytes()]
        uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        for make in (
            lambda: Region.parse(f"mask:{path}"),
            lambda: Region.from_json({"mask": str(path)}),
            lambda: Region.from_json({"mask": uri}),
        ):
            with pytest.raises(ValueError, match="label map"):
                make()
    for mask in forms:
        with pytest.raises(ValueError, match="label map"):
            Region.from_mask(mask)


def test_soft_masks_need_soft_true(tmp_path):
    edges = np.array([[0, 1], [128, 255]], np.uint8)
    Image.fromarray(edges).save(tmp_path / "m.png")
    soft = Region.from_mask(edges, soft=True)
    np.testing.assert_allclose(soft.mask(2, 2), edges / 255, atol=1e-6)
    path = str(tmp_path / "m.png")
    for same in (
        Region.from_mask(path, soft=True),
        Region.parse(f"softmask:{path}"),
        Region.from_json({"mask": path, "soft": True}),
        Region.from_json(json.loads(json.dumps(soft.to_json()))),
        Region.from_mask(soft.mask(2, 2)),
    ):
        assert same == soft
    faint = Region.from_mask(np.array([[0, 1e-9], [0, 1 / 255]]))  # its PNG has 0 and 1 alone
    assert Region.from_json(faint.to_json()) == faint and faint.mask(2, 2).max() == np.float32(1 / 255)
    for value in (1, "yes", None):
        with pytest.raises(ValueError, match="'soft': true or false"):
            Region.from_json({"mask": path, "soft": value})


def mask_images():
    """A mask in every supported mode."""
    inside = np.zeros((6, 8), bool)
    inside[1:3, 2:5] = True
    gray = Image.fromarray(inside.astype(np.uint8) * 255)
    deep = inside.astype(np.uint16) * np.uint16(65535)
    for mode in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "I"):
        via = {"La": "LA", "RGBa": "RGBA"}.get(mode, "L")
        yield inside, gray.convert(via).convert(mode)
    yield inside, Image.fromarray(deep)
    yield inside, Image.fromarray(deep.astype(np.int32))
    yield inside, Image.fromarray(inside.astype(np.float32))


@pytest.mark.parametrize(("inside", "image"), list(mask_images()), ids=lambda value: getattr(value, "mode", ""))
def test_masks_of_every_mode(inside, image):
    assert Region.from_mask(image) == Region.from_mask(inside)


@pytest.mark.parametrize(
    "mode", ["LA", "PA", "RGBA", "L with transparency", "P with transparency", "RGB with transparency"]
)
@pytest.mark.parametrize("color", [0, 255])
def test_a_mask_in_the_transparency_is_an_error(tmp_path, mode, color):
    """All pixels have the same color and differ only in transparency; by color, the mask would be full or empty."""
    image = Image.new("L", (8, 6), color).convert(mode.split()[0])
    if "with" in mode:
        image.info["transparency"] = image.getpixel((0, 0))
        image.save(tmp_path / "m.png", transparency=image.getpixel((0, 0)))
    else:
        alpha = Image.new("L", (8, 6))
        alpha.paste(255, (1, 1, 4, 4))
        image.putalpha(alpha)
        if mode != "PA":  # which no format keeps
            image.save(tmp_path / "m.png")
    for mask in [image, *tmp_path.iterdir()]:
        with pytest.raises(ValueError, match="has transparent pixels"):
            Region.from_mask(mask)


@pytest.mark.parametrize(
    "mask",
    [
        torch.eye(4).bfloat16(),
        torch.eye(4, requires_grad=True),
        torch.eye(4).bool(),
        torch.eye(4).half(),
        np.eye(4) > 0,
    ],
)
def test_masks_from_torch(mask):
    assert Region.from_mask(mask) == Region.from_mask(np.eye(4))


@pytest.mark.parametrize(
    "mask",
    [None, 5, [], [[]], [[1, 2], [3]], ["a"], b"", {}, object(), torch.zeros(2, 2, 2), np.zeros((0, 4)), "folder"],
)
def test_invalid_masks_are_an_error(tmp_path, monkeypatch, mask):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError) as caught:
        Region.from_mask(mask)
    assert "\n" not in str(caught.value)
