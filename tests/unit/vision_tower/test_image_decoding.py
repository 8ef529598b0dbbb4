"""The image decoder: equal pixels for every kind of input, modes and depths, EXIF once, values in no range refused.
Judges: PIL's own conversions, Transformers' `convert_to_rgb`.
"""

import io
import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb

from mllm.data.samples import displayed_size, load_image
from tests.files import encoded_image
from tests.tiny import noise_image
from vision_tower import AlphaCLIPImageProcessor, Region, image_decoding
from vision_tower.image_decoding import decode_image, image_size

MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]
TIFF_MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"]


def in_mode(mode):
    """A noise image of that mode, partly transparent where the mode can be."""
    image = noise_image(30, 20)
    if mode in ("La", "RGBa"):
        return in_mode(mode.upper()).convert(mode)
    if mode == "LAB":
        return Image.merge("LAB", image.split())
    image = image.convert(mode)
    if mode.endswith("A"):
        image.putalpha(noise_image(30, 20, seed=1).convert("L"))
    return image


def pixels_of(source, **options):
    image = decode_image(source, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_all_input_types_give_the_same_pixels(tmp_path):
    image = noise_image(31, 20)
    image.save(tmp_path / "p.png")
    array = np.asarray(image)
    first = np.moveaxis(array, -1, 0)
    with open(tmp_path / "p.png", "rb") as file:
        sources = [
            image,
            Image.open(tmp_path / "p.png"),
            str(tmp_path / "p.png"),
            tmp_path / "p.png",
            encoded_image(image),
            bytearray(encoded_image(image)),
            memoryview(encoded_image(image)),
            io.BytesIO(encoded_image(image)),
            file,
            array,
            first,
            torch.tensor(array),
            torch.tensor(first),
            array / 255,
            (array / 255).astype(np.float32),
            torch.tensor(first / 255, requires_grad=True),
            torch.tensor(first / 255).half(),
            array.astype(np.float32),
            torch.tensor(first).bfloat16(),
            array.astype(np.uint16) * np.uint16(257),
            array.astype(np.int64),
            array.astype(np.int32) * 257,
            np.dstack([array, np.full((20, 31), 255, np.uint8)]),
            array[:, ::-1][:, ::-1],
            np.asfortranarray(array),
        ]
        for source in sources:
            assert np.array_equal(pixels_of(source), array), image_decoding.describe(source)
        processor = AlphaCLIPImageProcessor.for_size(32, "pad")
        expected = processor(image)["pixel_values"]
        for source in sources:
            if hasattr(source, "seek"):
                source.seek(0)
            assert np.array_equal(processor(source)["pixel_values"], expected), image_decoding.describe(source)


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_input_data_format(layout):
    array = np.random.default_rng(0).integers(0, 256, (3, 40, 3), dtype=np.uint8)
    expected = array if layout == "channels_last" else np.moveaxis(array, 0, -1)
    assert np.array_equal(pixels_of(array, input_data_format=layout), expected)
    processor = AlphaCLIPImageProcessor.for_size(32, "pad")
    assert np.array_equal(
        processor(array, input_data_format=layout)["pixel_values"], processor(Image.fromarray(expected))["pixel_values"]
    )
    # not said, an array is as numpy has it and a tensor as torch has it
    assert np.array_equal(pixels_of(array), array)
    assert np.array_equal(pixels_of(torch.tensor(array)), np.moveaxis(array, 0, -1))


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode):
    image = in_mode(mode)
    if mode == "LAB":  # `convert_to_rgb` takes its A for transparency: all is white
        expected = np.asarray(image.convert("RGB"))
    elif mode in ("La", "RGBa", "PA"):  # `convert_to_rgb` cannot read them
        alpha = {"La": "LA", "RGBa": "RGBA"}.get(mode)
        expected = convert_to_rgb((image.convert(alpha) if alpha else image).convert("RGBA"), return_numpy=True)
    else:
        expected = convert_to_rgb(image, return_numpy=True)
    assert np.array_equal(pixels_of(image), expected)
    if mode in TIFF_MODES:
        assert np.array_equal(np.asarray(load_image(encoded_image(image, "TIFF"))), expected)
    if mode in ("1", "L", "LA", "RGB", "RGBA"):
        array = np.asarray(image)
        assert np.array_equal(pixels_of(array), expected) and np.array_equal(pixels_of(torch.tensor(array)), expected)


