"""Reads captions of boxes in COCO's layout: one JSON file with `images` and `annotations`.

| file | the caption is in | ids of results | tested with published records |
|---|---|---|---|
| GRiT's `train.json`, `test.json` (Visual Genome) | the annotation | of the annotation | no |
| GLaMM's `test_caption.json` (Visual Genome, 5,000 boxes) | the annotation | of the annotation | no |
| MDETR's `finetune_refcocog_val.json` | the image, one per expression | of the image | no |
| Osprey's `finetune_refcocog_val_with_mask.json` | the image, one per expression | of the image | no |
| GLaMM's `finetune_refcocog_val_captions.json` | the annotation | of the image | no |

A sample's `meta` has `image_id` (of COCO or Visual Genome; MDETR numbers expressions instead of images), `width`,
`height`, `area` (of the box, as a fraction of the image) and `ann_id`.

Source: JialianW/GRiT, README; ashkamath/mdetr, scripts/fine-tuning/refexp_coco_format.py; mbzuai-oryx/groundingLMM,
README.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mllm.data.image_folders import ImageFolders
from mllm.data.json_files import check_unique, read_json, unexpected
from mllm.data.masks import check_region_type, select_region
from mllm.data.read_report import (
    DUPLICATE_ID,
    MALFORMED,
    READ,
    UNKNOWN_IMAGE,
    ReadReport,
    clamp_box,
    relative_area,
    usable_record,
    usable_text,
)
from mllm.data.samples import RegionSample
from mllm.data.schemas import CocoAnnotation, CocoImage, is_file_name
from vision_tower import Region

IMAGE_FOLDERS = ("train2014", "VG_100K", "VG_100K_2", "", "images")
NO_CAPTION = "skipped: no caption"
NO_FILE = "skipped: image without a valid file_name"


def read_coco(
    annotations: str | os.PathLike,
    image_root: str | os.PathLike,
    *,
    region_type: str = "box",
    grouped: bool = False,
    masks: str | os.PathLike | None = None,
    report: ReadReport | None = None,
) -> Iterator[RegionSample]:
    """One sample per caption, or with `grouped` one per object with all its captions.

    Args:
        annotations: The JSON file.
        image_root: Folder of the images, or of their folders train2014/, VG_100K/, VG_100K_2/ or images/.
        region_type: "box", or "mask" (from `segmentation`, or from `masks`).
        grouped: Captions of the same `original_id` (MDETR's id of the object) become references of one sample.
        masks: JSON file of COCO RLE by annotation id, for files without `segmentation`.
        report: Filled with the counts of read, clamped and skipped records, which are also logged.

    Raises:
        ValueError: If a file is missing, damaged or not in this layout, an id of an image or annotation occurs twice,
            or more than `MAX_ERRORS` of the records cannot be used.
    """
    check_region_type(region_type)
    path = Path(annotations)
    report = ReadReport() if report is None else report
    content = read_json(path, dict)
    reader = _Reader(path, Path(image_root), region_type, report)
    reader.images = {
        row["id"]: image
        for row in rows_by_id(path, content, "images", report).values()
        if (image := usable_record(row, CocoImage, f"image {row['id']}", report)) is not None
    }
    reader.masks = None if masks is None else read_json(Path(masks), dict, unique_keys=True)
    rows = rows_by_id(path, content, "annotations", report).values()
    samples: Iterable[RegionSample] = (s for row in rows if (s := reader.sample(row, grouped)) is not None)
    if grouped:
        samples = _merge_references(samples)
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:  # two annotations of one expression
            report.skip(DUPLICATE_ID, sample.id)
            continue
        seen.add(sample.id)
        report.add(READ, sample.id)
        yield sample
    report.finish(f"{path}: captions", required=True)


def _merge_references(samples: Iterable[RegionSample]) -> Iterable[RegionSample]:
    """One sample per id with the references of all samples of this id."""
    merged: dict[str, RegionSample] = {}
    for sample in samples:
        first = merged.get(sample.id)
        references = sample.references if first is None else first.references + sample.references
        merged[sample.id] = dataclasses.replace(first or sample, references=references)
    return merged.values()


def rows_by_id(path: Path, content: dict, key: str, report: ReadReport) -> dict[int, dict]:
    """The objects of COCO's list `key` by id. Objects without an id are counted as skipped.

    Raises:
        ValueError: If the list is missing, or an id occurs twice.
    """
    rows = content.get(key)
    if not isinstance(rows, list):
        raise unexpected(path, f"a list {key!r}, as in COCO's layout", rows)
    found = []
    for number, row in enumerate(rows):
        if isinstance(row, dict) and type(row.get("id")) is int:
            found.append((row["id"], row))
        else:
            report.skip(MALFORMED, f"{key}[{number}]: expected an object with an integer id")
    by_id = dict(found)
    if len(by_id) < len(found):
        check_unique((row_id for row_id, _ in found), f"{path}: ids of {key}")
    return by_id


@dataclasses.dataclass
class _Reader:
    """Converts the annotations of a file."""

    path: Path
    root: Path
    region_type: str
    report: ReadReport
    images: dict[int, CocoImage] = dataclasses.field(default_factory=dict)
    masks: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.folders = ImageFolders(self.root, IMAGE_FOLDERS)

    def sample(self, record: dict, grouped: bool) -> RegionSample | None:
        """The sample of an annotation, or None (counted). Its id is the id of the object if `grouped`."""
        report = self.report
        if (row := usable_record(record, CocoAnnotation, f"annotation {record['id']}", report)) is None:
            return None
        if (image := self.images.get(row.image_id)) is None:
            report.add(UNKNOWN_IMAGE, row.id)
            return None
        if grouped and row.original_id is None:
            report.skip(MALFORMED, f"annotation {row.id}: expected original_id, the id of the object")
            return None
        text = row.caption if (row.caption or "").strip() else image.caption
        if (caption := usable_text(text, report, row.id, NO_CAPTION)) is None:
            return None
        if (box := clamp_box(row.bbox, image.width, image.height, report, row.id)) is None:
            return None
        mask = row.segmentation if self.masks is None else self.masks.get(str(row.id))
        region = select_region(mask, box, (image.height, image.width), self.region_type)
        if not isinstance(region, Region):
            report.skip(region, row.id)
            return None
        if (file := image_path(image, self.folders, report)) is None:
            return None
        # an image with an `original_id` is an expression, whose id results use
        is_expression = image.original_id is not None
        meta = {
            "image_id": image.original_id if is_expression else image.id,
            "width": image.width,
            "height": image.height,
            "area": relative_area(box, image.width, image.height),
            "ann_id": row.id,
        }
        sample_id = f"object-{row.original_id}" if grouped else str(image.id if is_expression else row.id)
        return RegionSample(sample_id, file, (region,), None, (caption,), meta=meta)


def image_path(image: CocoImage, folders: ImageFolders, report: ReadReport) -> str | None:
    """The path of an image, or None (counted) if its file name is not valid."""
    name = (image.file_name or "").strip()
    if not name or not is_file_name(name):
        report.skip(NO_FILE, image.id)
        return None
    return folders.find(name)
