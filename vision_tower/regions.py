"""A region of a picture: box, polygons, mask, points, stroke, or the whole image -> alpha map.

Coordinates are pixels of the picture as displayed, x right and y down; pixel i spans [i, i + 1). A region's alpha map
is `1 - strength * (1 - mask)`: strength 1 is the region alone, 0 the whole image.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import json
import logging
import math
import numbers
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
    check_drawn,
    decode_counts,
    line_coverage,
    mask_pixels,
    polygon_coverage,
    run_lengths,
)
from .region_points import (
    are_fractions,
    are_whole,
    finite,
    plain_lists,
    positive,
    shortened,
    split_polygons,
    vertices,
)

logger = logging.getLogger(__name__)

FORMS = (
    "box:x0,y0,x1,y1 | nbox:x0,y0,x1,y1 | polygon:x,y,x,y,x,y[;...] | mask:FILE.png | softmask:FILE.png | "
    "rle:FILE.json | points:x,y[;x,y]@radius | stroke:x,y;x,y@width | whole, each with an optional strength: "
    "box:1,2,3,4*0.5"
)
_STRENGTH = re.compile(r"(.*)\*([\d.eE+-]+)", re.DOTALL)
MAX_MASK_PIXELS = 200_000_000  # of a mask, which takes 4 bytes a pixel; a few bytes of runs could ask for all memory
_ROUNDING = 1e-3  # pixels that a region may reach over the picture without a warning; of a fraction, an error


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
        number = isinstance(self.strength, numbers.Real) and not isinstance(self.strength, bool)  # numpy's numbers too
        if not (number and 0 <= self.strength <= 1):
            raise ValueError(f"expected a strength from 0 to 1, got {shortened(self.strength)}")
        object.__setattr__(self, "strength", abs(float(self.strength)))  # -0.0 is 0

    @classmethod
    def from_box(
        cls, x0: float, y0: float, x1: float, y1: float, *, normalized: bool = False, strength: float = 1.0
    ) -> Region:
        """A box, half-open: x0 <= x < x1. In pixels, or with `normalized` as fractions (0 to 1) of width and height.

        Raises:
            ValueError: If a coordinate is not finite, the box has no area, a normalized box reaches outside 0 to 1, or
                a box in pixels is plainly one of fractions.
        """
        box = tuple(finite((x0, y0, x1, y1), "box"))
        if box[2] <= box[0] or box[3] <= box[1]:
            raise ValueError(f"expected a box x0,y0,x1,y1 with x0 < x1 and y0 < y1, got {_numbers(box)}")
        if normalized and (min(box) < -_ROUNDING or max(box) > 1 + _ROUNDING):
            raise ValueError(
                f"expected fractions from 0 to 1 of the image, got {_numbers(box)}; pixels are a plain box, and "
                "coordinates from 0 to 1000 are to be divided by 1000"
            )
        if not normalized and are_fractions(box):
            raise ValueError(f"expected a box in pixels, got {_numbers(box)}; fractions of the image are nbox")
        return cls("nbox" if normalized else "box", box, strength)

    @classmethod
    def from_polygon(cls, polygon: Sequence, *, strength: float = 1.0) -> Region:
        """A polygon [[x, y], ...], COCO's flat [x, y, x, y, ...] or OpenCV's contour (N, 1, 2), or a list of polygons,
        whose union it is. Even-odd filling.

        Raises:
            ValueError: If a polygon has no area, a coordinate is not finite, or all are plainly fractions.
        """
        polygons = [vertices(part) for part in split_polygons(polygon)]
        if are_fractions([value for part in polygons for point in part for value in point]):
            raise ValueError(
                f"expected a polygon in pixels, got {shortened(polygons)}; multiply fractions by the image's width and "
                "height"
            )
        for part in polygons:
            # not the signed area, which is 0 for a figure of eight too
            if np.linalg.matrix_rank(np.array(part) - part[0]) < 2:
                raise ValueError(
                    f"expected polygons of at least 3 different vertices and some area, got {shortened(part)}"
                )
        return cls("polygon", tuple(polygons), strength)

    @classmethod
    def from_mask(
        cls, mask: np.ndarray | Image.Image | str | os.PathLike, *, soft: bool = False, strength: float = 1.0
    ) -> Region:
        """A mask of the image's own size: an array or tensor (H, W), a PIL image, or an image file.

        Accepted are bool, integers of two values (0 and 1, 255 or 65535) and floats 0..1, where values between make
        soft edges (kept in 255 steps).

        Args:
            mask: The mask. Of image files and PIL images EXIF orientation is applied, as to the image itself.
            soft: The mask has 8 or 16 bits, and values between 0 and the largest are soft edges. It has to be said:
                a map of labels looks the same.
            strength: How much the region alone counts, 0 to 1.

        Raises:
            ValueError: If the file cannot be read, the mask is empty, or its values could mean several things.
        """
        pixels = mask_pixels(mask, soft)
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
        size, counts = plain_lists(rle["size"]), plain_lists(rle["counts"])
        compressed = isinstance(counts, str | bytes)
        if not are_whole(size) or len(size) != 2 or not (compressed or are_whole(counts)):
            raise ValueError(f"expected an RLE {{'size': [h, w], 'counts': ...}}, got {shortened(rle)}")
        height, width = map(int, size)
        runs = decode_counts(counts) if compressed else [*map(int, counts)]
        # Summed as Python integers: an int64 sum can wrap around to the right one, and np.repeat then crashes.
        if min(runs, default=-1) < 0 or height < 1 or width < 1 or sum(runs) != height * width:
            raise ValueError(
                f"the RLE is inconsistent: its runs add up to {shortened(sum(runs))}, not to {shortened(height)} * "
                f"{shortened(width)}"
            )
        _check_pixels(height, width)
        flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return cls.from_mask(flat.reshape(width, height).T, strength=strength)

    @classmethod
    def from_points(cls, points: Sequence, *, radius: float, strength: float = 1.0) -> Region:
        """Discs of `radius` pixels around points [[x, y], ...]; below half a pixel a disc takes in the pixel it lies
        in.

        Raises:
            ValueError: If there is no point, a number is not finite, or the radius is not positive.
        """
        return cls("points", (vertices(points), positive(radius, "radius")), strength)

    @classmethod
    def from_stroke(cls, points: Sequence, *, width: float, strength: float = 1.0) -> Region:
        """A line through points [[x, y], ...], `width` pixels wide, with round ends.

        Raises:
            ValueError: If there is no point, a number is not finite, or the width is not positive.
        """
        return cls("stroke", (vertices(points), positive(width, "width")), strength)

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
            ValueError: If the region lies wholly outside, is a mask of another size, or the picture has more than 200
                million pixels.
        """
        _check_pixels(height, width)
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
        drawn = 0
        for part in self.data:
            xs, ys = zip(*part, strict=True)
            left, right = max(math.floor(min(xs)), 0), min(math.ceil(max(xs)), width)
            top, bottom = max(math.floor(min(ys)), 0), min(math.ceil(max(ys)), height)
            if left < right and top < bottom:
                drawn += (right - left) * (bottom - top)
                check_drawn(drawn, self.kind)
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
        if not isinstance(text, str):
            raise ValueError(f"expected a region as text, got {shortened(text)}")
        kind, _, body = text.strip().partition(":")
        if kind not in _PARSERS:
            raise ValueError(f"expected a region {FORMS}; got {shortened(text)!r}")
        strength = "1"
        if match := _STRENGTH.fullmatch(body):
            body, strength = match.groups()
        try:
            return dataclasses.replace(_PARSERS[kind](cls, body), strength=float(strength))
        except (ValueError, OSError, RecursionError) as error:
            of_a_file = kind in ("mask", "softmask", "rle")  # there it is the file that is wrong
            forms = "" if of_a_file else f". Expected {FORMS}"
            reason = error.strerror if isinstance(error, OSError) else error  # else it repeats the path
            raise ValueError(f"cannot read the region {shortened(text)!r}: {reason}{forms}") from error

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
        return {"mask": PNG_URI + base64.b64encode(file.getvalue()).decode("ascii"), "soft": True}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Region:
        """Read {"box": [...]}, {"nbox": [...]}, {"polygon": ...}, {"mask": path}, {"mask": path, "soft": true}, {"rle":
        {...}}, {"points": ..., "radius": r}, {"stroke": ..., "width": w} or {"whole": true}, each with an optional
        "strength".

        Raises:
            ValueError: If the record has not exactly one region, or a key that belongs to none.
        """
        if not isinstance(record, dict):
            raise ValueError(f"expected a region as a JSON object, got {shortened(record)}")
        kinds = record.keys() & _FROM_JSON.keys()
        if len(kinds) != 1:
            raise ValueError(f"expected exactly one of {', '.join(_FROM_JSON)} in a region, got {shortened([*record])}")
        (kind,) = kinds
        read, required, optional = _FROM_JSON[kind]
        if unknown := record.keys() - {kind, "strength", *required, *optional}:
            raise ValueError(f"unknown keys {shortened([*unknown])} beside {kind!r} in a region")
        if missing := set(required) - record.keys():
            raise ValueError(f"expected {', '.join(missing)} beside {kind!r} in a region")
        options = {name: record[name] for name in (*required, *optional, "strength") if name in record}
        return read(cls, record[kind], **options)