def palettes():
    image = noise_image(30, 20).quantize(8)
    yield "a transparent index", {"transparency": image.getpixel((3, 3))}, image
    yield "transparency as bytes", {"transparency": bytes([0, 60, 255, 200, 0, 0, 9, 255])}, image
    rgb = noise_image(30, 20)
    yield "a transparent color", {"transparency": rgb.getpixel((3, 3))}, rgb
    yield "a transparent gray", {"transparency": rgb.convert("L").getpixel((3, 3))}, rgb.convert("L")


@pytest.mark.parametrize(("name", "options", "image"), list(palettes()), ids=lambda value: str(value)[:30])
def test_transparency_is_composited_onto_white(name, options, image):
    content = encoded_image(image, **options)
    expected = convert_to_rgb(Image.open(io.BytesIO(content)), return_numpy=True)
    assert np.array_equal(pixels_of(content), expected)
    assert np.array_equal(pixels_of(Image.open(io.BytesIO(content))), expected)
    assert (expected == 255).all(axis=-1).any() and not np.array_equal(expected, np.asarray(image.convert("RGB")))


def test_an_rgba_palette_is_composited_onto_white():
    image = Image.new("P", (4, 4))
    image.putpalette([200, 0, 0, 0, 0, 100, 0, 255], "RGBA")
    image.putpixel((0, 0), 1)
    assert pixels_of(image)[0, 0].tolist() == [0, 100, 0] and (pixels_of(image)[1:] == 255).all()


def test_strips_change_nothing(monkeypatch):
    images = [in_mode(mode) for mode in MODES]
    whole = [pixels_of(image) for image in images]
    monkeypatch.setattr(image_decoding, "_STRIP", 70)
    assert all(np.array_equal(pixels_of(image), one) for image, one in zip(images, whole, strict=True))


GRAY = np.arange(240, dtype=np.uint16).reshape(15, 16)


def deep_images():
    """The same tones in every depth."""
    big = GRAY * np.uint16(257)
    yield "uint16", Image.fromarray(big), "PNG"
    yield "uint16 TIFF", Image.fromarray(big), "TIFF"
    yield "big-endian TIFF", Image.fromarray(big.astype(">u2")), "TIFF"
    yield "PGM", Image.fromarray(big), "PPM"
    yield "int32 of 16 bits", Image.fromarray(big.astype(np.int32)), "TIFF"
    yield "int32 of 8 bits", Image.fromarray(GRAY.astype(np.int32)), "TIFF"
    yield "float 0..1", Image.fromarray((GRAY / 255).astype(np.float32)), "TIFF"
    yield "float 0..255", Image.fromarray(GRAY.astype(np.float32)), "TIFF"


@pytest.mark.parametrize(("name", "image", "kind"), list(deep_images()), ids=lambda value: str(value)[:20])
def test_bit_depths_keep_their_tones(tmp_path, name, image, kind):
    image.save(tmp_path / "x", kind)
    sources = [image, tmp_path / "x", Image.open(tmp_path / "x"), (tmp_path / "x").read_bytes(), np.asarray(image)]
    if np.asarray(image).dtype.isnative:
        sources.append(torch.tensor(np.asarray(image)))
    for source in sources:
        assert np.array_equal(pixels_of(source), np.dstack([GRAY] * 3)), image_decoding.describe(source)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_modes_of_16_bits(mode):
    image = Image.new(mode, (3, 2))
    for x, value in enumerate((0, 128 * 257, 65535)):
        image.putpixel((x, 0), value)
    order = ">u2" if mode == "I;16B" else "<u2"
    image.frombytes(np.array([[0, 128 * 257, 65535]] * 2, order).tobytes())
    assert pixels_of(image)[1, :, 0].tolist() == [0, 128, 255]


