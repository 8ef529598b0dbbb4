"""A region of a picture: box, polygons, mask, points, stroke, or the whole image -> alpha map.

Coordinates are pixels of the picture as displayed, x right and y down; pixel i spans [i, i + 1). A region's alpha map
is `1 - strength * (1 - mask)`: strength 1 is the region alone, 0 the whole image.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import logging
import math
import operator
import os
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from .region_pixels import (
    PNG_URI,
    box_coverage,
    decode_counts,
    line_coverage,
    mask_pixels,
    polygon_coverage,
    run_lengths,
    shortened,
)

logger = logging.getLogger(__name__)

FORMS = (
    "box:x0,y0,x1,y1 | nbox:x0,y0,x1,y1 | polygon:x,y,x,y,x,y[;...] | mask:FILE.png | rle:FILE.json | "
    "points:x,y[;x,y]@radius | stroke:x,y;x,y@width | whole, each with an optional strength: box:1,2,3,4*0.5"
)
_STRENGTH = re.compile(r"(.*)\*([\d.eE+-]+)", re.DOTALL)
_LARGEST_PICTURE = 400_000_000  # pixels of a run-length mask; a few bytes of runs could ask for all memory
_LARGEST = 1e9  # of a coordinate: what lies further out only overflows
_ROUNDING = 1e-3  # pixels that a region may reach over the picture without a warning


@dataclasses.dataclass(frozen=True)
class Region:
    """A region of a picture; immutable, hashable, equal by value. Made by the `from_*` methods, `whole`, `parse` or
    `from_json`.

    Attributes:
        kind: "box", "nbox", "polygon", "mask", "points", "stroke" or "whole". An RLE becomes a mask.
        data: The geometry, as nested tuples of numbers (a mask: height, width, "binary" or "soft", compressed bytes).
        strength: How much the region alone counts, 0 to 1.
    """

    kind: str
    data: tuple = ()
    strength: float = 1.0

    def __post_init__(self) -> None:
        """Check the strength.

        Raises:
            ValueError: If it is not a number from 0 to 1.
        """
        if not (isinstance(self.strength, int | float) and 0 <= self.strength <= 1):
            raise ValueError(f"expected a strength from 0 to 1, got {self.strength!r}")

    @classmethod
    def from_box(
        cls, x0: float, y0: float, x1: float, y1: float, *, normalized: bool = False, strength: float = 1.0
    ) -> Region:
        """A box, half-open: x0 <= x < x1. In pixels, or with `normalized` as fractions (0 to 1) of width and height.

        Raises:
            ValueError: If a coordinate is not finite, the box has no area, or a normalized box lies outside 0 to 1.
        """
        box = tuple(_finite((x0, y0, x1, y1), "box"))
        if box[2] <= box[0] or box[3] <= box[1]:
            raise ValueError(f"expected a box x0,y0,x1,y1 with x0 < x1 and y0 < y1, got {_numbers(box)}")
        if normalized and (min(box[2:]) <= 0 or max(box[:2]) >= 1):
            raise ValueError(
                f"expected fractions from 0 to 1 of the picture, got {_numbers(box)}; pixels are a plain box"
            )
        if not normalized and max(box) <= 1 and any(value % 1 for value in box):
            logger.warning("the box %s is a part of one pixel; fractions of the picture are nbox", _numbers(box))
        return cls("nbox" if normalized else "box", box, strength)

    @classmethod
    def from_polygon(cls, polygon: Sequence, *, strength: float = 1.0) -> Region:
        """A polygon [[x, y], ...] or COCO's flat [x, y, x, y, ...], or a list of polygons, whose union it is. Even-odd
        filling.

        Raises:
            ValueError: If a polygon has no area, or a coordinate is not finite.
        """
        polygons = [_vertices(part) for part in _split_polygons(polygon)]
        for part in polygons:
            # not the signed area, which is 0 for a figure of eight too
            if np.linalg.matrix_rank(np.array(part) - part[0]) < 2:
                raise ValueError(
                    f"expected polygons of at least 3 different vertices and some area, got {shortened(part)}"
                )
        return cls("polygon", tuple(polygons), strength)

    @classmethod
    def from_mask(cls, mask: np.ndarray | Image.Image | str | os.PathLike, *, strength: float = 1.0) -> Region:
        """A mask of the picture's own size: an array (H, W), a PIL image, or an image file.

        Taken are bool, integers of 0 and 1, uint8 0..255 and floats 0..1, where values between make soft edges (kept in
        255 steps).

        Raises:
            ValueError: If the file cannot be read, the mask is empty, or its values could mean several things.
        """
        pixels = mask_pixels(mask)
        if not pixels.any():
            raise ValueError("the region is empty: no pixel of the mask is set")
        binary = bool(((pixels == 0) | (pixels == 255)).all())  # np.isin takes 40 times as long
        packed = np.packbits(pixels > 0) if binary else pixels
        data = (*pixels.shape, "binary" if binary else "soft", zlib.compress(packed.tobytes(), 1))
        return cls("mask", data, strength)

    @classmethod
    def from_rle(cls, rle: dict, *, strength: float = 1.0) -> Region:
        """COCO run lengths: {"size": [height, width], "counts": compressed str or bytes, or a list of run lengths}.

        Decoded here and not by pycocotools, which reads a damaged string without noticing; the tower then needs no
        pycocotools either.

        Raises:
            ValueError: If the runs do not add up to height * width, or set no pixel.
        """
        if not isinstance(rle, dict) or not {"size", "counts"} <= rle.keys():
            raise ValueError(f"expected an RLE {{'size': [h, w], 'counts': ...}}, got {shortened(rle)}")
        try:
            height, width = map(operator.index, rle["size"])
            counts = rle["counts"]
            runs = decode_counts(counts) if isinstance(counts, str | bytes) else [*map(operator.index, counts)]
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(f"expected an RLE {{'size': [h, w], 'counts': ...}}, got {shortened(rle)}") from error
        # Summed as Python integers: an int64 sum can wrap around to the right one, and np.repeat then crashes.
        if min(runs, default=-1) < 0 or height < 1 or width < 1 or sum(runs) != height * width:
            raise ValueError(f"the RLE is inconsistent: its runs add up to {sum(runs)}, not to {height} * {width}")
        if height * width > _LARGEST_PICTURE:
            raise ValueError(f"the RLE is of {height} x {width} pixels; expected at most {_LARGEST_PICTURE:,} of them")
        flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return cls.from_mask(flat.reshape(width, height).T, strength=strength)

    @classmethod
    def from_points(cls, points: Sequence, *, radius: float, strength: float = 1.0) -> Region:
        """Discs of `radius` pixels around points [[x, y], ...]; below half a pixel a disc takes in the pixel it lies
        in.

        Raises:
            ValueError: If there is no point, a number is not finite, or the radius is not positive.
        """
        return cls("points", (_vertices(points), _positive(radius, "radius")), strength)

    @classmethod
    def from_stroke(cls, points: Sequence, *, width: float, strength: float = 1.0) -> Region:
        """A line through points [[x, y], ...], `width` pixels wide, with round ends.

        Raises:
            ValueError: If there is no point, a number is not finite, or the width is not positive.
        """
        return cls("stroke", (_vertices(points), _positive(width, "width")), strength)

    @classmethod
    def whole(cls) -> Region:
        """The whole image: alpha 1 everywhere, padding included."""
        return cls("whole")

    @property
    def is_whole(self) -> bool:
        """Whether alpha is 1 everywhere: the whole image, or a region of strength 0."""
        return self.kind == "whole" or self.strength == 0

    def mask(self, height: int, width: int) -> np.ndarray:
        """Coverage of each pixel of a (height, width) picture, before strength: float32 (H, W) in [0, 1].

        What lies outside the picture is cut off, with a warning.

        Raises:
            ValueError: If the region lies wholly outside, or is a mask of another size.
        """
        if self.kind == "whole":
            return np.ones((height, width), np.float32)
        if self.kind == "mask":
            return self._unpacked(height, width)
        x0, y0, x1, y1 = self._extent(height, width)
        if min(x0, y0) < -_ROUNDING or x1 > width + _ROUNDING or y1 > height + _ROUNDING:
            logger.warning(
                "the region %s reaches over the picture of %d x %d pixels and is cut off", self, width, height
            )
        if self.kind == "polygon":
            coverage = self._union(height, width)
        elif self.kind in ("points", "stroke"):
            points, size = self.data
            coverage = line_coverage(points, size if self.kind == "points" else size / 2, self.kind, height, width)
        else:
            coverage = box_coverage((x0, y0, x1, y1), height, width)
        if not coverage.any():
            raise ValueError(f"the region {self} lies outside the picture of {width} x {height} pixels")
        return coverage

    def to_alpha(self, height: int, width: int) -> np.ndarray:
        """The alpha map of a (height, width) picture: float32 (H, W) in [0, 1].

        Raises:
            ValueError: As `mask`.
        """
        return 1 - np.float32(self.strength) * (1 - self.mask(height, width))

    def bounding_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Box x0, y0, x1, y1 in pixels around the region, cut off at the edges of a (height, width) picture.

        Raises:
            ValueError: As `mask`.
        """
        if self.kind == "mask":
            rows, columns = np.nonzero(self.mask(height, width))
            return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)
        x0, y0, x1, y1 = self._extent(height, width)
        return max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))

    def _extent(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Box around the region in pixels; it may reach over the picture, but not lie outside."""
        x0, y0, x1, y1 = self._bounds(height, width)
        if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
            raise ValueError(f"the region {self} lies outside the picture of {width} x {height} pixels")
        return x0, y0, x1, y1

    def _bounds(self, height: int, width: int) -> tuple[float, float, float, float]:
        if self.kind == "whole":
            return 0.0, 0.0, float(width), float(height)
        if self.kind == "box":
            return self.data
        if self.kind == "nbox":
            x0, y0, x1, y1 = self.data
            return x0 * width, y0 * height, x1 * width, y1 * height
        reach = 0.0
        if self.kind == "polygon":
            points = [point for part in self.data for point in part]
        else:
            points, size = self.data
            reach = size if self.kind == "points" else size / 2
        xs, ys = zip(*points, strict=True)
        return min(xs) - reach, min(ys) - reach, max(xs) + reach, max(ys) + reach

    def _union(self, height: int, width: int) -> np.ndarray:
        """Coverage of the polygons, each drawn in its own window: many parts of a large picture stay cheap."""
        coverage = np.zeros((height, width), np.float32)
        for part in self.data:
            xs, ys = zip(*part, strict=True)
            left, right = max(math.floor(min(xs)), 0), min(math.ceil(max(xs)), width)
            top, bottom = max(math.floor(min(ys)), 0), min(math.ceil(max(ys)), height)
            if left < right and top < bottom:
                moved = tuple((x - left, y - top) for x, y in part)
                window = coverage[top:bottom, left:right]
                np.maximum(window, polygon_coverage(moved, bottom - top, right - left), out=window)
        return coverage

    def _unpacked(self, height: int, width: int) -> np.ndarray:
        own_height, own_width, depth, packed = self.data
        if (own_height, own_width) != (height, width):
            raise ValueError(
                f"the mask has {own_width} x {own_height} pixels, its picture {width} x {height}; "
                "expected equal sizes. Was the picture resized, or turned by its EXIF orientation?"
            )
        pixels = np.frombuffer(zlib.decompress(packed), np.uint8)
        if depth == "binary":
            return np.unpackbits(pixels, count=height * width).reshape(height, width).astype(np.float32)
        return pixels.reshape(height, width).astype(np.float32) / 255

    def __str__(self) -> str:
        """Short, for messages; in the form that `parse` takes where that is short."""
        if self.kind in ("box", "nbox"):
            return f"{self.kind}:{_numbers(self.data)}"
        if self.kind == "mask":
            return f"mask of {self.data[1]} x {self.data[0]} pixels"
        return self.kind if self.kind == "whole" else f"{self.kind}:{shortened(self.data[0])}"

    @classmethod
    def parse(cls, text: str) -> Region:
        """Read a region from command-line text, one of: box, nbox, polygon, mask, rle, points, stroke, whole (see
        `FORMS`).

        Raises:
            ValueError: If the text is of no such form.
        """
        kind, _, body = text.strip().partition(":")
        if kind not in _PARSERS:
            raise ValueError(f"expected a region {FORMS}; got {shortened(text)!r}")
        strength = "1"
        if match := _STRENGTH.fullmatch(body):
            body, strength = match.groups()
        try:
            return dataclasses.replace(_PARSERS[kind](cls, body), strength=float(strength))
        except (ValueError, OSError, RecursionError) as error:
            forms = "" if kind in ("mask", "rle") else f". Expected {FORMS}"  # there it is the file that is wrong
            raise ValueError(f"cannot read the region {shortened(text)!r}: {error}{forms}") from error

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal region."""
        if self.kind == "whole":
            body: dict[str, Any] = {"whole": True}
        elif self.kind in ("box", "nbox"):
            body = {self.kind: list(self.data)}
        elif self.kind == "polygon":
            body = {"polygon": [[list(point) for point in part] for part in self.data]}
        elif self.kind == "mask":
            body = self._mask_json()
        else:
            points, size = self.data
            body = {self.kind: [list(p) for p in points], "radius" if self.kind == "points" else "width": size}
        return body if self.strength == 1 else {**body, "strength": self.strength}

    def _mask_json(self) -> dict[str, Any]:
        height, width, depth, _ = self.data
        mask = self._unpacked(height, width)
        if depth == "binary":
            return {"rle": {"size": [height, width], "counts": run_lengths(mask > 0)}}
        file = io.BytesIO()
        Image.fromarray(np.rint(mask * 255).astype(np.uint8)).save(file, "PNG")
        return {"mask": PNG_URI + base64.b64encode(file.getvalue()).decode("ascii")}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Region:
        """Read {"box": [...]}, {"nbox": [...]}, {"polygon": ...}, {"mask": path}, {"rle": {...}}, {"points": ...,
        "radius": r}, {"stroke": ..., "width": w} or {"whole": true}, each with an optional "strength".

        Raises:
            ValueError: If the record has not exactly one region, or a key that belongs to none.
        """
        if not isinstance(record, dict):
            raise ValueError(f"expected a region as a JSON object, got {shortened(record)}")
        kinds = record.keys() & _FROM_JSON.keys()
        if len(kinds) != 1:
            raise ValueError(f"expected exactly one of {', '.join(_FROM_JSON)} in a region, got {sorted(record)}")
        (kind,) = kinds
        read, extra = _FROM_JSON[kind]
        if unknown := record.keys() - {kind, "strength", *extra}:
            raise ValueError(f"unknown keys {sorted(unknown)} beside {kind!r} in a region")
        if missing := set(extra) - record.keys():
            raise ValueError(f"expected {', '.join(missing)} beside {kind!r} in a region")
        try:
            region = read(cls, record[kind], *(record[name] for name in extra))
        except TypeError as error:
            raise ValueError(f"cannot read {kind!r} of a region: {shortened(record[kind])}") from error
        return dataclasses.replace(region, strength=record.get("strength", 1.0))


def _whole_from_json(cls: type[Region], value: Any) -> Region:
    if value is not True:
        raise ValueError(f"expected 'whole': true, got {value!r}")
    return cls.whole()


# kind -> (reader, further keys)
_FROM_JSON: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "box": (lambda cls, v: cls.from_box(*v), ()),
    "nbox": (lambda cls, v: cls.from_box(*v, normalized=True), ()),
    "polygon": (lambda cls, v: cls.from_polygon(v), ()),
    "mask": (lambda cls, v: cls.from_mask(v), ()),
    "rle": (lambda cls, v: cls.from_rle(v), ()),
    "points": (lambda cls, v, radius: cls.from_points(v, radius=radius), ("radius",)),
    "stroke": (lambda cls, v, width: cls.from_stroke(v, width=width), ("width",)),
    "whole": (_whole_from_json, ()),
}


