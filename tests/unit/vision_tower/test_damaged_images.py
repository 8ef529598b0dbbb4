"""Damaged files of every format that PIL writes, and some that it only reads: a result or a ValueError of one line.

The list of exceptions in `image_decoding` was found so. `python -m tests.unit.vision_tower.test_damaged_images SEED N`
damages each file N times and counts what PIL raised.
"""

import collections
import io
import os
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from mllm.data.samples import load_image
from tests.tiny import noise_image
from vision_tower import Region, image_decoding
from vision_tower.image_decoding import DAMAGE_ERRORS, decode_image, image_size

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F", "I;16")
EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010E], EXIF[0x8769] = 6, "hello", {0x9286: "x"}
TURNED = EXIF.tobytes()
FRAMES = {"save_all": True, "append_images": [noise_image(40, 30, 3)]}
COMPRESSIONS = ("packbits", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "group3", "group4", "lzma", "zstd", "webp")
# format -> options beside none
OPTIONS = {
    "TIFF": [*({"compression": name} for name in COMPRESSIONS), {"exif": TURNED}, FRAMES],
    "JPEG": [{"progressive": True}, {"exif": TURNED}, {"icc_profile": b"x" * 300}],
    "PNG": [{"exif": TURNED}, FRAMES],
    "WEBP": [{"lossless": True}, {"exif": TURNED}, FRAMES],
    "AVIF": [{"exif": TURNED}, FRAMES],
    "GIF": [FRAMES],
    "TGA": [{"compression": "tga_rle"}],
    "ICO": [{"bitmap_format": "bmp"}],
    "SGI": [{"rle": True}],
    "BLP": [{"blp_version": "BLP1"}],
    "JPEG2000": [{"no_jp2": True}, {"irreversible": True}],
    "DDS": [{"pixel_format": name} for name in ("DXT1", "DXT3", "DXT5", "BC2", "BC3", "BC5")],
}
FORMATS = ("AVIF BLP BMP DDS DIB EPS GIF ICNS ICO IM JPEG JPEG2000 MPO MSP PCX PNG PPM QOI SGI SPIDER TGA TIFF").split()
FORMATS += ["WEBP", "XBM"]


def header(*numbers, order="big", size=4):
    return b"".join(number.to_bytes(size, order) for number in numbers)


def written_by_hand():
    yield "PPM", b"P1\n3 2\n1 0 1\n0 1 0\n"
    yield "PPM", b"P3\n1 2\n255\n1 2 3 4 5 6\n"
    yield "PPM", b"P5\n3 2\n4095\n" + bytes(12)
    yield "PPM", b"Pf\n3 2\n-1.0\n" + bytes(24)
    yield "XPM", b'/* XPM */\nstatic char * a[] = {\n"3 2 2 1",\n"a c #ff0000",\n"b c #00ff00",\n"aab",\n"bba"};\n'
    cards = ("SIMPLE  =  T", "BITPIX  =  8", "NAXIS   =  2", "NAXIS1  =  4", "NAXIS2  =  3", "END")
    yield "FITS", "".join(card.ljust(80) for card in cards).ljust(2880).encode() + bytes(2880)
    yield "PSD", b"8BPS\0\1" + bytes(6) + b"\0\3" + header(3, 4) + b"\0\x08\0\3" + bytes(50)
    yield "SUN", header(0x59A66A95, 4, 3, 24, 36, 1, 0, 0) + bytes(36)
    yield "GBR", header(33, 2, 4, 3, 1) + b"GIMP" + header(5) + b"name\0" + bytes(12)
    yield "FTEX", b"FTEX" + header(0, 4, 4, 1, 1, 0, 32, 64, order="little") + bytes(64)
    yield "IPTC", b"\x1c\x03\x3c\0\2\1\0\x1c\x03\x14\0\1\3\x1c\x03\x1e\0\1\2\x1c\x03\x78\0\1\1\x1c\x08\x0a\0\6abcdef"
    yield "XVTHUMB", b"P7 332\n#x\n#END_OF_COMMENTS\n3 2 255\n" + bytes(6)


def whole_files(modes=MODES):
    """Pairs of a format and the content of a file of it."""
    for kind in FORMATS:
        for options in ({}, *OPTIONS.get(kind, [])):
            for mode in modes:
                image = noise_image(*((64, 64) if kind in ("ICNS", "ICO") else (40, 30))).convert(mode.split(";")[0])
                image = image if mode != "I;16" else Image.fromarray(np.asarray(image).astype(np.uint16))
                file = io.BytesIO()
                try:
                    image.save(file, kind, **options)
                except (OSError, ValueError, KeyError, SystemError, RuntimeError):
                    continue  # a mode that the format does not have
                yield kind, file.getvalue()
    yield from written_by_hand()


