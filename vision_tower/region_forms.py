"""The forms in which people and files write a region -> arguments of `Region`'s methods: text and JSON."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .region_points import plain_lists, shortened

if TYPE_CHECKING:
    from .regions import Region

FORMS = (
    "box:x0,y0,x1,y1 | nbox:x0,y0,x1,y1 | xywh:x,y,width,height | polygon:x,y,x,y,x,y[;...] | mask:FILE.png | "
    "softmask:FILE.png | rle:FILE.json | points:x,y[;x,y]@radius | stroke:x,y;x,y@width | whole, each with an optional "
    "strength: box:1,2,3,4*0.5"
)
STRENGTH = re.compile(r"(.*)\*\s*([\d.eE+-]+)", re.DOTALL)


def coco_segmentation(annotation: Any) -> Any:
    """The segmentation of a COCO annotation (or that itself): a dictionary is an RLE, anything else polygons.

    Raises:
        ValueError: If there is none, or it is a list or file of annotations.
    """
    value = annotation
    if isinstance(value, dict):
        for name in ("annotations", "images", "categories"):
            if name in value:
                raise ValueError(
                    f"expected one COCO annotation, got a whole file ({name!r}); save the one you mean alone"
                )
        value = value.get("segmentation", value)
    if isinstance(value, list | tuple) and any(isinstance(part, dict) for part in value):
        raise ValueError(f"expected one COCO annotation, got a list of {len(value)}; save the one you mean alone")
    if isinstance(value, dict) and value.keys() & {"bbox", "category_id"} or value in ([], None):
        raise ValueError("the COCO annotation has no segmentation; its bbox is a region of the form xywh")
    return value


def _numbers_from_json(kind: str, value: Any) -> list:
    value = plain_lists(value)
    if not isinstance(value, list) or len(value) != 4:
        raise ValueError(f"cannot read {kind!r} of a region: expected four numbers, got {shortened(value)}")
    return value


def _box_from_json(cls: type[Region], value: Any, **options: Any) -> Region:
    return cls.from_box(*_numbers_from_json("nbox" if options.get("normalized") else "box", value), **options)


def _xywh_from_json(cls: type[Region], value: Any, **options: Any) -> Region:
    return cls.from_xywh(*_numbers_from_json("xywh", value), **options)


def _mask_from_json(cls: type[Region], value: Any, soft: Any = False, **options: Any) -> Region:
    if not isinstance(soft, bool):
        raise ValueError(f"expected 'soft': true or false beside 'mask' in a region, got {shortened(soft)}")
    return cls.from_mask(value, soft=soft, **options)


def _whole_from_json(cls: type[Region], value: Any, strength: Any = 1.0) -> Region:
    if value is not True:
        raise ValueError(f"expected 'whole': true, got {shortened(value)}")
    return cls("whole", strength=strength)


# kind -> (reader, further keys, keys that may be left out)
JSON_FORMS: dict[str, tuple[Callable, tuple[str, ...], tuple[str, ...]]] = {
    "box": (_box_from_json, (), ()),
    "nbox": (functools.partial(_box_from_json, normalized=True), (), ()),
    "xywh": (_xywh_from_json, (), ()),
    "polygon": (lambda cls, v, **options: cls.from_polygon(v, **options), (), ()),
    "mask": (_mask_from_json, (), ("soft",)),
    "rle": (lambda cls, v, **options: cls.from_coco(v, **options), (), ()),
    "points": (lambda cls, v, **options: cls.from_points(v, **options), ("radius",), ()),
    "stroke": (lambda cls, v, **options: cls.from_stroke(v, **options), ("width",), ()),
    "whole": (_whole_from_json, (), ()),
}


def _floats(text: str, count: int | None = None) -> list[float]:
    """Numbers with commas, spaces or both between them."""
    values = [float(part) for part in re.split(r"\s*,\s*|\s+", text.strip())]
    if count is not None and len(values) != count:
        raise ValueError(f"expected {count} numbers, got {len(values)}")
    return values


def _points(text: str) -> tuple[list[float], float]:
    """Points as a flat list, and the size after them."""
    points, at, size = text.partition("@")
    if not at:
        raise ValueError("expected @ and a size in pixels after the points")
    parts = [_floats(part) for part in points.split(";")]
    if odd := [part for part in parts if len(part) % 2]:
        raise ValueError(f"expected x and y for each point, got {len(odd[0])} numbers")
    return [value for part in parts for value in part], float(size)


def _parse_points(cls: type[Region], text: str) -> Region:
    points, radius = _points(text)
    return cls.from_points(points, radius=radius)


def _parse_stroke(cls: type[Region], text: str) -> Region:
    points, width = _points(text)
    return cls.from_stroke(points, width=width)


def _parse_rle(cls: type[Region], text: str) -> Region:
    if not text.lstrip().startswith(("{", "[")):
        with open(text, encoding="utf-8-sig") as file:  # Windows programs write a byte order mark
            text = file.read()
    return cls.from_coco(json.loads(text))


def _parse_whole(cls: type[Region], text: str) -> Region:
    if text:
        raise ValueError("expected nothing after 'whole'")
    return cls.whole()


TEXT_FORMS: dict[str, Callable] = {
    "box": lambda cls, text: cls.from_box(*_floats(text, 4)),
    "nbox": lambda cls, text: cls.from_box(*_floats(text, 4), normalized=True),
    "xywh": lambda cls, text: cls.from_xywh(*_floats(text, 4)),
    "polygon": lambda cls, text: cls.from_polygon([_floats(part) for part in text.split(";")]),
    "mask": lambda cls, text: cls.from_mask(text),
    "softmask": lambda cls, text: cls.from_mask(text, soft=True),
    "rle": _parse_rle,
    "points": _parse_points,
    "stroke": _parse_stroke,
    "whole": _parse_whole,
}
