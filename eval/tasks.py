"""The tasks: protocols that define samples, references, prompt and metrics. Their results are not comparable.

The same predictions have METEOR 18.8 or 28.5 on RefCOCOg's validation split, depending on whether the expressions of a
region are separate items or references of one item (docs/evaluation.md).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from alpha_clip_commands.task_names import check_task
from eval import task_samples
from eval.metrics import captions, similarity
from mllm.data.samples import RegionSample
from mllm.data.templates import SHORT_ANSWER

CAPTION_METRICS = captions.METRICS
QUESTION_METRICS = ("exact_match", "contains", "token_f1")
# LLaVA-1.5's prompt for short answers: haotian-liu/LLaVA, docs/Evaluation.md at c121f04
SHORT_ANSWER_PROMPT = f"{{question}}\n{SHORT_ANSWER}"
_VG_IMAGES = "images in VG_100K and VG_100K_2"
_OWN_VG_FILES = (
    "region_descriptions.json and image_data.json in Visual Genome's format; images of any split in VG_100K, "
    "VG_100K_2, images or the folder itself (regions of images that are not found are skipped)"
)
_OWN_VG_QUESTIONS = _OWN_VG_FILES.replace(" and", ", question_answers.json, qa_to_region_mapping.json and", 1)
_VG_FILES = f"Visual Genome's region_descriptions.json and image_data.json, {_VG_IMAGES}"
_REFER_FILES = "{}, instances.json, images in train2014"


@dataclasses.dataclass(frozen=True)
class Task:
    """A protocol.

    Attributes:
        name: Of the protocol.
        kind: "caption", "question", or "either" if it depends on the samples.
        read: Reads its samples.
        files: The required content of the data folder.
        about: A short description of what is scored.
        references: How many references an item has, and where they come from.
        items: Required number of samples; None if it depends on the data.
        item: What an item is: "expression", "region", "question" or "line".
        prompt: See `eval.generate.GenerationSettings`; None for the model's default.
        max_new_tokens: Maximum length of an answer, in tokens.
        metrics: Ids; empty if they depend on the samples (see `metrics_for`).
        view: The only view that the protocol allows, or None.
        comparable: Whether published results are comparable.
        verified: Whether its reader was tested on a record published by the authors; None for formats of this project.
        family: The name under which several tasks are listed together; None for a separate line.
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
    view: str | None = None
    comparable: bool = False
    verified: bool | None = False
    family: str | None = None

    def samples(self, data: Path, form: str, limit: int | None = None) -> list[RegionSample]:
        """Read the samples in the order of the data; `form` is "box" or "mask", `limit` the maximum number.

        Raises:
            ValueError: If files are missing or damaged, or the number of samples is not that of the protocol.
        """
        samples = list(itertools.islice(self.read(data, form), limit))
        if not samples:
            raise ValueError(f"{self.name}: no samples in {data}; expected {self.files}")
        if limit is None and self.items not in (None, len(samples)):
            raise ValueError(
                f"{self.name} has {self.items:,} items, but {data} has {len(samples):,}, so results would not be "
                f"comparable. Expected {self.files}; use --limit to evaluate a part"
            )
        return samples


def find(name: str) -> Task:
    """The task with a name, from `TASKS` or of the form "vg-test/sample-N-seed-S".

    Raises:
        ValueError: If the task is unknown; the message suggests similar names.
    """
    sample = check_task(name)
    return TASKS[name] if sample is None else _vg_sample(name, *sample)


def metrics_for(
    questions: Sequence[str | None],
    task: Task | None = None,
    named: Sequence[str] = (),
    sentence_model: str | None = None,
) -> tuple[str, ...]:
    """The given metrics, else those of the task, else those for questions or descriptions, depending on the samples.

    A sentence model adds the metrics of `eval.metrics.similarity`.

    Args:
        questions: The question of each sample, None for a description.
        task: The protocol, or None if unknown.
        named: Ids given by the user.
        sentence_model: Directory of a sentence-transformers model, or None.

    Raises:
        ValueError: If neither user nor task define metrics, and the samples are questions and descriptions.
    """
    names = tuple(named) or (task.metrics if task else ())
    if not names:
        asked = sum(bool(question and question.strip()) for question in questions)
        if asked not in (0, len(questions)):
            raise ValueError(
                f"{asked} of {len(questions)} samples are questions, the others descriptions, and no default metrics "
                "suit both: use two files, or specify --metrics for all of them"
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
        references="all expressions of the region" if grouped else "1: each expression is a separate item",
        items=items,
        item=item,
        comparable=data_set == "refcocog",
        family=f"{data_set}-unc-SPLIT/[un]grouped" if split_by == "unc" else None,
    )


def _vg_sample(name: str, count: int, seed: int) -> Task:
    """A random sample of the regions of Visual Genome's test images; not comparable with published results."""
    read = task_samples.vg_sample(name, count, seed)
    return Task(name, "caption", read, _VG_FILES, "Visual Genome, N test regions", "1", count, verified=True)


_SHAPES_FILES = "the output of `alpha-clip shapes --out DIR --images N --seed S --split {}`"
_SHAPES_METRICS = ("literal_match", *CAPTION_METRICS)
_VG_REGIONQA = Task(
    "vg-regionqa/densecap-test",
    "question",
    task_samples.vg_questions,
    f"Visual Genome's image_data, region_descriptions, question_answers and qa_to_region_mapping .json, {_VG_IMAGES}",
    "Visual Genome, test images' questions",
    "1",
    item="question",
    prompt=SHORT_ANSWER_PROMPT,
    max_new_tokens=32,
    metrics=QUESTION_METRICS,
)
_TASKS = (
    _refer_task("refcocog", "umd", "val", False, 4896),
    _refer_task("refcocog", "umd", "val", True, 2573),
    _refer_task("refcocog", "umd", "test", False),  # 9,602 according to a secondary source, so not enforced
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
        view="red_box",
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
        _OWN_VG_FILES,
        "Visual Genome's layout, your images",
        "1",
        verified=True,
    ),
    dataclasses.replace(
        _VG_REGIONQA,
        name="vg-regionqa/own",
        read=task_samples.vg_own_questions,
        files=_OWN_VG_QUESTIONS,
        about="Visual Genome's layout, your questions",
    ),
    Task(
        "shapes-caption",
        "caption",
        task_samples.shapes_captions,
        _SHAPES_FILES.format("test"),
        "synthetic scenes, descriptions",
        "1",
        metrics=_SHAPES_METRICS,
        verified=None,
    ),
    Task(
        "shapes-novel",
        "caption",
        task_samples.shapes_novel,
        _SHAPES_FILES.format("novel"),
        "synthetic scenes, unseen pairs",
        "1",
        metrics=_SHAPES_METRICS,
        verified=None,
    ),
    Task(
        "shapes-vqa",
        "question",
        task_samples.shapes_questions,
        _SHAPES_FILES.format("test"),
        "synthetic scenes, questions",
        "1",
        item="question",
        max_new_tokens=32,
        metrics=("literal_match", *QUESTION_METRICS),
        verified=None,
    ),
    Task(
        "jsonl",
        "either",
        task_samples.jsonl_lines,
        "a JSONL file of {image, region, question, answer} lines; a description is requested without a question",
        "your file: descriptions or questions",
        "all of the line",
        item="line",
        metrics=(),
        verified=None,
    ),
)
TASKS = {task.name: task for task in _TASKS}
