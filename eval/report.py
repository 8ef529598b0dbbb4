"""`report.html`: the numbers of a run, what they may be compared with, whether the model looks, and samples to see."""

from __future__ import annotations

import dataclasses
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from eval import published
from eval.page import Picture, ordering_metric, picture_of, write_page
from eval.score import Measured
from eval.views import INPUTS

# Columns left out of the table of inputs, which would not fit a screen; metrics.json has them.
_LEFT_OUT = ("BLEU-1", "BLEU-2", "BLEU-3")
# What was asked: key of run.json -> what a reader calls it
_FACTS = {
    "model": "model",
    "region_input": "shown to the model",
    "prompt": "prompt (of the first sample)",
    "max_new_tokens": "longest answer, tokens",
    "geometry": "geometry",
    "decoding": "decoding",
}
_OTHER = "wrong, by the references of the region that was shown"


class OtherInput(NamedTuple):
    """What the model answered when it was shown something else than its region."""

    predictions: Mapping[str, str]  # by id
    right: Mapping[str, bool]  # by id; empty where no metric says


@dataclasses.dataclass(frozen=True)
class Results:
    """What a report is about.

    Attributes:
        metrics: The content of metrics.json.
        run: The content of run.json; what is missing is not shown.
        records: The predictions that `metrics` is about.
        measured: Their scores.
        others: Answers under each other input (see `eval.views.INPUTS`).
    """

    metrics: Mapping[str, Any]
    run: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    measured: Measured
    others: Mapping[str, OtherInput] = dataclasses.field(default_factory=dict)


def write_report(
    out_html: str | os.PathLike,
    results: Results,
    image_root: str | os.PathLike | None,
    *,
    max_images: int = 48,
    seed: int = 0,
) -> None:
    """Write one HTML file that opens offline: images are inside it, and there is no script.

    Args:
        out_html: The file.
        results: What it shows. The samples are in the order of their scores by the first of "token F1", "ROUGE-L",
            "METEOR", "CIDEr", "exact match" that was measured.
        image_root: Folder that the records' images are relative to, or None.
        max_images: So many samples are shown: worst, best and random ones, a third each.
        seed: Of the random ones.

    Raises:
        ValueError: If the file cannot be written.
    """
    run, metrics = results.run, results.metrics
    main_metric = ordering_metric(list(metrics["metrics"]))
    groups = _groups(results, main_metric, image_root, max_images, seed)
    images = [sample["picture"] for group in groups for sample in group["samples"]]
    task, beside, by = metrics.get("task"), metrics.get("published", []), metrics.get("by", {})
    write_page(
        out_html,
        "report.html",
        title=f"Region evaluation: {task or 'predictions of unknown protocol'}",
        subtitle=", ".join(
            filter(None, (run.get("model"), run.get("region_input") and f"shown: {run['region_input']}"))
        ),
        protocol=_protocol(run, metrics),
        items=metrics["items"],
        metrics=metrics["metrics"],
        about=[*_about_intervals(metrics["metrics"]), *_about_length(metrics.get("length"))],
        published=beside,
        not_comparable=_not_comparable(task, beside),
        main_metric=main_metric,
        verdict=results.measured.verdict,
        input_metrics=_columns(metrics["metrics"]),
        by_metrics={kind: _columns(next(iter(buckets.values()), {})) for kind, buckets in by.items()},
        by={kind: buckets for kind, buckets in by.items() if buckets},
        groups=groups,
        shown=len(images),
        problems=_problems(images),
        notes=_notes(metrics),
        command=metrics.get("command"),
        made=_rows({**run, "seed of the intervals": metrics.get("seed")}),
        versions=_rows(metrics.get("versions")),
        **_inputs(run, metrics, main_metric),
    )


