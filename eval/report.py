"""`report.html`: the numbers of a run, what they may be compared with, whether the model looks, and samples to see."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval import published
from eval.controls import INPUTS
from eval.page import ordering_metric, picture_of, write_page
from eval.score import measure

# Columns left out of the table of inputs, which would not fit a screen; metrics.json has them.
_LEFT_OUT = ("BLEU-1", "BLEU-2", "BLEU-3")
# What heads the page: key of run.json -> what a reader calls it
_FACTS = {
    "model": "model",
    "region_input": "shown to the model",
    "prompt": "prompt (of the first sample)",
    "max_new_tokens": "longest answer, tokens",
    "geometry": "geometry",
    "decoding": "decoding",
}
_OTHER = "wrong, by the references of the region that was shown"


def write_report(
    out_html: str | os.PathLike,
    run: Mapping[str, Any],
    metrics: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    others: Mapping[str, Mapping[str, str]],
    image_root: str | os.PathLike | None,
    *,
    scores: Sequence[float] | None = None,
    max_pictures: int = 48,
    seed: int = 0,
) -> None:
    """Write one HTML file that opens offline: pictures are inside it, and there is no script.

    Args:
        out_html: The file.
        run: The content of run.json; what is missing is not shown.
        metrics: The content of metrics.json.
        records: The predictions that `metrics` is about.
        others: Predictions by id under each other input (see `eval.controls.INPUTS`).
        image_root: Folder that the records' images are relative to, or None.
        scores: One for each record, by the first of "token F1", "ROUGE-L", "METEOR", "CIDEr", "exact match" that is in
            `metrics`; None computes them. They put the samples in order.
        max_pictures: So many samples are shown: worst, best and random ones, a third each.
        seed: Of the random ones.

    Raises:
        ValueError: If there are not as many scores as records, or the file cannot be written.
    """
    main_metric = ordering_metric(list(metrics["metrics"]))
    if scores is None:
        scores = measure(records, [main_metric]).items[main_metric]
    if len(scores) != len(records):
        raise ValueError(f"expected a score for each of the {len(records)} records, got {len(scores)}")
    right = _right(run, metrics)
    groups = _groups(records, scores, others, image_root, max_pictures, seed)
    pictures = [sample["picture"] for group in groups for sample in group["samples"]]
    task = metrics.get("task")
    write_page(
        out_html,
        "report.html",
        title=f"Region evaluation: {task or 'predictions of unknown protocol'}",
        protocol=_protocol(run, metrics),
        items=metrics["items"],
        metrics=metrics["metrics"],
        length=_length(metrics.get("length")),
        published=metrics.get("published", []),
        not_comparable=_not_comparable(task, metrics.get("published", [])),
        main_metric=main_metric,
        input_metrics=_columns(metrics["metrics"]),
        by_metrics={kind: _columns(next(iter(b.values()), {})) for kind, b in metrics.get("by", {}).items()},
        by={kind: buckets for kind, buckets in metrics.get("by", {}).items() if buckets},
        right_input=right,
        groups=groups,
        shown=len(pictures),
        without_picture=sum(picture.uri is None for picture in pictures),
        max_pictures=max_pictures,
        notes=metrics.get("notes", []),
        counts=[f"{name}: {count}" for name, count in metrics.get("counts", {}).items() if count],
        command=metrics.get("command"),
        made=_rows({**run, "seed of the intervals": metrics.get("seed")}),
        versions=_rows(metrics.get("versions")),
        **_inputs(run, metrics, main_metric),
    )


def _protocol(run: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What was asked, in the reader's order."""
    facts = {"protocol": metrics.get("task") or "unknown"}
    facts |= {key: value for key, value in metrics.get("protocol", {}).items() if value is not None}
    facts |= {name: run[key] for key, name in _FACTS.items() if run.get(key) is not None}
    return _rows(facts)


def _rows(content: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    """Names and values as text; a mapping inside becomes one line."""
    return [
        (name, "; ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, Mapping) else value)
        for name, value in (content or {}).items()
    ]


def _length(length: Mapping[str, Any] | float | None) -> list[tuple[str, Any]]:
    """Mean words, of the predictions and whatever else metrics.json says."""
    length = length if isinstance(length, Mapping) else {} if length is None else {"mean words": length}
    return [(name, f"{value:.1f}" if isinstance(value, float) else value) for name, value in length.items()]


def _columns(metrics: Mapping[str, Any]) -> list[str]:
    return [name for name in metrics if name not in _LEFT_OUT and name != "items"]


def _not_comparable(task: str | None, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The published results on the same data that are not among `rows`, each with the reason."""
    if task is None:
        return []
    if not rows:  # of a part of the task, say: not even those of its own protocol
        reason = "the same protocol, but these numbers are not of all its items, or not of its own"
        return published.not_comparable(task) + [{**row, "reason": reason} for row in published.rows(task)]
    return published.not_comparable(task)


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
    records: Sequence[Mapping[str, Any]],
    scores: Sequence[float],
    others: Mapping[str, Mapping[str, str]],
    image_root: str | os.PathLike | None,
    count: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Worst, best and random samples, none twice; random ones are out of all others."""
    order = [int(index) for index in np.argsort(np.asarray(scores, dtype=float), kind="stable")]
    third = min(count // 3, len(order) // 3)
    worst, best, rest = order[:third], order[len(order) - third :][::-1], order[third : len(order) - third]
    random_ones = random.Random(seed).sample(rest, min(count - 2 * third, len(rest)))
    groups = []
    for heading, chosen in (("Worst", worst), ("Best", best), (f"Random (seed {seed})", random_ones)):
        samples = [
            {
                "record": records[index],
                "score": float(scores[index]),
                "picture": picture_of(records[index], image_root),
                "others": [(name, found.get(records[index]["id"])) for name, found in others.items()],
            }
            for index in chosen
        ]
        groups += [{"name": heading, "samples": samples}] if samples else []
    return groups
