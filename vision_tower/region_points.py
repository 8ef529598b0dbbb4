"""Numbers and points as people and files give them -> checked tuples; short texts of them for messages."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .image_decoding import as_array, is_tensor

_LARGEST = 1e9  # of a coordinate: what lies further out only overflows
ROUNDING = 1e-3  # pixels that a region may reach over the image without a warning; of a fraction, an error
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxtuple, _REPR.maxdict = 5, 40, 40, 40
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 80


def shortened(value: Any) -> str:
    """A value in one line of at most 80 characters, for messages. However deep it is nested."""
    text = value[:200] if isinstance(value, str) else _REPR.repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."


def plain_lists(values: Any, depth: int = 6) -> Any:
    """Arrays, tensors and tuples in each other as lists; anything else as it is.

    Raises:
        ValueError: If they are nested deeper than `depth`.
    """
    if isinstance(values, np.ndarray) or is_tensor(values):
        return as_array(values).tolist()
    if not isinstance(values, list | tuple):
        return values
    if not depth:
        raise ValueError("expected points or polygons, got lists nested too deeply")
    return [plain_lists(value, depth - 1) for value in values]


def are_whole(values: Any) -> bool:
    """Whether it is a list of whole numbers."""
    return isinstance(values, list) and all(
        isinstance(value, int | np.integer) and not isinstance(value, bool) for value in values
    )


def check_no_fractions(coordinates: Any, what: str, advice: str) -> None:
    """Raise ValueError if coordinates in pixels lie within the first pixel and not on its corners: they are meant as
    parts of the image. `advice` says what to do with fractions.
    """
    values = _flat(coordinates)
    within = -ROUNDING <= min(values) and max(values) <= 1 + ROUNDING
    if within and any(value % 1 for value in values):
        raise ValueError(f"expected {what} in pixels, got {shortened(coordinates)}; fractions of the image {advice}")


def _flat(values: Any) -> list[float]:
    return [number for value in values for number in (_flat(value) if isinstance(value, list | tuple) else [value])]


def finite(values: Sequence, what: str) -> list[float]:
    """Floats that are finite and not absurdly large.

    Raises:
        ValueError: If one is not, or is not a number.
    """
    if any(isinstance(value, str | bytes | bool) for value in values):
        raise ValueError(f"expected numbers for the {what}, got {shortened(values)}")
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"expected numbers for the {what}, got {shortened(values)}") from error
    if not all(abs(number) <= _LARGEST for number in numbers):  # not a number fails this too
        raise ValueError(f"expected finite numbers up to {_LARGEST:g} for the {what}, got {shortened(values)}")
    return numbers


def positive(value: float, what: str) -> float:
    """A size in pixels.

    Raises:
        ValueError: If it is not above 0.
    """
    (number,) = finite((value,), what)
    if number <= 0:
        raise ValueError(f"expected a {what} above 0 pixels, got {number}")
    return number


def vertices(points: Any) -> tuple[tuple[float, float], ...]:
    """Points as tuples, from [[x, y], ...], flat [x, y, x, y, ...] or OpenCV's [[[x, y]], ...]."""
    points = plain_lists(points)
    if not isinstance(points, list):
        raise ValueError(f"expected points [[x, y], ...], got {shortened(points)}")
    if points and not isinstance(points[0], list):
        if len(points) % 2:
            raise ValueError(f"expected x and y for each point, got {len(points)} numbers")
        points = [list(point) for point in zip(points[::2], points[1::2], strict=True)]
    points = [point[0] if _is_contour_point(point) else point for point in points]
    if not points or any(not isinstance(point, list) or len(point) != 2 for point in points):
        raise ValueError(f"expected points [[x, y], ...], got {shortened(points)}")
    return tuple((x, y) for x, y in (finite(point, "points") for point in points))


def split_polygons(polygon: Any) -> list:
    """The polygons in any of the accepted nestings."""
    polygon = plain_lists(polygon)
    if not isinstance(polygon, list) or not polygon:
        raise ValueError(f"expected a polygon, got {'an empty list' if polygon == [] else shortened(polygon)}")
    first = polygon[0]
    if not isinstance(first, list):
        return [polygon]  # flat
    pair_of_numbers = len(first) == 2 and not isinstance(first[0], list)
    return [polygon] if pair_of_numbers or _is_contour_point(first) else polygon


def _is_contour_point(value: Any) -> bool:
    """[[x, y]], as OpenCV has it."""
    return isinstance(value, list) and len(value) == 1 and isinstance(value[0], list)