def test_a_dark_16_bit_file_is_not_read_as_8_bits(tmp_path):
    dark = (GRAY // 2).astype(np.uint16)
    for kind in ("PNG", "PPM"):
        Image.fromarray(dark).save(tmp_path / "x", kind)
        assert pixels_of(tmp_path / "x").max() == 0


def test_16_bits_give_the_channel_means_of_their_8_bits():
    processor = AlphaCLIPImageProcessor.for_size(32, "stretch")
    gray = noise_image(40, 40).convert("L")
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * np.uint16(257))
    assert np.array_equal(processor(deep)["pixel_values"], processor(gray)["pixel_values"])


def test_a_transparent_value_of_16_bits_is_white():
    deep = Image.fromarray(GRAY * np.uint16(257))
    deep.info["transparency"] = int(GRAY[2, 3]) * 257
    assert pixels_of(deep)[2, 3].tolist() == [255] * 3 and pixels_of(deep)[2, 4].tolist() == [GRAY[2, 4]] * 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, np.nan]]), "from nan to nan"),
        (np.array([[0, np.inf]]), "from 0 to inf"),
        (np.array([[-1.5, 2.2]]), "from -1.5 to 2.2"),
        (np.array([[0, 1.4]]), "from 0 to 1.4"),
        (np.array([[0, 300.0]]), "from 0 to 300"),
        (np.array([[-1, 200]]), "from -1 to 200"),
        (np.array([[0, 70000]]), "from 0 to 70000"),
        (np.array([[0, 1j]]), "expected numeric pixels"),
        (np.array([["a", "b"]]), "expected numeric pixels"),
        (np.array([[None, 1]]), "expected numeric pixels"),
        (np.zeros((0, 5)), "expected an image"),
        (np.zeros((4, 0, 3)), "expected an image"),
        (np.zeros(5), "expected an image"),
        (np.array(5), "expected an image"),
        (np.zeros((5, 6, 7)), "1, 2, 3 or 4 channels"),
        (np.zeros((2, 3, 4, 5, 6)), "expected an image"),
        (torch.zeros(3, 4).to_sparse(), "dense tensor"),
    ],
)
def test_invalid_arrays_are_an_error(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        decode_image(values)
    assert "\n" not in str(caught.value)


def test_float_and_int32_files_out_of_range_are_an_error(tmp_path):
    for values in (np.array([[-3, 2]], np.float32), np.array([[0, 70000]], np.int32)):
        Image.fromarray(values).save(tmp_path / "x.tif")
        for source in (tmp_path / "x.tif", Image.open(tmp_path / "x.tif")):
            with pytest.raises(ValueError, match="has values from .* expected bools, integers"):
                decode_image(source)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "MPO"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_exif_is_applied_exactly_once(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.kron(noise_image(3, 2), np.ones((8, 8, 1))).astype(np.uint8))
    stored.save(tmp_path / "x", kind, exif=exif)
    stored.save(tmp_path / "plain", kind)
    plain = Image.open(tmp_path / "plain").convert("RGB")
    plain.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(plain))
    once = decode_image(tmp_path / "x")
    assert displayed_size(tmp_path / "x") == image_size(tmp_path / "x") == once.size == expected.shape[1::-1]
    sources = [Image.open(tmp_path / "x"), (tmp_path / "x").read_bytes(), once, load_image(str(tmp_path / "x"))]
    sources += [decode_image(once), Image.open(tmp_path / "x").convert("RGB"), once.copy()]
    sources += [ImageOps.exif_transpose(Image.open(tmp_path / "x"))]
    for source in [once, *sources]:
        assert np.array_equal(pixels_of(source), expected)
    processor = AlphaCLIPImageProcessor.for_size(32, "pad")
    values = [processor(source)["pixel_values"] for source in (str(tmp_path / "x"), *sources)]
    assert all(np.array_equal(value, values[0]) for value in values)
    mask = Image.fromarray((np.arange(384).reshape(16, 24) < 100).astype(np.uint8) * 255)
    if kind == "PNG":
        mask.save(tmp_path / "mask.png", exif=exif)
        turned = Region.from_mask(tmp_path / "mask.png")
        assert turned == Region.from_mask(Image.open(tmp_path / "mask.png"))
        assert turned.data[:2] == expected.shape[:2]


