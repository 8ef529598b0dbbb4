"""A data set's folder -> its index (`mllm.data.index`): which readings make it, and which picture is of which split."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mllm.data import refcocog, visual_genome
from mllm.data.index import INDEX_FOLDER, write_index
from mllm.data.records import ReadReport, read_json
from mllm.data.samples import RegionSample
from mllm.data.splits import SIZES, densecap_split

logger = logging.getLogger(__name__)

UNLISTED = "unlisted"  # Visual Genome's images in none of DenseCap's splits

Reports = dict[str, ReadReport]


def make_index(root: str | os.PathLike) -> dict[str, Any]:
    """Index a folder in the layout that its files show.

    Raises:
        ValueError: If it is neither Visual Genome's nor RefCOCOg's, or a file is damaged.
    """
    root = Path(root)
    if (root / "image_data.json").exists() or not (refs := sorted(root.glob("refs(*).p"))):
        return index_visual_genome(root)
    return index_refcocog(root, split_by=refs[-1].name[len("refs(") : -len(").p")])  # umd before google


def index_visual_genome(
    root: str | os.PathLike, out: str | os.PathLike | None = None, reports: Reports | None = None
) -> dict[str, Any]:
    """Index a folder in Visual Genome's layout: regions, with their masks where `region_masks.json` holds them, the
    questions about them, and those about the whole image.

    A folder that names its split in `dataset.json` (Shapes) is of that split; else images have DenseCap's.

    Args:
        root: The folder.
        out: Where the index goes; by default into the folder.
        reports: Filled with what each reading left out, by name.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    root = Path(root)
    reports = {} if reports is None else reports
    split_of = split_of_images(root)

    def read(name: str, reader: Callable[..., Iterator[RegionSample]], **kwargs: Any) -> Iterator:
        report = reports[name] = ReadReport()
        return ((split_of(sample.meta["image_id"]), sample) for sample in reader(root, report=report, **kwargs))

    more: list[Iterable] = []
    if (root / "region_masks.json").exists():
        more.append(read("masks", visual_genome.read_regions, region_input="mask"))
    questions = [(root / name).exists() for name in ("question_answers.json", "qa_to_region_mapping.json")]
    if any(questions) and not all(questions):
        logger.warning(
            "%s: questions are left out; they need question_answers.json and qa_to_region_mapping.json", root
        )
    if all(questions):
        more.append(read("region questions", visual_genome.read_region_questions, located=False))
        more.append(read("questions", visual_genome.read_free_questions))
    regions = read("regions", visual_genome.read_regions)
    out = root / INDEX_FOLDER if out is None else out
    return write_index(out, root, regions, itertools.chain(*more), made_of="Visual Genome's layout", reports=reports)


def index_refcocog(
    root: str | os.PathLike,
    out: str | os.PathLike | None = None,
    reports: Reports | None = None,
    split_by: str = "umd",
) -> dict[str, Any]:
    """Index RefCOCOg (or RefCOCO, RefCOCO+) as lichengunc/refer publishes it: boxes, masks and expressions.

    Args and Raises: as `index_visual_genome`; `split_by` is "umd", "google" or "unc".
    """
    root = Path(root)
    reports = {} if reports is None else reports
    splits = sorted({str(ref.get("split")) for ref in refcocog.read_pickle(root / f"refs({split_by}).p")})

    def read(form: str, split: str) -> Iterator:
        report = reports[f"{split}, {form}"] = ReadReport()
        samples = refcocog.read_refs(
            root, split_by=split_by, split=split, grouped=True, region_input=form, report=report
        )
        # a region's number here is its annotation's: a region has one, refs may share it
        return ((split, _with_region_id(sample, "ann_id")) for sample in samples)

    masks = (pair for split in splits for pair in read("mask", split))
    boxes = sorted(
        (pair for split in splits for pair in read("box", split)), key=lambda pair: (pair[0], pair[1].meta["image_id"])
    )
    out = root / INDEX_FOLDER if out is None else out
    return write_index(out, root, boxes, masks, made_of=f"RefCOCO's layout, refs({split_by})", reports=reports)


def split_of_images(root: str | os.PathLike) -> Callable[[int], str]:
    """The split of an image by its number, in a folder in Visual Genome's layout: the one that `dataset.json` names for
    all, else DenseCap's.
    """
    path = Path(root) / "dataset.json"
    if path.exists():
        split = str(read_json(path, dict).get("split"))
        return lambda image: split
    split_of = {image: name for name in SIZES for image in densecap_split(name)}
    return lambda image: split_of.get(image, UNLISTED)


def _with_region_id(sample: RegionSample, name: str) -> RegionSample:
    return dataclasses.replace(sample, meta={**sample.meta, "region_id": sample.meta[name]})
