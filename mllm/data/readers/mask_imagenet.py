"""MaskImageNet's list of ImageNet-21k pictures with the mask, box and text of one object each -> `RegionSample`s.

*Unverified: no published file was at hand.* `M_ImageNet_top_460k.json` is read as Alpha-CLIP's
train/dataset/mask_image.py takes its entries, lists with at [2] the picture's path, [3] COCO's RLE of the mask, [4] the
box x, y, width, height in pixels, and [6] the text. The text is taken as it is.

An entry gives a sample of its box and a second one of its mask. Meta: `image_id` (the path), `region_id` (the entry's
position in the list), `width` and `height` as the mask has it: `RegionSample.open_image` refuses a picture of another
size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm.data.json_files import is_utf8, stream_json
from mllm.data.masks import mask_of
from mllm.data.records import READ, ReadReport, clamped
from mllm.data.samples import RegionSample
from mllm.data.schemas import PixelBox, checked, is_name
from vision_tower import Region

LIST = "M_ImageNet_top_460k.json"
OTHER_FORM = "of another form than [_, _, path, RLE, box, _, text], left out"
NO_TEXT = "without a text, left out"
NO_BOX = "whose box is not four numbers, left out"
_PATH, _MASK, _BOX, _TEXT = 2, 3, 4, 6


def read_mask_imagenet(
    root: str | os.PathLike, *, images: str | os.PathLike | None = None, report: ReadReport | None = None
) -> Iterator[RegionSample]:
    """The samples of each entry of the list, in its order.

    Args:
        root: Folder of the list.
        images: Folder that the pictures' paths begin in; by default `root`.
        report: Filled with what was read, clamped and left out; logged in any case.

    Raises:
        ValueError: If the list is missing or damaged, or none or too few of its entries can be used.
    """
    path = Path(root) / LIST
    images = Path(root if images is None else images)
    report = ReadReport() if report is None else report
    before = report.counts[READ]
    for number, entry in enumerate(stream_json(path)):
        yield from _samples(images, number, entry, report)
    report.finish(f"{path}: regions")
    if report.counts[READ] == before:
        raise ValueError(
            f"no entry of {path} can be used; expected lists with at 2 a picture's path, 3 an RLE, 4 a box, 6 a text. "
            f"Left out: {dict(report.counts) or 'nothing'}"
        )


def _samples(images: Path, number: int, entry: Any, report: ReadReport) -> Iterator[RegionSample]:
    """The samples of an entry, its box and its mask."""
    if not isinstance(entry, list) or len(entry) <= _TEXT or not _is_text(entry[_PATH]) or not is_name(entry[_PATH]):
        report.leave_out(OTHER_FORM, number)
        return
    if not _is_text(words := entry[_TEXT]):
        report.leave_out(NO_TEXT, number)
        return
    # an RLE alone, which tells the image's size
    mask = mask_of(entry[_MASK] if isinstance(entry[_MASK], dict) else "x")
    if not isinstance(mask, Region):
        report.leave_out(mask, number)
        return
    height, width = mask.data[:2]
    try:
        box = clamped(checked(entry[_BOX], PixelBox, number), width, height, report, number)
    except ValueError:
        report.leave_out(NO_BOX, number)
        return
    if box is None:
        return
    report.add(READ, number)
    meta = {"image_id": entry[_PATH], "region_id": number, "width": width, "height": height}
    for name, region in ((str(number), Region.from_box(*box)), (f"{number}/mask", mask)):
        yield RegionSample(name, str(images / entry[_PATH]), (region,), None, (words.strip(),), meta=meta)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and is_utf8(value)
