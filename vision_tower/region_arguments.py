"""Regions as arguments of processors: conversion to `Region`, matching with images, and checks of argument names.

Transformers ignores unknown arguments of processors. Here they are an error, since the region would be ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.processing_utils import ImagesKwargs

from .mask_decoding import is_packed_mask
from .regions import Region

_REGION_NAME = re.compile("region|mask|alpha|box|points|stroke|polygon")
_FIELDS = ("kind", "data", "strength")
# Accepted by tokenizers but not listed in the settings of processors.
_EXTRA_TEXT_SETTINGS = {"split_special_tokens"}


def as_region(value: Any) -> Region:
    """Convert a value to a `Region`.

    A `Region` is recognized by its fields, not its class: code loaded with `trust_remote_code` has a separate class,
    and Transformers converts a dataclass in a message to a dict.

    Args:
        value: A `Region`, its JSON (dict or str), its text ("box:40,60,220,200"), or None, the whole image.

    Raises:
        ValueError: If the value has another type or is not a valid region.
    """
    if value is None:
        return Region.whole()
    if isinstance(value, Region):
        return value
    if isinstance(value, str):
        return Region.from_json(_load_json(value)) if value.lstrip().startswith("{") else Region.parse(value)
    if isinstance(value, Mapping):
        # `datasets` adds the keys of all rows to each row, with the value None
        fields = {name: part for name, part in value.items() if part is not None}
        is_json = "kind" not in fields or not fields.keys() <= set(_FIELDS)
        return Region.from_json(fields) if is_json else _from_fields(**fields)
    if all(hasattr(value, name) for name in _FIELDS):
        return _from_fields(value.kind, value.data, value.strength)
    raise ValueError(
        f"expected a Region, its JSON, its text ('box:40,60,220,200') or None, got {type(value).__name__}; for a box "
        "pass Region.from_box(x0, y0, x1, y1), for a mask Region.from_mask(mask)"
    )


def region_list(entry: Any) -> list[Region]:
    """The regions of one image, from one region (see `as_region`) or a list of them.

    Raises:
        ValueError: If the list is empty or a region is invalid.
    """
    if not isinstance(entry, list | tuple):
        return [as_region(entry)]
    if not entry:
        raise ValueError("got an image with an empty list of regions; None means the whole image")
    return [as_region(value) for value in entry]


def region_entries(regions: Any, count: int, of: str = "images") -> list:
    """A list with one entry of `regions` per image.

    Args:
        regions: A list of entries, the entry of a single image, or None for whole images.
        count: The number of images.
        of: What is counted, for the message.

    Raises:
        ValueError: If there are not `count` entries.
    """
    entries = [None] * count if regions is None else regions
    entries = list(entries) if isinstance(entries, list | tuple) else [entries]
    if len(entries) != count:
        raise ValueError(
            f"expected one entry of regions for each of {count} {of}, got {len(entries)}; pass several regions of one "
            "image as a list in its entry"
        )
    return entries


def match_regions(images: Any, regions: Any) -> Any:
    """Pair each image with its list of regions.

    Args:
        images: One image, an array of images (N, H, W, C), or nested lists of these.
        regions: None (whole images), or one entry per image, a region or a list of regions, in the same nesting as
            `images`. For one image, the entry may be passed with or without a list around it. For nested images, a
            flat list of entries is accepted too.

    Returns:
        A pair (image, regions), or lists of pairs in the same nesting as `images`.

    Raises:
        ValueError: If there is no image, images and regions do not match, or a region is invalid.
    """
    if images is None:
        raise ValueError("got no image: pass one image or a list of them as images=")
    if not _is_batch(images):
        is_nested = isinstance(regions, list | tuple) and len(regions) == 1 and isinstance(regions[0], list | tuple)
        return images, region_list(regions[0] if is_nested else regions)
    if isinstance(regions, list | tuple) and not any(isinstance(entry, list | tuple) for entry in regions):
        if len(regions) == len(list(_flatten_images(images))):
            regions = _nest_like(images, iter(regions))
    entries = region_entries(regions, len(images))
    return [match_regions(image, entry) for image, entry in zip(images, entries, strict=True)]


def flatten_pairs(pairs: Any) -> Iterator[tuple[Any, list[Region]]]:
    """Iterate over the pairs that `match_regions` returns."""
    if isinstance(pairs, tuple):
        yield pairs
    else:
        for part in pairs:
            yield from flatten_pairs(part)


def _flatten_images(images: Any) -> Iterator[Any]:
    if _is_batch(images):
        for image in images:
            yield from _flatten_images(image)
    else:
        yield images


def _nest_like(images: Any, entries: Iterator[Any]) -> Any:
    return [_nest_like(image, entries) for image in images] if _is_batch(images) else next(entries)


def _is_batch(images: Any) -> bool:
    return isinstance(images, list | tuple) or isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4


def take_regions(regions: Any, settings: dict[str, Any]) -> Any:
    """The regions of a call: `regions=`, or `regions` in its settings or in `images_kwargs`.

    Args:
        regions: The value of `regions=`.
        settings: Further arguments of the call, from which the regions are removed.

    Raises:
        ValueError: If regions are passed more than once.
    """
    inner = dict(settings.get("images_kwargs") or {})
    given = [regions, settings.pop("regions", None), inner.pop("regions", None)]
    if "images_kwargs" in settings:
        settings["images_kwargs"] = inner
    given = [value for value in given if value is not None]
    if len(given) > 1:
        raise ValueError("got regions twice; pass them once, as regions= or in processor_kwargs")
    return given[0] if given else None


def check_call(processor: Any, images: Any, regions: Any, settings: Mapping[str, Any]) -> None:
    """Check a call of a processor that contains an `AlphaCLIPImageProcessor`, so that no region is ignored.

    Raises:
        ValueError: If an argument would be ignored, there are regions without images, or the image processor does not
            support regions.
    """
    check_names(processor, settings)
    if images is None and regions is not None:
        raise ValueError("got regions without images; pass their images as images=")
    if images is not None and not hasattr(processor.image_processor, "geometry"):
        raise ValueError(
            f"{type(processor.image_processor).__name__} does not support regions; create the processor with an "
            "AlphaCLIPImageProcessor"
        )


def is_region_name(name: Any) -> bool:
    """Whether the name of an argument or key suggests a region, in which case it must not be ignored silently."""
    return isinstance(name, str) and _REGION_NAME.search(name.lower()) is not None


def check_names(processor: Any, settings: Mapping[str, Any]) -> None:
    """Check that a processor uses all arguments. Transformers ignores unknown ones, with at most a warning.

    Args:
        processor: A `ProcessorMixin`.
        settings: Arguments of a call. Those that are None are not checked.

    Raises:
        ValueError: If an argument would be ignored.
    """
    modalities = processor.valid_processor_kwargs.__annotations__
    known = {name: {*getattr(kind, "__annotations__", ())} for name, kind in modalities.items()}
    known["images_kwargs"] |= {*getattr(processor.image_processor, "valid_kwargs", ImagesKwargs).__annotations__}
    known["common_kwargs"] = known["text_kwargs"] & known["images_kwargs"]
    accepted = {*known} | known["text_kwargs"] | known["images_kwargs"]
    known["text_kwargs"] |= _EXTRA_TEXT_SETTINGS
    unknown = [name for name, value in settings.items() if value is not None and name not in accepted]
    for name in known.keys() & settings.keys():
        if isinstance(settings[name], Mapping):
            unknown += [f"{name}[{inner!r}]" for inner in settings[name] if inner not in known[name]]
    if unknown:
        hint = "pass regions as regions="
        if vars(GenerationConfig()).keys() & set(unknown):
            hint = "in a pipeline, pass settings of generate() as generate_kwargs={...}"
        raise ValueError(f"unknown argument {', '.join(unknown)}, which would be ignored; {hint}")


def _load_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot parse the region {text!r:.80} as JSON: {error}") from error


def _from_fields(kind: Any, data: Any = (), strength: Any = 1.0) -> Region:
    """Create a region from the fields of a `Region`, which are untrusted."""
    parts = list(data) if isinstance(data, list | tuple) else []
    if kind in ("box", "nbox", "polygon"):
        return Region.from_json({kind: parts, "strength": strength})
    if kind in ("points", "stroke") and len(parts) == 2:
        size = "radius" if kind == "points" else "width"
        return Region.from_json({kind: parts[0], size: parts[1], "strength": strength})
    if kind == "whole" and not parts:
        return Region("whole", strength=strength)
    # Only a Region contains bytes, JSON does not.
    if kind == "mask" and len(parts) == 4 and is_packed_mask(*parts):
        return Region("mask", tuple(parts), strength)
    raise ValueError(f"expected the fields of a Region, got kind {kind!r:.80} and data {data!r:.80}")
