"""Masks: image files, arrays and COCO run lengths -> coverage as uint8 (H, W)."""

from __future__ import annotations

import base64
import binascii
import io
import os
import zlib
from typing import Any

import numpy as np
from PIL import Image

from .image_decoding import as_array, has_transparency, open_image, reading
from .region_values import are_integers, plain_lists, shorten

_PNG_URI = "data:image/png;base64,"
MAX_MASK_PIXELS = 200_000_000  # 4 bytes per pixel; without a limit, a few bytes of run lengths could exhaust memory
_ROWS = 256  # rows converted at a time; a mask of 100 million pixels takes 0.8 GB as float64


def check_mask_size(height: int, width: int) -> None:
    """Check the size of a mask.

    Raises:
        ValueError: If a side is not positive, or the mask has more than `MAX_MASK_PIXELS` pixels.
    """
    if height < 1 or width < 1 or height * width > MAX_MASK_PIXELS:
        raise ValueError(
            f"expected an image of at most {MAX_MASK_PIXELS:,} pixels for a region, got {shorten(width)} x "
            f"{shorten(height)}"
        )


def read_mask(mask: Any, soft: bool = False) -> np.ndarray:
    """Read a mask from an image file, a PIL image, an array or a tensor.

    Args:
        mask: See `Region.from_mask`.
        soft: Whether unsigned integers are coverage, from 0 to the maximum of their type.

    Returns:
        uint8 (H, W), from 0 (outside) to 255 (inside).

    Raises:
        ValueError: If the mask cannot be read or its values are ambiguous.
    """
    if isinstance(mask, str | os.PathLike | bytes | Image.Image) or hasattr(mask, "read"):
        mask = _image_to_array(_open_mask(mask))
    try:
        array = np.asarray(as_array(mask))
    except (TypeError, RuntimeError) as error:  # raised by numpy for arrays of objects
        raise ValueError(f"expected a mask (H, W), got {shorten(mask)}") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"expected a mask of bools, of 0 and 1, uint8 0..255 or floats 0..1, got {array.dtype}")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"expected a mask (H, W), got shape {array.shape}")
    return _to_coverage(array, soft)


def _to_coverage(array: np.ndarray, soft: bool) -> np.ndarray:
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    low, high = array.min(), array.max()  # NaN if the array contains NaN
    if array.dtype.kind == "f" and low >= 0 and high <= 1:
        return _scale_soft(array, 1)
    if array.dtype.kind in "iu" and low >= 0:
        if soft and array.dtype in (np.uint8, np.uint16):
            return array if array.dtype == np.uint8 else _scale_soft(array, 65535)
        for inside in (1, 255, 65535):  # with 0, the only unambiguous pairs of values
            if high <= inside and ((array == 0) | (array == inside)).all():
                return (array != 0).astype(np.uint8) * np.uint8(255)
    raise ValueError(
        "expected a mask of two values (bools, 0 and 1, or 0 and 255) or of floats 0..1, got "
        f"{array.dtype} from {low:g} to {high:g}; for a label map, select one object (mask == label); "
        "for a mask with soft edges, pass soft=True ('softmask:FILE.png')"
    )


def _scale_soft(array: np.ndarray, largest: int) -> np.ndarray:
    """Scale 0..largest to 0..255, rounding up so that small values do not become 0."""
    pixels = np.empty(array.shape, np.uint8)
    for top in range(0, len(array), _ROWS):
        values = array[top : top + _ROWS].astype(np.float64) * (255 / largest)
        # float32 represents v / 255 to within 2e-5 of a step
        pixels[top : top + _ROWS] = np.maximum(np.ceil(values - 1e-4), values > 0)
    return pixels


