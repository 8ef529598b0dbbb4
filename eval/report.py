"""`report.html`: the results of a run, comparable published results, a comparison of the views, and samples."""

from __future__ import annotations

import dataclasses
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from eval import published
from eval.metrics.intervals import Difference
from eval.page import Thumbnail, sort_metric, thumbnail, write_page
from eval.predictions import Prediction
from eval.results import MetricValue, Result, RunConfig, ViewResult, label
from eval.score import Measured
from eval.views import VIEWS

# Metrics without a column, so that tables fit on a screen; metrics.json has them.
_NO_COLUMN = ("items", "bleu_1", "bleu_2", "bleu_3")
# Fields of the settings that are shown first -> their names in the report
_MODEL_FACTS = {
    "model": "model",
    "view": "view",
    "prompt": "prompt (of the first sample)",
    "max_new_tokens": "maximum answer length (tokens)",
    "geometry": "geometry",
    "decoding": "decoding",
}
_LENGTH_LABELS = {"words_per_prediction": "words per prediction", "words_per_reference": "words per reference"}


class OtherView(NamedTuple):
    """The answers of a view other than the main one, and whether they are correct (empty if undefined); by id."""

    predictions: Mapping[str, str]
    correct: Mapping[str, bool]


@dataclasses.dataclass(frozen=True)
class ReportData:
    """The content of a report.

    Attributes:
        result: Of the run.
        config: Its settings.
        predictions: Of the main view.
        measured: Their metrics.
        others: The other views, by name.
    """

    result: Result
    config: RunConfig
    predictions: Sequence[Prediction]
    measured: Measured
    others: Mapping[str, OtherView] = dataclasses.field(default_factory=dict)


def write_report(
    path: str | os.PathLike,
    data: ReportData,
    image_root: str | os.PathLike | None,
    *,
    max_images: int = 48,
    seed: int = 0,
) -> None:
    """Write one HTML file that opens offline: images are embedded, and it has no scripts.

    Args:
        path: The file.
        data: Samples are sorted by the metric that `eval.page.sort_metric` selects.
        image_root: Folder that images are relative to, or None.
        max_images: Maximum number of samples: the worst, the best and random ones, a third each.
        seed: Of the random samples.

    Raises:
        ValueError: If the file cannot be written.
    """
    result = data.result
    main_metric = sort_metric(list(result.metrics))
    groups = _sample_groups(data, main_metric, image_root, max_images, seed)
    thumbnails = [sample["thumbnail"] for group in groups for sample in group["samples"]]
    write_page(
        path,
        "report.html",
        result=result,
        main_metric=main_metric,
        correctness_metric=data.measured.correctness_metric,
        groups=groups,
        shown=len(thumbnails),
        problems=_problems(thumbnails),
        **_header(data),
        **_metrics_section(result),
        **_views_section(data, main_metric),
        **_provenance(data),
    )


def _header(data: ReportData) -> dict[str, Any]:
    view = data.config.view and f"view: {data.config.view}"
    return {
        "title": f"Region evaluation: {data.result.task or 'predictions of an unknown protocol'}",
        "subtitle": ", ".join(filter(None, (data.config.model, view))),
    }


def _metrics_section(result: Result) -> dict[str, Any]:
    """The metrics, published results, and breakdowns."""
    by = {name.replace("_", " "): groups for name, groups in result.by.items() if groups}
    return {
        "about": [*_interval_sentence(result.metrics), *_length_sentence(result.length)],
        "not_comparable": _not_comparable(result),
        "columns": _columns(result.metrics),
        "by": by,
        "by_columns": {name: _columns(next(iter(groups.values()))) for name, groups in by.items()},
    }


def _provenance(data: ReportData) -> dict[str, Any]:
    """How the results were obtained."""
    config, result = msgspec.to_builtins(data.config), data.result
    return {
        "notes": result.notes,
        "protocol": _protocol_rows(data.result, config),
        "run": _rows({**config, "seed of the intervals": result.seed}),
        "versions": _rows(result.versions),
    }