def _protocol(run: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What was asked, in the reader's order."""
    indexed = {"protocol": metrics.get("task") or "unknown"}
    indexed |= {key: value for key, value in metrics.get("protocol", {}).items() if value is not None}
    indexed |= {name: run[key] for key, name in _FACTS.items() if run.get(key) is not None}
    return _rows(indexed)


def _rows(content: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    """Names and values as text; a mapping inside becomes one line."""
    return [
        (name, "; ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, Mapping) else value)
        for name, value in (content or {}).items()
    ]


def _about_intervals(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One sentence on how the intervals were made."""
    made: dict[str, list[str]] = {}
    for name, entry in metrics.items():
        if entry.get("interval"):
            made.setdefault(entry["interval"], []).append(name)
    if not made:
        return []
    main, *others = sorted(made, key=len)
    said = [f"of {', '.join(made[other])} {other.removeprefix(main).lstrip(', ')}" for other in others]
    return [f"Intervals: {'; '.join([main, *said])}."]


def _about_length(length: Mapping[str, float] | None) -> list[str]:
    """One sentence on the length of the texts."""
    return [f"Mean length: {', '.join(f'{value:.1f} {name}' for name, value in length.items())}."] if length else []


def _notes(metrics: Mapping[str, Any]) -> list[str]:
    """The notes, and the counts that are not among them."""
    counts = [f"{count:,} {name}" for name, count in metrics.get("counts", {}).items() if count]
    return list(dict.fromkeys([*metrics.get("notes", []), *counts]))


def _problems(images: Sequence[Picture]) -> dict[str, int]:
    """Why images are not there, where the reason is that of several: it is said once for all of them."""
    counts = Counter(image.problem for image in images if image.problem is not None)
    return {problem: count for problem, count in counts.items() if count > 1}


def _columns(metrics: Mapping[str, Any]) -> list[str]:
    return [name for name in metrics if name not in _LEFT_OUT and name != "items"]


def _not_comparable(task: str | None, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The published results on the same data that are not among `rows`, by the reason."""
    if task is None:
        return {}
    found = published.not_comparable(task)
    if not rows:  # of a part of the task, say: not even those of its own protocol
        reason = "the same protocol, but these numbers are not of all its items, or not of its own"
        found += [{**row, "reason": reason} for row in published.rows(task)]
    by_reason: dict[str, list[dict[str, Any]]] = {}
    said = set()
    for row in found:
        by_reason.setdefault(row["reason"], []).append({**row, "note": None if row["note"] in said else row["note"]})
        said.add(row["note"])
    return by_reason


def _right(run: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """The input that the others are compared with: the run's own, first in metrics.json."""
    return run.get("region_input") or next(iter(metrics.get("inputs", {})), "answer")


def _inputs(run: Mapping[str, Any], metrics: Mapping[str, Any], main_metric: str) -> dict[str, Any]:
    """The table of inputs: rows with their values and differences, and what must be said under it."""
    by_input = dict(metrics.get("inputs", {}))
    if len(by_input) < 2:
        return {"inputs": [], "input_notes": []}
    right = _right(run, metrics)
    base = by_input.setdefault(right, {"items": metrics["items"], "metrics": metrics["metrics"]})
    highest = max(entry["metrics"][main_metric]["value"] for entry in by_input.values()) or 1.0
    columns, rows, notes = _columns(metrics["metrics"]), [], []
    for name in [right, *(other for other in by_input if other != right)]:
        entry = by_input[name]
        if name != right and entry["items"] != base["items"] and "difference" not in entry:
            notes.append(f"{name}: {entry['items']:,} of {base['items']:,} samples, so no difference is given")
        for label, what, values in _variants(name, entry):
            rows.append(
                {
                    "name": label,
                    "what": what,
                    "right": name == right,
                    "items": entry["items"],
                    "share": round(100 * max(values[main_metric]["value"], 0) / highest, 1),
                    "cells": [
                        {**values[column], "difference": _difference(entry, base, column, values, name == right)}
                        for column in columns
                    ],
                }
            )
    return {"inputs": rows, "input_notes": notes}


def _variants(name: str, entry: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """The rows of an input: name, what was shown, values. Another region is scored by its own references too."""
    rows = [(name, INPUTS.get(name, ""), entry["metrics"])]
    return rows + [(_OTHER, "what a model that looks should say", entry["shown"])] if "shown" in entry else rows


def _difference(
    entry: Mapping[str, Any], base: Mapping[str, Any], column: str, values: Mapping[str, Any], right: bool
) -> dict[str, Any] | None:
    """The difference to the right region on the same samples: with its interval where metrics.json has it."""
    if right or values is entry.get("shown"):
        return None  # other references: another scale
    if "difference" in entry:
        return entry["difference"].get(column)
    if entry["items"] != base["items"]:
        return None
    return {"value": values[column]["value"] - base["metrics"][column]["value"]}


def _groups(
    results: Results, main_metric: str, image_root: str | os.PathLike | None, count: int, seed: int
) -> list[dict[str, Any]]:
    """Worst, best and random samples, none twice; random ones are out of all others."""
    scores, right = results.measured.items[main_metric], results.measured.right(results.records)
    order = [int(index) for index in np.argsort(scores, kind="stable")]
    third = min(count // 3, len(order) // 3)
    worst, best, rest = order[:third], order[len(order) - third :][::-1], order[third : len(order) - third]
    random_ones = random.Random(seed).sample(rest, min(count - 2 * third, len(rest)))
    groups = []
    for heading, chosen in (("Worst", worst), ("Best", best), (f"Random (seed {seed})", random_ones)):
        samples = []
        for index in chosen:
            record = results.records[index]
            others = [
                {"name": name, "text": other.predictions.get(record["id"]), "right": other.right.get(record["id"])}
                for name, other in results.others.items()
            ]
            picture, verdict = picture_of(record, image_root), right.get(record["id"])
            score = float(scores[index])
            samples.append({"record": record, "score": score, "right": verdict, "picture": picture, "others": others})
        groups += [{"name": heading, "samples": samples}] if samples else []
    return groups