def _open_mask(source: Any) -> Image.Image:
    if isinstance(source, str) and source.startswith(_PNG_URI):
        try:
            source = base64.b64decode(source[len(_PNG_URI) :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"cannot decode the mask {shorten(source)} as base64: {error}") from None
        return open_image(source, name="base64 mask")
    if isinstance(source, str | os.PathLike) and not os.path.isfile(source):
        raise ValueError(f"mask file not found: {shorten(os.fspath(source))}")
    return open_image(source)


def _image_to_array(image: Image.Image) -> np.ndarray:
    """Convert a mask image to an array (H, W).

    Raises:
        ValueError: If the image has transparent pixels (the mask could be the color or the transparency), is colored,
            or has a palette with more than two colors in use.
    """
    with reading("mask"):
        opaque = not has_transparency(image)
        if not opaque:
            flat = image.convert("LA") if image.mode == "La" else image
            opaque = flat.convert("RGBA").getextrema()[-1] == (255, 255)
        pixels = np.asarray(image)
        colors = np.asarray(image.convert("RGB")) if image.mode in ("P", "PA") else None
    if not opaque:
        raise ValueError(
            f"the mask of mode {image.mode} has transparent pixels; expected an opaque gray image ('L'), 0 outside and "
            "255 inside"
        )
    if image.mode in ("1", "L", "F", "I") or image.mode.startswith("I;"):
        return pixels
    if colors is not None:
        return _palette_mask(pixels if image.mode == "P" else pixels[..., 0], colors)
    if image.mode in ("RGB", "RGBX", "RGBA", "RGBa", "LA", "La"):
        channels = pixels[..., :3] if image.mode.startswith("RGB") else pixels[..., :1]
        if (channels == channels[..., :1]).all():
            return channels[..., 0]
    raise ValueError(
        f"expected a gray mask, got an image of mode {image.mode}; convert it to 'L', 0 outside and 255 inside"
    )


def _palette_mask(indices: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Boolean mask (H, W) from the palette indices (H, W) and colors (H, W, 3) of an image with at most two colors."""
    if len(np.unique(indices)) > 2:
        raise ValueError("the palette mask contains several objects; keep one object and set all other pixels to 0")
    inside = np.asarray(colors.any(axis=-1))  # by color, since either index can be black
    if inside.all() and (colors != 255).any():
        raise ValueError("the palette mask has no black pixels; expected black outside the region")
    return inside


def pack_mask(pixels: np.ndarray) -> tuple[int, int, str, bytes]:
    """Compress a mask into the `data` of a `Region`.

    Args:
        pixels: uint8 (H, W), see `read_mask`.

    Returns:
        Height, width, "binary" or "soft", and zlib-compressed bytes: 1 bit per pixel if binary, else 8.
    """
    binary = bool(((pixels == 0) | (pixels == 255)).all())  # 40 times faster than np.isin
    packed = np.packbits(pixels > 0) if binary else pixels
    height, width = pixels.shape
    return height, width, "binary" if binary else "soft", zlib.compress(packed.tobytes(), 1)


def unpack_mask(data: tuple) -> np.ndarray:
    """The mask that `pack_mask` compressed: float32 (H, W) in [0, 1]."""
    height, width, depth, packed = data
    pixels = np.frombuffer(zlib.decompress(packed), np.uint8)
    if depth == "binary":
        return np.unpackbits(pixels, count=height * width).reshape(height, width).astype(np.float32)
    return pixels.reshape(height, width).astype(np.float32) / 255


def is_packed_mask(height: Any, width: Any, depth: Any, packed: Any) -> bool:
    """Whether the arguments are a result of `pack_mask`, with at most `MAX_MASK_PIXELS` pixels."""
    if not isinstance(packed, bytes) or not all(isinstance(side, int) and side > 0 for side in (height, width)):
        return False
    length = {"binary": -(-height * width // 8), "soft": height * width}.get(depth)
    if length is None or height * width > MAX_MASK_PIXELS:
        return False
    try:
        return len(zlib.decompressobj().decompress(packed, length + 1)) == length
    except zlib.error:
        return False


def mask_to_json(data: tuple) -> dict[str, Any]:
    """The JSON record of a packed mask: an RLE if binary, else a PNG in base64."""
    height, width, depth, _ = data
    mask = unpack_mask(data)
    if depth == "binary":
        return {"rle": {"size": [height, width], "counts": _run_lengths(mask > 0)}}
    file = io.BytesIO()
    Image.fromarray(np.rint(mask * 255).astype(np.uint8)).save(file, "PNG")
    return {"mask": _PNG_URI + base64.b64encode(file.getvalue()).decode("ascii"), "soft": True}


def decode_rle(rle: Any) -> np.ndarray:
    """Decode a COCO RLE, compressed or not.

    pycocotools is not used because it decodes damaged strings without an error, and to avoid the dependency.

    Args:
        rle: {"size": [height, width], "counts": str, bytes or list of run lengths}.

    Returns:
        bool (H, W).

    Raises:
        ValueError: If the RLE is malformed, its runs do not add up to height * width, or it is too large.
    """
    if not isinstance(rle, dict) or not {"size", "counts"} <= rle.keys():
        raise ValueError(f"expected an RLE {{'size': [h, w], 'counts': ...}}, got {shorten(rle)}")
    size, counts = plain_lists(rle["size"]), plain_lists(rle["counts"])
    compressed = isinstance(counts, str | bytes)
    if not are_integers(size) or len(size) != 2 or not (compressed or are_integers(counts)):
        raise ValueError(f"expected an RLE {{'size': [h, w], 'counts': ...}}, got {shorten(rle)}")
    height, width = map(int, size)
    runs = _decompress_counts(counts) if compressed else [*map(int, counts)]
    # Sum Python integers: an int64 sum can overflow to the expected value, and np.repeat then crashes.
    if min(runs, default=-1) < 0 or height < 1 or width < 1 or sum(runs) != height * width:
        raise ValueError(
            f"the RLE is inconsistent: its runs add up to {shorten(sum(runs))}, expected {shorten(height)} * "
            f"{shorten(width)}"
        )
    check_mask_size(height, width)
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _decompress_counts(counts: str | bytes) -> list[int]:
    """Run lengths of a compressed COCO RLE.

    Source: `rleFrString` in pycocotools, maskApi.c. Each character, minus 48, has 5 bits of the number and a
        continuation bit. From the third run on, the number is the difference from the run two positions before.
    """
    codes = counts.encode("ascii") if isinstance(counts, str) else counts
    runs: list[int] = []
    position = 0
    while position < len(codes):
        value, shift, more = 0, 0, True
        while more:
            code = codes[position] - 48
            if not 0 <= code < 64 or shift > 60 or position + 1 == len(codes) and code & 32:
                raise ValueError("not a compressed RLE")
            value |= (code & 31) << shift
            more = bool(code & 32)
            position, shift = position + 1, shift + 5
            if not more and code & 16:
                value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed counts of a bool mask (H, W): column-major runs, starting with a run outside."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return [0, *runs] if flat[0] else runs