def _protocol_rows(result: Result, config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    facts = {"protocol": result.task or "unknown"}
    facts |= {key.replace("_", " "): value for key, value in msgspec.to_builtins(result.protocol).items()}
    facts |= {name: config[key] for key, name in _MODEL_FACTS.items()}
    return _rows(facts)


def _rows(content: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Names and values that are not None; a mapping becomes one line."""
    return [
        (name, "; ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, Mapping) else value)
        for name, value in content.items()
        if value is not None
    ]


def _interval_sentence(metrics: Mapping[str, MetricValue]) -> list[str]:
    """How the intervals were computed, or nothing without intervals."""
    by_method: dict[str, list[str]] = {}
    for name, value in metrics.items():
        if value.interval:
            by_method.setdefault(value.interval, []).append(label(name))
    if not by_method:
        return []
    main, *others = sorted(by_method, key=len)
    exceptions = [f"of {', '.join(by_method[other])} {other.removeprefix(main).lstrip(', ')}" for other in others]
    return [f"Intervals: {'; '.join([main, *exceptions])}."]


def _length_sentence(length: Mapping[str, float]) -> list[str]:
    texts = [f"{value:.1f} {_LENGTH_LABELS[name]}" for name, value in length.items()]
    return [f"Mean length: {', '.join(texts)}."] if texts else []


def _problems(thumbnails: Sequence[Thumbnail]) -> dict[str, int]:
    """Reasons why images are missing that apply to several images: each is stated only once."""
    counts = Counter(image.problem for image in thumbnails if image.problem is not None)
    return {problem: count for problem, count in counts.items() if count > 1}


def _columns(metrics: Mapping[str, Any]) -> list[str]:
    return [name for name in metrics if name not in _NO_COLUMN]


def _not_comparable(result: Result) -> dict[str, list[tuple[published.PublishedResult, str | None]]]:
    """The published results on the same dataset that are not comparable, by reason; a note is given only once."""
    if result.task is None:
        return {}
    found = published.not_comparable(result.task)
    if not result.published:  # a part of the task, for example
        reason = "the same protocol, but this run did not score all of its items, or used another view"
        found += [(row, reason) for row in published.comparable(result.task)]
    by_reason: dict[str, list[tuple[published.PublishedResult, str | None]]] = {}
    notes = set()
    for row, reason in found:
        by_reason.setdefault(reason, []).append((row, None if row.note in notes else row.note))
        notes.add(row.note)
    return by_reason


def _views_section(data: ReportData, main_metric: str) -> dict[str, Any]:
    """The table of views, and notes below it."""
    result = data.result
    if len(result.views) < 2:
        return {"views": [], "view_notes": []}
    main = data.config.view or next(iter(result.views))
    base = result.views[main]
    highest = max(view.metrics[main_metric].value for view in result.views.values()) or 1.0
    rows, notes = [], []
    for name in [main, *(other for other in result.views if other != main)]:
        view = result.views[name]
        if view.items != base.items and view.difference is None:
            notes.append(f"{name}: {view.items:,} of {base.items:,} samples, so the difference is not shown")
        for title, description, values in _variants(name, view):
            differences = {} if name == main or values is view.shown_region_metrics else _all_differences(view, base)
            rows.append(
                {
                    "name": title,
                    "description": description,
                    "is_main": name == main,
                    "items": view.items,
                    "share": round(100 * max(values[main_metric].value, 0) / highest, 1),
                    "cells": [(values[column], differences.get(column)) for column in _columns(result.metrics)],
                }
            )
    return {"views": rows, "view_notes": notes}


def _variants(name: str, view: ViewResult) -> list[tuple[str, str, Mapping[str, MetricValue]]]:
    """The rows of a view: title, description, values. Another region has a second row with its own references."""
    rows: list[tuple[str, str, Mapping[str, MetricValue]]] = [(name, VIEWS.get(name, ""), view.metrics)]
    if view.shown_region_metrics is not None:
        title = f"{name}, references of the region that was shown"
        rows.append((title, "expected to equal the main view if the model uses the region", view.shown_region_metrics))
    return rows


def _all_differences(view: ViewResult, base: ViewResult) -> dict[str, Difference | MetricValue]:
    """The differences to the main view on the same samples, with intervals if they were computed."""
    if view.difference is not None:
        return dict(view.difference)
    if view.items != base.items:
        return {}
    return {name: MetricValue(value.value - base.metrics[name].value) for name, value in view.metrics.items()}


def _sample_groups(
    data: ReportData, main_metric: str, image_root: str | os.PathLike | None, count: int, seed: int
) -> list[dict[str, Any]]:
    """The worst, best and random samples, none of them twice."""
    scores, correct = data.measured.items[main_metric], data.measured.correct(data.predictions)
    order = [int(index) for index in np.argsort(scores, kind="stable")]
    third = min(count // 3, len(order) // 3)
    worst, best, rest = order[:third], order[len(order) - third :][::-1], order[third : len(order) - third]
    random_ones = random.Random(seed).sample(rest, min(count - 2 * third, len(rest)))
    groups = []
    for heading, chosen in (("Worst", worst), ("Best", best), (f"Random (seed {seed})", random_ones)):
        samples = []
        for index in chosen:
            prediction = data.predictions[index]
            others = [
                {"name": name, "text": view.predictions.get(prediction.id), "correct": view.correct.get(prediction.id)}
                for name, view in data.others.items()
            ]
            samples.append(
                {
                    "prediction": prediction,
                    "score": float(scores[index]),
                    "correct": correct.get(prediction.id),
                    "thumbnail": thumbnail(prediction, image_root),
                    "others": others,
                }
            )
        groups += [{"name": heading, "samples": samples}] if samples else []
    return groups
