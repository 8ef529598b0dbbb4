"""Names of tasks, metrics and views, available to help and error messages without importing torch."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence

from alpha_clip_commands.source_values import constant

VIEWS = tuple(constant("eval/views.py", "VIEWS"))
VG_SAMPLE = "vg-test/sample-N-seed-S"  # N and S are numbers chosen by the user
_MAX_SUGGESTIONS = 5
TASKS = (  # in the order of `eval.tasks.TASKS`
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

METRICS = {  # id (in files and flags) -> label (in tables and reports)
    "literal_match": "literal match",
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "exact_match": "exact match",
    "contains": "contains",
    "token_f1": "token F1",
    "vqa_accuracy": "VQA accuracy",
    "s_iou": "S-IoU",
    "semantic_similarity": "semantic similarity",
}


def check_metric_names(names: Sequence[str], sentence_model: str | os.PathLike | None) -> None:
    """Raise ValueError if a metric is unknown or requires a sentence model that is not given."""
    if unknown := sorted(set(names) - METRICS.keys()):
        raise ValueError(f"expected metrics from {', '.join(METRICS)}, got {', '.join(unknown)}")
    if "semantic_similarity" in names and sentence_model is None:
        raise ValueError("semantic_similarity requires --sentence-model, a directory of a sentence-transformers model")


def check_task(name: str) -> tuple[int, int] | None:
    """Check the name of a task; returns size and seed for a name of the form `VG_SAMPLE`, None for other tasks.

    Raises:
        ValueError: If the task is unknown; the message suggests similar names.
    """
    if match := re.fullmatch(r"vg-test/sample-([1-9]\d{0,8})-seed-(\d{1,9})", name):
        return int(match[1]), int(match[2])
    if name.startswith("vg-test/sample"):
        raise ValueError(
            f"expected {VG_SAMPLE} with numbers for N and S (vg-test/sample-1000-seed-0), got {name!r:.100}"
        )
    if name not in TASKS:
        similar = _similar(name)
        meant = f"did you mean {', '.join(similar)}? " if similar else ""
        raise ValueError(f"unknown task {name!r:.100}; {meant}`region-eval tasks` lists all tasks")
    return None


def _similar(name: str) -> list[str]:
    """Names that contain `name`, followed by names with a similar spelling."""
    names, wanted = [*TASKS, VG_SAMPLE], name.lower().replace("_", "-")
    containing = [other for other in names if wanted and wanted in other.lower()]
    return list(dict.fromkeys([*containing, *difflib.get_close_matches(wanted, names, _MAX_SUGGESTIONS)]))[
        :_MAX_SUGGESTIONS
    ]
