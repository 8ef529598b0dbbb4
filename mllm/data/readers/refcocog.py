"""RefCOCO, RefCOCO+ and RefCOCOg as lichengunc/refer publishes them -> `RegionSample`s; and rows of the Hub's copies.

A folder holds `refs(umd).p` or `refs(google).p` (RefCOCO and RefCOCO+: `refs(unc).p`), `instances.json`, and pictures
in `train2014/`. No record of these files published by their authors has been read here: they are written as their
README and refer.py describe, and by `mllm.data.shapes.scenes`. JSON copies: `mllm.data.readers.coco`.

A sample's meta holds `image_id`, `width`, `height`, `area` (share of the picture that the box covers), `same_class`
(how many other annotations of the picture are of its category), `ref_id`, `ann_id`, and `sent_id` where it is one
expression.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alpha_clip_commands.command_line import one_line
from mllm.data.json_files import is_utf8, read_json, refuse_repeated, wrong
from mllm.data.masks import check_region_input, region_of
from mllm.data.readers.coco import IMAGE_FOLDERS, file_of, rows_by_id
from mllm.data.readers.plain_pickle import read_pickle
from mllm.data.records import (
    MALFORMED,
    READ,
    Folders,
    ReadReport,
    area_share,
    clamped,
    usable_record,
    usable_text,
)
from mllm.data.samples import RegionSample
from mllm.data.schemas import MOST_SENTENCES, CocoAnnotation, CocoImage, HubRow, Ref, Sentence, checked
from vision_tower import Region

NO_TEXT = "without text, left out"
NO_SPLIT = "without a split, left out"
NO_ANNOTATION = "about an annotation or image that instances.json does not have, left out"


class RefFiles:
    """The refs and `instances.json` of a folder: read once, for all splits and forms.

    Attributes:
        path: Of the refs.
        splits: Names of the splits, sorted.
    """

    def __init__(self, root: str | os.PathLike, split_by: str = "umd") -> None:
        """Read the files.

        Args:
            root: Folder of the files.
            split_by: Whose split: "umd", "google" or "unc".

        Raises:
            ValueError: If a file is missing, damaged or wants to run code, or an id occurs twice.
        """
        root = Path(root)
        self.path = root / f"refs({split_by}).p"
        self.refs = read_pickle(self.path)
        if not isinstance(self.refs, list):
            raise wrong(self.path, "a list of refs", self.refs)
        self.splits = sorted({split for ref in self.refs if (split := _split_of(ref)) is not None})
        self._refuse_repeated()
        self.instances_path = root / "instances.json"
        content = read_json(self.instances_path, dict)
        self.malformed = ReadReport()
        self.images = rows_by_id(self.instances_path, content, "images", self.malformed)
        self.annotations = rows_by_id(self.instances_path, content, "annotations", self.malformed)
        self.classes = Counter(map(_class_of, self.annotations.values()))
        self.folders = Folders(root, IMAGE_FOLDERS)

    def _refuse_repeated(self) -> None:
        for name in ("ref_id", "sent_id"):
            ids = [record[name] for record in self._records(name) if type(record.get(name)) is int]
            if len(set(ids)) < len(ids):
                refuse_repeated(ids, f"{self.path}: values of {name}")

    def _records(self, name: str) -> Iterator[dict]:
        """The refs, or their sentences, that are objects."""
        for ref in self.refs:
            if not isinstance(ref, dict):
                continue
            sentences = ref.get("sentences")
            if name == "ref_id":
                yield ref
            elif isinstance(sentences, list) and len(sentences) <= MOST_SENTENCES:
                yield from (sentence for sentence in sentences if isinstance(sentence, dict))


def _split_of(ref: Any) -> str | None:
    """The split of a ref; None if it has none."""
    split = ref.get("split") if isinstance(ref, dict) else None
    return split if isinstance(split, str) and split and is_utf8(split) else None


def _class_of(row: dict) -> tuple:
    """Image and category of an annotation."""
    return tuple(value if type(value := row.get(name)) is int else None for name in ("image_id", "category_id"))


def read_refs(
    root: str | os.PathLike,
    *,
    split_by: str = "umd",
    split: str = "val",
    grouped: bool = False,
    region_input: str = "box",
    report: ReadReport | None = None,
    files: RefFiles | None = None,
) -> Iterator[RegionSample]:
    """One sample for each expression, or with `grouped` for each region with all its expressions as references.

    An expression without text is left out, and so is a region whose expressions all are.

    Args:
        root: Folder of the files.
        split_by: Whose split: "umd", "google" or "unc".
        split: "train", "val", "test", "testA" or "testB".
        grouped: Which of two protocols: published numbers differ by half in METEOR (docs/evaluation.md).
        region_input: "box", or "mask" (polygons or RLE of `instances.json`).
        report: Filled with what was read, clamped and left out; logged in any case.
        files: The files, if they were read already.

    Raises:
        ValueError: If a file is missing, damaged, wants to run code, or has no such split; if an id of an image,
            annotation, ref or expression occurs twice; or if too many records cannot be used (`mllm.data.records`).
    """
    check_region_input(region_input)
    files = RefFiles(root, split_by) if files is None else files
    if split not in files.splits:
        raise ValueError(f"{files.path} has no split {split!r}; it has {', '.join(files.splits) or 'none'}")
    report = ReadReport() if report is None else report
    report.note(files.malformed, f"records of {files.instances_path.name}")
    for number, record in enumerate(files.refs):
        if (found := _split_of(record)) is None:
            report.leave_out(NO_SPLIT, f"refs[{number}]")
        elif found == split:
            yield from _samples(files, number, record, grouped, region_input, report)
    report.finish(f"{files.path}, {split}: {'regions' if grouped else 'expressions'}")


def _samples(
    files: RefFiles, number: int, record: dict, grouped: bool, region_input: str, report: ReadReport
) -> Iterator[RegionSample]:
    """The samples of a ref."""
    if (ref := usable_record(record, Ref, f"refs[{number}]", report)) is None:
        return
    sentences = list(_sentences(ref, grouped, report))
    if not sentences:
        if grouped or not ref.sentences:
            report.leave_out(NO_TEXT, f"ref {ref.ref_id}")
        return
    if (found := _region(files, ref, region_input, report)) is None:
        return
    image, region, meta = found
    if grouped:
        report.add(READ, ref.ref_id)
        references = tuple(words for _, words in sentences)
        yield RegionSample(f"ref-{ref.ref_id}", image, (region,), None, references, meta=meta)
        return
    for sent_id, words in sentences:
        report.add(READ, sent_id)
        about = {**meta, "sent_id": sent_id}
        yield RegionSample(f"sent-{sent_id}", image, (region,), None, (words,), meta=about)


def _sentences(ref: Ref, grouped: bool, report: ReadReport) -> Iterator[tuple[int, str]]:
    """Id and text of the expressions of a ref that can be used; the others are counted."""
    # grouped, expressions are not items: the region that one is dropped from is still read
    dropped = ReadReport() if grouped else report
    for record in ref.sentences:
        sentence = usable_record(record, Sentence, f"a sentence of ref {ref.ref_id}", dropped)
        if sentence is None:
            continue
        words = usable_text(sentence.sent, dropped, f"sentence {sentence.sent_id}", NO_TEXT)
        if words is not None:
            yield sentence.sent_id, words
    if grouped:
        report.note(dropped, "expressions")


def _region(
    files: RefFiles, ref: Ref, region_input: str, report: ReadReport
) -> tuple[str, Region, dict[str, Any]] | None:
    """Image, region and meta of a ref; None, counted, where they cannot be used."""
    name = f"ref {ref.ref_id}"
    record, of_image = files.annotations.get(ref.ann_id), files.images.get(ref.image_id)
    if record is None or of_image is None or record.get("image_id") != ref.image_id:
        report.leave_out(NO_ANNOTATION, f"{name}: annotation {ref.ann_id} of image {ref.image_id}")
        return None
    row = usable_record(record, CocoAnnotation, f"{name}, annotation {ref.ann_id}", report)
    if row is None or (image := usable_record(of_image, CocoImage, f"{name}, image {ref.image_id}", report)) is None:
        return None
    if (box := clamped(row.bbox, image.width, image.height, report, name)) is None:
        return None
    region = region_of(row.segmentation, box, (image.height, image.width), region_input)
    if not isinstance(region, Region):
        report.leave_out(region, name)
        return None
    # not the ref's own file name, which has the annotation's id after the image's
    if (file := file_of(image, files.folders, report)) is None:
        return None
    meta = {
        "image_id": image.id,
        "width": image.width,
        "height": image.height,
        "area": area_share(box, image.width, image.height),
        "same_class": files.classes[_class_of(record)] - 1,
        "ref_id": ref.ref_id,
        "ann_id": row.id,
    }
    return file, region, meta


_HUB_COLUMNS = ("image", "answer", "bbox", "file_name")


def read_hub_rows(root: str | os.PathLike, *, report: ReadReport | None = None) -> Iterator[RegionSample]:
    """The rows of lmms-lab-encoder/RefCOCOg from its parquet files under `root`, with the images inside them.

    Args:
        root: Folder of the files.
        report: Filled with what was read and left out; logged in any case.

    Raises:
        ValueError: If there are no such files, one is damaged or of another form, the package pyarrow is absent, or too
            many rows cannot be used (`mllm.data.records`).
    """
    files = sorted(Path(root).rglob("*.parquet"))
    if not files:
        raise ValueError(f"{root} holds no parquet file; expected those of lmms-lab-encoder/RefCOCOg")
    report = ReadReport() if report is None else report
    number = 0
    for file in files:
        for row in _parquet_rows(file):
            if (sample := _hub_sample(number, row, report)) is not None:
                yield sample
            number += 1
    report.finish(f"{root}: rows", needed=True)


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, of the columns that are used.

    Raises:
        ValueError: If it is damaged, or lacks a column.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError("reading parquet files needs pyarrow: pip install datasets") from None
    try:
        with parquet.ParquetFile(path) as file:
            if missing := set(_HUB_COLUMNS[:3]) - set(file.schema_arrow.names):
                raise ValueError(f"no column {', '.join(sorted(missing))}; expected rows of lmms-lab's RefCOCOg")
            columns = [name for name in _HUB_COLUMNS if name in file.schema_arrow.names]
            for batch in file.iter_batches(64, columns=columns):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {one_line(error)}") from error


def _hub_sample(number: int, record: dict[str, Any], report: ReadReport) -> RegionSample | None:
    """A row: box x, y, width, height in pixels; all its answers are references. None, counted, if it is unusable."""
    name = f"row-{number}"
    try:
        row = checked(record, HubRow, name)
        x, y, width, height = row.bbox
        region = Region.from_box(x, y, x + width, y + height)
    except ValueError as error:
        report.leave_out(MALFORMED, str(error))
        return None
    answers = tuple(words for words in row.answer if words.strip())
    if not answers:
        report.leave_out(NO_TEXT, name)
        return None
    report.add(READ, name)
    # an image may have several rows: its file's name tells, where there is one
    meta = {"image_id": row.file_name} if row.file_name else {}
    return RegionSample(name, row.image.content, (region,), None, answers, meta=meta)
