"""Text and COCO annotations -> JSON records of a region, which `Region.from_json` reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from .region_values import plain_lists, shorten

FORMATS = (
    "box:x0,y0,x1,y1 | nbox:x0,y0,x1,y1 | xywh:x,y,width,height | polygon:x,y,x,y,x,y[;...] | mask:FILE.png | "
    "softmask:FILE.png | rle:FILE.json | points:x,y[;x,y]@radius | stroke:x,y;x,y@width | whole, each with an optional "
    "strength: box:1,2,3,4*0.5"
)
_STRENGTH = re.compile(r"(.*)\*\s*([\d.eE+-]+)", re.DOTALL)
# key of the geometry -> (required keys, optional keys); "strength" is optional for all
_JSON_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "box": ((), ()),
    "nbox": ((), ()),
    "xywh": ((), ()),
    "polygon": ((), ()),
    "mask": ((), ("soft",)),
    "rle": ((), ()),
    "points": (("radius",), ()),
    "stroke": (("width",), ()),
    "whole": ((), ()),
}


def split_record(record: Any) -> tuple[str, Any, dict[str, Any]]:
    """Check the keys of a region's JSON record.

    Returns:
        The key of the geometry ("box", "mask", ...), its value, and the remaining items.

    Raises:
        ValueError: If the record does not have exactly one geometry, or keys are missing or unknown.
    """
    if not isinstance(record, dict):
        raise ValueError(f"expected a region as a JSON object, got {shorten(record)}")
    kinds = record.keys() & _JSON_KEYS.keys()
    if len(kinds) != 1:
        raise ValueError(f"expected exactly one of {', '.join(_JSON_KEYS)} in a region, got {shorten([*record])}")
    (kind,) = kinds
    required, optional = _JSON_KEYS[kind]
    if unknown := record.keys() - {kind, "strength", *required, *optional}:
        raise ValueError(f"unknown keys {shorten([*unknown])} next to {kind!r} in a region")
    if missing := set(required) - record.keys():
        raise ValueError(f"expected {', '.join(missing)} next to {kind!r} in a region")
    if not isinstance(record.get("soft", False), bool):
        raise ValueError(f"expected 'soft': true or false next to 'mask' in a region, got {shorten(record['soft'])}")
    options = {name: record[name] for name in (*required, *optional, "strength") if name in record}
    return kind, record[kind], options


def four_numbers(kind: str, value: Any) -> list:
    """The four numbers of a box in JSON.

    Raises:
        ValueError: If there are not four.
    """
    value = plain_lists(value)
    if not isinstance(value, list) or len(value) != 4:
        raise ValueError(f"cannot read {kind!r} of a region: expected four numbers, got {shorten(value)}")
    return value


def coco_segmentation(annotation: Any) -> Any:
    """The segmentation of a COCO annotation: a dict is an RLE, anything else is polygons.

    Args:
        annotation: A COCO annotation, or its segmentation, which is returned unchanged.

    Raises:
        ValueError: If there is no segmentation, or `annotation` is a list or file of annotations.
    """
    value = annotation
    if isinstance(value, dict):
        for name in ("annotations", "images", "categories"):
            if name in value:
                raise ValueError(
                    f"expected one COCO annotation, got a complete COCO file (with {name!r}); save one annotation to a "
                    "separate file"
                )
        value = value.get("segmentation", value)
    if isinstance(value, list | tuple) and any(isinstance(part, dict) for part in value):
        raise ValueError(
            f"expected one COCO annotation, got a list of {len(value)}; save one annotation to a separate file"
        )
    if isinstance(value, dict) and value.keys() & {"bbox", "category_id"} or value in ([], None):
        raise ValueError("the COCO annotation has no segmentation; pass its bbox as xywh")
    return value


def split_text(text: Any) -> tuple[str, str]:
    """Split a region written as text into its format ("box", "softmask", ...) and the rest.

    Raises:
        ValueError: If `text` is not a string, or the format is unknown.
    """
    if not isinstance(text, str):
        raise ValueError(f"expected a region as text, got {shorten(text)}")
    name, _, body = text.strip().partition(":")
    if name not in _READERS:
        raise ValueError(f"expected a region {FORMATS}; got {shorten(text)!r}")
    return name, body


def record_from_text(name: str, body: str) -> dict[str, Any]:
    """The JSON record of a region, from what `split_text` returns. An RLE file is read here, a mask file is not.

    Raises:
        ValueError: If the numbers or the JSON cannot be read.
        OSError: If the RLE file cannot be opened.
    """
    strength = "1"
    if match := _STRENGTH.fullmatch(body):
        body, strength = match.groups()
    return {**_READERS[name](body), "strength": float(strength)}


def format_hint(name: str) -> str:
    """The expected text of a format, as the end of a message; empty for formats that are read from a file."""
    if name in ("mask", "softmask", "rle"):
        return ""
    return "; expected " + next(line for line in FORMATS.split(" | ") if line.partition(":")[0] == name)


def _floats(text: str, count: int | None = None) -> list[float]:
    """Numbers separated by commas, spaces or both."""
    values = [float(part) for part in re.split(r"\s*,\s*|\s+", text.strip())]
    if count is not None and len(values) != count:
        raise ValueError(f"expected {count} numbers, got {len(values)}")
    return values


def _points_and_size(text: str) -> tuple[list[float], float]:
    """x,y[;x,y]@size -> [x, y, x, y, ...] and the size."""
    points, at, size = text.partition("@")
    if not at:
        raise ValueError("expected @ and a size in pixels after the points")
    parts = [_floats(part) for part in points.split(";")]
    if odd := [part for part in parts if len(part) % 2]:
        raise ValueError(f"expected x and y for each point, got {len(odd[0])} numbers")
    return [value for part in parts for value in part], float(size)


def _read_points(text: str) -> dict[str, Any]:
    points, radius = _points_and_size(text)
    return {"points": points, "radius": radius}


def _read_stroke(text: str) -> dict[str, Any]:
    points, width = _points_and_size(text)
    return {"stroke": points, "width": width}


def _read_rle(text: str) -> dict[str, Any]:
    if not text.lstrip().startswith(("{", "[")):
        with open(text, encoding="utf-8-sig") as file:  # Windows programs write a byte order mark
            text = file.read()
    return {"rle": json.loads(text)}


def _read_whole(text: str) -> dict[str, Any]:
    if text:
        raise ValueError("expected nothing after 'whole'")
    return {"whole": True}


_READERS: dict[str, Callable[[str], dict[str, Any]]] = {
    "box": lambda text: {"box": _floats(text, 4)},
    "nbox": lambda text: {"nbox": _floats(text, 4)},
    "xywh": lambda text: {"xywh": _floats(text, 4)},
    "polygon": lambda text: {"polygon": [_floats(part) for part in text.split(";")]},
    "mask": lambda text: {"mask": text},
    "softmask": lambda text: {"mask": text, "soft": True},
    "rle": _read_rle,
    "points": _read_points,
    "stroke": _read_stroke,
    "whole": _read_whole,
}
