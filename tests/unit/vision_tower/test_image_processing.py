"""Image + regions -> pixel_values. Judges: CLIP's and LLaVA's own image processors for RGB, the region's geometry for
alpha.
"""

import base64
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from transformers import (
    AutoImageProcessor,
    BlipImageProcessor,
    BlipImageProcessorPil,
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    LlavaImageProcessor,
    LlavaImageProcessorPil,
)
from transformers.image_utils import OPENAI_CLIP_STD

from tests.alpha_maps import alpha_map
from tests.files import encoded_image
from tests.tiny import noise_image
from vision_tower import AlphaCLIPImageProcessor, Region, image_processing_alpha_clip
from vision_tower import geometry as geometry_module
from vision_tower.alpha_embedding import WHOLE_IMAGE

SIDE = 64
SIZES = [(100, 60), (60, 100), (80, 80), (64, 64), (61, 97), (33, 40)]


def build(geometry):
    size = {"height": SIDE, "width": SIDE}
    return AlphaCLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size, geometry=geometry)


def stock_processors(crop, pad, stretch):
    settings = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    blip = stretch(size={"height": SIDE, "width": SIDE})
    return {"crop": crop(**settings), "pad": pad(do_pad=True, **settings), "stretch": blip}


@pytest.mark.parametrize("size", SIZES)
def test_rgb_equals_the_stock_processors(size):
    """Transformers' PIL processors, which are the default where torchvision is not installed."""
    image = noise_image(*size)
    stock = stock_processors(CLIPImageProcessorPil, LlavaImageProcessorPil, BlipImageProcessorPil)
    for geometry, processor in stock.items():
        ours = build(geometry)(image, Region.from_box(5, 5, 30, 30), return_tensors="pt")["pixel_values"]
        theirs = processor(image, return_tensors="pt")["pixel_values"]
        assert ours.shape == (1, 4, SIDE, SIDE)
        assert torch.equal(ours[:, :3], theirs), geometry


@pytest.mark.parametrize("size", SIZES)
def test_rgb_is_close_to_the_torchvision_processors(size):
    """Where it is installed, they are Transformers' default."""
    pytest.importorskip("torchvision")
    image = noise_image(*size).filter(ImageFilter.GaussianBlur(1))  # edges as photographs have them
    for geometry, processor in stock_processors(CLIPImageProcessor, LlavaImageProcessor, BlipImageProcessor).items():
        ours = build(geometry)(image, return_tensors="pt")["pixel_values"][:, :3]
        theirs = processor(image, return_tensors="pt")["pixel_values"]
        levels = 255 * torch.tensor(OPENAI_CLIP_STD)[:, None, None] * (ours - theirs).abs()
        assert levels.max() <= 1.001, geometry  # of 255; measured: 1, with torchvision 0.29.1


