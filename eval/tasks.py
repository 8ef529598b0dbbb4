"""The protocols by name: which samples, which references, what is asked. Two protocols are never mixed.

Why there are so many: the same predictions give METEOR 18.8 or 28.5 on RefCOCOg's validation split, depending only on
whether the expressions of a region are separate items or references of one (docs/evaluation.md).
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from mllm.data import coco, jsonl, refcocog, shapes, visual_genome
from mllm.data.samples import RegionSample
from mllm.data.splits import densecap_split

CAPTION_METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
QUESTION_METRICS = ("exact match", "contains", "token F1")
# LLaVA-1.5's own prompt for short answers: haotian-liu/LLaVA, docs/Evaluation.md at c121f04
SHORT_ANSWER = "{question}\nAnswer the question using a single word or phrase."
_VG_FILES = "Visual Genome's region_descriptions.json and image_data.json, pictures in VG_100K and VG_100K_2"
_REFER_FILES = "{}, instances.json, pictures in train2014"
# Copies of RefCOCOg's umd val with an image entry for each expression: MDETR's, Osprey's, GLaMM's
_JSON_COPIES = (
    "finetune_refcocog_val.json",
    "finetune_refcocog_val_with_mask.json",
    "finetune_refcocog_val_captions.json",
)

# (data folder, "box" or "mask") -> samples
Reader = Callable[[Path, str], Iterable[RegionSample]]


@dataclasses.dataclass(frozen=True)
class Task:
    """A protocol.

    Attributes:
        name: What a number made by it is called.
        kind: "caption" or "question".
        read: Gives its samples.
        files: What the data folder holds.
        references: How many right answers an item has, and where they come from.
        items: How many samples there must be; None where the data decides.
        item: What one is: "expression", "region", "question".
        prompt: What is asked (see `eval.generate.Settings`); None leaves it to the model.
        max_new_tokens: Longest answer, in tokens.
        metrics: Names of `eval.metrics`.
        region_input: The only input that the protocol allows, or None.
        comparable: Published numbers may stand beside it.
        verified: Its reader has read a record published by its authors.
    """

    name: str
    kind: str
    read: Reader
    files: str
    references: str
    items: int | None = None
    item: str = "region"
    prompt: str | None = None
    max_new_tokens: int = 64
    metrics: tuple[str, ...] = CAPTION_METRICS
    region_input: str | None = None
    comparable: bool = False
    verified: bool = False

    def samples(self, data: Path, form: str, limit: int | None = None) -> list[RegionSample]:
        """The samples, in the order of the data; `form` is "box" or "mask", `limit` takes the first ones.

        Raises:
            ValueError: If files are missing or damaged, or there are not as many samples as the protocol has.
        """
        samples = list(itertools.islice(self.read(data, form), limit))
        if not samples:
            raise ValueError(f"{self.name}: {data} holds no sample; expected {self.files}")
        if limit is None and self.items not in (None, len(samples)):
            raise ValueError(
                f"{self.name} has {self.items:,} items, {data} gives {len(samples):,}: a number on them could not be "
                f"compared. Expected {self.files}; part of it may be evaluated with --limit"
            )
        return samples


def find(name: str) -> Task:
    """The task of a name, of `TASKS` or "vg-test/sample-N-seed-S".

    Raises:
        ValueError: If there is none.
    """
    if match := re.fullmatch(r"vg-test/sample-(\d+)-seed-(\d+)", name):
        return _vg_sample(name, int(match[1]), int(match[2]))
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; expected one out of {', '.join(TASKS)}, vg-test/sample-N-seed-S")
    return TASKS[name]


def _refer_task(data_set: str, split_by: str, split: str, grouped: bool, items: int | None = None) -> Task:
    """A split of RefCOCO, RefCOCO+ or RefCOCOg in the layout of lichengunc/refer."""

    def read(data: Path, form: str) -> Iterable[RegionSample]:
        copies = [data / name for name in _JSON_COPIES if (data_set, split_by, split) == ("refcocog", "umd", "val")]
        copy = next((file for file in copies if file.is_file()), None)
        if copy is not None and not (data / f"refs({split_by}).p").exists():
            return coco.read_captions(copy, data, grouped=grouped, region_input=form)
        return refcocog.read_refs(data, split_by=split_by, split=split, grouped=grouped, region_input=form)

    return Task(
        name=f"{data_set}-{split_by}-{split}/{'grouped' if grouped else 'ungrouped'}",
        kind="caption",
        read=read,
        files=_REFER_FILES.format(f"refs({split_by}).p")
        + (
            f" (or one of {', '.join(_JSON_COPIES)})"
            if (data_set, split_by, split) == ("refcocog", "umd", "val")
            else ""
        ),
        references="all expressions of the region" if grouped else "1: each expression is an item of its own",
        items=items,
        item="region" if grouped else "expression",
        comparable=data_set == "refcocog",
    )


def _vg_sample(name: str, count: int, seed: int) -> Task:
    """An own sample of Visual Genome's test images: comparable with nothing but itself."""

    def read(data: Path, form: str) -> Iterable[RegionSample]:
        regions = visual_genome.read_regions(data, image_ids=densecap_split("test"), region_input=form)
        samples = sorted(regions, key=lambda sample: sample.meta["region_id"])
        if len(samples) < count:
            raise ValueError(f"{name}: expected at least {count} regions of test images in {data}, got {len(samples)}")
        return random.Random(seed).sample(samples, count)

    return Task(name, "caption", read, _VG_FILES, "1", count, verified=True)


