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
import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

logger = logging.getLogger(__name__)

FORMS = (
    "box:x0,y0,x1,y1 | nbox:x0,y0,x1,y1 | polygon:x,y,x,y,x,y[;...] | mask:FILE.png | rle:FILE.json | "
    "points:x,y[;x,y]@radius | stroke:x,y;x,y@width | whole, each with an optional strength: box:1,2,3,4*0.5"
)
_SUBROWS = 8  # scan lines a pixel row, for polygons; across a line, coverage is exact
_PNG_URI = "data:image/png;base64,"


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
            ValueError: If a coordinate is not finite, or the box has no area.
        """
        box = tuple(_finite((x0, y0, x1, y1), "box"))
        if box[2] <= box[0] or box[3] <= box[1]:
            raise ValueError(f"expected a box x0,y0,x1,y1 with x0 < x1 and y0 < y1, got {_numbers(box)}")
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
            area = sum(ax * by - bx * ay for (ax, ay), (bx, by) in zip(part, part[1:] + part[:1], strict=True))
            if len(set(part)) < 3 or (area == 0 and len(part) < 4):
                raise ValueError(f"expected polygons of at least 3 different vertices and some area, got {part}")
        return cls("polygon", tuple(polygons), strength)

    @classmethod
    def from_mask(cls, mask: np.ndarray | Image.Image | str | os.PathLike, *, strength: float = 1.0) -> Region:
        """A mask of the picture's own size: an array (H, W), a PIL image, or an image file.

        Taken are bool, integers of 0 and 1, uint8 0..255 and floats 0..1, where values between make soft edges (kept in
        255 steps).

        Raises:
            ValueError: If the file cannot be read, the mask is empty, or its values could mean several things.
        """
        pixels = _mask_pixels(mask)
        if not pixels.any():
            raise ValueError("the region is empty: no pixel of the mask is set")
        binary = bool(np.isin(pixels, (0, 255)).all())
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
            raise ValueError(f"expected an RLE {{'size': [h, w], 'counts': ...}}, got {_short(rle)}")
        try:
            height, width = (int(v) for v in rle["size"])
            counts = rle["counts"]
            runs = np.array(_decode_counts(counts) if isinstance(counts, str | bytes) else counts, np.int64)
        except (TypeError, ValueError, OverflowError, IndexError) as error:
            raise ValueError(f"expected an RLE {{'size': [h, w], 'counts': ...}}, got {_short(rle)}") from error
        if runs.ndim != 1 or (runs < 0).any() or height < 1 or width < 1 or runs.sum() != height * width:
            raise ValueError(f"the RLE is inconsistent: its runs add up to {runs.sum()}, not to {height} * {width}")
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
        if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
            raise ValueError(f"the region {self} lies outside the picture of {width} x {height} pixels")
        if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
            logger.warning(
                "the region %s reaches over the picture of %d x %d pixels and is cut off", self, width, height
            )
        if self.kind == "polygon":
            coverage = np.maximum.reduce([_polygon_coverage(part, height, width) for part in self.data])
        elif self.kind in ("points", "stroke"):
            points, size = self.data
            coverage = _line_coverage(points, size if self.kind == "points" else size / 2, self.kind, height, width)
        else:
            coverage = _box_coverage((x0, y0, x1, y1), height, width)
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
        """Box x0, y0, x1, y1 in pixels around the part of the region that lies in a (height, width) picture."""
        if self.kind == "mask":
            rows, columns = np.nonzero(self.mask(height, width))
            return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)
        x0, y0, x1, y1 = self._extent(height, width)
        return max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))

    def _extent(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Box around the region in pixels; it may reach over the picture."""
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

    def _unpacked(self, height: int, width: int) -> np.ndarray:
        own_height, own_width, depth, packed = self.data
        if (own_height, own_width) != (height, width):
            raise ValueError(
                f"the mask is {own_width} x {own_height} pixels, its picture {width} x {height}: expected the same size; was "
                " the picture resized, or turned by its EXIF orientation?"
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
        return self.kind if self.kind == "whole" else f"{self.kind}:{_short(self.data[0])}"

    @classmethod
    def parse(cls, text: str) -> Region:
        """Read a region from command-line text, one of: box, nbox, polygon, mask, rle, points, stroke, whole (see
        `FORMS`).

        Raises:
            ValueError: If the text is of no such form.
        """
        kind, _, rest = text.strip().partition(":")
        body, star, strength = rest.rpartition("*") if kind not in ("mask", "rle") else (rest, "", "")
        try:
            read = _PARSERS[kind]
            return dataclasses.replace(
                read(cls, body if star or kind in ("mask", "rle") else rest), strength=float(strength) if star else 1.0
            )
        except KeyError:
            raise ValueError(f"expected a region {FORMS}; got {_short(text)!r}") from None
        except (ValueError, OSError) as error:
            raise ValueError(f"cannot read the region {_short(text)!r}: {error}") from error

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
            return {"rle": {"size": [height, width], "counts": _run_lengths(mask > 0)}}
        file = io.BytesIO()
        Image.fromarray(np.rint(mask * 255).astype(np.uint8)).save(file, "PNG")
        return {"mask": _PNG_URI + base64.b64encode(file.getvalue()).decode("ascii")}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Region:
        """Read {"box": [...]}, {"nbox": [...]}, {"polygon": ...}, {"mask": path}, {"rle": {...}}, {"points": ...,
        "radius": r}, {"stroke": ..., "width": w} or {"whole": true}, each with an optional "strength".

        Raises:
            ValueError: If the record has not exactly one region, or a key that belongs to none.
        """
        if not isinstance(record, dict):
            raise ValueError(f"expected a region as a JSON object, got {_short(record)}")
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
            raise ValueError(f"cannot read {kind!r} of a region: {_short(record[kind])}") from error
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
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected numbers for the {what}, got {_short(values)}") from error
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"expected finite numbers for the {what}, got {_short(values)}")
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
        raise ValueError(f"expected points [[x, y], ...], got {_short(points)}")
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


