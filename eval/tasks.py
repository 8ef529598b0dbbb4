"""The protocols by name: which samples, which references, what is asked. Two protocols are never mixed.

Why there are so many: the same predictions give METEOR 18.8 or 28.5 on RefCOCOg's validation split, depending only on
whether the expressions of a region are separate items or references of one (docs/evaluation.md).
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from alpha_clip_commands.evaluation import VG_SAMPLE, check_task
from eval.metrics import similarity
from mllm.data import coco, jsonl, refcocog, shapes, visual_genome
from mllm.data.samples import RegionSample
from mllm.data.splits import densecap_split

logger = logging.getLogger(__name__)

CAPTION_METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
QUESTION_METRICS = ("exact match", "contains", "token F1")
# LLaVA-1.5's own prompt for short answers: haotian-liu/LLaVA, docs/Evaluation.md at c121f04
SHORT_ANSWER = "{question}\nAnswer the question using a single word or phrase."
_VG_IMAGES = "images in VG_100K and VG_100K_2"
_VG_OWN_FILES = (
    "region_descriptions.json and image_data.json in Visual Genome's format; images of any split in VG_100K, "
    "VG_100K_2, images or the folder itself (regions of images that are not there are left out)"
)
_VG_OWN_QUESTIONS = _VG_OWN_FILES.replace(" and", ", question_answers.json, qa_to_region_mapping.json and", 1)
_VG_FILES = f"Visual Genome's region_descriptions.json and image_data.json, {_VG_IMAGES}"
_REFER_FILES = "{}, instances.json, images in train2014"
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
        kind: "caption", "question", or "either" where the samples decide.
        read: Gives its samples.
        files: What the data folder holds.
        about: What is scored, in a few words.
        references: How many right answers an item has, and where they come from.
        items: How many samples there must be; None where the data decides.
        item: What one is: "expression", "region", "question".
        prompt: What is asked (see `eval.generate.Settings`); None leaves it to the model.
        max_new_tokens: Longest answer, in tokens.
        metrics: Names of `eval.metrics`; none where the samples decide (see `metrics_for`).
        region_input: The only input that the protocol allows, or None.
        comparable: Published numbers may stand beside it.
        verified: Its reader has read a record published by its authors; None for this project's own formats.
        family: What it is listed as, with the other tasks that are listed so; None for a line of its own.
    """

    name: str
    kind: str
    read: Reader
    files: str
    about: str
    references: str
    items: int | None = None
    item: str = "region"
    prompt: str | None = None
    max_new_tokens: int = 64
    metrics: tuple[str, ...] = CAPTION_METRICS
    region_input: str | None = None
    comparable: bool = False
    verified: bool | None = False
    family: str | None = None

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
        ValueError: If there is none; names like it are in the message.
    """
    sample = check_task(name)
    return TASKS[name] if sample is None else _vg_sample(name, *sample)


def metrics_for(
    questions: Sequence[str | None],
    task: Task | None = None,
    named: Sequence[str] = (),
    sentence_model: str | None = None,
) -> tuple[str, ...]:
    """The metrics that are named, or those of the task, or those of the kind of the samples: VQA's for questions, the
    captions' for descriptions. A sentence model adds those of its kind.

    Args:
        questions: The question of each sample, None for a description.
        task: The protocol, or None where it is unknown.
        named: Names that the user gave.
        sentence_model: Directory of a sentence-transformers model, or None.

    Raises:
        ValueError: If the samples decide, and some are questions while others are descriptions.
    """
    names = tuple(named) or (task.metrics if task else ())
    if not names:
        asked = sum(bool(question and question.strip()) for question in questions)
        if asked not in (0, len(questions)):
            raise ValueError(
                f"{asked} of {len(questions)} samples are questions, the others descriptions, which no metric fits "
                "alike: make a file of each, or name the --metrics for all of them"
            )
        names = QUESTION_METRICS if asked else CAPTION_METRICS
    return names + tuple(name for name in similarity.METRICS if sentence_model and name not in names)


def _refer_task(data_set: str, split_by: str, split: str, grouped: bool, items: int | None = None) -> Task:
    """A split of RefCOCO, RefCOCO+ or RefCOCOg in the layout of lichengunc/refer."""
    title = data_set.replace("refcoco", "RefCOCO")
    item = "region" if grouped else "expression"
    splits = {"unc": f"{title}; SPLIT: val, testA or testB", "google": f"{title}, Google's split, by {item}"}

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
        about=splits.get(split_by, f"{title}, an item per {item}"),
        references="all expressions of the region" if grouped else "1: each expression is an item of its own",
        items=items,
        item=item,
        comparable=data_set == "refcocog",
        family=f"{data_set}-unc-SPLIT/[un]grouped" if split_by == "unc" else None,
    )


def _vg_sample(name: str, count: int, seed: int) -> Task:
    """An own sample of Visual Genome's test images: comparable with nothing but itself."""

    def read(data: Path, form: str) -> Iterable[RegionSample]:
        regions = _of_test_images(visual_genome.read_regions, "vg/own", data, form)
        samples = sorted(regions, key=lambda sample: sample.meta["region_id"])
        if len(samples) < count:
            raise ValueError(f"{name}: expected at least {count} regions of test images in {data}, got {len(samples)}")
        return random.Random(seed).sample(samples, count)

    return Task(name, "caption", read, _VG_FILES, "Visual Genome, N test regions", "1", count, verified=True)