@pytest.mark.parametrize("geometry", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", SIZES)
def test_alpha_has_the_geometry_of_the_image(geometry, size):
    """A picture that is white in the region and black elsewhere: its red channel and its alpha map must agree."""
    width, height = size
    box = (width // 4, height // 4, width - width // 5, height - height // 4)
    white = np.zeros((height, width, 3), np.uint8)
    white[box[1] : box[3], box[0] : box[2]] = 255
    processor = build(geometry)
    processor.image_mean, processor.image_std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    processor.resample = Image.Resampling.BILINEAR
    values = processor(Image.fromarray(white), Region.from_box(*box), return_tensors="pt")["pixel_values"]
    # PIL resizes uint8 with rounding: half a step of 255 in each of its two passes
    assert (values[:, 0] - alpha_map(values)).abs().max() < 1.5 / 255


@pytest.mark.parametrize("geometry", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("region", [Region.whole(), None, Region.from_box(3, 3, 9, 9, strength=0)])
def test_whole_image_is_alpha_one_everywhere(geometry, region):
    values = build(geometry)(noise_image(100, 50), region, return_tensors="pt")["pixel_values"]
    assert (values[:, 3] == torch.tensor(WHOLE_IMAGE)).all()


def test_padding_has_alpha_zero_for_a_region():
    values = build("pad")(noise_image(128, 64), Region.from_box(0, 0, 128, 64), return_tensors="pt")["pixel_values"]
    alpha = alpha_map(values)[0]
    assert alpha[:14].abs().max() < 1e-6 and alpha[-14:].abs().max() < 1e-6
    assert (alpha[18:46] == 1).all()
    assert values[0, 3].min() == pytest.approx(-WHOLE_IMAGE)


@pytest.mark.parametrize("geometry", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(4000, 3000), (3000, 4000), (90, 70)])
def test_a_region_of_one_pixel_is_visible(geometry, size):
    x, y = size[0] // 2 + 3, size[1] // 2 - 5
    alpha = alpha_map(
        build(geometry)(noise_image(*size), Region.from_box(x, y, x + 1, y + 1), return_tensors="pt")["pixel_values"]
    )
    assert alpha.max() == pytest.approx(1)
    assert alpha.bfloat16().max() > 0.9


def test_regions_of_one_image_equal_separate_calls_and_decode_once(monkeypatch):
    image = noise_image(100, 60)
    regions = [Region.from_box(5, 5, 30, 30), Region.from_points([[50, 30]], radius=9), None]
    processor = build("pad")
    separate = torch.cat([processor(image, region, return_tensors="pt")["pixel_values"] for region in regions])
    calls = []
    decode = image_processing_alpha_clip.decode_image
    monkeypatch.setattr(
        image_processing_alpha_clip, "decode_image", lambda *args, **kw: calls.append(1) or decode(*args, **kw)
    )
    together = processor(image, regions, return_tensors="pt")["pixel_values"]
    assert torch.equal(together, separate)
    assert len(calls) == 1
    batch = processor([image, image], [regions[:2], regions[2]], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch, separate)


def test_exif_orientation_is_applied(tmp_path):
    image = noise_image(40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter: 20 wide, 40 high
    image.save(tmp_path / "turned.png", exif=exif)
    region = Region.from_box(2, 30, 10, 38)  # fits only the turned picture
    turned = build("pad")(Image.open(tmp_path / "turned.png"), region, return_tensors="pt")["pixel_values"]
    expected = build("pad")(image.rotate(-90, expand=True), region, return_tensors="pt")["pixel_values"]
    assert torch.equal(turned, expected)


def test_save_and_load(tmp_path):
    processor = build("pad")
    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(again) is AlphaCLIPImageProcessor
    assert again.to_dict() == processor.to_dict()
    assert "regions" not in again.to_dict()
    image, region = noise_image(50, 90), Region.from_box(1, 1, 40, 40)
    assert torch.equal(
        again(image, region, return_tensors="pt")["pixel_values"],
        processor(image, region, return_tensors="pt")["pixel_values"],
    )


@given(st.integers(8, 90), st.integers(8, 90), st.data())
@settings(deadline=None, max_examples=40)
def test_any_box_any_geometry(width, height, data):
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    region = Region.from_box(x, y, data.draw(st.integers(x + 1, width)), data.draw(st.integers(y + 1, height)))
    geometry = data.draw(st.sampled_from(["crop", "pad", "stretch"]))
    try:
        alpha = alpha_map(build(geometry)(noise_image(width, height), region, return_tensors="pt")["pixel_values"])
    except ValueError as error:
        assert geometry == "crop" and "outside the center crop" in str(error)
        return
    assert -1e-6 <= alpha.min() and alpha.max() <= 1 + 1e-6 and alpha.max() > 0.99


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, i: p([i, i], [Region.whole()]), "each of 2 images, got 1"),
        (lambda p, i: p(i, Region.from_mask(np.ones((5, 5)))), "expected equal sizes"),
        (lambda p, i: p(i, Region.from_box(500, 500, 600, 600)), "outside the image"),
        (lambda p, i: p(i, [[]]), "an empty list of regions"),
        (lambda p, i: p(i, []), "empty list"),
        (lambda p, i: p(i, "box:3,2,1,4"), "cannot read the region"),
        (lambda p, i: p(i, None, geometry="zoom"), "expected geometry"),
        (lambda p, i: p(i, None, size={"height": 8, "width": 8}), "size: pass them to the constructor"),
        (lambda p, i: p(i, None, do_center_crop=False), "do_center_crop: pass them to the constructor"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(build("crop"), noise_image(60, 40))


def test_regions_as_text():
    image, region = noise_image(60, 40), Region.from_box(20, 10, 40, 30)
    expected = build("pad")(image, region)["pixel_values"]
    for regions, images in (("box:20,10,40,30", image), (["box:20,10,40,30"], image), (["box:20,10,40,30"], [image])):
        assert np.array_equal(build("pad")(images, regions)["pixel_values"], expected)


def test_a_region_outside_the_center_crop_is_an_error():
    with pytest.raises(ValueError, match="use geometry='pad'"):
        build("crop")(noise_image(300, 60), Region.from_box(0, 0, 20, 20))


def test_settings_that_would_change_only_the_image_are_an_error():
    with pytest.raises(ValueError, match="one square output size"):
        AlphaCLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 32, "width": 32})
    with pytest.raises(ValueError, match="expected geometry"):
        AlphaCLIPImageProcessor(geometry="fit")


def test_the_center_crop_uses_the_position_before_resizing(caplog):
    """Of a picture of 300 x 100 the crop keeps columns 100 to 200; resizing must not draw a region into it."""
    processor = AlphaCLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    image = Image.new("RGB", (300, 100))
    with pytest.raises(ValueError, match="outside the center crop"):
        processor(image, regions=Region.from_box(0, 0, 99.9, 100))
    processor(image, regions=Region.from_box(110, 10, 190, 90))
    assert not caplog.records
    processor(image, regions=Region.from_box(50, 10, 150, 90))
    assert "removes 50%" in caplog.text


def test_rescaling_in_a_call_is_an_error():
    with pytest.raises(ValueError, match="do_rescale"):
        AlphaCLIPImageProcessor()(Image.new("RGB", (9, 9)), do_rescale=False)


@pytest.mark.parametrize("side", [None, 0, "336"])
def test_an_invalid_size_is_an_error(side):
    with pytest.raises(ValueError, match="side in pixels"):
        AlphaCLIPImageProcessor.for_size(side, "crop")


def test_a_transparent_file_is_composited_onto_white(tmp_path):
    picture = Image.new("RGBA", (40, 30), (10, 20, 200, 0))
    picture.paste((200, 0, 0, 255), (5, 5, 20, 20))
    picture.save(tmp_path / "a.png")
    processor = AlphaCLIPImageProcessor.for_size(32, "pad")
    of_file, of_picture = (
        processor(image, return_tensors="pt")["pixel_values"] for image in (str(tmp_path / "a.png"), picture)
    )
    assert torch.equal(of_file, of_picture)
    assert of_picture[0, :3, 16, 28].min() > 1.5  # white, normalised


def padded_in_full(image, side, resample):
    """The definition: a square of the mean color, then resized."""
    square = Image.new("RGB", (max(image.size),) * 2, (122, 116, 104))
    square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
    return square.resize((side, side), resample)


SHAPES = [
    (1, 1),
    (1, 2),
    (3, 1),
    (1, 300),
    (400, 1),
    (64, 65),
    (97, 61),
    (33, 40),
    (700, 20),
    (21, 705),
    (31, 64),
    (5, 9),
]


@pytest.mark.parametrize("resample", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("strip", [1, 5000, 4_000_000])
def test_padding_without_the_square_is_bit_equal(monkeypatch, resample, strip):
    monkeypatch.setattr(geometry_module, "_STRIP", strip)
    for shape in SHAPES:
        image = noise_image(*shape)
        for side in (1, 7, 64):
            ours = geometry_module.resize(image, side, "pad", (122, 116, 104), Image.Resampling(resample))
            assert ours.tobytes() == padded_in_full(image, side, resample).tobytes(), (shape, side)


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([1, 16, 63, 224]), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_any_size_padded_without_the_square_is_bit_equal(width, height, side, seed):
    image = noise_image(width, height, seed)
    ours = geometry_module.resize(image, side, "pad", (122, 116, 104), Image.Resampling.BICUBIC)
    assert ours.tobytes() == padded_in_full(image, side, Image.Resampling.BICUBIC).tobytes()
    mask = np.random.default_rng(seed).random((height, width), np.float32) * (
        noise_image(width, height) > np.full(3, 9)
    ).all(-1)
    mask[height // 2, width // 2] = 1
    square = np.zeros((max(width, height),) * 2, np.float32)
    top, left = (len(square) - height) // 2, (len(square) - width) // 2
    square[top : top + height, left : left + width] = mask
    expected = np.asarray(Image.fromarray(square).resize((side, side), Image.Resampling.BILINEAR))
    ours = geometry_module.resize(mask, side, "pad", 0, Image.Resampling.BILINEAR)
    assert np.array_equal(np.asarray(ours), expected)


@pytest.mark.parametrize("size", [(20000, 1), (1, 20000), (20000, 5000), (5000, 20000)])
@pytest.mark.slow
def test_the_largest_images_are_processed_in_seconds(size):
    image, region = Image.new("RGB", size, (9, 99, 199)), Region.from_box(0, 0, *size)
    start = time.process_time()
    values = AlphaCLIPImageProcessor.for_size(336, "pad")(image, region)["pixel_values"]
    assert time.process_time() - start < 10  # measured: 3 s
    assert values.shape == (1, 4, 336, 336)


@pytest.mark.parametrize("geometry", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("size", [(65500, 1), (1, 65500), (20001, 4)])
def test_images_over_the_limits_are_an_error(tmp_path, geometry, size):
    Image.new("1", size).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="too long|too many pixels") as caught:
        AlphaCLIPImageProcessor.for_size(32, geometry)(str(tmp_path / "x.png"))
    assert "\n" not in str(caught.value)


def test_the_limits_are_settings_that_are_saved(tmp_path):
    image = noise_image(60, 40)
    AlphaCLIPImageProcessor(max_side=59, max_pixels=2399).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert (processor.max_side, processor.max_pixels) == (59, 2399)
    with pytest.raises(ValueError, match="60 x 40 = 2,400, expected at most 2,399"):
        processor(image, geometry="pad")
    with pytest.raises(ValueError, match="sides up to 59 pixels"):
        processor(image, geometry="pad", max_pixels=2400)
    assert processor(image, geometry="pad", max_pixels=2400, max_side=60)["pixel_values"].shape == (1, 4, 224, 224)
    with pytest.raises(ValueError, match="would be resized to 336 before cropping"):
        processor(image, geometry="crop", max_pixels=2400, max_side=335)


IMAGE = np.asarray(noise_image(60, 40))
BATCH = np.stack([IMAGE, IMAGE[::-1]])


@pytest.mark.parametrize(
    "images",
    [
        BATCH,
        np.moveaxis(BATCH, -1, 1),
        torch.tensor(BATCH),
        torch.tensor(np.moveaxis(BATCH, -1, 1)),
        [IMAGE, IMAGE[::-1]],
        (IMAGE, IMAGE[::-1]),
        [[IMAGE], [IMAGE[::-1]]],
        [BATCH],
        [[Image.fromarray(IMAGE), torch.tensor(IMAGE[::-1].copy())]],
    ],
    ids=lambda images: f"{type(images).__name__} {getattr(images, 'shape', '')}",
)
def test_batches_equal_those_of_the_stock_processor(images):
    regions = [Region.from_box(5, 5, 30, 30), None]
    processor = build("pad")
    expected = np.concatenate(
        [processor(image, region)["pixel_values"] for image, region in zip(BATCH, regions, strict=True)]
    )
    assert np.array_equal(processor(images, regions)["pixel_values"], expected)
    stock = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    if isinstance(images, np.ndarray):
        assert np.array_equal(stock(images, return_tensors="np")["pixel_values"], expected[:, :3])


@pytest.mark.parametrize(
    ("images", "regions"),
    [
        (None, None),
        ([], None),
        ([[]], None),
        ([None], None),
        (5, None),
        ("none.png", None),
        ("not a path", None),
        ("", None),
        ("data:image/png;base64,????", None),
        (["none.png"], None),
        (b"", None),
        (np.zeros((0, 3)), None),
        (np.zeros((0, 4, 5, 3)), None),
        (np.zeros((2, 2, 4, 5, 3)), None),
        ([[1, 2], [3, 4]], None),
        ({"image": 1}, None),
        (BATCH, Region.from_box(5, 5, 30, 30)),
        (IMAGE, 5),
        ([IMAGE], 5),
        (IMAGE, {"box": 1}),
        (IMAGE, [5]),
        (IMAGE, np.zeros((40, 60))),
        (IMAGE, "box:1e30,0,2e30,9"),
        (IMAGE, "box:1000000,0,1000010,9"),
        (IMAGE, True),
    ],
    ids=lambda value: str(value)[:25],
)
def test_invalid_images_and_regions_are_a_one_line_error(images, regions):
    with pytest.raises(ValueError) as caught:
        build("pad")(images, regions)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_base64_text_is_an_image():
    text = base64.b64encode(encoded_image(noise_image(60, 40))).decode()
    expected = build("pad")(noise_image(60, 40))["pixel_values"]
    for images in (text, "data:image/png;base64," + text):
        assert np.array_equal(build("pad")(images)["pixel_values"], expected)
