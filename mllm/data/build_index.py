"""Builds the region index of a dataset: selects the readers for its layout and assigns each image to a split."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mllm.data.densecap_splits import SIZES, densecap_split
from mllm.data.index import INDEX_FOLDER, TRAIN, index_of_file
from mllm.data.index_writer import SplitSample, write_index
from mllm.data.json_files import read_json
from mllm.data.read_report import ReadReport
from mllm.data.readers import refcocog, visual_genome
from mllm.data.readers.grit import read_grit
from mllm.data.readers.image_json_pairs import has_pairs
from mllm.data.readers.jsonl import read_jsonl
from mllm.data.readers.mask_imagenet import read_mask_imagenet
from mllm.data.samples import RegionSample
from mllm.data.schemas import DatasetInfo, validate
from vision_tower import Region

logger = logging.getLogger(__name__)

INCONSISTENT_SIZE = "images with an incomplete or inconsistent size, all their lines skipped"
UNLISTED = "unlisted"  # the split of Visual Genome images that are in none of DenseCap's splits

Reports = dict[str, ReadReport]  # by name of the reading


def build_index(root: str | os.PathLike) -> dict[str, Any]:
    """Index a folder, whose layout is recognized by its files, or a .jsonl file.

    Raises:
        ValueError: If the layout is not recognized, or a file is damaged.
    """
    root = Path(root)
    if root.suffix == ".jsonl":
        return index_jsonl(root)
    if not root.is_dir():
        raise ValueError(f"folder not found: {root}")
    if (root / "image_data.json").exists():
        return index_visual_genome(root)
    if refs := sorted(root.glob("refs(*).p")):
        return index_refcocog(root, split_by=refs[-1].name[len("refs(") : -len(").p")])  # umd before google
    if has_pairs(root):
        return index_grit(root)
    raise ValueError(
        f"cannot recognize the layout of {root}: expected image_data.json (Visual Genome), refs(...).p (RefCOCO), or "
        "*.tar or images with a .json of the same name (GRIT); to index a .jsonl file, pass its path"
    )


def index_visual_genome(
    root: str | os.PathLike, out: str | os.PathLike | None = None, reports: Reports | None = None
) -> dict[str, Any]:
    """Index a folder in Visual Genome's layout: regions, their masks if there is a `region_masks.json`, questions
    about them, and questions about the whole image.

    Args:
        root: Folder of the dataset. The split is the one in `dataset.json` (Shapes), or else DenseCap's.
        out: Folder of the index; default: `region_index` in `root`.
        reports: Filled with the report of each reading.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    root = Path(root)
    reports = {} if reports is None else reports
    split_of = image_split(root)

    def read(name: str, reader: Callable[..., Iterator[RegionSample]], **kwargs: Any) -> Iterator[SplitSample]:
        report = reports[name] = ReadReport()
        return ((split_of(sample.meta["image_id"]), sample) for sample in reader(root, report=report, **kwargs))

    more: list[Iterable[SplitSample]] = []
    if (root / "region_masks.json").exists():
        more.append(read("masks", visual_genome.read_regions, region_type="mask"))
    questions = [(root / name).exists() for name in ("question_answers.json", "qa_to_region_mapping.json")]
    if any(questions) and not all(questions):
        logger.warning("%s: no questions: they need question_answers.json and qa_to_region_mapping.json", root)
    if all(questions):
        more.append(read("region questions", visual_genome.read_region_questions, located=False))
        more.append(read("questions", visual_genome.read_image_questions))
    regions = read("regions", visual_genome.read_regions)
    out = root / INDEX_FOLDER if out is None else out
    return write_index(out, root, regions, itertools.chain(*more), layout="Visual Genome", reports=reports)


def index_refcocog(
    root: str | os.PathLike,
    out: str | os.PathLike | None = None,
    reports: Reports | None = None,
    split_by: str = "umd",
) -> dict[str, Any]:
    """Index RefCOCOg, RefCOCO or RefCOCO+ in the layout of lichengunc/refer: boxes, masks and expressions.

    Args and Raises: as for `index_visual_genome`; `split_by` is "umd", "google" or "unc".
    """
    root = Path(root)
    reports = {} if reports is None else reports
    files = refcocog.RefFiles(root, split_by)

    def read(region_type: str, split: str) -> Iterator[SplitSample]:
        report = reports[f"{split}, {region_type}"] = ReadReport()
        samples = refcocog.read_refcocog(
            root, split=split, grouped=True, region_type=region_type, report=report, files=files
        )
        for sample in samples:  # several refs can have the same annotation, which is the region
            yield split, dataclasses.replace(sample, meta={**sample.meta, "region_id": sample.meta["ann_id"]})

    masks = (pair for split in files.splits for pair in read("mask", split))
    boxes = sorted(
        (pair for split in files.splits for pair in read("box", split)),
        key=lambda pair: (pair[0], pair[1].meta["image_id"]),
    )
    out = root / INDEX_FOLDER if out is None else out
    return write_index(out, root, boxes, masks, layout=f"RefCOCO, refs({split_by})", reports=reports)


