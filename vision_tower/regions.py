"""A region of a picture: box, polygons, mask, points, stroke, or the whole image -> alpha map.

Coordinates are pixels of the picture as displayed, x right and y down; pixel i spans [i, i + 1). A region's alpha map
is `1 - strength * (1 - mask)`: strength 1 is the region alone, 0 the whole image.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import logging
import math
import numbers
import os
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from .region_forms import FORMS, JSON_FORMS, STRENGTH, TEXT_FORMS, coco_segmentation
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
    ROUNDING,
    are_whole,
    check_no_fractions,
    finite,
    plain_lists,
    positive,
    shortened,
    split_polygons,
    vertices,
)

logger = logging.getLogger(__name__)

KINDS = ("box", "nbox", "polygon", "mask", "points", "stroke", "whole")
_MULTIPLY = "are to be multiplied by its width and height"
MAX_MASK_PIXELS = 200_000_000  # of a mask, which takes 4 bytes a pixel; a few bytes of runs could ask for all memory


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
        """Check kind and strength.

        Raises:
            ValueError: If the kind is unknown, or the strength is not a number from 0 to 1.
        """
        if self.kind not in KINDS:
            raise ValueError(
                f"expected a kind of region ({', '.join(KINDS)}), got {shortened(self.kind)}; make regions with "
                "Region.from_box, Region.parse and the like"
            )
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
            raise ValueError(
                f"expected a box x0,y0,x1,y1 with x0 < x1 and y0 < y1, got {_numbers(box)}; a box x,y,width,height is "
                "xywh"
            )
        if normalized and (min(box) < -ROUNDING or max(box) > 1 + ROUNDING):
            raise ValueError(
                f"expected fractions from 0 to 1 of the image for nbox, got {_numbers(box)}; a box in pixels is box, "
                "and coordinates from 0 to 1000 are to be divided by 1000"
            )
        if not normalized:
            check_no_fractions(box, "a box", "are nbox")
        return cls("nbox" if normalized else "box", box, strength)

    @classmethod
    def from_xywh(cls, x: float, y: float, width: float, height: float, *, strength: float = 1.0) -> Region:
        """A box in pixels as COCO writes it: its left upper corner, width and height.

        Raises:
            ValueError: If a number is not finite, width or height is not positive, or all are plainly fractions.
        """
        x, y, width, height = finite((x, y, width, height), "box")
        if width <= 0 or height <= 0:
            given = _numbers((x, y, width, height))
            raise ValueError(f"expected a box x,y,width,height with a width and height above 0, got {given}")
        check_no_fractions((x, y, width, height), "a box x,y,width,height", "are nbox:x0,y0,x1,y1")
        return cls.from_box(x, y, x + width, y + height, strength=strength)

    @classmethod
    def from_polygon(cls, polygon: Sequence, *, strength: float = 1.0) -> Region:
        """A polygon [[x, y], ...], COCO's flat [x, y, x, y, ...] or OpenCV's contour (N, 1, 2), or a list of polygons,
        whose union it is. Even-odd filling.

        Raises:
            ValueError: If a polygon has no area, a coordinate is not finite, or all are plainly fractions.
        """
        polygons = [vertices(part) for part in split_polygons(polygon)]
        check_no_fractions(polygons, "a polygon", _MULTIPLY)
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
    def from_coco(cls, annotation: Any, *, strength: float = 1.0) -> Region:
        """A COCO annotation (a dictionary with `segmentation`) or its segmentation: an RLE or polygons.

        Raises:
            ValueError: If there is no segmentation, it is a list or file of annotations, or as `from_rle` and
                `from_polygon`.
        """
        segmentation = coco_segmentation(annotation)
        read = cls.from_rle if isinstance(segmentation, dict) else cls.from_polygon
        return read(segmentation, strength=strength)

    @classmethod
    def from_points(cls, points: Sequence, *, radius: float, strength: float = 1.0) -> Region:
        """Discs of `radius` pixels around points [[x, y], ...]; below half a pixel a disc takes in the pixel it lies
        in.

        Raises:
            ValueError: If there is no point, a number is not finite, the radius is not positive, or all coordinates are
                plainly fractions.
        """
        points = vertices(points)
        check_no_fractions(points, "points", _MULTIPLY)
        return cls("points", (points, positive(radius, "radius")), strength)

    @classmethod
    def from_stroke(cls, points: Sequence, *, width: float, strength: float = 1.0) -> Region:
        """A line through points [[x, y], ...], `width` pixels wide, with round ends.

        Raises:
            ValueError: If there is no point, a number is not finite, the width is not positive, or all coordinates are
                plainly fractions.
        """
        points = vertices(points)
        check_no_fractions(points, "a stroke", _MULTIPLY)
        return cls("stroke", (points, positive(width, "width")), strength)

    @classmethod
    def whole(cls) -> Region:
        """The whole image: alpha 1 everywhere, padding included."""
        return cls("whole")

    @property
    def is_whole(self) -> bool:
        """Whether alpha is 1 everywhere: the whole image, or a region of strength 0."""
        return self.kind == "whole" or self.strength == 0

    def mask(self, height: int, width: int, *, warn: bool = True) -> np.ndarray:
        """Coverage of each pixel of a (height, width) picture, before strength: float32 (H, W) in [0, 1].

        What lies outside the image is clipped, with a warning unless `warn` is false.

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
        if warn and (min(x0, y0) < -ROUNDING or x1 > width + ROUNDING or y1 > height + ROUNDING):
            logger.warning(
                "region %s extends beyond the image of %d x %d pixels and is clipped%s",
                self,
                width,
                height,
                self._unit_advice(height, width),
            )
        if self.kind == "polygon":
            coverage = self._union(height, width)
        elif self.kind in ("points", "stroke"):
            points, size = self.data
            coverage = line_coverage(points, size if self.kind == "points" else size / 2, self.kind, height, width)
        else:
            coverage = box_coverage((x0, y0, x1, y1), height, width)
        if not coverage.any():
            raise ValueError(f"the region {self} lies outside the image of {width} x {height} pixels")
        return coverage

    def to_alpha(self, height: int, width: int, *, warn: bool = True) -> np.ndarray:
        """The alpha map of a (height, width) picture: float32 (H, W) in [0, 1].

        Raises:
            ValueError: As `mask`.
        """
        return 1 - np.float32(self.strength) * (1 - self.mask(height, width, warn=warn))

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
            advice = self._unit_advice(height, width)
            raise ValueError(f"the region {self} lies outside the image of {width} x {height} pixels{advice}")
        return x0, y0, x1, y1

    def _unit_advice(self, height: int, width: int) -> str:
        """What to do if the coordinates may be from 0 to 1000, as some models write them."""
        x0, y0, x1, y1 = self._bounds(height, width)
        if min(x0, y0) < 0 or max(x1, y1) > 1000 or (x1 <= width + ROUNDING and y1 <= height + ROUNDING):
            return ""
        return "; if its coordinates are from 0 to 1000, divide them by 1000 and give a box as nbox"

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
                f"the mask has {own_width} x {own_height} pixels, its image {width} x {height}; "
                "expected equal sizes. Was the image resized, or turned by its EXIF orientation?"
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
        if self.kind == "whole":
            return self.kind
        if self.kind == "polygon":
            groups, size = [[value for point in part for value in point] for part in self.data], ""
        else:
            groups, size = self.data[0], f"@{self.data[1]:g}"
        return f"{self.kind}:{shortened(';'.join(map(_numbers, groups)))}{size}"

    @classmethod
    def parse(cls, text: str) -> Region:
        """Read a region from command-line text, one of: box, nbox, xywh, polygon, mask, softmask, rle, points, stroke,
        whole (see `FORMS`). Numbers have commas, spaces or both between them.

        Raises:
            ValueError: If the text is of no such form.
        """
        if not isinstance(text, str):
            raise ValueError(f"expected a region as text, got {shortened(text)}")
        kind, _, body = text.strip().partition(":")
        if kind not in TEXT_FORMS:
            raise ValueError(f"expected a region {FORMS}; got {shortened(text)!r}")
        strength = "1"
        if match := STRENGTH.fullmatch(body):
            body, strength = match.groups()
        try:
            return dataclasses.replace(TEXT_FORMS[kind](cls, body), strength=float(strength))
        except (ValueError, OSError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else error  # else it repeats the path
            raise ValueError(f"cannot read the region {shortened(text)!r}: {reason}{_form_of(kind)}") from error

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
        """Read {"box": [...]}, {"nbox": [...]}, {"xywh": [...]}, {"polygon": ...}, {"mask": path}, {"mask": path,
        "soft": true}, {"rle": {...}} (or a COCO annotation), {"points": ..., "radius": r}, {"stroke": ..., "width": w}
        or {"whole": true}, each with an optional "strength".

        Raises:
            ValueError: If the record has not exactly one region, or a key that belongs to none.
        """
        if not isinstance(record, dict):
            raise ValueError(f"expected a region as a JSON object, got {shortened(record)}")
        kinds = record.keys() & JSON_FORMS.keys()
        if len(kinds) != 1:
            raise ValueError(f"expected exactly one of {', '.join(JSON_FORMS)} in a region, got {shortened([*record])}")
        (kind,) = kinds
        read, required, optional = JSON_FORMS[kind]
        if unknown := record.keys() - {kind, "strength", *required, *optional}:
            raise ValueError(f"unknown keys {shortened([*unknown])} beside {kind!r} in a region")
        if missing := set(required) - record.keys():
            raise ValueError(f"expected {', '.join(missing)} beside {kind!r} in a region")
        options = {name: record[name] for name in (*required, *optional, "strength") if name in record}
        return read(cls, record[kind], **options)


def _check_pixels(height: int, width: int) -> None:
    if height < 1 or width < 1 or height * width > MAX_MASK_PIXELS:
        raise ValueError(
            f"expected an image of at most {MAX_MASK_PIXELS:,} pixels for a region, got {shortened(width)} x "
            f"{shortened(height)}"
        )


def _form_of(kind: str) -> str:
    """How a region of this kind is written, as the end of a message; of a file, it is the file that is wrong."""
    if kind in ("mask", "softmask", "rle"):
        return ""
    return "; it is written " + next(form for form in FORMS.split(" | ") if form.partition(":")[0] == kind)


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