def _grit(file: str) -> Reader:
    def read(data: Path, form: str) -> Iterable[RegionSample]:
        return coco.read_captions(data / file, data, region_input=form)

    return read


def _vg_questions(data: Path, form: str) -> Iterable[RegionSample]:
    return visual_genome.read_region_questions(data, image_ids=densecap_split("test"), region_input=form)


def _hub_rows(data: Path, form: str) -> Iterable[RegionSample]:
    return refcocog.read_hub_rows(data)


def _shapes(data: Path, form: str, split: str = "test") -> Iterable[RegionSample]:
    shapes.expect_split(data, split)
    return shapes.with_same_class(visual_genome.read_regions(data, region_input=form), data)


def _shapes_novel(data: Path, form: str) -> Iterable[RegionSample]:
    return _shapes(data, form, "novel")


def _shapes_questions(data: Path, form: str) -> Iterable[RegionSample]:
    shapes.expect_split(data, "test")
    return shapes.with_same_class(visual_genome.read_region_questions(data, region_input=form), data)


def _jsonl(data: Path, form: str) -> Iterable[RegionSample]:
    return jsonl.read_jsonl(data)


_SHAPES_FILES = "what `alpha-clip shapes --out DIR --images N --seed S --split {}` writes"
_SHAPES_METRICS = ("exactly right", *CAPTION_METRICS)
_TASKS = (
    _refer_task("refcocog", "umd", "val", False, 4896),
    _refer_task("refcocog", "umd", "val", True, 2573),
    _refer_task("refcocog", "umd", "test", False),  # 9,602 by a secondary source: not enforced
    _refer_task("refcocog", "umd", "test", True, 5023),
    _refer_task("refcocog", "google", "val", True, 5000),
    *(
        _refer_task(data_set, "unc", split, grouped)
        for data_set in ("refcoco", "refcoco+")
        for split in ("val", "testA", "testB")
        for grouped in (False, True)
    ),
    Task(
        "refcocog-lmms-eval",
        "caption",
        _hub_rows,
        "the parquet files of the Hub's lmms-lab-encoder/RefCOCOg, split val",
        "all answers of the row",
        7573,
        prompt="Provide a short description for this region.",
        region_input="red-box",
    ),
    Task(
        "vg-test/subset5k",
        "caption",
        _grit("test_caption.json"),
        "GLaMM's test_caption.json",
        "1",
        5000,
        comparable=True,
    ),
    Task("vg-test/full", "caption", _grit("test.json"), "GRiT's test.json", "1", 232_935, comparable=True),
    Task(
        "vg-regionqa/densecap-test",
        "question",
        _vg_questions,
        "Visual Genome's image_data, region_descriptions, question_answers and qa_to_region_mapping .json, pictures",
        "1",
        item="question",
        prompt=SHORT_ANSWER,
        max_new_tokens=32,
        metrics=QUESTION_METRICS,
    ),
    Task(
        "shapes-caption", "caption", _shapes, _SHAPES_FILES.format("test"), "1", metrics=_SHAPES_METRICS, verified=True
    ),
    Task(
        "shapes-novel",
        "caption",
        _shapes_novel,
        _SHAPES_FILES.format("novel"),
        "1",
        metrics=_SHAPES_METRICS,
        verified=True,
    ),
    Task(
        "shapes-vqa",
        "question",
        _shapes_questions,
        _SHAPES_FILES.format("test"),
        "1",
        item="question",
        max_new_tokens=32,
        metrics=("exactly right", *QUESTION_METRICS),
        verified=True,
    ),
    Task(
        "jsonl",
        "caption",
        _jsonl,
        "a JSONL file of {image, region, question, answer} lines",
        "as many as the line has",
        item="line",
        verified=True,
    ),
)
TASKS = {task.name: task for task in _TASKS}
