"""Pixels of a region: coverage of boxes, polygons and lines, mask images and arrays, COCO run lengths."""

from __future__ import annotations

import base64
import io
import math
import os
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

PNG_URI = "data:image/png;base64,"
_SUBROWS = 8  # scan lines a pixel row, for polygons; across a line, coverage is exact


def mask_pixels(mask: Any) -> np.ndarray:
    """uint8 (H, W), 0 outside to 255 inside."""
    ours = isinstance(mask, str) and mask.startswith(PNG_URI)  # written by `Region.to_json`, also of a faint mask
    if isinstance(mask, str | os.PathLike):
        mask = _open_mask(mask)
    if isinstance(mask, Image.Image):
        mask = _grey(mask)
    array = np.asarray(mask)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"expected a mask of bools, of 0 and 1, uint8 0..255 or floats 0..1, got {array.dtype}")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"expected a mask (H, W), got shape {array.shape}")
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind in "iu":
        low, high = int(array.min()), int(array.max())
        if 0 <= low and high <= 1:
            return array.astype(np.uint8) * np.uint8(255)
        if array.dtype == np.uint8 and high < 128 and not ours:
            raise ValueError(
                f"the mask's values end at {high} of 255, as in a map of labels; give one object (mask == label), and "
                "a faint region as its strength"
            )
        if array.dtype == np.uint8 or (0 <= low and high <= 255 and np.isin(array, (0, 255)).all()):
            return array.astype(np.uint8)
    elif array.dtype.kind == "f" and np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1:
        # rounded up, so that a faint value does not vanish
        return np.ceil(array.astype(np.float64) * 255 - 1e-6).astype(np.uint8)
    raise ValueError(
        f"expected a mask of bools, of 0 and 1, uint8 0..255 or floats 0..1, got {array.dtype} from "
        f"{array.min()} to {array.max()}"
    )


def _open_mask(source: str | os.PathLike) -> Image.Image:
    text = os.fspath(source)
    try:
        file = io.BytesIO(base64.b64decode(text[len(PNG_URI) :])) if text.startswith(PNG_URI) else text
        image = Image.open(file)
        image = ImageOps.exif_transpose(image)  # as the picture itself is turned; this loads it too
    except FileNotFoundError:
        raise ValueError(f"there is no mask file {text}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the mask {shortened(text)} as an image: {error}") from error
    return image


def _grey(image: Image.Image) -> np.ndarray:
    """A mask image as an array; modes that could mean several things are refused."""
    if image.mode in ("1", "L", "F"):
        return np.asarray(image)
    if image.mode == "P":
        indices = np.asarray(image)
        if len(np.unique(indices)) > 2:
            raise ValueError("the palette mask holds several objects; keep one of them: a picture with 0 outside")
        colours = np.asarray(image.convert("RGB"))  # not by index: which one is black is the writer's choice
        inside = colours.any(axis=-1)
        if inside.all() and (colours != 255).any():
            raise ValueError("the palette mask has no black; expected black outside the region")
        return inside
    pixels = np.asarray(image)
    if image.mode in ("RGB", "RGBA", "LA"):
        colours = pixels[..., :3] if image.mode.startswith("RGB") else pixels[..., :1]
        opaque = image.mode == "RGB" or (pixels[..., -1] == 255).all()
        if opaque and (colours == colours[..., :1]).all():
            return colours[..., 0]
    raise ValueError(
        f"expected a grey mask, got a picture of mode {image.mode}; convert it to 'L', 0 outside and 255 inside"
    )


def box_coverage(box: tuple[float, float, float, float], height: int, width: int) -> np.ndarray:
    """Share of each pixel that the box covers, exactly."""
    x0, y0, x1, y1 = box
    columns, rows = np.arange(width), np.arange(height)
    across = (np.minimum(columns + 1, x1) - np.maximum(columns, x0)).clip(0, 1)
    down = (np.minimum(rows + 1, y1) - np.maximum(rows, y0)).clip(0, 1)
    return np.outer(down, across).astype(np.float32)


def polygon_coverage(points: tuple, height: int, width: int) -> np.ndarray:
    """Share of each pixel that the polygon covers: exact along x, `_SUBROWS` scan lines a pixel along y; even-odd
    filling.
    """
    x0, y0 = np.array(points).T
    x1, y1 = np.roll(x0, -1), np.roll(y0, -1)
    top, bottom = max(math.floor(y0.min()), 0), min(math.ceil(y0.max()), height)
    change = np.zeros((height, width + 2), np.float64)  # of coverage from a pixel to the next on its right
    for row in range(top, bottom):
        lines = row + (np.arange(_SUBROWS) + 0.5) / _SUBROWS
        crossing = (y0 <= lines[:, None]) != (y1 <= lines[:, None])
        for line, edges in zip(lines, crossing, strict=True):
            xs = np.sort(x0[edges] + (line - y0[edges]) * (x1[edges] - x0[edges]) / (y1[edges] - y0[edges]))
            xs = xs.clip(0, width)
            signs = np.where(np.arange(len(xs)) % 2 == 0, 1.0, -1.0) / _SUBROWS
            cells = np.floor(xs).astype(int)
            np.add.at(change[row], cells, signs * (1 - (xs - cells)))
            np.add.at(change[row], cells + 1, signs * (xs - cells))
    coverage = change[:, :width].cumsum(1).clip(0, 1)
    coverage[coverage < 1e-9] = 0  # rounding of the sum
    # Thinner than the distance of the scan lines: still a trace. Only then: the box around a polygon that merely passes
    # a corner of the picture reaches into it.
    thin = min(np.ptp(x0), np.ptp(y0)) < 1 / _SUBROWS
    if thin and not coverage.any():
        return box_coverage((x0.min(), y0.min(), x0.max(), y0.max()), height, width)
    return coverage.astype(np.float32)


def line_coverage(points: tuple, radius: float, kind: str, height: int, width: int) -> np.ndarray:
    """Discs around points, or the line through them: 1 inside, falling to 0 over the pixel at the edge."""
    radius = max(radius, 0.5)  # a smaller disc could fall between the pixel centres
    ends = points if kind == "points" or len(points) == 1 else points[1:]
    starts = points if kind == "points" or len(points) == 1 else points[:-1]
    coverage = np.zeros((height, width), np.float32)
    for (ax, ay), (bx, by) in zip(starts, ends, strict=True):
        left, right = max(math.floor(min(ax, bx) - radius - 1), 0), min(math.ceil(max(ax, bx) + radius + 1), width)
        top, bottom = max(math.floor(min(ay, by) - radius - 1), 0), min(math.ceil(max(ay, by) + radius + 1), height)
        if left >= right or top >= bottom:
            continue
        xs, ys = np.arange(left, right) + 0.5, (np.arange(top, bottom) + 0.5)[:, None]
        dx, dy = bx - ax, by - ay
        length = dx * dx + dy * dy
        along = ((xs - ax) * dx + (ys - ay) * dy) / length if length else np.zeros((bottom - top, right - left))
        along = along.clip(0, 1)
        distance = np.hypot(xs - ax - along * dx, ys - ay - along * dy)
        window = coverage[top:bottom, left:right]
        np.maximum(window, (radius + 0.5 - distance).clip(0, 1), out=window)
    return coverage


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
            if not 0 <= code < 64:
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


def shortened(value: Any) -> str:
    """A value in at most 80 characters, for messages."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