def index_grit(
    root: str | os.PathLike, out: str | os.PathLike | None = None, reports: Reports | None = None
) -> dict[str, Any]:
    """Index a folder in GRIT's layout: boxes, masks if any, phrases, and captions of the whole image.

    The split is the one in `dataset.json` (Shapes), or else "train". Args and Raises: as for `index_visual_genome`.
    """
    root = Path(root)
    reports = {} if reports is None else reports
    report = reports["regions and captions"] = ReadReport()
    split = dataset_split(root) or TRAIN
    samples = ((split, sample) for sample in read_grit(root, report=report))
    out = root / INDEX_FOLDER if out is None else out
    return write_index(out, root, samples, layout="GRIT", reports=reports)


def index_mask_imagenet(
    root: str | os.PathLike, out: str | os.PathLike | None = None, reports: Reports | None = None
) -> dict[str, Any]:
    """Index MaskImageNet: boxes, masks and texts. The split is "train".

    Args and Raises: as for `index_visual_genome`.
    """
    root = Path(root)
    reports = {} if reports is None else reports
    report = reports["regions"] = ReadReport()
    samples = ((TRAIN, sample) for sample in read_mask_imagenet(root, report=report))
    out = root / INDEX_FOLDER if out is None else out
    return write_index(out, root, samples, layout="MaskImageNet", reports=reports)


def index_jsonl(
    path: str | os.PathLike, out: str | os.PathLike | None = None, reports: Reports | None = None
) -> dict[str, Any]:
    """Index a JSONL file (`mllm.data.readers.jsonl`), which is held in memory.

    Lines about the same image or region need not be consecutive. A line's `meta` may contain `split` (default:
    "train"), `width` and `height`. If a line has a mask, the image must have its size; others are skipped in training.

    Args:
        path: The file.
        out: Folder of the index; default: `<name>.region_index` next to the file.
        reports: Filled with the report of the reading.

    Raises:
        ValueError: If the file cannot be read, or more than `MAX_ERRORS` of its lines cannot be used.
    """
    path = Path(path)
    folder = Path(os.path.realpath(path)).parent  # `resolve` raises RuntimeError on a circular link
    reports = {} if reports is None else reports
    report = reports["lines"] = ReadReport()
    by_image: dict[str, list[RegionSample]] = {}
    for sample in read_jsonl(path, report=report):
        by_image.setdefault(sample.image, []).append(sample)
    samples = (pair for image, lines in by_image.items() for pair in _with_ids(folder, image, lines, report))
    out = index_of_file(path) if out is None else out
    return write_index(out, folder, samples, layout="JSONL", reports=reports)


def _with_ids(folder: Path, image: str, lines: list[RegionSample], report: ReadReport) -> list[SplitSample]:
    """The samples of an image with image and region ids, sorted by split; none (counted) if their sizes differ."""
    name = Path(image)
    image_id = name.relative_to(folder).as_posix() if name.is_relative_to(folder) else name.as_posix()
    sizes = {(meta.get("width"), meta.get("height")) for sample in lines if (meta := sample.meta)} - {(None, None)}
    # an image of another size than its mask is skipped when it is opened
    masks = (region for sample in lines for region in sample.regions if region.kind == "mask")
    sizes |= {(width, height) for height, width, *_ in (mask.data for mask in masks)}
    if len(sizes) > 1 or any(None in size for size in sizes):
        report.add(INCONSISTENT_SIZE, f"{image_id}: {sorted(map(str, sizes))}")
        return []
    size = dict(zip(("width", "height"), *sizes, strict=True)) if sizes else {}
    region_ids: dict[Region, int] = {}
    found = []
    for sample in lines:
        (region,) = sample.regions
        meta = {"image_id": image_id, **size}
        if region.kind != "whole":
            meta["region_id"] = region_ids.setdefault(region, len(region_ids))
        if sample.meta.get("type"):
            meta["type"] = sample.meta["type"]
        found.append((sample.meta.get("split") or TRAIN, dataclasses.replace(sample, meta=meta)))
    return sorted(found, key=lambda pair: pair[0])


def dataset_split(root: str | os.PathLike) -> str | None:
    """The split of a whole folder as stated in its `dataset.json`; None if there is no such file.

    Raises:
        ValueError: If the file is damaged or states no split.
    """
    path = Path(root) / "dataset.json"
    if not path.exists():
        return None
    return validate(read_json(path, dict), DatasetInfo, path).split


def image_split(root: str | os.PathLike) -> Callable[[int], str]:
    """A function from image id to split, for a folder in Visual Genome's layout.

    All images are in the split that `dataset.json` states; without this file, they have DenseCap's splits.
    """
    if (split := dataset_split(root)) is not None:
        return lambda image: split
    split_of = {image: name for name in SIZES for image in densecap_split(name)}
    return lambda image: split_of.get(image, UNLISTED)
