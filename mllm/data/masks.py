"""Converts masks of COCO's formats to `Region`s, or returns the reason why a mask cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from mllm.data.read_report import Box
from mllm.data.schemas import Rle
from vision_tower import Region

NO_MASK = "skipped: no mask"
INVALID_MASK = "skipped: invalid mask"
EMPTY_MASK = "skipped: empty mask"
OTHER_SIZE = "skipped: mask and image differ in size"
REGION_TYPES = ("box", "mask")


def check_region_type(region_type: str) -> None:
    """Raise ValueError unless the region type is "box" or "mask"."""
    if region_type not in REGION_TYPES:
        raise ValueError(f"expected region_type 'box' or 'mask', got {region_type!r}")


def select_region(mask: Any, box: Box, size: tuple[int, int], region_type: str) -> Region | str:
    """The region of a record as a box or as a mask, or the reason why the mask cannot be used.

    Args:
        mask: COCO RLE or polygons; None if there is none.
        box: Box in pixels.
        size: (height, width) of the image.
        region_type: "box" or "mask".
    """
    if region_type == "box":
        return Region.from_box(*box)
    return mask_region(mask, size)


def mask_region(mask: Any, size: tuple[int, int] | None = None) -> Region | str:
    """The region of an RLE or of polygons, or the reason why it cannot be used.

    Args:
        mask: COCO RLE or polygons; None if there is none.
        size: (height, width) of the image, which an RLE must have; None if unknown.
    """
    if mask is None or (isinstance(mask, list | dict | str) and not mask):
        return NO_MASK
    try:
        if isinstance(mask, list):
            polygons = [polygon for polygon in _flat_polygons(mask) if _has_area(polygon)]
            return Region.from_polygon(polygons) if polygons else EMPTY_MASK
        rle = msgspec.convert(mask, Rle)
        if size is not None and rle.size != tuple(size):
            return OTHER_SIZE
        return Region.from_rle({"size": rle.size, "counts": rle.counts})
    except msgspec.ValidationError:
        return INVALID_MASK
    except ValueError as error:
        return EMPTY_MASK if "the region is empty" in str(error) else INVALID_MASK


def _flat_polygons(mask: list) -> list[list[float]]:
    """Polygons in any nesting that `Region.from_polygon` accepts, as flat lists x, y, x, y, ...

    Raises:
        ValueError: If they contain anything but numbers, or an odd number of coordinates.
    """
    if not isinstance(mask[0], list):
        mask = [mask]
    elif all(isinstance(part, list) and len(part) == 2 and not isinstance(part[0], list) for part in mask):
        mask = [[value for point in mask for value in point]]  # one polygon of points
    flat = []
    for part in mask:
        if isinstance(part, list) and part and isinstance(part[0], list):
            part = [value for point in msgspec.convert(part, list[tuple[float, float]]) for value in point]
        flat.append(msgspec.convert(part, list[float]))
        if len(flat[-1]) % 2:
            raise ValueError("odd number of coordinates")
    return flat


def _has_area(polygon: Sequence[float]) -> bool:
    """Whether a flat polygon encloses an area: COCO has polygons of two points, or whose points are collinear."""
    points = list(zip(polygon[::2], polygon[1::2], strict=True))
    if len(points) < 3:
        return False
    (x0, y0), *others = points
    return any(
        (x1 - x0) * (y2 - y0) != (x2 - x0) * (y1 - y0) for (x1, y1), (x2, y2) in zip(others, others[1:], strict=False)
    )
