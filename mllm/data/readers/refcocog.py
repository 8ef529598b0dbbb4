"""Reads RefCOCO, RefCOCO+ and RefCOCOg in the layout of lichengunc/refer.

A folder has `refs(umd).p` or `refs(google).p` (RefCOCO and RefCOCO+: `refs(unc).p`), `instances.json`, and the images
in `train2014/`. Not tested with published files: the tests write them as the README and refer.py describe, or with
`mllm.data.shapes`. JSON versions of these datasets: `mllm.data.readers.coco`.

A sample's `meta` has `image_id`, `width`, `height`, `area` (of the box, as a fraction of the image), `same_class`
(number of other annotations of the same category in the image), `ref_id`, `ann_id`, and `sent_id` if it is one
expression.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm.data.image_folders import ImageFolders
from mllm.data.json_files import check_unique, is_utf8, read_json, unexpected
from mllm.data.masks import check_region_type, select_region
from mllm.data.read_report import (
    READ,
    ReadReport,
    clamp_box,
    relative_area,
    usable_record,
    usable_text,
)
from mllm.data.readers.coco import IMAGE_FOLDERS, image_path, rows_by_id
from mllm.data.readers.plain_pickle import read_pickle
from mllm.data.samples import RegionSample
from mllm.data.schemas import MAX_SENTENCES, CocoAnnotation, CocoImage, Ref, RefSentence
from vision_tower import Region

NO_TEXT = "skipped: no text"
NO_SPLIT = "skipped: no split"
NO_ANNOTATION = "skipped: the annotation or image is not in instances.json"


def read_refcocog(
    root: str | os.PathLike,
    *,
    split_by: str = "umd",
    split: str = "val",
    grouped: bool = False,
    region_type: str = "box",
    report: ReadReport | None = None,
    files: RefFiles | None = None,
) -> Iterator[RegionSample]:
    """One sample per expression, or with `grouped` one per region with all its expressions as references.

    Expressions without text are skipped, and regions whose expressions all have no text.

    Args:
        root: Folder of the files.
        split_by: Author of the split: "umd", "google" or "unc".
        split: "train", "val", "test", "testA" or "testB".
        grouped: Evaluation protocol: METEOR differs by half between the two (docs/evaluation.md).
        region_type: "box", or "mask" (polygons or RLE of `instances.json`).
        report: Filled with the counts of read, clamped and skipped records, which are also logged.
        files: The files, if they have been read.

    Raises:
        ValueError: If a file is missing or damaged, refers to code, or lacks the split; if an id of an image,
            annotation, ref or expression occurs twice; or if more than `MAX_ERRORS` of the records cannot be used.
    """
    check_region_type(region_type)
    files = RefFiles(root, split_by) if files is None else files
    if split not in files.splits:
        raise ValueError(f"{files.path} has no split {split!r}; its splits are {', '.join(files.splits) or 'none'}")
    report = ReadReport() if report is None else report
    report.include(files.malformed, f"records of {files.instances_path.name}")
    for number, record in enumerate(files.refs):
        if (found := _split_of(record)) is None:
            report.skip(NO_SPLIT, f"refs[{number}]")
        elif found == split:
            yield from _samples(files, number, record, grouped, region_type, report)
    report.finish(f"{files.path}, {split}: {'regions' if grouped else 'expressions'}")


class RefFiles:
    """The refs and `instances.json` of a folder, which are read once for all splits and region types.

    Attributes:
        path: Path of the refs.
        splits: Names of the splits, sorted.
    """

    def __init__(self, root: str | os.PathLike, split_by: str = "umd") -> None:
        """Read the files.

        Args:
            root: Folder of the files.
            split_by: Author of the split: "umd", "google" or "unc".

        Raises:
            ValueError: If a file is missing or damaged, refers to code, or an id occurs twice.
        """
        root = Path(root)
        self.path = root / f"refs({split_by}).p"
        self.refs = read_pickle(self.path)
        if not isinstance(self.refs, list):
            raise unexpected(self.path, "a list of refs", self.refs)
        self.splits = sorted({split for ref in self.refs if (split := _split_of(ref)) is not None})
        self._check_ids()
        self.instances_path = root / "instances.json"
        content = read_json(self.instances_path, dict)
        self.malformed = ReadReport()
        self.images = rows_by_id(self.instances_path, content, "images", self.malformed)
        self.annotations = rows_by_id(self.instances_path, content, "annotations", self.malformed)
        self.classes = Counter(map(_class_of, self.annotations.values()))
        self.folders = ImageFolders(root, IMAGE_FOLDERS)

    def _check_ids(self) -> None:
        for name in ("ref_id", "sent_id"):
            ids = [record[name] for record in self._records(name) if type(record.get(name)) is int]
            if len(set(ids)) < len(ids):
                check_unique(ids, f"{self.path}: values of {name}")

    def _records(self, name: str) -> Iterator[dict]:
        """The refs or their sentences, as far as they are objects."""
        for ref in self.refs:
            if not isinstance(ref, dict):
                continue
            sentences = ref.get("sentences")
            if name == "ref_id":
                yield ref
            elif isinstance(sentences, list) and len(sentences) <= MAX_SENTENCES:
                yield from (sentence for sentence in sentences if isinstance(sentence, dict))


def _split_of(ref: Any) -> str | None:
    """The split of a ref; None if it has none."""
    split = ref.get("split") if isinstance(ref, dict) else None
    return split if isinstance(split, str) and split and is_utf8(split) else None


def _class_of(row: dict) -> tuple:
    """Image and category of an annotation."""
    return tuple(value if type(value := row.get(name)) is int else None for name in ("image_id", "category_id"))


def _samples(
    files: RefFiles, number: int, record: dict, grouped: bool, region_type: str, report: ReadReport
) -> Iterator[RegionSample]:
    """The samples of a ref."""
    if (ref := usable_record(record, Ref, f"refs[{number}]", report)) is None:
        return
    sentences = list(_sentences(ref, grouped, report))
    if not sentences:
        if grouped or not ref.sentences:
            report.skip(NO_TEXT, f"ref {ref.ref_id}")
        return
    if (found := _region(files, ref, region_type, report)) is None:
        return
    image, region, meta = found
    if grouped:
        report.add(READ, ref.ref_id)
        references = tuple(text for _, text in sentences)
        yield RegionSample(f"ref-{ref.ref_id}", image, (region,), None, references, meta=meta)
        return
    for sent_id, text in sentences:
        report.add(READ, sent_id)
        yield RegionSample(f"sent-{sent_id}", image, (region,), None, (text,), meta={**meta, "sent_id": sent_id})


def _sentences(ref: Ref, grouped: bool, report: ReadReport) -> Iterator[tuple[int, str]]:
    """Id and text of each usable expression of a ref; the others are counted."""
    # with `grouped`, a skipped expression is not a skipped sample: its region can still be read
    skipped = ReadReport() if grouped else report
    for record in ref.sentences:
        sentence = usable_record(record, RefSentence, f"a sentence of ref {ref.ref_id}", skipped)
        if sentence is None:
            continue
        text = usable_text(sentence.sent, skipped, f"sentence {sentence.sent_id}", NO_TEXT)
        if text is not None:
            yield sentence.sent_id, text
    if grouped:
        report.include(skipped, "expressions")


def _region(
    files: RefFiles, ref: Ref, region_type: str, report: ReadReport
) -> tuple[str, Region, dict[str, Any]] | None:
    """Image path, region and meta of a ref, or None (counted) if they cannot be used."""
    name = f"ref {ref.ref_id}"
    annotation, image_row = files.annotations.get(ref.ann_id), files.images.get(ref.image_id)
    if annotation is None or image_row is None or annotation.get("image_id") != ref.image_id:
        report.skip(NO_ANNOTATION, f"{name}: annotation {ref.ann_id} of image {ref.image_id}")
        return None
    row = usable_record(annotation, CocoAnnotation, f"{name}, annotation {ref.ann_id}", report)
    if row is None or (image := usable_record(image_row, CocoImage, f"{name}, image {ref.image_id}", report)) is None:
        return None
    if (box := clamp_box(row.bbox, image.width, image.height, report, name)) is None:
        return None
    region = select_region(row.segmentation, box, (image.height, image.width), region_type)
    if not isinstance(region, Region):
        report.skip(region, name)
        return None
    # not the file name of the ref, which also contains the id of the annotation
    if (file := image_path(image, files.folders, report)) is None:
        return None
    meta = {
        "image_id": image.id,
        "width": image.width,
        "height": image.height,
        "area": relative_area(box, image.width, image.height),
        "same_class": files.classes[_class_of(annotation)] - 1,
        "ref_id": ref.ref_id,
        "ann_id": row.id,
    }
    return file, region, meta
