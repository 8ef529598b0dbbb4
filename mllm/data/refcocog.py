"""RefCOCO, RefCOCO+ and RefCOCOg as lichengunc/refer publishes them -> `RegionSample`s; and rows of the Hub's copies.

A folder holds `refs(umd).p` or `refs(google).p` (RefCOCO and RefCOCO+: `refs(unc).p`), `instances.json`, and pictures
in `train2014/`. No record of these files published by their authors has been read here: they are written as their
README and refer.py describe, and by `mllm.data.shapes`. JSON copies: `mllm.data.coco`.

A sample's meta holds `image_id`, `width`, `height`, `area` (share of the picture that the box covers), `same_class`
(how many other annotations of the picture are of its category), `ref_id`, `ann_id`, and `sent_id` where it is one
expression.
"""

from __future__ import annotations

import io
import os
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm.data.coco import IMAGE_FOLDERS, region_of
from mllm.data.records import READ, Folders, ReadReport, area_share, clamped, integer, read_json, text, wrong
from mllm.data.samples import RegionSample
from vision_tower import Region


def read_refs(
    root: str | os.PathLike,
    *,
    split_by: str = "umd",
    split: str = "val",
    grouped: bool = False,
    region_input: str = "box",
    report: ReadReport | None = None,
) -> Iterator[RegionSample]:
    """One sample for each expression, or with `grouped` for each region with all its expressions as references.

    Args:
        root: Folder of the files.
        split_by: Whose split: "umd", "google" or "unc".
        split: "train", "val", "test", "testA" or "testB".
        grouped: Which of two protocols: published numbers differ by half in METEOR (docs/evaluation.md).
        region_input: "box", or "mask" (polygons or RLE of `instances.json`).
        report: Filled with what was read, clamped and left out; logged in any case.

    Raises:
        ValueError: If a file is missing, damaged, wants to run code, or has no such split.
    """
    root = Path(root)
    path = root / f"refs({split_by}).p"
    report = ReadReport() if report is None else report
    refs = read_pickle(path)
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise wrong(path, "a list of refs", refs)
    if not any(ref.get("split") == split for ref in refs):
        found = sorted({str(ref.get("split")) for ref in refs})
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(found)}")
    instances = _Instances(root, region_input, report)
    for ref in refs:
        if ref.get("split") != split:
            continue
        found = instances.region(path, ref)
        if found is None:
            continue
        image, region, meta = found
        sentences = [(integer(path, s, "sent_id"), text(path, s, "sent")) for s in ref.get("sentences", [])]
        if grouped:
            ref_id = integer(path, ref, "ref_id")
            report.add(READ, ref_id)
            references = tuple(sentence for _, sentence in sentences)
            yield RegionSample(f"ref-{ref_id}", image, (region,), None, references, meta=meta)
            continue
        for sent_id, sentence in sentences:
            report.add(READ, sent_id)
            about = {**meta, "sent_id": sent_id}
            yield RegionSample(f"sent-{sent_id}", image, (region,), None, (sentence,), meta=about)
    report.log(f"{path}, {split}: {'regions' if grouped else 'expressions'}")


def read_hub_rows(root: str | os.PathLike) -> Iterator[RegionSample]:
    """The rows of lmms-lab-encoder/RefCOCOg from its parquet files under `root`, with the pictures inside them.

    Raises:
        ValueError: If there are no such files, a row is of another form, or the package datasets is absent.
    """
    files = sorted(map(str, Path(root).rglob("*.parquet")))
    if not files:
        raise ValueError(f"{root} holds no parquet file; expected those of lmms-lab-encoder/RefCOCOg")
    try:
        import datasets
    except ImportError:
        raise ValueError("reading parquet files needs datasets: pip install datasets") from None
    datasets.disable_progress_bars()
    table = datasets.load_dataset("parquet", data_files=files, split="train")
    for number, row in enumerate(table.cast_column("image", datasets.Image(decode=False))):
        yield _hub_sample(Path(root), number, row)


def _hub_sample(root: Path, number: int, row: dict[str, Any]) -> RegionSample:
    """A row: box x, y, width, height in pixels; all its answers are references."""
    missing = {"question_id", "image", "answer", "bbox"} - row.keys()
    if missing:
        raise ValueError(
            f"{root}: row {number} has no {', '.join(sorted(missing))}; expected rows of lmms-lab's RefCOCOg"
        )
    x, y, width, height = row["bbox"]
    # an image may have several rows: its file's name tells, where there is one
    meta = {"image_id": row["file_name"]} if row.get("file_name") else {}
    region = Region.from_box(x, y, x + width, y + height)
    return RegionSample(f"row-{number}", row["image"]["bytes"], (region,), None, tuple(row["answer"]), meta=meta)


class _Instances:
    """`instances.json`: pictures and annotations by id."""

    def __init__(self, root: Path, region_input: str, report: ReadReport) -> None:
        self.path = root / "instances.json"
        content = read_json(self.path, dict)
        if not all(isinstance(content.get(key), list) for key in ("images", "annotations")):
            raise wrong(self.path, "lists 'images' and 'annotations'", content)
        self.images = {integer(self.path, image, "id"): image for image in content["images"]}
        self.annotations = {integer(self.path, row, "id"): row for row in content["annotations"]}
        self.classes = Counter((row.get("image_id"), row.get("category_id")) for row in content["annotations"])
        self.folders = Folders(root, IMAGE_FOLDERS)
        self.region_input = region_input
        self.report = report

    def region(self, path: Path, ref: dict) -> tuple[str, Region, dict[str, Any]] | None:
        """Picture, region and meta of a ref; None, counted, where nothing of its box lies inside the picture."""
        ref_id, ann_id = integer(path, ref, "ref_id"), integer(path, ref, "ann_id")
        row, image = self.annotations.get(ann_id), self.images.get(integer(path, ref, "image_id"))
        if row is None or image is None or row.get("image_id") != image["id"]:
            raise ValueError(
                f"{path}: ref {ref_id} is about annotation {ann_id} of image {ref['image_id']}, which {self.path} does "
                "not have; both files must be of the same data set"
            )
        width, height = integer(self.path, image, "width"), integer(self.path, image, "height")
        box = clamped(row.get("bbox", ()), width, height, self.report, f"annotation {ann_id} in {self.path}")
        if box is None:
            return None
        meta = {
            "image_id": image["id"],
            "width": width,
            "height": height,
            "area": area_share(box, width, height),
            "same_class": self.classes[image["id"], row.get("category_id")] - 1,
            "ref_id": ref_id,
            "ann_id": ann_id,
        }
        # not the ref's own file name, which carries the annotation's id behind the picture's
        file = self.folders.find(text(self.path, image, "file_name"))
        return file, region_of(self.path, row, box, (height, width), self.region_input), meta


# What the unpickler raises on damaged files
_DAMAGE = (
    pickle.UnpicklingError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
)


class _PlainUnpickler(pickle.Unpickler):
    """Builds lists, dicts, strings and numbers, nothing else: a pickle may name any function to call."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which would be run")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside the file")


def read_pickle(path: Path) -> Any:
    """The content of a pickle of plain containers, strings and numbers, as Python 2 or 3 wrote it.

    Raises:
        ValueError: If it is missing or damaged, or holds anything else.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; it is one of the data set's files") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    try:
        # as its own reader does: refer.py of lichengunc/refer opens it in Python 2, whose bytes these are
        return _PlainUnpickler(io.BytesIO(content), encoding="latin1").load()
    except _DAMAGE as error:
        raise ValueError(
            f"{path} is damaged, or no pickle of plain lists, dicts, strings and numbers: {error or 'cut short'}"
        ) from error
