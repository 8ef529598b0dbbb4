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

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mllm.data.records import READ, Folders, ReadReport, area_share, clamped, integer, read_json, text, wrong
from mllm.data.samples import RegionSample
from vision_tower import Region

IMAGE_FOLDERS = ("train2014", "VG_100K", "VG_100K_2", "", "images")


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
        ValueError: If a file is missing, damaged or of another form, or a region has no mask where masks are asked for.
    """
    path = Path(annotations)
    report = ReadReport() if report is None else report
    content = read_json(path, dict)
    images = {integer(path, image, "id"): image for image in _rows(path, content, "images")}
    by_id = None if masks is None else read_json(Path(masks), dict)
    folders = Folders(Path(image_root), IMAGE_FOLDERS)
    rows = _rows(path, content, "annotations")
    merged: dict[Any, RegionSample] = {}
    for row in rows:
        sample = _sample(path, row, images, folders, region_input, by_id, report)
        if sample is None:
            continue
        if not grouped:
            report.add(READ, sample.id)
            yield sample
            continue
        key = integer(path, row, "original_id")
        earlier = merged.get(key)
        references = sample.references if earlier is None else earlier.references + sample.references
        meta = (sample if earlier is None else earlier).meta
        merged[key] = RegionSample(f"object-{key}", sample.image, sample.regions, None, references, meta=meta)
    for sample in merged.values():
        report.add(READ, sample.id)
        yield sample
    report.log(f"{path}: captions")


def _rows(path: Path, content: dict, key: str) -> list[dict]:
    rows = content.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise wrong(path, f"a list {key!r} of objects, as in COCO's layout", rows)
    return rows


def _sample(
    path: Path,
    row: dict,
    images: dict[int, dict],
    folders: Folders,
    region_input: str,
    masks: dict | None,
    report: ReadReport,
) -> RegionSample | None:
    """The sample of an annotation; None, counted, where it has no picture, caption or area."""
    ann_id, image = integer(path, row, "id"), images.get(integer(path, row, "image_id"))
    if image is None:
        report.add("of an unknown image, left out", ann_id)
        return None
    caption = text(path, row, "caption") or text(path, image, "caption")
    if not caption:
        report.add("without a caption, left out", ann_id)
        return None
    width, height = integer(path, image, "width"), integer(path, image, "height")
    box = clamped(row.get("bbox", ()), width, height, report, f"annotation {ann_id} in {path}")
    if box is None:
        return None
    region = region_of(path, row, box, (height, width), region_input, masks)
    image_id = image.get("original_id", image["id"])
    meta = {"image_id": image_id, "width": width, "height": height, "area": area_share(box, width, height)}
    # where an image entry is an expression (it has the original's id beside its own), results name that
    sample_id = str(image["id"] if "original_id" in image else ann_id)
    file = folders.find(text(path, image, "file_name"))
    return RegionSample(sample_id, file, (region,), None, (caption,), meta={**meta, "ann_id": ann_id})


def region_of(
    path: Path,
    row: dict,
    box: Sequence[float],
    size: tuple[int, int],
    region_input: str,
    masks: dict | None = None,
) -> Region:
    """The region of a COCO annotation in the form asked for; `size` is (height, width) of its picture.

    Raises:
        ValueError: If it has no mask, or one of another size or form, where masks are asked for.
    """
    if region_input == "box":
        return Region.from_box(*box)
    if region_input != "mask":
        raise ValueError(f"expected region_input 'box' or 'mask', got {region_input!r}")
    shape = row.get("segmentation") if masks is None else masks.get(str(row["id"]))
    if not shape:
        raise ValueError(f"{path}: annotation {row['id']} has no mask; use the boxes")
    try:
        if isinstance(shape, dict):
            if list(shape.get("size", ())) != list(size):
                raise ValueError(f"expected the size {list(size)} (h, w) of its picture, got {shape.get('size')}")
            return Region.from_rle(shape)
        # COCO has parts of two points or without area, which are no mask
        parts = [part for part in (shape if isinstance(shape[0], list) else [shape]) if _has_area(part)]
        return Region.from_polygon(parts)
    except ValueError as error:
        raise ValueError(f"{path}: mask of annotation {row['id']}: {error}") from error


def _has_area(flat: Sequence[float]) -> bool:
    """Whether a flat polygon x, y, x, y, ... encloses anything: its points do not lie on one line."""
    points = list(zip(flat[::2], flat[1::2], strict=False))
    (x0, y0), *others = points
    return any(
        (x1 - x0) * (y2 - y0) != (x2 - x0) * (y1 - y0) for (x1, y1), (x2, y2) in zip(others, others[1:], strict=False)
    )
