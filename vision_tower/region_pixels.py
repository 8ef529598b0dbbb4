"""Pixels of a region: coverage of boxes, polygons and lines, mask images and arrays, COCO run lengths."""

from __future__ import annotations

import base64
import binascii
import math
import os
from typing import Any

import numpy as np
from PIL import Image

from .image_decoding import as_array, has_transparency, open_image, reading
from .region_points import shortened

PNG_URI = "data:image/png;base64,"
_SUBROWS = 8  # scan lines a pixel row, for polygons; across a line, coverage is exact
_STRIP = 4_000_000  # pixels drawn at a time
_MAX_CROSSINGS = 10_000_000  # of a polygon's outline with scan lines: they take seconds, and 0.5 GB
MAX_DRAWN = 1_000_000_000  # pixels in the boxes around the parts of a region: they take some ten seconds
_ROWS = 256  # of a mask converted at a time: as float64, one of 100 million pixels would take 0.8 GB


def mask_pixels(mask: Any, soft: bool = False) -> np.ndarray:
    """uint8 (H, W), 0 outside to 255 inside. `soft`: the integers of the mask are coverage, 0 to its type's largest.

    Raises:
        ValueError: If the mask cannot be read, or its values could mean several things.
    """
    if isinstance(mask, str | os.PathLike | bytes | Image.Image) or hasattr(mask, "read"):
        mask = _gray(_open_mask(mask))
    try:
        array = np.asarray(as_array(mask))
    except (TypeError, RuntimeError) as error:  # of numpy, about objects in it
        raise ValueError(f"expected a mask (H, W), got {shortened(mask)}") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"expected a mask of bools, of 0 and 1, uint8 0..255 or floats 0..1, got {array.dtype}")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"expected a mask (H, W), got shape {array.shape}")
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    low, high = array.min(), array.max()  # NaN if any is
    if array.dtype.kind == "f" and low >= 0 and high <= 1:
        return _soft_pixels(array, 1)
    if array.dtype.kind in "iu" and low >= 0:
        if soft and array.dtype in (np.uint8, np.uint16):
            return array if array.dtype == np.uint8 else _soft_pixels(array, 65535)
        # for each pair of values that can only be outside and inside
        for inside in (1, 255, 65535):
            if high <= inside and ((array == 0) | (array == inside)).all():
                return (array != 0).astype(np.uint8) * np.uint8(255)
    raise ValueError(
        "expected a mask of two values (bools, 0 and 1, or 0 and 255) or of floats 0..1, got "
        f"{array.dtype} from {low:g} to {high:g}; of a map of labels give one object (mask == label); "
        "a mask with soft edges needs soft=True ('softmask:FILE.png')"
    )


def _soft_pixels(array: np.ndarray, largest: int) -> np.ndarray:
    """Values 0..largest as 0..255, rounded up, so that a faint value does not vanish."""
    pixels = np.empty(array.shape, np.uint8)
    for top in range(0, len(array), _ROWS):
        values = array[top : top + _ROWS].astype(np.float64) * (255 / largest)
        # float32 holds v / 255 to 2e-5 of such a step
        pixels[top : top + _ROWS] = np.maximum(np.ceil(values - 1e-4), values > 0)
    return pixels


