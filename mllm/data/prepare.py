"""`alpha-clip prepare`: check a dataset and write the index that training reads.

Reports missing files and where they are published, skipped records with their reasons, and training images that are in
a test or validation split: of the same dataset, of another dataset (Visual Genome and RefCOCOg share images of COCO),
or test images in LLaVA-1.5's training data.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

from alpha_clip_commands.command_line import log_to_terminal, say
from mllm.data import build_index
from mllm.data.index import TRAIN, RegionIndex, find_index
from mllm.data.json_stream import stream_json
from mllm.data.read_report import READ
from mllm.data.readers import mask_imagenet

FILES = {
    "vg": {
        "image_data.json": "visualgenome.org, image meta data (version 1.2)",
        "region_descriptions.json": "visualgenome.org, region descriptions (version 1.2)",
        "question_answers.json": "visualgenome.org, question answers (version 1.2); without it there are no questions",
        "qa_to_region_mapping.json": "visualgenome.org, question answers to region mapping; needed for the questions",
    },
    "refcocog": {
        "refs({split_by}).p": "github.com/lichengunc/refer, refcocog.zip",
        "instances.json": "github.com/lichengunc/refer, refcocog.zip",
    },
    "grit": {},  # any images with JSON files, or tars
    "jsonl": {},
    "mask-imagenet": {mask_imagenet.LIST: "huggingface.co/datasets/Zery/MaskImageNet"},
}
OPTIONAL = {"question_answers.json", "qa_to_region_mapping.json"}
IMAGES = {
    "vg": "VG_100K/ and VG_100K_2/: visualgenome.org, images.zip and images2.zip",
    "refcocog": "train2014/: images.cocodataset.org, train2014.zip",
    "grit": "URLs in huggingface.co/datasets/zzliang/GRIT, for img2dataset",
    "jsonl": "the paths are those in the file",
    "mask-imagenet": "imagenet-21k/images/: image-net.org",
}
_INDEXERS = {
    "vg": build_index.index_visual_genome,
    "grit": build_index.index_grit,
    "jsonl": build_index.index_jsonl,
    "mask-imagenet": build_index.index_mask_imagenet,
}
_COCO = re.compile(r"(\d{12})\.jpg$")
_IDS_SHOWN = 5
_IMAGES_SHOWN = 3


class Images(NamedTuple):
    """The images of a dataset as ("vg", id), ("coco", id), or else ("file", path), which other datasets share."""

    train: set
    held_out: set


def run(args: argparse.Namespace) -> int:
    """Check and index a dataset; returns the exit code."""
    log_to_terminal(logging.ERROR)  # skipped records are in the report
    check_files(args.kind, args.source, args.split_by)
    reports: build_index.Reports = {}
    if args.kind == "refcocog":
        info = build_index.index_refcocog(args.source, args.out, reports, args.split_by)
    else:
        info = _INDEXERS[args.kind](args.source, args.out, reports)
    print_report(args, info, reports)
    images = images_of(args.source, args.out)
    print_overlap(f"the test and validation splits of {args.source} itself", images.train, images.held_out)
    for path in args.against:
        other = images_of(path)
        print_overlap(f"the test and validation splits of {path}", images.train, other.held_out)
        print_overlap(f"{path} that are in the test and validation splits here", other.train, images.held_out)
    return 0


def check_files(kind: str, source: Path, split_by: str) -> None:
    """Print the missing optional files.

    Raises:
        ValueError: If required files are missing. The message lists them and where they are published.
    """
    if kind == "jsonl":
        return  # checked by read_jsonl
    if not source.is_dir():
        raise ValueError(f"folder not found: {source}")
    missing = {}
    for name, published in FILES[kind].items():
        name = name.format(split_by=split_by)
        if not (source / name).exists():
            missing[name] = published
            if name in OPTIONAL:
                say(f"{name} is missing: {published}")
    if required := [f"{name} ({published})" for name, published in missing.items() if name not in OPTIONAL]:
        raise ValueError(f"missing in {source}: {'; '.join(required)}")


def print_report(args: argparse.Namespace, info: dict, reports: build_index.Reports) -> None:
    """Print the numbers of read and skipped records, of regions per split, and of missing images."""
    for name, report in reports.items():
        say(f"{name}: {report.counts[READ]:,} read")
        for reason, count in report.problems().items():
            say(f"  {count:,} {reason} (ids {', '.join(map(str, report.examples[reason][:_IDS_SHOWN]))} ...)")
    if info["turns_without_region"]:
        say(f"  {info['turns_without_region']:,} questions skipped: unknown region")
    root = Path(os.path.realpath(args.source)).parent if args.kind == "jsonl" else args.source
    index = RegionIndex(args.out or args.source, root=root)
    missing_by_split = {split: index.missing_images(split) for split in info["splits"]}
    for split, regions in info["splits"].items():
        images, missing = int((index.image_splits == split).sum()), missing_by_split[split]
        line = f"split {split}: {regions:,} regions in {images:,} images"
        say(line + (f", {sum(missing.values()):,} of them missing (first: {next(iter(missing))})" if missing else ""))
    if any(missing_by_split.values()):
        say(f"images are published as {IMAGES[args.kind]}")
    say(f"index: {index.folder} ({sum(f.stat().st_size for f in index.folder.iterdir()) / 1e6:.0f} MB)")


def print_overlap(where: str, train: set, held_out: set) -> None:
    """Print the number of training images that are held out elsewhere, and the first of them."""
    shared = sorted(train & held_out)
    first = f" (first: {', '.join(f'{kind} {number}' for kind, number in shared[:_IMAGES_SHOWN])})" if shared else ""
    say(f"training images in {where}: {len(shared):,}{first}")


def images_of(source: Path, index: Path | None = None) -> Images:
    """The images of a dataset: its folder, an indexed .jsonl file, or LLaVA's JSON file of conversations.

    Args:
        source: The folder or file.
        index: Folder of the index, if it is not in `source`.

    Raises:
        ValueError: If it is none of them.
    """
    if source.is_file() and source.suffix != ".jsonl":
        return Images(_images_of_llava(source), set())
    if (source / "image_data.json").exists():
        return _images_of_visual_genome(source)
    if find_index(index or source) is None:
        raise ValueError(
            f"expected a folder of Visual Genome, an indexed dataset, or a JSON file of LLaVA, got {source}"
        )
    images, found = Images(set(), set()), RegionIndex(index or source)
    is_coco = any(source.glob("refs(*).p"))
    for image in found.images:
        if is_coco:
            name = "coco", int(image["image_id"])
        else:
            file = os.path.realpath(found.root / image["path"])
            name = _shared_name(image["path"]) or ("file", "!".join(filter(None, (file, image["member"]))))
        (images.train if image["split"] == TRAIN else images.held_out).add(name)
    return images


def _images_of_visual_genome(source: Path) -> Images:
    """The images by their ids in Visual Genome and, if they are from COCO, in COCO."""
    split_of = build_index.image_split(source)
    images = Images(set(), set())
    for entry in stream_json(source / "image_data.json"):
        if not isinstance(entry, dict) or type(number := entry.get("image_id", entry.get("id"))) is not int:
            continue  # skipped and counted when the index was written
        if (split := split_of(number)) == build_index.UNLISTED:
            continue
        target = images.train if split == TRAIN else images.held_out
        target.add(("vg", number))
        if type(entry.get("coco_id")) is int:
            target.add(("coco", entry["coco_id"]))
    return images


def _images_of_llava(path: Path) -> set:
    """The images of a JSON list of {"image": "vg/VG_100K/1.jpg" or "coco/train2017/000000000009.jpg", ...}."""
    images = set()
    for entry in stream_json(path):
        image = entry.get("image") if isinstance(entry, dict) else None
        if name := _shared_name(image if isinstance(image, str) else ""):
            images.add(name)
    return images


def _shared_name(path: str) -> tuple[str, int] | None:
    """The id of an image in COCO or Visual Genome, if its path contains it."""
    if coco := _COCO.search(path):
        return "coco", int(coco[1])
    if "VG_100K" in path and Path(path).stem.isdecimal():
        return "vg", int(Path(path).stem)
    return None
