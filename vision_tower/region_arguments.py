"""Regions as arguments: whatever stands for a region -> `Region`, one list of them for each image, and an error for
every spelling that Transformers would drop together with its region.
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

from .region_masks import is_packed_mask
from .regions import Region

_LIKE_A_REGION = re.compile("region|mask|alpha|box|points|stroke|polygon")
_FIELDS = ("kind", "data", "strength")
# Tokenizers take it, the processors' list of settings lacks it.
_MORE_TEXT_SETTINGS = {"split_special_tokens"}


def as_region(value: Any) -> Region:
    """A region from a `Region`, its JSON (a dict or text), its text ("box:40,60,220,200"), or None, the whole image.

    A `Region` is recognized by its fields: code loaded with `trust_remote_code` has a class of its own, and
    Transformers turns a dataclass inside a message into a dict.

    Raises:
        ValueError: If it is none of these, or no valid region.
    """
    if value is None:
        return Region.whole()
    if isinstance(value, Region):
        return value
    if isinstance(value, str):
        return Region.from_json(_object(value)) if value.lstrip().startswith("{") else Region.parse(value)
    if isinstance(value, Mapping):
        fields = {name: part for name, part in value.items() if part is not None}  # `datasets` adds all keys to a row
        is_json = "kind" not in fields or not fields.keys() <= set(_FIELDS)
        return Region.from_json(fields) if is_json else _from_fields(**fields)
    if all(hasattr(value, name) for name in _FIELDS):
        return _from_fields(value.kind, value.data, value.strength)
    raise ValueError(
        f"expected a Region, its JSON, its text ('box:40,60,220,200') or None, got {type(value).__name__}; a box is "
        "Region.from_box(x0, y0, x1, y1), a mask Region.from_mask(mask)"
    )


def region_list(entry: Any) -> list[Region]:
    """The regions of one image: `entry` is one (see `as_region`) or a list of them.

    Raises:
        ValueError: As `as_region`, and if the list is empty.
    """
    if not isinstance(entry, list | tuple):
        return [as_region(entry)]
    if not entry:
        raise ValueError("got an image with an empty list of regions; None means the whole image")
    return [as_region(value) for value in entry]


def region_entries(regions: Any, count: int, of: str = "images") -> list:
    """One entry of `regions` for each of `count` images; without a list, `regions` is the entry of a single image.

    Raises:
        ValueError: If their number differs.
    """
    entries = [None] * count if regions is None else regions
    entries = list(entries) if isinstance(entries, list | tuple) else [entries]
    if len(entries) != count:
        raise ValueError(
            f"expected one entry of regions for each of {count} {of}, got {len(entries)}; several regions of one "
            "image are a list inside its entry"
        )
    return entries


def match_regions(images: Any, regions: Any) -> Any:
    """Each image with its list of regions.

    Args:
        images: One image, an array of images (N, H, W, C), or lists of these, also nested.
        regions: None (whole images), or nested as `images` are, with one entry for each image: a region or a list of
            them. For one image, in a list or not, its entry alone or in a list will do; for nested images, also a
            list without nesting.

    Returns:
        A pair (image, regions), or lists of pairs, nested as the images are.

    Raises:
        ValueError: If there is no image, images and regions do not match, or a region is invalid.
    """
    if images is None:
        raise ValueError("got no image: pass one image or a list of them as images=")
    if not _is_batch(images):
        is_nested = isinstance(regions, list | tuple) and len(regions) == 1 and isinstance(regions[0], list | tuple)
        return images, region_list(regions[0] if is_nested else regions)
    if isinstance(regions, list | tuple) and not any(isinstance(entry, list | tuple) for entry in regions):
        if len(regions) == len(list(_singles(images))):
            regions = _nested_like(images, iter(regions))
    entries = region_entries(regions, len(images))
    return [match_regions(image, entry) for image, entry in zip(images, entries, strict=True)]


def flat_pairs(pairs: Any) -> Iterator[tuple[Any, list[Region]]]:
    """The pairs of `match_regions` in order, without nesting."""
    if isinstance(pairs, tuple):
        yield pairs
    else:
        for part in pairs:
            yield from flat_pairs(part)


def _singles(images: Any) -> Iterator[Any]:
    if _is_batch(images):
        for image in images:
            yield from _singles(image)
    else:
        yield images


def _nested_like(images: Any, entries: Iterator[Any]) -> Any:
    return [_nested_like(image, entries) for image in images] if _is_batch(images) else next(entries)


def _is_batch(images: Any) -> bool:
    return isinstance(images, list | tuple) or isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4


def take_regions(regions: Any, settings: dict[str, Any]) -> Any:
    """The regions of a call, from `regions=` or from its settings `regions` or `images_kwargs={"regions": ...}`, which
    then lose them.

    Raises:
        ValueError: If there are several of these.
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
    """For the processors around `AlphaCLIPImageProcessor`: nothing is ignored that may have been a region.

    Raises:
        ValueError: If an argument would be ignored, there are regions without images, or the image processor does not
            take regions.
    """
    check_names(processor, settings)
    if images is None and regions is not None:
        raise ValueError("got regions without images; pass the images that they lie in")
    if images is not None and not hasattr(processor.image_processor, "geometry"):
        raise ValueError(
            f"{type(processor.image_processor).__name__} would drop every region; make the processor with an "
            "AlphaCLIPImageProcessor"
        )


def means_region(name: Any) -> bool:
    """Whether an argument or a key is named like a region, so that its user must not believe it was used."""
    return isinstance(name, str) and _LIKE_A_REGION.search(name.lower()) is not None


def check_names(processor: Any, settings: Mapping[str, Any]) -> None:
    """Transformers ignores, with at most a warning, an argument that no part of a processor takes.

    Args:
        processor: A `ProcessorMixin`.
        settings: Arguments of a call; None counts as not given.

    Raises:
        ValueError: If an argument would be ignored.
    """
    modalities = processor.valid_processor_kwargs.__annotations__
    known = {name: {*getattr(kind, "__annotations__", ())} for name, kind in modalities.items()}
    known["images_kwargs"] |= {*getattr(processor.image_processor, "valid_kwargs", ImagesKwargs).__annotations__}
    known["common_kwargs"] = known["text_kwargs"] & known["images_kwargs"]
    taken = {*known} | known["text_kwargs"] | known["images_kwargs"]
    known["text_kwargs"] |= _MORE_TEXT_SETTINGS
    unknown = [name for name, value in settings.items() if value is not None and name not in taken]
    for name in known.keys() & settings.keys():
        if isinstance(settings[name], Mapping):
            unknown += [f"{name}[{inner!r}]" for inner in settings[name] if inner not in known[name]]
    if unknown:
        what = "regions are passed as regions="
        if vars(GenerationConfig()).keys() & set(unknown):
            what = "a pipeline takes settings of generate() as generate_kwargs={...}"
        raise ValueError(f"unknown argument {', '.join(unknown)}, which would be ignored; {what}")


def _object(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot read the region {text!r:.80} as JSON: {error}") from error


def _from_fields(kind: Any, data: Any = (), strength: Any = 1.0) -> Region:
    """A region from its own fields, which may come from anywhere."""
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