def damaged(content, rng):
    """Cut short, bytes changed, moved, left out or doubled, numbers in texts and heads changed."""
    data = np.frombuffer(content, np.uint8).copy()
    how, head = rng.integers(6), min(len(data), int(rng.choice([64, 300, len(data)])))
    start = int(rng.integers(len(data)))
    end = min(start + int(rng.integers(40)), len(data))
    digits = [i for i, code in enumerate(data[:400]) if 48 <= code < 58] or [0]
    if how == 0:
        data = data[:start]
    elif how == 1:
        data[rng.integers(0, head, rng.integers(1, 6))] = rng.integers(0, 256)
    elif how == 2:
        start = int(rng.integers(head))
        data[start : start + rng.integers(1, 5)] = rng.choice([0, 255, 127, 128, 1])
    elif how == 3:
        parts = [data[:start], data[end:]] if rng.random() < 0.5 else [data[:end], data[start:]]
        data = np.concatenate(parts)
    elif how == 4:
        data[rng.choice(digits)] = rng.choice([48, 57, 45, 32, 65, 46])
    else:
        start = int(rng.integers(max(head - 4, 1)))
        number = rng.choice([b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\1\0\0\0", b"\0\0\0\1", b"\x7f\x80\0\0"])
        number = np.frombuffer(number.ljust(4, b"\0"), np.uint8)
        data[start : start + 4] = number[: len(data[start : start + 4])]
    return data.tobytes()


def outcome(content):
    """The exception that PIL raised, or None; anything but a ValueError of one line passes through."""
    for read in (decode_image, image_size, Region.from_mask):
        try:
            read(content)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            if read is decode_image:
                failed = type(error.__cause__ or error.__context__ or error)
        else:
            failed = None if read is decode_image else failed
    return failed


def damage_all(modes, seed, times):
    rng = np.random.default_rng(seed)
    raised = collections.Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, content in whole_files(modes):
            for _ in range(times):
                raised[kind, outcome(damaged(content, rng))] += 1
    return raised


def test_undamaged_files_of_every_format():
    read = collections.Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, content in whole_files(("1", "RGB")):
            if kind != "EPS":
                read[kind] += decode_image(content).size[0] > 0
    assert len(read) >= 30 and min(read.values()) >= 1


def test_damaged_files_of_every_format():
    raised = damage_all(("1", "RGB"), 0, 3)
    assert len({kind for kind, _ in raised}) >= 30
    assert sum(count for (_, failed), count in raised.items() if failed) > 90


@pytest.mark.slow
def test_thousands_of_damaged_files():
    raised = damage_all(MODES, 1, 40)
    assert sum(raised.values()) > 7000
    assert sum(count for (_, failed), count in raised.items() if failed) > 3000


def test_a_type_error_of_pil_is_a_damaged_file():
    fraction = b"Image type: L\r\nImage size (x*y): 3.5*2\r\nFile size (no of images): 1\r\n"
    with pytest.raises(ValueError, match="cannot read the image .*integer"):
        decode_image(fraction.ljust(511, b"\0") + b"\x1a" + bytes(12))


@pytest.mark.parametrize("error", [*DAMAGE_ERRORS, NotImplementedError])
def test_each_listed_exception_becomes_a_value_error(monkeypatch, tmp_path, error):
    noise_image(30, 20).save(tmp_path / "x.png")

    def fail(self):
        raise error("two\nlines")

    monkeypatch.setattr(Image.Image, "load", fail)
    for read in (decode_image, lambda path: load_image(str(path)), Region.from_mask):
        with pytest.raises(ValueError, match=r"x\.png.*two lines") as caught:
            read(tmp_path / "x.png")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [KeyError, AttributeError, MemoryError, ZeroDivisionError, KeyboardInterrupt])
def test_other_exceptions_are_not_caught(monkeypatch, tmp_path, error):
    noise_image(30, 20).save(tmp_path / "x.png")

    def fail(self):
        raise error("x")

    monkeypatch.setattr(image_decoding.Image.Image, "load", fail)
    with pytest.raises(error):
        decode_image(tmp_path / "x.png")


if __name__ == "__main__":
    counts = damage_all(MODES, int(sys.argv[1]), int(sys.argv[2]))
    for (kind, failed), count in sorted(counts.items(), key=str):
        print(kind, failed and failed.__name__, count)  # noqa: T201, a script


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_devices_and_pipes_are_an_error(tmp_path, kind):
    path = "/dev/zero"
    if kind == "pipe":
        path = tmp_path / "pipe.png"
        os.mkfifo(path)
    with pytest.raises(ValueError, match="got a device or pipe"):
        decode_image(path)
