"""Reads GRIT's layout: images with a caption, and boxes and masks of phrases of the caption.

Each image has a JSON object: `caption`; `ref_exps`, a list of [phrase_start, phrase_end, x0, y0, x1, y1, score], where
the phrase is `caption[int(start):int(end)]` and the box is in fractions of the image; and optionally COCO RLE masks in
the same order (`MASK_KEYS`). Image and JSON are files with the same name, in folders or in uncompressed tars, as
img2dataset writes them (`mllm.data.readers.image_json_pairs`).

A phrase becomes a sample of its box and, if there is a mask, a sample of its mask; the caption becomes a sample of the
whole image. A sample's `meta` has `image_id` (the path without suffix), `region_id` (the number of the phrase, from 0;
none for the whole image), and `width` and `height` in pixels: of the masks, else as in the JSON, else of the image.

Source: zzliang/GRIT on the Hub; Alpha-CLIP's train/dataset/alpha_grit.py, which has the masks under `seudo_masks`. Not
tested with published files, only with those that `mllm.data.shapes.grit_layout` writes.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm.data.json_files import is_utf8
from mllm.data.masks import OTHER_SIZE, mask_region
from mllm.data.read_report import CLAMPED, NO_AREA, READ, Box, ReadReport
from mllm.data.readers.image_json_pairs import ImageJsonPair, find_pairs
from mllm.data.samples import RegionSample, displayed_size
from vision_tower import Region

MASK_KEYS = ("seudo_masks", "pseudo_masks", "masks")  # the first is the spelling of the released code
INVALID_JSON = "skipped: the JSON is damaged or not an object"
NO_CAPTION = "skipped: no caption"
NO_PHRASES = "without a list of ref_exps, only the caption is used"
NO_SIZE = "skipped: the image cannot be read for its size"
NO_PHRASE = "skipped: the phrase is empty or not a part of the caption"
INVALID_BOX = "skipped: the box is not in fractions of the image"
OTHER_NUMBER = "masks skipped: not as many as ref_exps"
_MAX_OUTSIDE = 0.5  # fraction of the image's side; a box further outside is in other units
_DECIMALS = 3  # of a pixel: a fraction times a size gives 40.99999999999999


def read_grit(root: str | os.PathLike, *, report: ReadReport | None = None) -> Iterator[RegionSample]:
    """The samples of each image, first its regions, then the whole image, in the order of the sorted files or tars.

    Args:
        root: Folder of the files.
        report: Filled with the counts of read, clamped and skipped records, which are also logged.

    Raises:
        ValueError: If no record can be used, more than `MAX_ERRORS` of them cannot be used, or a tar is compressed.
    """
    root = Path(root)
    report = ReadReport() if report is None else report
    before = report.counts[READ]
    for pair in find_pairs(root, report):
        yield from _samples(pair, report)
    report.finish(f"{root}: regions and captions")
    if report.counts[READ] == before:
        raise ValueError(
            f"nothing in {root} can be used; expected images, each with a .json of the same name that has a 'caption' "
            f"and 'ref_exps', in folders or in *.tar. Skipped: {dict(report.counts) or 'nothing'}"
        )


def _samples(pair: ImageJsonPair, report: ReadReport) -> Iterator[RegionSample]:
    """The samples of an image."""
    key, image = pair.key, pair.image
    if (record := _record(pair, report)) is None:
        return
    caption, phrases = record["caption"], record.get("ref_exps")
    if not isinstance(phrases, list):
        report.add(NO_PHRASES, key)
        phrases = []
    masks = _masks(key, record, len(phrases), report)
    if (size := _size(pair, record, masks)) is None:
        report.skip(NO_SIZE, key)
        return
    image_meta = {"image_id": key, "width": size[0], "height": size[1]}
    for number, row in enumerate(phrases):
        name, mask = f"{key}/{number}", masks.get(number)
        if (phrase := _phrase(caption, row)) is None:
            report.skip(NO_PHRASE, name)
        elif isinstance(mask, str):
            report.skip(mask, name)
        elif (box := _box(row, size, report, name)) is not None:
            report.add(READ, name)
            meta = {**image_meta, "region_id": number}
            yield RegionSample(name, image, (Region.from_box(*box),), None, (phrase,), meta=meta)
            if mask is not None:
                yield RegionSample(f"{name}/mask", image, (mask,), None, (phrase,), meta=meta)
    report.add(READ, f"{key}/whole")
    yield RegionSample(f"{key}/whole", image, (Region.whole(),), None, (caption.strip(),), meta=image_meta)


def _record(pair: ImageJsonPair, report: ReadReport) -> dict[str, Any] | None:
    """The JSON of an image, or None (counted) if it is damaged or has no caption."""
    try:
        record = json.loads(pair.record.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        report.skip(INVALID_JSON, pair.key)
        return None
    caption = record.get("caption")
    if not isinstance(caption, str) or not caption.strip() or not is_utf8(caption):
        report.skip(NO_CAPTION, pair.key)
        return None
    return record


def _masks(key: str, record: dict[str, Any], count: int, report: ReadReport) -> dict[int, Region | str]:
    """The mask of each phrase that has one, or the reason why it cannot be used."""
    stated = next((record[name] for name in MASK_KEYS if record.get(name) is not None), None)
    if stated is None:
        return {}
    if not isinstance(stated, list) or len(stated) != count:
        report.add(OTHER_NUMBER, key)  # they could be those of other phrases
        return {}
    masks = {number: mask_region(rle) for number, rle in enumerate(stated) if rle is not None}
    sizes = Counter(mask.data[:2] for mask in masks.values() if isinstance(mask, Region))
    if len(sizes) > 1:
        most_common = sizes.most_common(1)[0][0]
        for number, mask in masks.items():
            if isinstance(mask, Region) and mask.data[:2] != most_common:
                masks[number] = OTHER_SIZE
    return masks


def _size(pair: ImageJsonPair, record: dict[str, Any], masks: dict[int, Region | str]) -> tuple[int, int] | None:
    """Width and height in pixels: of the masks, else as in the JSON, else of the image; None if it cannot be read."""
    for mask in masks.values():
        if isinstance(mask, Region):
            height, width = mask.data[:2]
            return width, height
    width, height = record.get("width"), record.get("height")
    if type(width) is int and type(height) is int and 0 < min(width, height) and max(width, height) < 1e9:
        return width, height
    try:
        return displayed_size(pair.image)
    except ValueError:
        return None


def _phrase(caption: str, row: Any) -> str | None:
    """The phrase of a row; None if its start and end are not numbers or not in the caption."""
    if not isinstance(row, list) or not _are_numbers(row[:2], 2):
        return None
    start, end = int(row[0]), int(row[1])
    return caption[start:end].strip() or None if 0 <= start < end <= len(caption) else None


def _box(row: list, size: tuple[int, int], report: ReadReport, name: str) -> Box | None:
    """The box of a row in pixels, clamped to the image, or None (counted) if it is not valid or has no area."""
    stated = row[2:6]
    if not _are_numbers(stated, 4) or not all(-_MAX_OUTSIDE <= side <= 1 + _MAX_OUTSIDE for side in stated):
        report.skip(INVALID_BOX, f"{name} {reprlib.repr(stated)}")
        return None
    inside = [min(max(side, 0), 1) for side in stated]
    x0, y0, x1, y1 = (round(side * extent, _DECIMALS) for side, extent in zip(inside, size * 2, strict=True))
    if x0 >= x1 or y0 >= y1:
        report.skip(NO_AREA, name)
        return None
    if inside != stated:
        report.add(CLAMPED, name)
    return x0, y0, x1, y1


def _are_numbers(values: list, count: int) -> bool:
    """Whether these are `count` finite numbers."""
    return len(values) == count and all(
        type(value) in (int, float) and abs(value) < 1e15 and math.isfinite(value) for value in values
    )
