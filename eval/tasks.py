"""The protocols by name: which samples, which references, what is asked. Two protocols are never mixed.

Why there are so many: the same predictions give METEOR 18.8 or 28.5 on RefCOCOg's validation split, depending only on
whether the expressions of a region are separate items or references of one (docs/evaluation.md).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from alpha_clip_commands.task_names import check_task
from eval import task_samples
from eval.metrics import similarity
from mllm.data.samples import RegionSample

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
    read: task_samples.Reader
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

    return Task(
        name=f"{data_set}-{split_by}-{split}/{'grouped' if grouped else 'ungrouped'}",
        kind="caption",
        read=task_samples.refer(data_set, split_by, split, grouped=grouped),
        files=_REFER_FILES.format(f"refs({split_by}).p")
        + (
            f" (or one of {', '.join(task_samples.JSON_COPIES)})"
            if (data_set, split_by, split) == task_samples.COPIED
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
    read = task_samples.vg_sample(name, count, seed)
    return Task(name, "caption", read, _VG_FILES, "Visual Genome, N test regions", "1", count, verified=True)


_SHAPES_FILES = "what `alpha-clip shapes --out DIR --images N --seed S --split {}` writes"
_SHAPES_METRICS = ("exactly right", *CAPTION_METRICS)
_VG_REGIONQA = Task(
    "vg-regionqa/densecap-test",
    "question",
    task_samples.vg_questions,
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
        task_samples.hub_rows,
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
        task_samples.grit("test_caption.json"),
        f"GLaMM's test_caption.json, {_VG_IMAGES}",
        "Visual Genome, GLaMM's 5,000 regions",
        "1",
        5000,
        comparable=True,
    ),
    Task(
        "vg-test/full",
        "caption",
        task_samples.grit("test.json"),
        f"GRiT's test.json, {_VG_IMAGES}",
        "Visual Genome, GRiT's test regions",
        "1",
        232_935,
        comparable=True,
    ),
    _VG_REGIONQA,
    Task(
        "vg/own",
        "caption",
        task_samples.vg_own,
        _VG_OWN_FILES,
        "Visual Genome's layout, your images",
        "1",
        verified=True,
    ),
    dataclasses.replace(
        _VG_REGIONQA,
        name="vg-regionqa/own",
        read=task_samples.vg_own_questions,
        files=_VG_OWN_QUESTIONS,
        about="Visual Genome's layout, your questions",
    ),
    Task(
        "shapes-caption",
        "caption",
        task_samples.shapes_captions,
        _SHAPES_FILES.format("test"),
        "drawn scenes, descriptions",
        "1",
        metrics=_SHAPES_METRICS,
        verified=None,
    ),
    Task(
        "shapes-novel",
        "caption",
        task_samples.shapes_novel,
        _SHAPES_FILES.format("novel"),
        "drawn scenes, unseen pairs",
        "1",
        metrics=_SHAPES_METRICS,
        verified=None,
    ),
    Task(
        "shapes-vqa",
        "question",
        task_samples.shapes_questions,
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
        task_samples.jsonl_lines,
        "a JSONL file of {image, region, question, answer} lines; without questions they ask for descriptions",
        "your file: descriptions or questions",
        "as many as the line has",
        item="line",
        metrics=(),
        verified=None,
    ),
)
TASKS = {task.name: task for task in _TASKS}
