"""Pictures with a caption, phrases of it, boxes and masks in GRIT's layout -> `RegionSample`s.

A picture has a JSON object of its own: `caption`; `ref_exps`, a list of [phrase_start, phrase_end, x0, y0, x1, y1,
score] where the phrase is `caption[int(start):int(end)]` and the box in fractions of the picture; and, where there are
masks, COCO RLEs in the same order (`MASK_KEYS`). Both lie side by side in a folder and its sub-folders, or in
uncompressed tars as img2dataset writes them: `mllm.data.readers.region_text_pairs`.

A phrase gives a sample of its box and, where there is a mask, a second one of the mask; the picture gives one of the
whole image with the caption. Meta: `image_id` (the files' path without suffix), `region_id` (the phrase's number, from
0; none for the whole image), `width` and `height` in pixels, as the masks have it, else the JSON or the picture itself:
`RegionSample.open_image` refuses a picture of another size.

Source: zzliang/GRIT on the Hub; Alpha-CLIP's train/dataset/alpha_grit.py, which has the masks under `seudo_masks`. No
file of either was at hand: what has been read here is what `mllm.data.shapes.grit_layout` writes.
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
from mllm.data.masks import OTHER_SIZE, mask_of
from mllm.data.readers.region_text_pairs import PicturePair, find_pairs
from mllm.data.records import CLAMPED, NO_AREA, READ, Box, ReadReport
from mllm.data.samples import RegionSample, displayed_size
from vision_tower import Region

MASK_KEYS = ("seudo_masks", "pseudo_masks", "masks")  # the first is how the released code spells it
DAMAGED = "whose JSON is damaged or no object, left out"
NO_CAPTION = "without a caption, left out"
NO_PHRASES = "without a list of ref_exps, only the caption is used"
UNREADABLE = "whose picture cannot be read for its size, left out"
NO_PHRASE = "whose phrase is empty or not a part of the caption, left out"
NO_BOX = "whose box is not numbers in fractions of the picture, left out"
OTHER_NUMBER = "with masks not as many as ref_exps, masks left out"
_FAR_OUT = 0.5  # of the picture's side: a box that lies further outside is in other units
_DECIMALS = 3  # of a pixel: fractions times a size give 40.99999999999999


def read_grit(root: str | os.PathLike, *, report: ReadReport | None = None) -> Iterator[RegionSample]:
    """The samples of each picture, its regions and then the whole image, in the order of the sorted files or tars.

    Args:
        root: Folder of the files.
        report: Filled with what was read, clamped and left out, each for its own reason; logged in any case.

    Raises:
        ValueError: If there is nothing to read, a tar is compressed, or too many regions cannot be used
            (`mllm.data.records`).
    """
    root = Path(root)
    report = ReadReport() if report is None else report
    before = report.counts[READ]
    for pair in find_pairs(root, report):
        yield from _samples(pair, report)
    report.finish(f"{root}: regions and captions")
    if report.counts[READ] == before:
        raise ValueError(
            f"nothing in {root} can be used; expected pictures, each with a .json of the same name that has a 'caption'"
            f" and 'ref_exps', in folders or in *.tar. Left out: {dict(report.counts) or 'nothing'}"
        )


def _samples(pair: PicturePair, report: ReadReport) -> Iterator[RegionSample]:
    """The samples of a picture."""
    key, image = pair.key, pair.image
    if (record := _record(pair, report)) is None:
        return
    caption, phrases = record["caption"], record.get("ref_exps")
    if not isinstance(phrases, list):
        report.add(NO_PHRASES, key)
        phrases = []
    masks = _masks(key, record, len(phrases), report)
    if (size := _size(pair, record, masks)) is None:
        report.leave_out(UNREADABLE, key)
        return
    meta = {"image_id": key, "width": size[0], "height": size[1]}
    for number, row in enumerate(phrases):
        name, mask = f"{key}/{number}", masks.get(number)
        if (phrase := _phrase(caption, row)) is None:
            report.leave_out(NO_PHRASE, name)
        elif isinstance(mask, str):
            report.leave_out(mask, name)
        elif (box := _box(row, size, report, name)) is not None:
            report.add(READ, name)
            about = {**meta, "region_id": number}
            yield RegionSample(name, image, (Region.from_box(*box),), None, (phrase,), meta=about)
            if mask is not None:
                yield RegionSample(f"{name}/mask", image, (mask,), None, (phrase,), meta=about)
    report.add(READ, f"{key}/whole")
    yield RegionSample(f"{key}/whole", image, (Region.whole(),), None, (caption.strip(),), meta=meta)


def _record(pair: PicturePair, report: ReadReport) -> dict[str, Any] | None:
    """The JSON of a picture; None, counted, where it is damaged or has no caption."""
    try:
        record = json.loads(pair.record.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        report.leave_out(DAMAGED, pair.key)
        return None
    caption = record.get("caption")
    if not isinstance(caption, str) or not caption.strip() or not is_utf8(caption):
        report.leave_out(NO_CAPTION, pair.key)
        return None
    return record


def _masks(key: str, record: dict[str, Any], count: int, report: ReadReport) -> dict[int, Region | str]:
    """The mask of each phrase that has one, or the reason for which it cannot be used."""
    stated = next((record[name] for name in MASK_KEYS if record.get(name) is not None), None)
    if stated is None:
        return {}
    if not isinstance(stated, list) or len(stated) != count:
        report.add(OTHER_NUMBER, key)  # they could be shifted
        return {}
    masks = {number: mask_of(rle) for number, rle in enumerate(stated) if rle is not None}
    sizes = Counter(mask.data[:2] for mask in masks.values() if isinstance(mask, Region))
    if len(sizes) > 1:
        most = sizes.most_common(1)[0][0]
        for number, mask in masks.items():
            if isinstance(mask, Region) and mask.data[:2] != most:
                masks[number] = OTHER_SIZE
    return masks


def _size(pair: PicturePair, record: dict[str, Any], masks: dict[int, Region | str]) -> tuple[int, int] | None:
    """Width and height in pixels: of the masks, else as the JSON states, else of the picture; None if it has none."""
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
    """The phrase of a row; None if its start and end are no numbers or no part of the caption."""
    if not isinstance(row, list) or not _are_numbers(row[:2], 2):
        return None
    start, end = int(row[0]), int(row[1])
    return caption[start:end].strip() or None if 0 <= start < end <= len(caption) else None


def _box(row: list, size: tuple[int, int], report: ReadReport, name: str) -> Box | None:
    """The box of a row in pixels inside the picture; None, counted, where it is none or has no area."""
    stated = row[2:6]
    if not _are_numbers(stated, 4) or not all(-_FAR_OUT <= side <= 1 + _FAR_OUT for side in stated):
        report.leave_out(NO_BOX, f"{name} {reprlib.repr(stated)}")
        return None
    inside = [min(max(side, 0), 1) for side in stated]
    x0, y0, x1, y1 = (round(side * extent, _DECIMALS) for side, extent in zip(inside, size * 2, strict=True))
    if x0 >= x1 or y0 >= y1:
        report.leave_out(NO_AREA, name)
        return None
    if inside != stated:
        report.add(CLAMPED, name)
    return x0, y0, x1, y1


def _are_numbers(values: list, count: int) -> bool:
    """Whether these are so many finite numbers."""
    return len(values) == count and all(
        type(value) in (int, float) and abs(value) < 1e15 and math.isfinite(value) for value in values
    )
