"""Captions of boxes in COCO's layout -> `RegionSample`s: one JSON with `images` and `annotations`.

| file | a caption stands in | ids | a record published by its authors was read |
|---|---|---|---|
| GRiT's `train.json`, `test.json` (Visual Genome) | its annotation | of the annotation | no |
| GLaMM's `test_caption.json` (Visual Genome, 5,000 boxes) | its annotation | of the annotation | no |
| MDETR's `finetune_refcocog_val.json` | its image: one an expression | of the image | no |
| Osprey's `finetune_refcocog_val_with_mask.json` | its image: one an expression | of the image | no |
| GLaMM's `finetune_refcocog_val_captions.json` | its annotation | of the image | no |

Layouts: JialianW/GRiT, README; ashkamath/mdetr, scripts/fine-tuning/refexp_coco_format.py; mbzuai-oryx/groundingLMM,
README.

A sample's meta holds `image_id` (of COCO or Visual Genome: MDETR's own image ids count expressions), `width`, `height`,
`area` (share of the picture that the box covers) and `ann_id`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm.data.json_files import read_json, refuse_repeated, wrong
from mllm.data.masks import check_region_input, region_of
from mllm.data.records import (
    MALFORMED,
    READ,
    REPEATED,
    UNKNOWN_IMAGE,
    Folders,
    ReadReport,
    area_share,
    clamped,
    usable_record,
    usable_text,
)
from mllm.data.samples import RegionSample
from mllm.data.schemas import CocoAnnotation, CocoImage, is_name
from vision_tower import Region

IMAGE_FOLDERS = ("train2014", "VG_100K", "VG_100K_2", "", "images")
NO_CAPTION = "without a caption, left out"
NO_FILE = "of an image without a usable file_name, left out"


def read_captions(
    annotations: str | os.PathLike,
    image_root: str | os.PathLike,
    *,
    region_input: str = "box",
    grouped: bool = False,
    masks: str | os.PathLike | None = None,
    report: ReadReport | None = None,
) -> Iterator[RegionSample]:
    """One sample for each caption, or with `grouped` for each object with all its captions.

    Args:
        annotations: The JSON.
        image_root: Folder of the pictures: themselves, or in train2014/, VG_100K/, VG_100K_2/ or images/.
        region_input: "box", or "mask" (from `segmentation`, or from `masks`).
        grouped: Captions of the same `original_id` (MDETR's id of the object) become references of one sample.
        masks: JSON of COCO RLE by annotation id, for files without segmentation.
        report: Filled with what was read, clamped and left out; logged in any case.

    Raises:
        ValueError: If a file is missing, damaged or not of this layout, has two images or two annotations of one id, or
            too many of its records cannot be used (`mllm.data.records`).
    """
    check_region_input(region_input)
    path = Path(annotations)
    report = ReadReport() if report is None else report
    content = read_json(path, dict)
    reader = _Reader(path, Path(image_root), region_input, report)
    reader.images = {
        row["id"]: image
        for row in rows_by_id(path, content, "images", report).values()
        if (image := usable_record(row, CocoImage, f"image {row['id']}", report)) is not None
    }
    reader.masks = None if masks is None else read_json(Path(masks), dict, unique_keys=True)
    rows = rows_by_id(path, content, "annotations", report).values()
    samples = (sample for row in rows if (sample := reader.sample(row, grouped)) is not None)
    if grouped:
        merged: dict[str, RegionSample] = {}
        for sample in samples:
            first = merged.get(sample.id)
            references = sample.references if first is None else first.references + sample.references
            merged[sample.id] = dataclasses.replace(first or sample, references=references)
        samples = iter(merged.values())
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:  # two annotations of one expression
            report.leave_out(REPEATED, sample.id)
            continue
        seen.add(sample.id)
        report.add(READ, sample.id)
        yield sample
    report.finish(f"{path}: captions", needed=True)


def rows_by_id(path: Path, content: dict, key: str, report: ReadReport) -> dict[int, dict]:
    """The objects of COCO's list `key` by their id; what has none is counted.

    Raises:
        ValueError: If there is no such list, or an id occurs twice.
    """
    rows = content.get(key)
    if not isinstance(rows, list):
        raise wrong(path, f"a list {key!r}, as in COCO's layout", rows)
    found = []
    for number, row in enumerate(rows):
        if isinstance(row, dict) and type(row.get("id")) is int:
            found.append((row["id"], row))
        else:
            report.leave_out(MALFORMED, f"{key}[{number}]: expected an object with an id, a whole number")
    by_id = dict(found)
    if len(by_id) < len(found):
        refuse_repeated((row_id for row_id, _ in found), f"{path}: ids of {key}")
    return by_id


@dataclasses.dataclass
class _Reader:
    """What all annotations of a file share."""

    path: Path
    root: Path
    region_input: str
    report: ReadReport
    images: dict[int, CocoImage] = dataclasses.field(default_factory=dict)
    masks: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.folders = Folders(self.root, IMAGE_FOLDERS)

    def sample(self, record: dict, grouped: bool) -> RegionSample | None:
        """The sample of an annotation; None, counted, where it cannot be used. Its id is the object's if `grouped`."""
        report = self.report
        if (row := usable_record(record, CocoAnnotation, f"annotation {record['id']}", report)) is None:
            return None
        if (image := self.images.get(row.image_id)) is None:
            report.add(UNKNOWN_IMAGE, row.id)
            return None
        if grouped and row.original_id is None:
            report.leave_out(MALFORMED, f"annotation {row.id}: expected original_id, the object's id")
            return None
        words = row.caption if (row.caption or "").strip() else image.caption
        if (caption := usable_text(words, report, row.id, NO_CAPTION)) is None:
            return None
        if (box := clamped(row.bbox, image.width, image.height, report, row.id)) is None:
            return None
        shape = row.segmentation if self.masks is None else self.masks.get(str(row.id))
        region = region_of(shape, box, (image.height, image.width), self.region_input)
        if not isinstance(region, Region):
            report.leave_out(region, row.id)
            return None
        if (file := file_of(image, self.folders, report)) is None:
            return None
        # where an image entry is an expression (it has the original's id beside its own), results name that
        is_expression = image.original_id is not None
        meta = {
            "image_id": image.original_id if is_expression else image.id,
            "width": image.width,
            "height": image.height,
            "area": area_share(box, image.width, image.height),
            "ann_id": row.id,
        }
        sample_id = f"object-{row.original_id}" if grouped else str(image.id if is_expression else row.id)
        return RegionSample(sample_id, file, (region,), None, (caption,), meta=meta)


def file_of(image: CocoImage, folders: Folders, report: ReadReport) -> str | None:
    """The path of an image; None, counted, if its name cannot be one."""
    name = (image.file_name or "").strip()
    if not name or not is_name(name):
        report.leave_out(NO_FILE, image.id)
        return None
    return folders.find(name)