def _box_from_json(cls: type[Region], value: Any, **options: Any) -> Region:
    value = plain_lists(value)
    if not isinstance(value, list) or len(value) != 4:
        raise ValueError(f"cannot read 'box' of a region: expected four numbers, got {shortened(value)}")
    return cls.from_box(*value, **options)


def _mask_from_json(cls: type[Region], value: Any, soft: Any = False, **options: Any) -> Region:
    if not isinstance(soft, bool):
        raise ValueError(f"expected 'soft': true or false beside 'mask' in a region, got {shortened(soft)}")
    return cls.from_mask(value, soft=soft, **options)


def _whole_from_json(cls: type[Region], value: Any, strength: Any = 1.0) -> Region:
    if value is not True:
        raise ValueError(f"expected 'whole': true, got {shortened(value)}")
    return cls("whole", strength=strength)


# kind -> (reader, further keys, keys that may be left out)
_FROM_JSON: dict[str, tuple[Callable, tuple[str, ...], tuple[str, ...]]] = {
    "box": (_box_from_json, (), ()),
    "nbox": (functools.partial(_box_from_json, normalized=True), (), ()),
    "polygon": (lambda cls, v, **options: cls.from_polygon(v, **options), (), ()),
    "mask": (_mask_from_json, (), ("soft",)),
    "rle": (lambda cls, v, **options: cls.from_rle(v, **options), (), ()),
    "points": (lambda cls, v, **options: cls.from_points(v, **options), ("radius",), ()),
    "stroke": (lambda cls, v, **options: cls.from_stroke(v, **options), ("width",), ()),
    "whole": (_whole_from_json, (), ()),
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
        with open(text, encoding="utf-8-sig") as file:  # Windows programs write a byte order mark
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
    "softmask": lambda cls, text: cls.from_mask(text, soft=True),
    "rle": _parse_rle,
    "points": lambda cls, text: (lambda points, size: cls.from_points(points, radius=size))(*_parse_points(text)),
    "stroke": lambda cls, text: (lambda points, size: cls.from_stroke(points, width=size))(*_parse_points(text)),
    "whole": _parse_whole,
}


def _check_pixels(height: int, width: int) -> None:
    if height < 1 or width < 1 or height * width > MAX_MASK_PIXELS:
        raise ValueError(
            f"expected an image of at most {MAX_MASK_PIXELS:,} pixels for a region, got {shortened(width)} x "
            f"{shortened(height)}"
        )


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