JUNK = [b"Exif\0\0junkjunkjunkjunk", b"junk", b"", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("junk", JUNK)
def test_invalid_exif_is_ignored(tmp_path, kind, junk):
    picture = noise_image(64, 48)
    picture.save(tmp_path / "x", kind, exif=junk)
    picture.save(tmp_path / "plain", kind)
    expected = pixels_of(tmp_path / "plain")
    processor = AlphaCLIPImageProcessor.for_size(32, "pad")
    values = processor(str(tmp_path / "plain"))["pixel_values"]
    for source in (str(tmp_path / "x"), Image.open(tmp_path / "x"), load_image(str(tmp_path / "x"))):
        assert np.array_equal(pixels_of(source), expected)
        assert np.array_equal(processor(source)["pixel_values"], values)
    assert displayed_size(tmp_path / "x") == (64, 48)
    mask = Image.new("L", (20, 10))
    mask.paste(255, (3, 3, 9, 8))
    mask.save(tmp_path / "mask", "PNG", exif=junk)
    assert Region.from_mask(tmp_path / "mask").bounding_box(10, 20) == (3, 3, 9, 8)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_first_frame_of_a_file_and_the_current_frame_of_a_pil_image(tmp_path, kind):
    frames = [Image.new("RGB", (16, 16), color) for color in ((255, 0, 0), (0, 0, 255), (0, 255, 0))]
    frames[0].save(tmp_path / "x", kind, save_all=True, append_images=frames[1:])
    for source in (tmp_path / "x", (tmp_path / "x").read_bytes(), Image.open(tmp_path / "x")):
        assert np.abs(pixels_of(source).astype(int) - (255, 0, 0)).max() < 12
    with Image.open(tmp_path / "x") as image:
        image.seek(2)
        assert np.abs(pixels_of(image).astype(int) - (0, 255, 0)).max() < 12


def test_a_pil_image_is_not_modified():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encoded_image(in_mode("RGBA"), exif=exif)))
    before = image.copy()
    decode_image(image)
    assert image.mode == "RGBA" and image.tobytes() == before.tobytes() and image.getexif()[0x0112] == 6


def test_the_pixel_limit_is_checked_before_decoding(tmp_path, monkeypatch):
    noise_image(30, 20).save(tmp_path / "x.png")
    for source in (tmp_path / "x.png", Image.open(tmp_path / "x.png"), np.zeros((20, 30, 3)), noise_image(30, 20)):
        assert decode_image(source, max_pixels=600).size == (30, 20)
        with pytest.raises(ValueError, match="too many pixels: 30 x 20 = 600, expected at most 599"):
            decode_image(source, max_pixels=599)
    Image.new("1", (12000, 9000)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="too many pixels: 12000 x 9000"):
            decode_image(tmp_path / "large.png")


def test_eps_files_are_not_run(tmp_path, monkeypatch):
    noise_image(30, 20).save(tmp_path / "x.eps")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kw: pytest.fail("Ghostscript was run"))
    for source in (tmp_path / "x.eps", Image.open(tmp_path / "x.eps")):
        with pytest.raises(ValueError, match="EPS"):
            decode_image(source)