def _floats(text: str, count: int | None = None) -> list[float]:
    values = [float(part) for part in text.split(",")]
    if count is not None and len(values) != count:
        raise ValueError(f"expected {count} numbers, got {len(values)}")
    return values


def _parse_points(text: str) -> tuple[list[list[float]], float]:
    points, at, size = text.partition("@")
    if not at:
        raise ValueError("expected @ and a size in pixels after the points")
    return [_floats(point, 2) for point in points.split(";")], float(size)


def _parse_rle(cls: type[Region], text: str) -> Region:
    if not text.lstrip().startswith("{"):
        with open(text, encoding="utf-8") as file:
            text = file.read()
    return cls.from_rle(json.loads(text))


def _parse_whole(cls: type[Region], text: str) -> Region:
    if text:
        raise ValueError("expected nothing after 'whole'")
    return cls.whole()


_PARSERS: dict[str, Callable] = {
    "box": lambda cls, text: cls.from_box(*_floats(text, 4)),
    "nbox": lambda cls, text: cls.from_box(*_floats(text, 4), normalized=True),
    "polygon": lambda cls, text: cls.from_polygon([_floats(part) for part in text.split(";")]),
    "mask": lambda cls, text: cls.from_mask(text),
    "rle": _parse_rle,
    "points": lambda cls, text: (lambda points, size: cls.from_points(points, radius=size))(*_parse_points(text)),
    "stroke": lambda cls, text: (lambda points, size: cls.from_stroke(points, width=size))(*_parse_points(text)),
    "whole": _parse_whole,
}


