"""`Region`: the part of an image that a question is about, and its alpha map.

A region is a box, polygons, a mask, points, a stroke, or the whole image. Coordinates are pixels of the image as
displayed (EXIF applied), x to the right and y down; pixel i spans [i, i + 1). The alpha map of a region is
`1 - strength * (1 - mask)`: strength 1 is the region alone, 0 the whole image.
"""

from __future__ import annotations

import dataclasses
import logging
import numbers
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from .mask_decoding import check_mask_size, decode_rle, mask_to_json, pack_mask, read_mask, unpack_mask
from .rasterization import box_coverage, discs_coverage, mask_to_alpha, polygons_coverage, stroke_coverage
from .region_formats import coco_segmentation, format_hint, four_numbers, record_from_text, split_record, split_text
from .region_values import (
    ROUNDING,
    check_pixel_units,
    finite,
    join_numbers,
    positive,
    shorten,
    split_polygons,
    to_points,
)

logger = logging.getLogger(__name__)

KINDS = ("box", "nbox", "polygon", "mask", "points", "stroke", "whole")
_TO_PIXELS = "must be multiplied by its width and height"


@dataclasses.dataclass(frozen=True)
class Region:
    """A region of an image: immutable, hashable and compared by value.

    Create one with a `from_*` method, `whole` or `parse`, not with the constructor.

    Attributes:
        kind: "box", "nbox", "polygon", "mask", "points", "stroke" or "whole". An RLE becomes a mask.
        data: The geometry as nested tuples of numbers; for a mask (height, width, "binary" or "soft", compressed
            bytes).
        strength: Strength of the region, 0 to 1: alpha outside the region is `1 - strength`.

    Example:
        >>> Region.from_box(40, 60, 220, 200)
        >>> Region.parse("box:40,60,220,200*0.5")
        >>> Region.from_mask("mask.png").to_alpha(height=480, width=640)  # float32 (480, 640)
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
                f"expected a region kind ({', '.join(KINDS)}), got {shorten(self.kind)}; create regions with "
                "Region.from_box, Region.parse, etc."
            )
        number = isinstance(self.strength, numbers.Real) and not isinstance(self.strength, bool)  # includes numpy's
        if not (number and 0 <= self.strength <= 1):
            raise ValueError(f"expected a strength from 0 to 1, got {shorten(self.strength)}")
        object.__setattr__(self, "strength", abs(float(self.strength)))  # -0.0 becomes 0.0

    @classmethod
    def from_box(
        cls, x0: float, y0: float, x1: float, y1: float, *, normalized: bool = False, strength: float = 1.0
    ) -> Region:
        """Create a region from a box.

        Args:
            x0: Left edge, in pixels. The box is half-open: x0 <= x < x1.
            y0: Top edge.
            x1: Right edge.
            y1: Bottom edge.
            normalized: Whether the coordinates are fractions (0 to 1) of width and height instead of pixels.
            strength: Strength of the region, 0 to 1.

        Raises:
            ValueError: If a coordinate is not finite, the box has no area, a normalized box extends beyond 0 to 1, or
                a box in pixels appears to contain fractions.
        """
        box = tuple(finite((x0, y0, x1, y1), "box"))
        if box[2] <= box[0] or box[3] <= box[1]:
            raise ValueError(
                f"expected a box x0,y0,x1,y1 with x0 < x1 and y0 < y1, got {join_numbers(box)}; use xywh for "
                "x,y,width,height"
            )
        if normalized and (min(box) < -ROUNDING or max(box) > 1 + ROUNDING):
            raise ValueError(
                f"expected fractions from 0 to 1 of the image for nbox, got {join_numbers(box)}; use box for pixels, "
                "and divide coordinates from 0 to 1000 by 1000"
            )
        if not normalized:
            check_pixel_units(box, "a box", "must be passed as nbox")
        return cls("nbox" if normalized else "box", box, strength)

    @classmethod
    def from_xywh(cls, x: float, y: float, width: float, height: float, *, strength: float = 1.0) -> Region:
        """Create a region from a COCO box in pixels: top-left corner, width and height.

        Raises:
            ValueError: If a number is not finite, width or height is not positive, or all appear to be fractions.
        """
        x, y, width, height = finite((x, y, width, height), "box")
        if width <= 0 or height <= 0:
            given = join_numbers((x, y, width, height))
            raise ValueError(f"expected a box x,y,width,height with a width and height above 0, got {given}")
        check_pixel_units((x, y, width, height), "a box x,y,width,height", "must be passed as nbox:x0,y0,x1,y1")
        return cls.from_box(x, y, x + width, y + height, strength=strength)

    @classmethod
    def from_polygon(cls, polygon: Sequence, *, strength: float = 1.0) -> Region:
        """Create a region from one polygon or the union of several, filled by the even-odd rule.

        Args:
            polygon: [[x, y], ...], a flat [x, y, x, y, ...] (COCO), a contour (N, 1, 2) (OpenCV), or a list of these.
            strength: Strength of the region, 0 to 1.

        Raises:
            ValueError: If a polygon has no area, a coordinate is not finite, or all appear to be fractions.
        """
        polygons = [to_points(part) for part in split_polygons(polygon)]
        check_pixel_units(polygons, "a polygon", _TO_PIXELS)
        for part in polygons:
            # The signed area would be 0 for a figure of eight too.
            if np.linalg.matrix_rank(np.array(part) - part[0]) < 2:
                raise ValueError(
                    f"expected polygons of at least 3 different vertices and some area, got {shorten(part)}"
                )
        return cls("polygon", tuple(polygons), strength)

    @classmethod
    def from_mask(
        cls, mask: np.ndarray | Image.Image | str | os.PathLike, *, soft: bool = False, strength: float = 1.0
    ) -> Region:
        """Create a region from a mask of the same size as the image.

        Args:
            mask: Array or tensor (H, W), PIL image, or path of an image file, of bools, integers with two values (0 and
                1, 255 or 65535) or floats from 0 to 1 (rounded up to 1/255). EXIF orientation is applied to images.
            soft: Whether a mask of 8 or 16 bits has soft edges, that is, values between 0 and the maximum. Without it,
                such a mask is an error, because a label map looks the same.
            strength: Strength of the region, 0 to 1.

        Raises:
            ValueError: If the file cannot be read, the mask is empty, or its values are ambiguous.
        """
        pixels = read_mask(mask, soft)
        if not pixels.any():
            raise ValueError("the region is empty: no pixel of the mask is set")
        return cls("mask", pack_mask(pixels), strength)

    @classmethod
    def from_rle(cls, rle: dict, *, strength: float = 1.0) -> Region:
        """Create a region from a COCO RLE.

        Args:
            rle: {"size": [height, width], "counts": compressed str or bytes, or a list of run lengths}.
            strength: Strength of the region, 0 to 1.

        Raises:
            ValueError: If the runs do not add up to height * width, or set no pixel.
        """
        return cls.from_mask(decode_rle(rle), strength=strength)

    @classmethod
    def from_coco(cls, annotation: Any, *, strength: float = 1.0) -> Region:
        """Create a region from a COCO annotation (a dict with `segmentation`) or its segmentation.

        Raises:
            ValueError: If there is no segmentation, `annotation` is a list or file of annotations, or `from_rle` or
                `from_polygon` raises it.
        """
        segmentation = coco_segmentation(annotation)
        create = cls.from_rle if isinstance(segmentation, dict) else cls.from_polygon
        return create(segmentation, strength=strength)

    @classmethod
    def from_points(cls, points: Sequence, *, radius: float, strength: float = 1.0) -> Region:
        """Create a region of discs around points.

        Args:
            points: [[x, y], ...] in pixels.
            radius: Radius in pixels. With a radius below 0.5, a disc covers the pixel that contains the point.
            strength: Strength of the region, 0 to 1.

        Raises:
            ValueError: If there is no point, a number is not finite, the radius is not positive, or all coordinates
                appear to be fractions.
        """
        points = to_points(points)
        check_pixel_units(points, "points", _TO_PIXELS)
        return cls("points", (points, positive(radius, "radius")), strength)

    @classmethod
    def from_stroke(cls, points: Sequence, *, width: float, strength: float = 1.0) -> Region:
        """Create a region from a brush stroke: a line through points, with round ends.

        Args:
            points: [[x, y], ...] in pixels.
            width: Width of the line in pixels.
            strength: Strength of the region, 0 to 1.

        Raises:
            ValueError: If there is no point, a number is not finite, the width is not positive, or all coordinates
                appear to be fractions.
        """
        points = to_points(points)
        check_pixel_units(points, "a stroke", _TO_PIXELS)
        return cls("stroke", (points, positive(width, "width")), strength)

    @classmethod
    def whole(cls) -> Region:
        """The whole image: alpha 1 everywhere, padding included."""
        return cls("whole")

    @classmethod
    def parse(cls, text: str) -> Region:
        """Create a region from text, as used on the command line: "box:40,60,220,200", "mask:FILE.png*0.5", ...

        All formats are listed in `region_formats.FORMATS`. Numbers are separated by commas, spaces or both.

        Raises:
            ValueError: If the text has an unknown format or describes an invalid region.
        """
        name, body = split_text(text)
        try:
            return cls.from_json(record_from_text(name, body))
        except (ValueError, OSError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else error  # str(OSError) would repeat the path
            raise ValueError(f"cannot read the region {shorten(text)!r}: {reason}{format_hint(name)}") from error

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Region:
        """Create a region from a JSON object.

        Args:
            record: {"box": [...]}, {"nbox": [...]}, {"xywh": [...]}, {"polygon": ...}, {"mask": path},
                {"mask": path, "soft": true}, {"rle": {...}} (or a COCO annotation), {"points": ..., "radius": r},
                {"stroke": ..., "width": w} or {"whole": true}, each with an optional "strength".

        Raises:
            ValueError: If the record does not have exactly one geometry, has missing or unknown keys, or describes an
                invalid region.
        """
        kind, value, options = split_record(record)
        if kind in ("box", "nbox"):
            return cls.from_box(*four_numbers(kind, value), normalized=kind == "nbox", **options)
        if kind == "xywh":
            return cls.from_xywh(*four_numbers(kind, value), **options)
        if kind == "whole":
            if value is not True:
                raise ValueError(f"expected 'whole': true, got {shorten(value)}")
            return cls("whole", **options)
        create = cls.from_coco if kind == "rle" else getattr(cls, f"from_{kind}")
        return create(value, **options)

    def to_json(self) -> dict[str, Any]:
        """The JSON object from which `from_json` creates an equal region."""
        if self.kind == "whole":
            record: dict[str, Any] = {"whole": True}
        elif self.kind in ("box", "nbox"):
            record = {self.kind: list(self.data)}
        elif self.kind == "polygon":
            record = {"polygon": [[list(point) for point in part] for part in self.data]}
        elif self.kind == "mask":
            record = mask_to_json(self.data)
        else:
            points, size = self.data
            record = {self.kind: [list(p) for p in points], "radius" if self.kind == "points" else "width": size}
        return record if self.strength == 1 else {**record, "strength": self.strength}

    def __str__(self) -> str:
        """A short text for messages, in the format of `parse` if that is short."""
        if self.kind in ("box", "nbox"):
            return f"{self.kind}:{join_numbers(self.data)}"
        if self.kind == "mask":
            return f"mask of {self.data[1]} x {self.data[0]} pixels"
        if self.kind == "whole":
            return self.kind
        if self.kind == "polygon":
            groups, size = [[value for point in part for value in point] for part in self.data], ""
        else:
            groups, size = self.data[0], f"@{self.data[1]:g}"
        return f"{self.kind}:{shorten(';'.join(map(join_numbers, groups)))}{size}"

    @property
    def is_whole(self) -> bool:
        """Whether alpha is 1 everywhere: the whole image, or a region of strength 0."""
        return self.kind == "whole" or self.strength == 0

    def mask(self, height: int, width: int, *, warn: bool = True) -> np.ndarray:
        """Coverage of each pixel of an image, without strength: float32 (H, W) in [0, 1].

        Args:
            height: Height of the image in pixels.
            width: Width of the image in pixels.
            warn: Whether to log a warning if the region extends beyond the image, where it is clipped.

        Raises:
            ValueError: If the region lies outside the image, is a mask of another size, or the image has more than 200
                million pixels.
        """
        check_mask_size(height, width)
        if self.kind == "whole":
            return np.ones((height, width), np.float32)
        if self.kind == "mask":
            return self._sized_mask(height, width)
        bounds = self._bounds_in_image(height, width)
        if warn and (min(bounds[:2]) < -ROUNDING or bounds[2] > width + ROUNDING or bounds[3] > height + ROUNDING):
            message = "region %s extends beyond the image of %d x %d pixels and is clipped%s"
            logger.warning(message, self, width, height, self._unit_hint(height, width))
        coverage = self._coverage(height, width)
        if not coverage.any():
            raise ValueError(f"the region {self} lies outside the image of {width} x {height} pixels")
        return coverage

    def to_alpha(self, height: int, width: int, *, warn: bool = True) -> np.ndarray:
        """The alpha map of an image: float32 (H, W) in [0, 1]. Arguments and errors are those of `mask`."""
        return mask_to_alpha(self.mask(height, width, warn=warn), self.strength)

    def bounding_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """The box x0, y0, x1, y1 in pixels around the region, clipped to the image.

        Raises:
            ValueError: If the region lies outside the image or is a mask of another size.
        """
        if self.kind == "mask":
            rows, columns = np.nonzero(self.mask(height, width))
            return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)
        x0, y0, x1, y1 = self._bounds_in_image(height, width)
        return max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))

    def _coverage(self, height: int, width: int) -> np.ndarray:
        if self.kind == "polygon":
            return polygons_coverage(self.data, height, width)
        if self.kind in ("points", "stroke"):
            points, size = self.data
            draw = discs_coverage if self.kind == "points" else stroke_coverage
            return draw(points, size, height, width)
        return box_coverage(self._bounds(height, width), height, width)

    def _sized_mask(self, height: int, width: int) -> np.ndarray:
        mask_height, mask_width = self.data[:2]
        if (mask_height, mask_width) != (height, width):
            raise ValueError(
                f"the mask has {mask_width} x {mask_height} pixels, its image {width} x {height}; "
                "expected equal sizes. Was the image resized, or rotated by its EXIF orientation?"
            )
        return unpack_mask(self.data)

    def _bounds_in_image(self, height: int, width: int) -> tuple[float, float, float, float]:
        """`_bounds`, not clipped; an error if they lie outside the image."""
        x0, y0, x1, y1 = self._bounds(height, width)
        if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
            hint = self._unit_hint(height, width)
            raise ValueError(f"the region {self} lies outside the image of {width} x {height} pixels{hint}")
        return x0, y0, x1, y1

    def _bounds(self, height: int, width: int) -> tuple[float, float, float, float]:
        """The box around the region, in pixels."""
        if self.kind == "whole":
            return 0.0, 0.0, float(width), float(height)
        if self.kind == "box":
            return self.data
        if self.kind == "nbox":
            x0, y0, x1, y1 = self.data
            return x0 * width, y0 * height, x1 * width, y1 * height
        radius = 0.0
        if self.kind == "polygon":
            points = [point for part in self.data for point in part]
        else:
            points, size = self.data
            radius = size if self.kind == "points" else size / 2
        xs, ys = zip(*points, strict=True)
        return min(xs) - radius, min(ys) - radius, max(xs) + radius, max(ys) + radius

    def _unit_hint(self, height: int, width: int) -> str:
        """The end of a message if the coordinates may be from 0 to 1000, as some models write them."""
        x0, y0, x1, y1 = self._bounds(height, width)
        if min(x0, y0) < 0 or max(x1, y1) > 1000 or (x1 <= width + ROUNDING and y1 <= height + ROUNDING):
            return ""
        return "; if its coordinates are from 0 to 1000, divide them by 1000 and pass the box as nbox"
