"""`alpha-clip prepare`: check a data set, say what is wrong with it, and write the index that training reads.

Says which files are missing and where they are published, counts what was left out and why, and lists the training
images that are in a test split: of the same data set, of another one (Visual Genome and RefCOCOg share COCO's images),
or the test images in LLaVA-1.5's training mix.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

from alpha_clip_commands.command_line import log_to_terminal, say
from mllm.data import prepare
from mllm.data.index import TRAIN, RegionIndex, index_folder
from mllm.data.json_files import stream_json
from mllm.data.readers import mask_imagenet
from mllm.data.records import READ

FILES = {
    "vg": {
        "image_data.json": "visualgenome.org, image meta data (version 1.2)",
        "region_descriptions.json": "visualgenome.org, region descriptions (version 1.2)",
        "question_answers.json": "visualgenome.org, question answers (version 1.2); without it there are no questions",
        "qa_to_region_mapping.json": "visualgenome.org, question answers to region mapping; goes with the questions",
    },
    "refcocog": {
        "refs({split_by}).p": "github.com/lichengunc/refer, refcocog.zip",
        "instances.json": "github.com/lichengunc/refer, refcocog.zip",
    },
    "grit": {},  # whatever pictures with a JSON, or tars, there are
    "jsonl": {},
    "mask-imagenet": {mask_imagenet.LIST: "huggingface.co/datasets/Zery/MaskImageNet"},
}
OPTIONAL = {"question_answers.json", "qa_to_region_mapping.json"}
PICTURES = {
    "vg": "VG_100K/ and VG_100K_2/: visualgenome.org, images.zip and images2.zip",
    "refcocog": "train2014/: images.cocodataset.org, train2014.zip",
    "grit": "URLs in huggingface.co/datasets/zzliang/GRIT, for img2dataset",
    "jsonl": "the file says",
    "mask-imagenet": "imagenet-21k/images/: image-net.org",
}
_COCO = re.compile(r"(\d{12})\.jpg$")


class Images(NamedTuple):
    """Images by split, under the names by which data sets share them: ("vg", id), ("coco", id), else ("file", path)."""

    train: set
    held_out: set


def run(args: argparse.Namespace) -> int:
    """Check and index; returns the exit code."""
    log_to_terminal(logging.ERROR)  # what was left out is counted in the report
    check_files(args.kind, args.source, args.split_by)
    reports: prepare.Reports = {}
    if args.kind == "refcocog":
        record = prepare.index_refcocog(args.source, args.out, reports, args.split_by)
    else:
        record = _INDEX[args.kind](args.source, args.out, reports)
    print_report(args, record, reports)
    own = images_of(args.source, args.out)
    print_overlap(f"the test and validation splits of {args.source} itself", own.train, own.held_out)
    for other in args.against:
        there = images_of(other)
        print_overlap(f"the test and validation splits of {other}", own.train, there.held_out)
        print_overlap(f"what {other} trains on, of the test and validation splits here", there.train, own.held_out)
    return 0


def check_files(kind: str, source: Path, split_by: str) -> None:
    """Print which optional files are missing.

    Raises:
        ValueError: If one is missing that must be there; all of them are named, with where they are published.
    """
    if kind == "jsonl":
        return  # read_jsonl says what is wrong with a file
    if not source.is_dir():
        raise ValueError(f"there is no folder {source}")
    missing = {}
    for name, published in FILES[kind].items():
        name = name.format(split_by=split_by)
        if not (source / name).exists():
            missing[name] = published
            if name in OPTIONAL:
                say(f"{name} is missing: {published}")
    if needed := [f"{name} ({published})" for name, published in missing.items() if name not in OPTIONAL]:
        raise ValueError(f"missing in {source}: {'; '.join(needed)}")


def print_report(args: argparse.Namespace, record: dict, reports: prepare.Reports) -> None:
    """What was read, left out, and which pictures are not there."""
    for name, report in reports.items():
        say(f"{name}: {report.counts[READ]:,} read")
        for reason, count in report.counts.items():
            if reason != READ:
                say(f"  {count:,} {reason} (ids {', '.join(map(str, report.examples[reason][:5]))} ...)")
    if record["turns_of_unknown_regions"]:
        say(f"  {record['turns_of_unknown_regions']:,} questions on a region that is not there, left out")
    root = Path(os.path.realpath(args.source)).parent if args.kind == "jsonl" else args.source
    index = RegionIndex(args.out or args.source, root=root)
    missing_of = {split: index.missing_pictures(split) for split in record["splits"]}
    for split, regions in record["splits"].items():
        pictures, missing = int((index.split_of_picture == split).sum()), missing_of[split]
        line = f"split {split}: {regions:,} regions on {pictures:,} pictures"
        say(line + (f", {sum(missing.values()):,} of them missing (first: {next(iter(missing))})" if missing else ""))
    if any(missing_of.values()):
        say(f"missing pictures are published as {PICTURES[args.kind]}")
    say(f"index: {index.folder} ({sum(f.stat().st_size for f in index.folder.iterdir()) / 1e6:.0f} MB)")


def print_overlap(where: str, train: set, held_out: set) -> None:
    """How many training images are held out elsewhere, and the first of them."""
    shared = sorted(train & held_out)
    first = f" (first: {', '.join(f'{kind} {number}' for kind, number in shared[:3])})" if shared else ""
    say(f"training images in {where}: {len(shared):,}{first}")


def images_of(source: Path, index: Path | None = None) -> Images:
    """The images of a data set's folder, of an indexed .jsonl, or of LLaVA's JSON of conversations.

    Args:
        source: The folder or file.
        index: Where the folder's index lies, if not in it.

    Raises:
        ValueError: If it is none of them.
    """
    if source.is_file() and source.suffix != ".jsonl":
        return Images(_images_of_llava(source), set())
    if (source / "image_data.json").exists():
        return _images_of_visual_genome(source)
    if index_folder(index or source) is None:
        raise ValueError(
            f"expected a folder of Visual Genome, an indexed one of another layout, or LLaVA's JSON, got {source}"
        )
    images, found = Images(set(), set()), RegionIndex(index or source)
    of_coco = any(source.glob("refs(*).p"))
    for picture in found.pictures:
        if of_coco:
            name = "coco", int(picture["image_id"])
        else:
            file = os.path.realpath(found.root / picture["image"])
            name = _name(picture["image"]) or ("file", "!".join(filter(None, (file, picture["member"]))))
        (images.train if picture["split"] == TRAIN else images.held_out).add(name)
    return images


def _images_of_visual_genome(source: Path) -> Images:
    """Each image under Visual Genome's number, and COCO's where it is one of COCO's."""
    split_of = prepare.split_of_images(source)
    images = Images(set(), set())
    for entry in stream_json(source / "image_data.json"):
        if not isinstance(entry, dict) or type(number := entry.get("image_id", entry.get("id"))) is not int:
            continue  # left out of the index too, and counted there
        if (split := split_of(number)) == prepare.UNLISTED:
            continue
        side = images.train if split == TRAIN else images.held_out
        side.add(("vg", number))
        if type(entry.get("coco_id")) is int:
            side.add(("coco", entry["coco_id"]))
    return images


def _images_of_llava(path: Path) -> set:
    """The images of a JSON list of {"image": "vg/VG_100K/1.jpg" or "coco/train2017/000000000009.jpg", ...}."""
    images = set()
    for entry in stream_json(path):
        image = entry.get("image") if isinstance(entry, dict) else None
        if name := _name(image if isinstance(image, str) else ""):
            images.add(name)
    return images


def _name(path: str) -> tuple[str, int] | None:
    """What a picture is called in COCO or Visual Genome, where its path shows it."""
    if coco := _COCO.search(path):
        return "coco", int(coco[1])
    if "VG_100K" in path and Path(path).stem.isdecimal():
        return "vg", int(Path(path).stem)
    return None


# beside RefCOCOg's, which takes whose split it is
_INDEX = {
    "vg": prepare.index_visual_genome,
    "grit": prepare.index_grit,
    "jsonl": prepare.index_jsonl,
    "mask-imagenet": prepare.index_mask_imagenet,
}
