"""Reads MaskImageNet: a JSON list of ImageNet-21k images, each with the mask, box and text of one object.

*Not tested with the published file.* The entries of `M_ImageNet_top_460k.json` are read as in Alpha-CLIP's
train/dataset/mask_image.py: lists with the path of the image at [2], a COCO RLE of the mask at [3], the box x, y,
width, height in pixels at [4], and the text at [6].

Each entry becomes a sample of its box and a sample of its mask. A sample's `meta` has `image_id` (the path),
`region_id` (the position of the entry in the list), and `width` and `height` of the mask, which the image must have.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm.data.json_files import is_utf8
from mllm.data.json_stream import stream_json
from mllm.data.masks import mask_region
from mllm.data.read_report import READ, ReadReport, clamp_box
from mllm.data.samples import RegionSample
from mllm.data.schemas import PixelBox, is_file_name, validate
from vision_tower import Region

LIST = "M_ImageNet_top_460k.json"
INVALID_ENTRY = "skipped: expected [_, _, path, RLE, box, _, text]"
NO_TEXT = "skipped: no text"
NO_BOX = "skipped: the box is not four numbers"
_PATH, _MASK, _BOX, _TEXT = 2, 3, 4, 6


def read_mask_imagenet(
    root: str | os.PathLike, *, images: str | os.PathLike | None = None, report: ReadReport | None = None
) -> Iterator[RegionSample]:
    """Two samples per entry, the box and the mask, in the order of the list.

    Args:
        root: Folder of the list.
        images: Folder that the image paths are relative to; default: `root`.
        report: Filled with the counts of read, clamped and skipped records, which are also logged.

    Raises:
        ValueError: If the list is missing or damaged, none of its entries can be used, or more than `MAX_ERRORS` of
            them cannot be used.
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
            f"no entry of {path} can be used; expected lists with the path of an image at [2], an RLE at [3], a box at "
            f"[4] and a text at [6]. Skipped: {dict(report.counts) or 'nothing'}"
        )


def _samples(images: Path, number: int, entry: Any, report: ReadReport) -> Iterator[RegionSample]:
    """The samples of an entry."""
    if (
        not isinstance(entry, list)
        or len(entry) <= _TEXT
        or not _is_text(entry[_PATH])
        or not is_file_name(entry[_PATH])
    ):
        report.skip(INVALID_ENTRY, number)
        return
    if not _is_text(text := entry[_TEXT]):
        report.skip(NO_TEXT, number)
        return
    # only an RLE: polygons do not state the size of the image
    mask = mask_region(entry[_MASK] if isinstance(entry[_MASK], dict) else "x")
    if not isinstance(mask, Region):
        report.skip(mask, number)
        return
    height, width = mask.data[:2]
    try:
        box = clamp_box(validate(entry[_BOX], PixelBox, number), width, height, report, number)
    except ValueError:
        report.skip(NO_BOX, number)
        return
    if box is None:
        return
    report.add(READ, number)
    meta = {"image_id": entry[_PATH], "region_id": number, "width": width, "height": height}
    for name, region in ((str(number), Region.from_box(*box)), (f"{number}/mask", mask)):
        yield RegionSample(name, str(images / entry[_PATH]), (region,), None, (text.strip(),), meta=meta)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and is_utf8(value)