def _finite(values: Sequence, what: str) -> list[float]:
    if any(isinstance(value, str | bytes) for value in values):
        raise ValueError(f"expected numbers for the {what}, got {shortened(values)}")
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"expected numbers for the {what}, got {shortened(values)}") from error
    if not all(abs(number) <= _LARGEST for number in numbers):  # not a number fails this too
        raise ValueError(f"expected finite numbers up to {_LARGEST:g} for the {what}, got {shortened(values)}")
    return numbers


def _positive(value: float, what: str) -> float:
    (number,) = _finite((value,), what)
    if number <= 0:
        raise ValueError(f"expected a {what} above 0 pixels, got {number}")
    return number


def _vertices(points: Sequence) -> tuple[tuple[float, float], ...]:
    """Points as tuples, from [[x, y], ...] or flat [x, y, x, y, ...]."""
    points = points.tolist() if isinstance(points, np.ndarray) else list(points)
    if points and not isinstance(points[0], list | tuple | np.ndarray):
        if len(points) % 2:
            raise ValueError(f"expected x and y for each point, got {len(points)} numbers")
        points = list(zip(points[::2], points[1::2], strict=True))
    if not points or any(len(point) != 2 for point in points):
        raise ValueError(f"expected points [[x, y], ...], got {shortened(points)}")
    return tuple((x, y) for x, y in (_finite(point, "points") for point in points))


def _split_polygons(polygon: Sequence) -> list:
    """The polygons in any of the accepted nestings."""
    polygon = polygon.tolist() if isinstance(polygon, np.ndarray) else list(polygon)
    if not polygon:
        raise ValueError("expected a polygon, got an empty list")
    first = polygon[0]
    if not isinstance(first, list | tuple | np.ndarray):
        return [polygon]  # flat
    pair_of_numbers = len(first) == 2 and not isinstance(first[0], list | tuple | np.ndarray)
    return [polygon] if pair_of_numbers else polygon


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
