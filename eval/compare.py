"""Compare runs on the same samples: paired differences with intervals, and the samples with the largest changes."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from eval.external_formats import listed
from eval.metrics.intervals import RESAMPLES, Difference
from eval.page import p_value, sort_metric, thumbnail, write_page
from eval.predictions import Prediction, read_predictions
from eval.results import FORMER_VIEWS, METRICS_FILE, RUN_FILE, RunConfig, label, read_result, read_run_config
from eval.score import Measured, image_groups, measure
from eval.tasks import metrics_for
from mllm.files import check_replaceable

_PAGE = "compare.html"
_MAX_LISTED = 5  # samples in the table for a terminal
_MAX_CHANGED = 24
# Fields of the protocol that must be equal. The ids are compared themselves; another region form is noted.
_PROTOCOL_FIELDS = ("item", "references")
# Settings in which two runs may differ, with a note
_NOTED_SETTINGS = "model weights alpha_and_adapter view strength geometry prompt max_new_tokens".split()


@dataclasses.dataclass(frozen=True)
class ChangedSample:
    """A sample whose scores differ: its predictions, scores and correctness (None if undefined), one per run."""

    predictions: list[Prediction]
    scores: list[float]
    correct: list[bool | None]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    Attributes:
        names: The runs as given; the first is the baseline.
        items: Number of samples.
        values: Of each metric, by run, as the reference scorers return them (METEOR .195).
        differences: Of each metric, of each run but the first to the first.
        sort_metric: The metric that decides which samples changed most.
        correctness_metric: The metric that decides whether an answer is correct, or None.
        changed: The samples with the largest changes, the largest first.
        notes: Other differences between the runs, and how the intervals were computed.
        image_root: Folder of the images, if a run states it.
    """

    names: list[str]
    items: int
    values: dict[str, list[float]]
    differences: dict[str, list[Difference]]
    sort_metric: str
    correctness_metric: str | None
    changed: list[ChangedSample]
    notes: list[str]
    image_root: str | None

    def to_text(self) -> str:
        """A table for a terminal, values times 100."""
        lines = [f"{self.items:,} samples, values times 100, differences with 95% intervals"]
        lines += [f"{_letter(index)} = {name}" for index, name in enumerate(self.names)]
        for index in range(1, len(self.names)):
            letter = _letter(index)
            lines.append(f"\n{'metric':<14}{'A':>8}{letter:>8}{letter + ' - A':>9}  95% interval")
            for metric, values in self.values.items():
                found = self.differences[metric][index - 1]
                interval = f"[{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
                lines.append(
                    f"{label(metric):<14}{100 * values[0]:>8.1f}{100 * values[index]:>8.1f}{100 * found.value:>+9.1f}"
                    f"  {interval:<18}{p_value(found.p)}"
                )
        if self.changed:
            lines.append(f"\nLargest changes by {label(self.sort_metric)}:")
        for sample in self.changed[:_MAX_LISTED]:
            first = sample.predictions[0]
            lines.append(f"  {_quoted(first.id)}: reference {_quoted(first.references[0])}")
            for index, prediction in enumerate(sample.predictions):
                score = f"{100 * sample.scores[index]:5.1f}"
                lines.append(f"    {_letter(index)} {score}  {_quoted(prediction.text)}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def write_html(self, path: str | os.PathLike, image_root: str | os.PathLike | None = None) -> None:
        """Write the comparison, with images of the changed samples, as one HTML file that opens offline.

        Args:
            path: The file.
            image_root: Folder that images are relative to; None for the one that a run states.

        Raises:
            ValueError: If `path` cannot be a file, or the file exists and is not a comparison.
            OSError: If it cannot be written.
        """
        check_html(path)
        root = self.image_root if image_root is None else image_root
        write_page(
            path,
            _PAGE,
            title=f"Comparison of {len(self.names)} runs",
            comparison=self,
            letters=[_letter(index) for index in range(len(self.names))],
            samples=[(sample, thumbnail(sample.predictions[0], root)) for sample in self.changed],
        )


def check_html(path: str | os.PathLike, *, reads: Iterable[str | os.PathLike] = ()) -> None:
    """Raise ValueError unless `path` is new or an earlier comparison, and none of the files that are read."""
    check_replaceable(path, reads=reads, kind=_PAGE)


def compare(
    paths: Sequence[str | os.PathLike],
    *,
    metrics: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    max_changed: int = _MAX_CHANGED,
) -> Comparison:
    """Compare runs on the same samples.

    Args:
        paths: Run folders or files of predictions, two or more; the first is the baseline.
        metrics: Ids; None for those of the first run's metrics.json, or without one those for questions or
            descriptions.
        resamples: Of the paired bootstrap; over images if every sample's `meta` has an `image_id`.
        seed: Of the bootstrap.
        max_changed: Maximum number of changed samples in the result.

    Raises:
        ValueError: If there are fewer than two runs, a file cannot be read, or samples or protocols differ.
    """
    paths = [Path(path) for path in paths]
    if len(paths) < 2:
        raise ValueError(f"expected two or more runs to compare, got {len(paths)}")
    configs = [_run_config(path) for path in paths]
    _check_protocols(paths, configs)
    base, *others = [read_predictions(path)[0] for path in paths]
    files = [base] + [_matched(paths[0], base, path, found) for path, found in zip(paths[1:], others, strict=True)]
    metrics = metrics or _metric_names(paths[0], base)
    measured = [measure(predictions, metrics) for predictions in files]
    groups = image_groups(base)
    by = sort_metric(list(metrics))
    return Comparison(
        names=[str(path) for path in paths],
        items=len(base),
        values={metric: [found.values[metric] for found in measured] for metric in metrics},
        differences={
            metric: [measured[0].difference(other, metric, groups, resamples, seed) for other in measured[1:]]
            for metric in metrics
        },
        sort_metric=by,
        correctness_metric=measured[0].correctness_metric,
        changed=_largest_changes(files, measured, by, max_changed),
        notes=_notes(configs, groups is not None),
        image_root=next((config.data for config in configs if config and config.data), None),
    )


def _run_config(path: Path) -> RunConfig | None:
    """The settings of the run that a file of predictions is from; None if unknown."""
    folder = path if path.is_dir() else path.parent
    # predictions of another view are in views/VIEW of the run; controls/VIEW in version 0.1.0
    view = folder.name if folder.parent.name in ("views", "controls") else None
    file = (folder.parent.parent if view else folder) / RUN_FILE
    if not file.is_file():
        return None
    config = read_run_config(file)
    return config if view is None else msgspec.structs.replace(config, view=FORMER_VIEWS.get(view, view))


def _check_protocols(paths: Sequence[Path], configs: Sequence[RunConfig | None]) -> None:
    """Raise ValueError if known protocols differ. Runs without settings are checked by ids and references only."""
    known = [(path, _protocol(config)) for path, config in zip(paths, configs, strict=True) if config]
    for path, protocol in known[1:]:
        if protocol != known[0][1]:
            raise ValueError(
                f"{known[0][0]} and {path} have different protocols ({_described(known[0][1])}; "
                f"{_described(protocol)}) and are not comparable. Evaluate both with the same protocol"
            )


def _protocol(config: RunConfig) -> dict[str, Any]:
    return {"task": config.task, **{name: getattr(config.protocol, name) for name in _PROTOCOL_FIELDS}}


def _described(protocol: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in protocol.items() if value is not None)


def _matched(first: Path, base: list[Prediction], path: Path, predictions: list[Prediction]) -> list[Prediction]:
    """The predictions of `path` in the order of those of `first`.

    Raises:
        ValueError: If ids or references differ.
    """
    by_id = {prediction.id: prediction for prediction in predictions}
    missing = [prediction.id for prediction in base if prediction.id not in by_id]
    known = {prediction.id for prediction in base}
    unknown = [prediction.id for prediction in predictions if prediction.id not in known]
    if missing or unknown:
        what = [f"{path} lacks {len(missing)} of the {len(base)} ids of {first} ({listed(missing)})"] if missing else []
        what += [f"{path} has {len(unknown)} ids that are not in {first} ({listed(unknown)})"] if unknown else []
        raise ValueError(f"{'; '.join(what)}. Only runs on the same samples can be compared")
    ordered = [by_id[prediction.id] for prediction in base]
    pairs = zip(base, ordered, strict=True)
    other = [one.id for one, two in pairs if sorted(one.references) != sorted(two.references)]
    if other:
        raise ValueError(
            f"{first} and {path} have different references for {len(other)} of {len(base)} ids ({listed(other)}): "
            "data or protocols differ. Score both against the same references"
        )
    return ordered


def _metric_names(path: Path, predictions: Sequence[Prediction]) -> list[str]:
    file = (path if path.is_dir() else path.parent) / METRICS_FILE
    if file.is_file():
        return list(read_result(file).metrics)
    try:
        return list(metrics_for([prediction.question for prediction in predictions]))
    except ValueError as error:
        raise ValueError(f"{path}: {error} (region-eval score --metrics), then compare the folders of scores") from None


def _largest_changes(
    files: list[list[Prediction]], measured: list[Measured], metric: str, count: int
) -> list[ChangedSample]:
    """The samples whose score differs most from the first run's in any other run; none with equal scores."""
    table = np.stack([found.items[metric] for found in measured])  # (runs, N)
    change = np.abs(table[1:] - table[0]).max(0)
    order = [int(index) for index in np.argsort(-change, kind="stable")[:count] if change[index] > 0]
    correct = [found.correct(predictions) for found, predictions in zip(measured, files, strict=True)]
    changed = []
    for index in order:
        predictions = [predictions[index] for predictions in files]
        verdicts = [by_id.get(prediction.id) for by_id, prediction in zip(correct, predictions, strict=True)]
        changed.append(ChangedSample(predictions, [float(score) for score in table[:, index]], verdicts))
    return changed


def _notes(configs: Sequence[RunConfig | None], over_images: bool) -> list[str]:
    known = [config for config in configs if config]
    differ = [name for name in _NOTED_SETTINGS if len({json.dumps(getattr(config, name)) for config in known}) > 1]
    notes = [f"the runs differ in {', '.join(differ)}"] if differ else []
    forms = {config.protocol.region_form for config in known}
    notes += [f"the region forms differ: {', '.join(sorted(map(str, forms)))}"] if len(forms) > 1 else []
    if unknown := sum(config is None for config in configs):
        notes.append(
            f"{unknown} of {len(configs)} have no run.json: that the protocols are equal was checked by ids and "
            "references only"
        )
    notes.append(f"intervals: paired bootstrap over {'images' if over_images else 'samples'}")
    return notes


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"run {index + 1}"


def _quoted(text: str) -> str:
    """One line of at most 100 characters, with control characters escaped."""
    return repr(text[:100] + ("..." if len(text) > 100 else ""))
