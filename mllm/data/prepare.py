"""A data set's folder or file -> its index (`mllm.data.index`): which readings make it, and which picture is of which
split.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mllm.data.index import INDEX_FOLDER, TRAIN, index_beside, write_index
from mllm.data.json_files import read_json
from mllm.data.readers import refcocog, visual_genome
from mllm.data.readers.grit import read_grit
from mllm.data.readers.jsonl import read_jsonl
from mllm.data.readers.mask_imagenet import read_mask_imagenet
from mllm.data.readers.region_text_pairs import has_pairs
from mllm.data.records import ReadReport
from mllm.data.samples import RegionSample
from mllm.data.schemas import DatasetRecord, checked
from mllm.data.splits import SIZES, densecap_split
from vision_tower import Region

logger = logging.getLogger(__name__)

OTHER_SIZES = "images of which lines and masks state no size, or several, all their lines left out"
UNLISTED = "unlisted"  # Visual Genome's images in none of DenseCap's splits

Reports = dict[str, ReadReport]


def make_index(root: str | os.PathLike) -> dict[str, Any]:
    """Index a folder in the layout that its files show, or a .jsonl file.

    Raises:
        ValueError: If it is in none of the known layouts, or a file is damaged.
    """
    root = Path(root)
    if root.suffix == ".jsonl":
        return index_jsonl(root)
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}")
    if (root / "image_data.json").exists():
        return index_visual_genome(root)
    if refs := sorted(root.glob("refs(*).p")):
        return index_refcocog(root, split_by=refs[-1].name[len("refs(") : -len(").p")])  # umd before google
    if has_pairs(root):
        return index_grit(root)
    raise ValueError(
        f"{root} is in no layout that can be indexed: image_data.json is missing (Visual Genome's), and so are "
        "refs(...).p (RefCOCO's) and *.tar or pictures with a .json of the same name (GRIT's); a file of one's own is "
        "given as the path of a .jsonl"
    )


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
    files = refcocog.RefFiles(root, split_by)

    def read(form: str, split: str) -> Iterator:
        report = reports[f"{split}, {form}"] = ReadReport()
        samples = refcocog.read_refs(root, split=split, grouped=True, region_input=form, report=report, files=files)
        # a region's number here is its annotation's: a region has one, refs may share it
        return ((split, _with_region_id(sample, "ann_id")) for sample in samples)

    masks = (pair for split in files.splits for pair in read("mask", split))
    boxes = sorted(
        (pair for split in files.splits for pair in read("box", split)),
        key=lambda pair: (pair[0], pair[1].meta["image_id"]),
    )
    out = root / INDEX_FOLDER if out is None else out
    return write_index(out, root, boxes, masks, made_of=f"RefCOCO's layout, refs({split_by})", reports=reports)


def index_grit(
    root: str | os.PathLike, out: str | os.PathLike | None = None, reports: Reports | None = None
) -> dict[str, Any]:
    """Index a folder in GRIT's layout: boxes, masks where there are some, phrases, and captions of the whole image.

    A folder that names its split in `dataset.json` (Shapes) is of that split; else all is for training.

    Args and Raises: as `index_visual_genome`.
    """
    root = Path(root)
    reports = {} if reports is None else reports
    report = reports["regions and captions"] = ReadReport()
    split = stated_split(root) or TRAIN
    samples = ((split, sample) for sample in read_grit(root, report=report))
    out = root / INDEX_FOLDER if out is None else out
    return write_index(out, root, samples, made_of="GRIT's layout", reports=reports)


def index_mask_imagenet(
    root: str | os.PathLike, out: str | os.PathLike | None = None, reports: Reports | None = None
) -> dict[str, Any]:
    """Index MaskImageNet's list and the pictures beside it: boxes, masks and texts, all for training.

    Args and Raises: as `index_visual_genome`.
    """
    root = Path(root)
    reports = {} if reports is None else reports
    report = reports["regions"] = ReadReport()
    samples = ((TRAIN, sample) for sample in read_mask_imagenet(root, report=report))
    out = root / INDEX_FOLDER if out is None else out
    return write_index(out, root, samples, made_of="MaskImageNet's list", reports=reports)


def index_jsonl(
    path: str | os.PathLike, out: str | os.PathLike | None = None, reports: Reports | None = None
) -> dict[str, Any]:
    """Index a JSONL file of one's own (`mllm.data.readers.jsonl`). Lines about one image, and about one region of it,
    are put together wherever they are. A line's meta may state `split` (default: train), `width` and `height`. A mask
    states the size too; an image of another size is left out of training.

    Args:
        path: The file, held in memory.
        out: Where the index goes; by default beside the file, `<name>.region_index`.
        reports: Filled with what was read and left out.

    Raises:
        ValueError: If the file cannot be read, or too many of its lines cannot be used (`mllm.data.records`).
    """
    path = Path(path)
    folder = Path(os.path.realpath(path)).parent  # `resolve` raises RuntimeError on a circular link
    reports = {} if reports is None else reports
    report = reports["lines"] = ReadReport()
    of_picture: dict[str, list[RegionSample]] = {}
    for sample in read_jsonl(path, report=report):
        of_picture.setdefault(sample.image, []).append(sample)
    samples = (pair for image, lines in of_picture.items() for pair in _of_picture(folder, image, lines, report))
    out = index_beside(path) if out is None else out
    return write_index(out, folder, samples, made_of="JSONL", reports=reports)


def _of_picture(
    folder: Path, image: str, lines: list[RegionSample], report: ReadReport
) -> list[tuple[str, RegionSample]]:
    """The lines about one picture with their splits and ids, those of one split side by side; none, counted, where they
    state different sizes of it.
    """
    name = Path(image)
    image_id = name.relative_to(folder).as_posix() if name.is_relative_to(folder) else name.as_posix()
    sizes = {(meta.get("width"), meta.get("height")) for sample in lines if (meta := sample.meta)} - {(None, None)}
    # a mask states it too: a picture of another size is then left out when it is opened
    masks = (region for sample in lines for region in sample.regions if region.kind == "mask")
    sizes |= {(width, height) for height, width, *_ in (mask.data for mask in masks)}
    if len(sizes) > 1 or any(None in size for size in sizes):
        report.add(OTHER_SIZES, f"{image_id}: {sorted(map(str, sizes))}")
        return []
    size = dict(zip(("width", "height"), *sizes, strict=True)) if sizes else {}
    number_of: dict[Region, int] = {}
    found = []
    for sample in lines:
        (region,) = sample.regions
        about = {} if region.kind == "whole" else {"region_id": number_of.setdefault(region, len(number_of))}
        if sample.meta.get("type"):
            about["type"] = sample.meta["type"]
        meta = {"image_id": image_id, **size, **about}
        found.append((sample.meta.get("split") or TRAIN, dataclasses.replace(sample, meta=meta)))
    return sorted(found, key=lambda pair: pair[0])


def stated_split(root: str | os.PathLike) -> str | None:
    """The split that a folder's `dataset.json` names for all its images; None where there is no such file.

    Raises:
        ValueError: If the file is damaged or names none.
    """
    path = Path(root) / "dataset.json"
    if not path.exists():
        return None
    return checked(read_json(path, dict), DatasetRecord, path).split


def split_of_images(root: str | os.PathLike) -> Callable[[int], str]:
    """The split of an image by its number, in a folder in Visual Genome's layout: the one that `dataset.json` names for
    all, else DenseCap's.
    """
    if (split := stated_split(root)) is not None:
        return lambda image: split
    split_of = {image: name for name in SIZES for image in densecap_split(name)}
    return lambda image: split_of.get(image, UNLISTED)


def _with_region_id(sample: RegionSample, name: str) -> RegionSample:
    return dataclasses.replace(sample, meta={**sample.meta, "region_id": sample.meta[name]})