def _grit(file: str) -> Reader:
    def read(data: Path, form: str) -> Iterable[RegionSample]:
        if not (data / file).exists() and (data / "region_descriptions.json").exists():
            raise ValueError(
                f"{data / file} is missing; the folder holds Visual Genome's own files, which the tasks vg/own and "
                f"{VG_SAMPLE} read"
            )
        return coco.read_captions(data / file, data, region_input=form)

    return read


def _of_test_images(read: Callable, own: str, data: Path, form: str) -> Iterator[RegionSample]:
    """The samples of Visual Genome's test images; `own` is the task that reads those of the other images too.

    Raises:
        ValueError: If there is none, with the reason; and as `read`.
    """
    split, empty = densecap_split("test"), True
    for sample in read(data, image_ids=split, region_input=form):
        empty = False
        yield sample
    if empty:
        listed = visual_genome.read_image_files(data)
        of_split = len(split & listed.keys())
        raise ValueError(
            f"none of the {len(listed):,} images in {data / 'image_data.json'} is one of DenseCap's "
            f"{len(split):,} test images; --task {own} evaluates the folder's own images, whatever their split"
            if not of_split
            else f"{data} lists {of_split:,} of DenseCap's {len(split):,} test images, but nothing that can be asked "
            "about them: are the files complete?"
        )


def _of_own_images(read: Callable, data: Path, form: str) -> Iterator[RegionSample]:
    """The samples of the images whose files are in a folder of Visual Genome's layout, whatever their split.

    Raises:
        ValueError: If there is none, with the reason; and as `read`.
    """
    files = visual_genome.read_image_files(data)
    there = {image_id for image_id, file in files.items() if os.path.exists(file)}
    if not there:
        raise ValueError(
            f"{data / 'image_data.json'} lists {len(files):,} images, none of whose files is in {data} (in VG_100K, "
            "VG_100K_2, images, or beside it)"
        )
    if len(there) < len(files):
        logger.warning("%s: %d of %d images are not in the folder, left out", data, len(files) - len(there), len(files))
    return read(data, image_ids=there, region_input=form)


def _vg_questions(data: Path, form: str) -> Iterable[RegionSample]:
    return _of_test_images(visual_genome.read_region_questions, "vg-regionqa/own", data, form)


def _vg_own(data: Path, form: str) -> Iterable[RegionSample]:
    return _of_own_images(visual_genome.read_regions, data, form)


def _vg_own_questions(data: Path, form: str) -> Iterable[RegionSample]:
    return _of_own_images(visual_genome.read_region_questions, data, form)


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
_VG_REGIONQA = Task(
    "vg-regionqa/densecap-test",
    "question",
    _vg_questions,
    f"Visual Genome's image_data, region_descriptions, question_answers and qa_to_region_mapping .json, {_VG_IMAGES}",
    "Visual Genome, test images' questions",
    "1",
    item="question",
    prompt=SHORT_ANSWER,
    max_new_tokens=32,
    metrics=QUESTION_METRICS,
)
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
        "RefCOCOg by lmms-eval, with a red box",
        "all answers of the row",
        7573,
        prompt="Provide a short description for this region.",
        region_input="red-box",
    ),
    Task(
        "vg-test/subset5k",
        "caption",
        _grit("test_caption.json"),
        f"GLaMM's test_caption.json, {_VG_IMAGES}",
        "Visual Genome, GLaMM's 5,000 regions",
        "1",
        5000,
        comparable=True,
    ),
    Task(
        "vg-test/full",
        "caption",
        _grit("test.json"),
        f"GRiT's test.json, {_VG_IMAGES}",
        "Visual Genome, GRiT's test regions",
        "1",
        232_935,
        comparable=True,
    ),
    _VG_REGIONQA,
    Task("vg/own", "caption", _vg_own, _VG_OWN_FILES, "Visual Genome's layout, your images", "1", verified=True),
    dataclasses.replace(
        _VG_REGIONQA,
        name="vg-regionqa/own",
        read=_vg_own_questions,
        files=_VG_OWN_QUESTIONS,
        about="Visual Genome's layout, your questions",
    ),
    Task(
        "shapes-caption",
        "caption",
        _shapes,
        _SHAPES_FILES.format("test"),
        "drawn scenes, descriptions",
        "1",
        metrics=_SHAPES_METRICS,
        verified=None,
    ),
    Task(
        "shapes-novel",
        "caption",
        _shapes_novel,
        _SHAPES_FILES.format("novel"),
        "drawn scenes, unseen pairs",
        "1",
        metrics=_SHAPES_METRICS,
        verified=None,
    ),
    Task(
        "shapes-vqa",
        "question",
        _shapes_questions,
        _SHAPES_FILES.format("test"),
        "drawn scenes, questions",
        "1",
        item="question",
        max_new_tokens=32,
        metrics=("exactly right", *QUESTION_METRICS),
        verified=None,
    ),
    Task(
        "jsonl",
        "either",
        _jsonl,
        "a JSONL file of {image, region, question, answer} lines; without questions they ask for descriptions",
        "your file: descriptions or questions",
        "as many as the line has",
        item="line",
        metrics=(),
        verified=None,
    ),
)
TASKS = {task.name: task for task in _TASKS}