def test_bugs_are_not_reported_as_damaged_files(tmp_path, monkeypatch):
    noise_image(30, 20).convert("RGBA").save(tmp_path / "x.png")

    def broken(*args, **kwargs):
        raise TypeError("a bug")

    for name in ("_to_rgb", "_load", "_open_file", "_check_pixels", "has_transparency", "_to_8_bits", "_from_array"):
        with monkeypatch.context() as patch:
            patch.setattr(image_decoding, name, broken)
            with pytest.raises(TypeError, match="a bug"):
                decode_image(tmp_path / "x.png")
                decode_image(np.zeros((3, 4)))


@pytest.mark.parametrize("source", ["none.png", "x" * 5000, "a\0b", "", b"", b"text", io.BytesIO(b"text"), 5, object()])
def test_unsupported_inputs_are_a_one_line_error(source):
    with pytest.raises(ValueError) as caught:
        decode_image(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_a_rotated_tiff_is_the_same_by_path_and_by_bytes(tmp_path, mode):
    """PIL maps a plain TIFF that it opens by its name into memory, with the size that it will have once turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded_image(in_mode(mode), "TIFF", exif=exif)
    (tmp_path / "x.tif").write_bytes(content)
    expected = pixels_of(content)
    assert expected.shape == (30, 20, 3)
    for source in (tmp_path / "x.tif", Image.open(tmp_path / "x.tif")):
        assert np.array_equal(pixels_of(source), expected)


def test_16_bit_color_gives_equal_pixels_as_a_file_and_as_an_array():
    values = np.arange(0, 65536, 91, dtype=np.uint16)[:720].reshape(12, 20, 3)
    # PIL writes no such file: the array as a TIFF, big-endian samples after one directory
    tags = [(256, 4, 20), (257, 4, 12), (258, 3, 0), (259, 3, 1), (262, 3, 2), (273, 4, 0), (277, 3, 3), (278, 4, 12)]
    tags += [(279, 4, values.nbytes)]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b""
    for tag, kind, value in tags:
        count, value = (3, start) if tag == 258 else (1, start + 6 if tag == 273 else value)
        body = value.to_bytes(2, "big") + b"\0\0" if kind == 3 and count == 1 else value.to_bytes(4, "big")
        entries += tag.to_bytes(2, "big") + kind.to_bytes(2, "big") + count.to_bytes(4, "big") + body
    content = b"MM\0*\0\0\0\x08" + len(tags).to_bytes(2, "big") + entries + bytes(4) + b"\0\x10" * 3
    content += values.astype(">u2").tobytes()
    assert np.array_equal(pixels_of(content), pixels_of(values))


def test_a_damaged_length_is_not_allocated(tmp_path):
    """A PNG chunk that states 4 GB: a file would be asked for all of them at once."""
    content = bytearray(encoded_image(in_mode("L")))
    place = content.index(b"IDAT")
    content[place - 4 : place] = b"\xff\xff\xff\xff"
    (tmp_path / "x.png").write_bytes(content)
    with open(tmp_path / "x.png", "rb") as plain, image_decoding._File(tmp_path / "x.png") as file:
        assert file.read(2**62) == plain.read()
        assert file.read() == b"" and file.fileno()


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ValueError, match="got a device or pipe"):
        decode_image(tmp_path / "x.png")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, 4, 5, device="meta"),
        torch.zeros(3, 4, 5, dtype=torch.complex64).conj(),
        torch.zeros(4, 5, dtype=torch.uint8).view(torch.bits8),
        torch.zeros(3, 4, 5).to_sparse(),
    ],
)
def test_unsupported_tensors_are_an_error(tensor):
    with pytest.raises(ValueError, match="expected a dense tensor"):
        decode_image(tensor)
    with pytest.raises(ValueError, match="expected a dense tensor"):
        Region.from_mask(tensor)


def test_a_negated_view_is_read():
    assert not pixels_of(torch._neg_view(torch.zeros(3, 4, 5))).any()
