"""Masks in other people's files -> `Region`s, or the reason why one cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from mllm.data.records import Box
from mllm.data.schemas import Rle
from vision_tower import Region

NO_MASK = "without a mask, left out"
BAD_MASK = "whose mask cannot be decoded, left out"
EMPTY_MASK = "whose mask is empty, left out"
OTHER_SIZE = "whose mask has another size than its image, left out"
REGION_INPUTS = ("box", "mask")


def check_region_input(region_input: str) -> None:
    """Raise ValueError unless regions are asked for as "box" or "mask"."""
    if region_input not in REGION_INPUTS:
        raise ValueError(f"expected region_input 'box' or 'mask', got {region_input!r}")


def region_of(shape: Any, box: Box, size: tuple[int, int], region_input: str) -> Region | str:
    """The region of a record in the form asked for, or the reason why its mask cannot be used.

    Args:
        shape: Its mask: an RLE or polygons as COCO has them; None where there is none.
        box: Its box in pixels.
        size: (height, width) of its image.
        region_input: "box" or "mask".
    """
    if region_input == "box":
        return Region.from_box(*box)
    return mask_of(shape, size)


def mask_of(shape: Any, size: tuple[int, int] | None = None) -> Region | str:
    """A mask from an RLE or from polygons, or the reason why it cannot be used; `size` is (height, width) of its image,
    which an RLE must have.
    """
    if shape is None or (isinstance(shape, list | dict | str) and not shape):
        return NO_MASK
    try:
        if isinstance(shape, list):
            parts = [part for part in _parts(shape) if _has_area(part)]
            return Region.from_polygon(parts) if parts else EMPTY_MASK
        rle = msgspec.convert(shape, Rle)
        if size is not None and rle.size != tuple(size):
            return OTHER_SIZE
        return Region.from_rle({"size": rle.size, "counts": rle.counts})
    except msgspec.ValidationError:
        return BAD_MASK
    except ValueError as error:
        return EMPTY_MASK if "the region is empty" in str(error) else BAD_MASK


def _parts(shape: list) -> list[list[float]]:
    """Polygons in any of the nestings that `Region.from_polygon` takes, as flat lists x, y, x, y, ...

    Raises:
        ValueError: If they hold anything but numbers, or half a point.
    """
    if not isinstance(shape[0], list):
        shape = [shape]
    elif all(isinstance(part, list) and len(part) == 2 and not isinstance(part[0], list) for part in shape):
        shape = [[value for point in shape for value in point]]  # one polygon of points
    flat = []
    for part in shape:
        if isinstance(part, list) and part and isinstance(part[0], list):
            part = [value for point in msgspec.convert(part, list[tuple[float, float]]) for value in point]
        flat.append(msgspec.convert(part, list[float]))
        if len(flat[-1]) % 2:
            raise ValueError("half a point")
    return flat


def _has_area(flat: Sequence[float]) -> bool:
    """Whether a flat polygon encloses anything: COCO has parts of two points or on one line, which enclose nothing."""
    points = list(zip(flat[::2], flat[1::2], strict=True))
    if len(points) < 3:
        return False
    (x0, y0), *others = points
    return any(
        (x1 - x0) * (y2 - y0) != (x2 - x0) * (y1 - y0) for (x1, y1), (x2, y2) in zip(others, others[1:], strict=False)
    )
