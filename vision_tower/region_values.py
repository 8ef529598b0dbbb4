"""Numbers and points of a region, as passed by users or read from files -> checked floats and tuples."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .image_decoding import as_array, is_tensor

_MAX_COORDINATE = 1e9  # larger values would only overflow
ROUNDING = 1e-3  # pixels by which a region may extend beyond the image without a warning; tolerance of a fraction
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxtuple, _REPR.maxdict = 5, 40, 40, 40
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 80


def shorten(value: Any) -> str:
    """A value on one line of at most 80 characters, for error messages. Safe for deeply nested values."""
    text = value[:200] if isinstance(value, str) else _REPR.repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."


def join_numbers(values: Sequence[float]) -> str:
    """Numbers separated by commas, for messages: "1,2.5"."""
    return ",".join(f"{value:g}" for value in values)


def plain_lists(values: Any, depth: int = 6) -> Any:
    """Convert arrays, tensors and tuples, also nested, to lists. Other values are returned unchanged.

    Raises:
        ValueError: If the values are nested deeper than `depth`.
    """
    if isinstance(values, np.ndarray) or is_tensor(values):
        return as_array(values).tolist()
    if not isinstance(values, list | tuple):
        return values
    if not depth:
        raise ValueError("expected points or polygons, got lists nested too deeply")
    return [plain_lists(value, depth - 1) for value in values]


def are_integers(values: Any) -> bool:
    """Whether `values` is a list of integers."""
    return isinstance(values, list) and all(
        isinstance(value, int | np.integer) and not isinstance(value, bool) for value in values
    )


def check_pixel_units(coordinates: Any, name: str, advice: str) -> None:
    """Check that coordinates are not fractions of the image size.

    Args:
        coordinates: Numbers, also nested.
        name: Name of the coordinates in the message.
        advice: End of the sentence "fractions of the image ...".

    Raises:
        ValueError: If all coordinates are between 0 and 1, and at least one is not an integer.
    """
    values = _flatten(coordinates)
    within = -ROUNDING <= min(values) and max(values) <= 1 + ROUNDING
    if within and any(value % 1 for value in values):
        raise ValueError(f"expected {name} in pixels, got {shorten(coordinates)}; fractions of the image {advice}")


def _flatten(values: Any) -> list[float]:
    return [number for value in values for number in (_flatten(value) if isinstance(value, list | tuple) else [value])]


def finite(values: Sequence, name: str) -> list[float]:
    """Convert numbers to floats.

    Raises:
        ValueError: If a value is not a number, is not finite, or is larger than 1e9 in absolute value.
    """
    if any(isinstance(value, str | bytes | bool) for value in values):
        raise ValueError(f"expected numbers for the {name}, got {shorten(values)}")
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"expected numbers for the {name}, got {shorten(values)}") from error
    if not all(abs(number) <= _MAX_COORDINATE for number in numbers):  # false for NaN too
        raise ValueError(f"expected finite numbers up to {_MAX_COORDINATE:g} for the {name}, got {shorten(values)}")
    return numbers


def positive(value: float, name: str) -> float:
    """Convert a size in pixels to a float.

    Raises:
        ValueError: If it is not a positive number.
    """
    (number,) = finite((value,), name)
    if number <= 0:
        raise ValueError(f"expected a {name} above 0 pixels, got {number}")
    return number


def to_points(values: Any) -> tuple[tuple[float, float], ...]:
    """Points ((x, y), ...) from [[x, y], ...], a flat [x, y, x, y, ...] or OpenCV's [[[x, y]], ...].

    Raises:
        ValueError: If there is no point, or a point does not have two finite coordinates.
    """
    points = plain_lists(values)
    if not isinstance(points, list):
        raise ValueError(f"expected points [[x, y], ...], got {shorten(points)}")
    if points and not isinstance(points[0], list):
        if len(points) % 2:
            raise ValueError(f"expected x and y for each point, got {len(points)} numbers")
        points = [list(point) for point in zip(points[::2], points[1::2], strict=True)]
    points = [point[0] if _is_contour_point(point) else point for point in points]
    if not points or any(not isinstance(point, list) or len(point) != 2 for point in points):
        raise ValueError(f"expected points [[x, y], ...], got {shorten(points)}")
    return tuple((x, y) for x, y in (finite(point, "points") for point in points))


def split_polygons(polygon: Any) -> list:
    """A list of polygons, from one polygon or several in any accepted nesting (see `Region.from_polygon`).

    Raises:
        ValueError: If `polygon` is not a list or is empty.
    """
    polygon = plain_lists(polygon)
    if not isinstance(polygon, list) or not polygon:
        raise ValueError(f"expected a polygon, got {'an empty list' if polygon == [] else shorten(polygon)}")
    first = polygon[0]
    if not isinstance(first, list):
        return [polygon]  # flat
    pair_of_numbers = len(first) == 2 and not isinstance(first[0], list)
    return [polygon] if pair_of_numbers or _is_contour_point(first) else polygon


def _is_contour_point(value: Any) -> bool:
    """Whether `value` is [[x, y]], a point of an OpenCV contour."""
    return isinstance(value, list) and len(value) == 1 and isinstance(value[0], list)
