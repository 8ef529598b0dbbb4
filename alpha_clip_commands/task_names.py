"""Names of tasks, metrics and views, which help and errors show before torch is imported."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence

from alpha_clip_commands.source_values import constant

INPUTS = tuple(constant("eval/views.py", "INPUTS"))
VG_SAMPLE = "vg-test/sample-N-seed-S"  # a name with two numbers of one's own
_NEAR = 5  # names in a message
TASKS = (  # the names of `eval.tasks.TASKS`
    "refcocog-umd-val/ungrouped",
    "refcocog-umd-val/grouped",
    "refcocog-umd-test/ungrouped",
    "refcocog-umd-test/grouped",
    "refcocog-google-val/grouped",
    "refcoco-unc-val/ungrouped",
    "refcoco-unc-val/grouped",
    "refcoco-unc-testA/ungrouped",
    "refcoco-unc-testA/grouped",
    "refcoco-unc-testB/ungrouped",
    "refcoco-unc-testB/grouped",
    "refcoco+-unc-val/ungrouped",
    "refcoco+-unc-val/grouped",
    "refcoco+-unc-testA/ungrouped",
    "refcoco+-unc-testA/grouped",
    "refcoco+-unc-testB/ungrouped",
    "refcoco+-unc-testB/grouped",
    "refcocog-lmms-eval",
    "vg-test/subset5k",
    "vg-test/full",
    "vg-regionqa/densecap-test",
    "vg/own",
    "vg-regionqa/own",
    "shapes-caption",
    "shapes-novel",
    "shapes-vqa",
    "jsonl",
)

METRICS = (  # `eval.score.METRICS`
    "exactly right",
    "BLEU-1",
    "BLEU-2",
    "BLEU-3",
    "BLEU-4",
    "METEOR",
    "ROUGE-L",
    "CIDEr",
    "exact match",
    "contains",
    "token F1",
    "VQA accuracy",
    "S-IoU",
    "semantic similarity",
)


def check_metric_names(names: Sequence[str], sentence_model: str | os.PathLike | None) -> None:
    """Raise ValueError if a metric is unknown, or needs a sentence model and has none."""
    if unknown := sorted(set(names) - set(METRICS)):
        raise ValueError(f"expected metrics out of {', '.join(METRICS)}, got {', '.join(unknown)}")
    if "semantic similarity" in names and sentence_model is None:
        raise ValueError("semantic similarity needs --sentence-model, a directory of a sentence-transformers model")


def check_task(name: str) -> tuple[int, int] | None:
    """The size and seed that `VG_SAMPLE` stands for, None for the name of a task.

    Raises:
        ValueError: If there is no such task; names like it are in the message.
    """
    if match := re.fullmatch(r"vg-test/sample-([1-9]\d{0,8})-seed-(\d{1,9})", name):
        return int(match[1]), int(match[2])
    if name.startswith("vg-test/sample"):
        raise ValueError(
            f"expected {VG_SAMPLE} with numbers for N and S (vg-test/sample-1000-seed-0), got {name!r:.100}"
        )
    if name not in TASKS:
        near = _near(name)
        meant = f"did you mean {', '.join(near)}? " if near else ""
        raise ValueError(f"unknown task {name!r:.100}; {meant}`region-eval tasks` lists all of them")
    return None


def _near(name: str) -> list[str]:
    """The names that hold a name or part of it, then those that are spelled like it."""
    names, wanted = [*TASKS, VG_SAMPLE], name.lower().replace("_", "-")
    holding = [other for other in names if wanted and wanted in other.lower()]
    return list(dict.fromkeys([*holding, *difflib.get_close_matches(wanted, names, _NEAR)]))[:_NEAR]