def _mask_pixels(mask: Any) -> np.ndarray:
    """uint8 (H, W), 0 outside to 255 inside."""
    if isinstance(mask, str | os.PathLike):
        mask = _open_mask(mask)
    if isinstance(mask, Image.Image):
        mask = _grey(mask)
    array = np.asarray(mask)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"expected a mask (H, W), got shape {array.shape}")
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind in "iu":
        low, high = int(array.min()), int(array.max())
        if 0 <= low and high <= 1:
            return array.astype(np.uint8) * np.uint8(255)
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
        file = io.BytesIO(base64.b64decode(text[len(_PNG_URI) :])) if text.startswith(_PNG_URI) else text
        image = Image.open(file)
        image.load()
    except FileNotFoundError:
        raise ValueError(f"there is no mask file {text}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the mask {_short(text)} as an image: {error}") from error
    return image


def _grey(image: Image.Image) -> np.ndarray:
    """A mask image as an array; modes that could mean several things are refused."""
    if image.mode in ("1", "L", "F"):
        return np.asarray(image)
    if image.mode == "P":
        indices = np.asarray(image)
        if len(np.unique(indices)) > 2:
            raise ValueError("the palette mask holds several objects; keep one of them: a picture with 0 outside")
        return indices > 0
    pixels = np.asarray(image)
    if image.mode in ("RGB", "RGBA", "LA"):
        colours = pixels[..., :3] if image.mode.startswith("RGB") else pixels[..., :1]
        opaque = image.mode == "RGB" or (pixels[..., -1] == 255).all()
        if opaque and (colours == colours[..., :1]).all():
            return colours[..., 0]
    raise ValueError(
        f"expected a grey mask, got a picture of mode {image.mode}; convert it to 'L', 0 outside and 255 inside"
    )


def _box_coverage(box: tuple[float, float, float, float], height: int, width: int) -> np.ndarray:
    """Share of each pixel that the box covers, exactly."""
    x0, y0, x1, y1 = box
    columns, rows = np.arange(width), np.arange(height)
    across = (np.minimum(columns + 1, x1) - np.maximum(columns, x0)).clip(0, 1)
    down = (np.minimum(rows + 1, y1) - np.maximum(rows, y0)).clip(0, 1)
    return np.outer(down, across).astype(np.float32)


def _polygon_coverage(points: tuple, height: int, width: int) -> np.ndarray:
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
    if not coverage.any():  # thinner than the distance of the scan lines: still a trace
        return _box_coverage((x0.min(), y0.min(), x0.max(), y0.max()), height, width)
    return coverage.astype(np.float32)


def _line_coverage(points: tuple, radius: float, kind: str, height: int, width: int) -> np.ndarray:
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


def _decode_counts(counts: str | bytes) -> list[int]:
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


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed counts: runs down the columns, beginning with those outside."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return [0, *runs] if flat[0] else runs


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