def _open_mask(source: Any) -> Image.Image:
    if isinstance(source, str) and source.startswith(PNG_URI):
        try:
            source = base64.b64decode(source[len(PNG_URI) :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"cannot read the mask {shortened(source)} as base64: {error}") from None
        return open_image(source, name="mask in base64")
    if isinstance(source, str | os.PathLike) and not os.path.isfile(source):
        raise ValueError(f"there is no mask file {shortened(os.fspath(source))}")
    return open_image(source)


def _gray(image: Image.Image) -> np.ndarray:
    """A mask image as an array; modes that could mean several things are refused.

    Raises:
        ValueError: If pixels are transparent (which of color and transparency is the mask?), colored, or of more than
            two colors in a palette.
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
        indices = pixels if image.mode == "P" else pixels[..., 0]
        if len(np.unique(indices)) > 2:
            raise ValueError("the palette mask holds several objects; keep one of them: an image with 0 outside")
        inside = colors.any(axis=-1)  # not by index: which one is black is the writer's choice
        if inside.all() and (colors != 255).any():
            raise ValueError("the palette mask has no black; expected black outside the region")
        return inside
    if image.mode in ("RGB", "RGBX", "RGBA", "RGBa", "LA", "La"):
        channels = pixels[..., :3] if image.mode.startswith("RGB") else pixels[..., :1]
        if (channels == channels[..., :1]).all():
            return channels[..., 0]
    raise ValueError(
        f"expected a gray mask, got an image of mode {image.mode}; convert it to 'L', 0 outside and 255 inside"
    )


def box_coverage(box: tuple[float, float, float, float], height: int, width: int) -> np.ndarray:
    """Share of each pixel that the box covers, exactly."""
    x0, y0, x1, y1 = box
    columns, rows = np.arange(width), np.arange(height)
    across = (np.minimum(columns + 1, x1) - np.maximum(columns, x0)).clip(0, 1)
    down = (np.minimum(rows + 1, y1) - np.maximum(rows, y0)).clip(0, 1)
    coverage = np.empty((height, width), np.float32)
    return np.multiply(down[:, None], across, out=coverage, casting="same_kind")


def polygon_coverage(points: tuple, height: int, width: int) -> np.ndarray:
    """Share of each pixel that the polygon covers: exact along x, `_SUBROWS` scan lines a pixel along y; even-odd
    filling.
    """
    x0, y0 = np.array(points).T
    x1, y1 = np.roll(x0, -1), np.roll(y0, -1)
    top, bottom = max(math.floor(y0.min()), 0), min(math.ceil(y0.max()), height)
    coverage = np.zeros((height, width), np.float32)
    crossings = _crossings(y0, y1, top, bottom)
    if crossings > _MAX_CROSSINGS:
        raise ValueError(
            f"the polygon of {len(points):,} vertices has too long an outline for an image of {height} rows; give it "
            "as a mask"
        )
    rows = max(1, _STRIP // (width + 2))
    for start in range(top, bottom, rows):
        end = min(start + rows, bottom)
        coverage[start:end] = _scanned((x0, y0, x1, y1), start, end, width)
    # Thinner than the distance of the scan lines: still a trace. Only then: the box around a polygon that merely passes
    # a corner of the picture reaches into it.
    thin = min(np.ptp(x0), np.ptp(y0)) < 1 / _SUBROWS
    if thin and not coverage.any():
        return box_coverage((x0.min(), y0.min(), x0.max(), y0.max()), height, width)
    return coverage


def _lines(start: int, end: int) -> np.ndarray:
    """The scan lines of the pixel rows from `start` to before `end`."""
    return (np.arange(start, end)[:, None] + (np.arange(_SUBROWS) + 0.5) / _SUBROWS).ravel()


def _crossings(y0: np.ndarray, y1: np.ndarray, start: int, end: int) -> int:
    """How often edges cross scan lines."""
    lines = _lines(start, end)
    return int(np.abs(np.searchsorted(lines, y0) - np.searchsorted(lines, y1)).sum())


def _scanned(edges: tuple[np.ndarray, ...], start: int, end: int, width: int) -> np.ndarray:
    """Share of each pixel of some rows that a polygon covers."""
    x0, y0, x1, y1 = edges
    lines = _lines(start, end)
    first, last = np.searchsorted(lines, np.minimum(y0, y1)), np.searchsorted(lines, np.maximum(y0, y1))
    counts = last - first
    edge = np.repeat(np.arange(len(x0)), counts)
    line = np.arange(len(edge)) + np.repeat(first - np.cumsum(counts) + counts, counts)
    xs = x0[edge] + (lines[line] - y0[edge]) * (x1[edge] - x0[edge]) / (y1[edge] - y0[edge])
    order = np.lexsort((xs, line))
    xs, line = xs[order].clip(0, width), line[order]
    # in and out by turns: a closed outline crosses each line an even number of times
    signs = np.where(np.arange(len(xs)) % 2 == 0, 1.0, -1.0) / _SUBROWS
    cells = np.floor(xs).astype(int)
    change = np.zeros((end - start) * (width + 2))  # of coverage from a pixel to the next on its right
    places = line // _SUBROWS * (width + 2) + cells
    for subrow in range(_SUBROWS):
        of_line = line % _SUBROWS == subrow
        place, sign, share = places[of_line], signs[of_line], (xs - cells)[of_line]
        np.add.at(change, place, sign * (1 - share))
        np.add.at(change, place + 1, sign * share)
    covered = change.reshape(end - start, width + 2)[:, :width].cumsum(axis=1).clip(0, 1)
    covered[covered < 1e-9] = 0  # rounding of the sum
    return covered


def line_coverage(points: tuple, radius: float, kind: str, height: int, width: int) -> np.ndarray:
    """Discs around points, or the line through them: 1 inside, falling to 0 over the pixel at the edge."""
    radius = max(radius, 0.5)  # a smaller disc could fall between the pixel centres
    ends = points if kind == "points" or len(points) == 1 else points[1:]
    starts = points if kind == "points" or len(points) == 1 else points[:-1]
    coverage = np.zeros((height, width), np.float32)
    drawn = 0
    for (ax, ay), (bx, by) in zip(starts, ends, strict=True):
        left, right = max(math.floor(min(ax, bx) - radius - 1), 0), min(math.ceil(max(ax, bx) + radius + 1), width)
        top, bottom = max(math.floor(min(ay, by) - radius - 1), 0), min(math.ceil(max(ay, by) + radius + 1), height)
        if left >= right or top >= bottom:
            continue
        drawn += (right - left) * (bottom - top)
        check_drawn(drawn, kind)
        rows = max(1, _STRIP // (right - left))
        for start in range(top, bottom, rows):
            window = coverage[start : min(start + rows, bottom), left:right]
            ys, xs = np.arange(start, start + len(window))[:, None] + 0.5, np.arange(left, right) + 0.5
            np.maximum(window, (radius + 0.5 - _distance(xs, ys, (ax, ay), (bx, by))).clip(0, 1), out=window)
    return coverage


def _distance(xs: np.ndarray, ys: np.ndarray, start: tuple, end: tuple) -> np.ndarray:
    """Of the points of a grid from the line between two points."""
    (ax, ay), (bx, by) = start, end
    dx, dy = bx - ax, by - ay
    length = dx * dx + dy * dy
    along = ((xs - ax) * dx + (ys - ay) * dy) / length if length else np.zeros((len(ys), len(xs)))
    along = along.clip(0, 1)
    return np.hypot(xs - ax - along * dx, ys - ay - along * dy)


def check_drawn(pixels: int, kind: str) -> None:
    """Raise ValueError if a region has too many parts, or too large ones, to be drawn."""
    if pixels > MAX_DRAWN:
        raise ValueError(
            f"the region ({kind}) has too many large parts: over {MAX_DRAWN:,} pixels to draw; give it as a mask"
        )


def decode_counts(counts: str | bytes) -> list[int]:
    """Run lengths of a compressed COCO RLE.

    Source: `rleFrString` in pycocotools' maskApi.c: 6-bit characters from code 48 on, 5 bits of number and one of
        continuation; from
    the third run on, the difference to the run before the last.
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


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed counts: runs down the columns, beginning with those outside."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return [0, *runs] if flat[0] else runs
