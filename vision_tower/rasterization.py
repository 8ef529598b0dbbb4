"""Rasterization of a region: the coverage of each pixel by boxes, polygons, discs and strokes, and its alpha map."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

_SUBROWS = 8  # scan lines per pixel row, for polygons; along a scan line, coverage is exact
_STRIP = 4_000_000  # pixels rasterized at a time
_MAX_CROSSINGS = 10_000_000  # of a polygon's edges with scan lines; they take seconds and 0.5 GB
MAX_DRAWN = 1_000_000_000  # total pixels of the windows around the parts of a region; they take about ten seconds


def mask_to_alpha(mask: np.ndarray, strength: float) -> np.ndarray:
    """The alpha map of a mask, both float32 (H, W) in [0, 1]; 1 everywhere at strength 0."""
    return 1 - np.float32(strength) * (1 - mask)


def box_coverage(box: tuple[float, float, float, float], height: int, width: int) -> np.ndarray:
    """Share of each pixel that is covered by the box x0, y0, x1, y1, exact: float32 (H, W) in [0, 1]."""
    x0, y0, x1, y1 = box
    columns, rows = np.arange(width), np.arange(height)
    across = (np.minimum(columns + 1, x1) - np.maximum(columns, x0)).clip(0, 1)
    down = (np.minimum(rows + 1, y1) - np.maximum(rows, y0)).clip(0, 1)
    coverage = np.empty((height, width), np.float32)
    return np.multiply(down[:, None], across, out=coverage, casting="same_kind")


def polygons_coverage(polygons: tuple, height: int, width: int) -> np.ndarray:
    """Share of each pixel that is covered by the union of the polygons: float32 (H, W) in [0, 1].

    Each polygon is rasterized in a window of its own, so that many small polygons in a large image are fast.

    Raises:
        ValueError: If the windows or an outline are too large.
    """
    coverage = np.zeros((height, width), np.float32)
    drawn = 0
    for points in polygons:
        xs, ys = zip(*points, strict=True)
        left, right = max(math.floor(min(xs)), 0), min(math.ceil(max(xs)), width)
        top, bottom = max(math.floor(min(ys)), 0), min(math.ceil(max(ys)), height)
        if left < right and top < bottom:
            drawn += (right - left) * (bottom - top)
            _check_drawn(drawn)
            shifted = tuple((x - left, y - top) for x, y in points)
            window = coverage[top:bottom, left:right]
            np.maximum(window, _polygon_coverage(shifted, bottom - top, right - left), out=window)
    return coverage


def _polygon_coverage(points: tuple, height: int, width: int) -> np.ndarray:
    """Coverage by one polygon with even-odd filling: exact along x, `_SUBROWS` scan lines per pixel along y."""
    x0, y0 = np.array(points).T
    x1, y1 = np.roll(x0, -1), np.roll(y0, -1)
    top, bottom = max(math.floor(y0.min()), 0), min(math.ceil(y0.max()), height)
    coverage = np.zeros((height, width), np.float32)
    crossings = _count_crossings(y0, y1, top, bottom)
    if crossings > _MAX_CROSSINGS:
        raise ValueError(
            f"the polygon of {len(points):,} vertices has too long an outline for an image of {height} rows; pass it "
            "as a mask"
        )
    rows = max(1, _STRIP // (width + 2))
    for start in range(top, bottom, rows):
        end = min(start + rows, bottom)
        coverage[start:end] = _scan_rows((x0, y0, x1, y1), start, end, width)
    # A polygon thinner than the distance between scan lines can miss all of them; its bounding box is used instead.
    # Not for other polygons without coverage: the bounding box of one that passes a corner of the image overlaps it.
    thin = min(np.ptp(x0), np.ptp(y0)) < 1 / _SUBROWS
    if thin and not coverage.any():
        return box_coverage((x0.min(), y0.min(), x0.max(), y0.max()), height, width)
    return coverage


def _scan_lines(start: int, end: int) -> np.ndarray:
    """The y of the scan lines of pixel rows `start` to `end` (exclusive)."""
    return (np.arange(start, end)[:, None] + (np.arange(_SUBROWS) + 0.5) / _SUBROWS).ravel()


def _count_crossings(y0: np.ndarray, y1: np.ndarray, start: int, end: int) -> int:
    """The number of crossings of edges with scan lines."""
    lines = _scan_lines(start, end)
    return int(np.abs(np.searchsorted(lines, y0) - np.searchsorted(lines, y1)).sum())


def _scan_rows(edges: tuple[np.ndarray, ...], start: int, end: int, width: int) -> np.ndarray:
    """Coverage of the pixels of rows `start` to `end` by a polygon with edges x0, y0, x1, y1: (rows, width)."""
    x0, y0, x1, y1 = edges
    lines = _scan_lines(start, end)
    first, last = np.searchsorted(lines, np.minimum(y0, y1)), np.searchsorted(lines, np.maximum(y0, y1))
    counts = last - first
    edge = np.repeat(np.arange(len(x0)), counts)
    line = np.arange(len(edge)) + np.repeat(first - np.cumsum(counts) + counts, counts)
    xs = x0[edge] + (lines[line] - y0[edge]) * (x1[edge] - x0[edge]) / (y1[edge] - y0[edge])
    order = np.lexsort((xs, line))
    xs, line = xs[order].clip(0, width), line[order]
    # Crossings alternately enter and leave the polygon; a closed outline crosses each line an even number of times.
    signs = np.where(np.arange(len(xs)) % 2 == 0, 1.0, -1.0) / _SUBROWS
    cells = np.floor(xs).astype(int)
    change = np.zeros((end - start) * (width + 2))  # of coverage from each pixel to its right neighbor
    positions = line // _SUBROWS * (width + 2) + cells
    for subrow in range(_SUBROWS):
        here = line % _SUBROWS == subrow
        position, sign, share = positions[here], signs[here], (xs - cells)[here]
        np.add.at(change, position, sign * (1 - share))
        np.add.at(change, position + 1, sign * share)
    covered = change.reshape(end - start, width + 2)[:, :width].cumsum(axis=1).clip(0, 1)
    covered[covered < 1e-9] = 0  # rounding errors of the sum
    return covered


def discs_coverage(points: tuple, radius: float, height: int, width: int) -> np.ndarray:
    """Coverage by discs around points: float32 (H, W), falling from 1 to 0 over one pixel at the edge.

    Raises:
        ValueError: If the windows around the discs are too large.
    """
    return _segments_coverage(zip(points, points, strict=True), radius, height, width)


def stroke_coverage(points: tuple, line_width: float, height: int, width: int) -> np.ndarray:
    """Coverage by a line through points, with round ends: float32 (H, W), falling from 1 to 0 over one pixel.

    Raises:
        ValueError: If the windows around its segments are too large.
    """
    ends = points[1:] or points
    return _segments_coverage(zip(points, ends, strict=False), line_width / 2, height, width)


def _segments_coverage(segments: Iterable[tuple], radius: float, height: int, width: int) -> np.ndarray:
    """Coverage by all points within `radius` of line segments."""
    radius = max(radius, 0.5)  # a smaller disc could fall between the pixel centers
    coverage = np.zeros((height, width), np.float32)
    drawn = 0
    for (ax, ay), (bx, by) in segments:
        left, right = max(math.floor(min(ax, bx) - radius - 1), 0), min(math.ceil(max(ax, bx) + radius + 1), width)
        top, bottom = max(math.floor(min(ay, by) - radius - 1), 0), min(math.ceil(max(ay, by) + radius + 1), height)
        if left >= right or top >= bottom:
            continue
        drawn += (right - left) * (bottom - top)
        _check_drawn(drawn)
        rows = max(1, _STRIP // (right - left))
        for start in range(top, bottom, rows):
            window = coverage[start : min(start + rows, bottom), left:right]
            ys, xs = np.arange(start, start + len(window))[:, None] + 0.5, np.arange(left, right) + 0.5
            np.maximum(window, (radius + 0.5 - _distance(xs, ys, (ax, ay), (bx, by))).clip(0, 1), out=window)
    return coverage


def _distance(xs: np.ndarray, ys: np.ndarray, start: tuple, end: tuple) -> np.ndarray:
    """Distance of the grid points (xs, ys) from a line segment: (len(ys), len(xs))."""
    (ax, ay), (bx, by) = start, end
    dx, dy = bx - ax, by - ay
    length = dx * dx + dy * dy
    along = ((xs - ax) * dx + (ys - ay) * dy) / length if length else np.zeros((len(ys), len(xs)))
    along = along.clip(0, 1)
    return np.hypot(xs - ax - along * dx, ys - ay - along * dy)


def _check_drawn(pixels: int) -> None:
    if pixels > MAX_DRAWN:
        raise ValueError(f"the region has too many large parts: over {MAX_DRAWN:,} pixels to draw; pass it as a mask")
