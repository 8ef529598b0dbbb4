"""Readers of the tasks' data (`eval.tasks`), with errors that explain what a folder lacks."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from alpha_clip_commands.task_names import VG_SAMPLE
from mllm.data.densecap_splits import densecap_split
from mllm.data.readers import coco, jsonl, refcocog, refcocog_parquet, visual_genome
from mllm.data.samples import RegionSample
from mllm.data.shapes import scenes

logger = logging.getLogger(__name__)

# (data folder, "box" or "mask") -> samples
Reader = Callable[[Path, str], Iterable[RegionSample]]

COPIED = ("refcocog", "umd", "val")
# Copies of this split with an image entry per expression, by MDETR, Osprey and GLaMM
JSON_COPIES = (
    "finetune_refcocog_val.json",
    "finetune_refcocog_val_with_mask.json",
    "finetune_refcocog_val_captions.json",
)


def refer(data_set: str, split_by: str, split: str, *, grouped: bool) -> Reader:
    """A reader of a split of RefCOCO, RefCOCO+ or RefCOCOg in the layout of lichengunc/refer, or of a copy of it."""

    def read(data: Path, form: str) -> Iterable[RegionSample]:
        copies = [data / name for name in JSON_COPIES if (data_set, split_by, split) == COPIED]
        copy = next((file for file in copies if file.is_file()), None)
        if copy is not None and not (data / f"refs({split_by}).p").exists():
            return coco.read_coco(copy, data, grouped=grouped, region_type=form)
        return refcocog.read_refcocog(data, split_by=split_by, split=split, grouped=grouped, region_type=form)

    return read


def vg_sample(name: str, count: int, seed: int) -> Reader:
    """A reader of a random sample of the regions of Visual Genome's test images."""

    def read(data: Path, form: str) -> Iterable[RegionSample]:
        regions = _of_test_images(visual_genome.read_regions, "vg/own", data, form)
        samples = sorted(regions, key=lambda sample: sample.meta["region_id"])
        if len(samples) < count:
            raise ValueError(f"{name}: expected at least {count} regions of test images in {data}, got {len(samples)}")
        return random.Random(seed).sample(samples, count)

    return read


def grit(file: str) -> Reader:
    """A reader of a file in GRiT's or GLaMM's layout."""

    def read(data: Path, form: str) -> Iterable[RegionSample]:
        if not (data / file).exists() and (data / "region_descriptions.json").exists():
            raise ValueError(
                f"{data / file} is missing; the folder has the original files of Visual Genome, which the tasks "
                f"vg/own and {VG_SAMPLE} read"
            )
        return coco.read_coco(data / file, data, region_type=form)

    return read


def _of_test_images(read: Callable, own: str, data: Path, form: str) -> Iterator[RegionSample]:
    """The samples of Visual Genome's test images; `own` is the task for images of all splits.

    Raises:
        ValueError: If there are none, with the reason; and as `read`.
    """
    split, empty = densecap_split("test"), True
    for sample in read(data, image_ids=split, region_type=form):
        empty = False
        yield sample
    if empty:
        listed = visual_genome.read_image_paths(data)
        of_split = len(split & listed.keys())
        raise ValueError(
            f"none of the {len(listed):,} images in {data / 'image_data.json'} is one of DenseCap's "
            f"{len(split):,} test images; --task {own} evaluates all images of the folder, of any split"
            if not of_split
            else f"{data} lists {of_split:,} of DenseCap's {len(split):,} test images, but no samples for them; are "
            "the files complete?"
        )


def _of_own_images(read: Callable, data: Path, form: str) -> Iterator[RegionSample]:
    """The samples of all images that are found in a folder of Visual Genome's layout, of any split.

    Raises:
        ValueError: If there are none, with the reason; and as `read`.
    """
    files = visual_genome.read_image_paths(data)
    found = {image_id for image_id, file in files.items() if os.path.exists(file)}
    if not found:
        raise ValueError(
            f"{data / 'image_data.json'} lists {len(files):,} images, but none of them is found in {data} (in VG_100K, "
            "VG_100K_2, images, or the folder itself)"
        )
    if len(found) < len(files):
        logger.warning(
            "%s: %d of %d images are not in the folder and were skipped", data, len(files) - len(found), len(files)
        )
    return read(data, image_ids=found, region_type=form)


def vg_questions(data: Path, form: str) -> Iterable[RegionSample]:
    """Questions on regions of Visual Genome's test images."""
    return _of_test_images(visual_genome.read_region_questions, "vg-regionqa/own", data, form)


def vg_own(data: Path, form: str) -> Iterable[RegionSample]:
    """Regions of all images of a folder."""
    return _of_own_images(visual_genome.read_regions, data, form)


def vg_own_questions(data: Path, form: str) -> Iterable[RegionSample]:
    """Questions on regions of all images of a folder."""
    return _of_own_images(visual_genome.read_region_questions, data, form)


def hub_rows(data: Path, form: str) -> Iterable[RegionSample]:
    """Rows of the Hub's parquet files."""
    return refcocog_parquet.read_refcocog_parquet(data)


def shapes_captions(data: Path, form: str, split: str = "test") -> Iterable[RegionSample]:
    """Descriptions of a split of Shapes."""
    scenes.expect_split(data, split)
    return scenes.with_same_class(visual_genome.read_regions(data, region_type=form), data)


def shapes_novel(data: Path, form: str) -> Iterable[RegionSample]:
    """Descriptions of the unseen pairs of Shapes."""
    return shapes_captions(data, form, "novel")


def shapes_questions(data: Path, form: str) -> Iterable[RegionSample]:
    """Questions of the test split of Shapes."""
    scenes.expect_split(data, "test")
    return scenes.with_same_class(visual_genome.read_region_questions(data, region_type=form), data)


def jsonl_lines(data: Path, form: str) -> Iterable[RegionSample]:
    """Lines of a JSONL file."""
    return jsonl.read_jsonl(data)
