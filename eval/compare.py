"""Two or more runs on the same samples: differences with paired intervals, and the samples that changed most."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.metrics.intervals import RESAMPLES, Difference
from eval.page import ordering_metric, p_value, picture_of, write_page
from eval.predictions import read_predictions
from eval.score import Measured, measure, picture_of_each
from eval.tasks import metrics_for
from mllm.files import check_replaceable
from mllm.fingerprints import with_current_keys

_PAGE = "compare.html"
_NAMED = 5  # ids named in a message
_CHANGED = 24  # samples that are shown
# Parts of a protocol that must agree. The number of items shows in the ids; the region's form is a difference between
# models like their prompt, and is said.
_BINDING = ("item", "references")
# What two runs may differ in, and a reader must know: keys of run.json
_SAID = ("model", "weights", "alpha_and_adapter", "region_input", "strength", "geometry", "prompt", "max_new_tokens")


@dataclasses.dataclass(frozen=True)
class Changed:
    """A sample on which the runs differ: its record in each run, its score in each, and whether it is right in each
    (None where no metric says).
    """

    records: list[dict[str, Any]]
    scores: list[float]
    right: list[bool | None]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        names: The runs, as they were given; the first is the one that the others are compared with.
        items: Number of samples.
        values: Of each metric, in each run; as the reference scorers give them, METEOR .195.
        differences: Of each metric, of each run but the first to the first.
        ordering: The metric by which samples changed.
        verdict: The metric that calls an answer right or wrong, or None.
        changed: The samples that changed most, most first.
        notes: What else the runs differ in, and how the differences were made.
        image_root: Folder of the pictures, where a run says it.
    """

    names: list[str]
    items: int
    values: dict[str, list[float]]
    differences: dict[str, list[Difference]]
    ordering: str
    verdict: str | None
    changed: list[Changed]
    notes: list[str]
    image_root: str | None

    def to_text(self) -> str:
        """A table for a terminal, values times 100."""
        lines = [f"{self.items:,} samples, values times 100, differences with 95 % intervals"]
        lines += [f"{_letter(index)} = {name}" for index, name in enumerate(self.names)]
        for index in range(1, len(self.names)):
            letter = _letter(index)
            lines.append(f"\n{'metric':<14}{'A':>8}{letter:>8}{letter + ' - A':>9}  95 % interval")
            for metric, values in self.values.items():
                found = self.differences[metric][index - 1]
                interval = f"[{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
                lines.append(
                    f"{metric:<14}{100 * values[0]:>8.1f}{100 * values[index]:>8.1f}{100 * found.value:>+9.1f}"
                    f"  {interval:<18}{p_value(found.p)}"
                )
        if self.changed:
            lines.append(f"\nChanged most, by {self.ordering}:")
        for sample in self.changed[:_NAMED]:
            lines.append(
                f"  {_quoted(sample.records[0]['id'])}: reference {_quoted(sample.records[0]['references'][0])}"
            )
            for index, record in enumerate(sample.records):
                lines.append(f"    {_letter(index)} {100 * sample.scores[index]:5.1f}  {_quoted(record['prediction'])}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def write_html(self, path: str | os.PathLike, image_root: str | os.PathLike | None = None) -> None:
        """Write the comparison as one HTML file that opens offline, with the pictures of the samples that changed.

        Args:
            path: The file.
            image_root: Folder that the records' images are relative to; None takes the one that a run states.

        Raises:
            ValueError: If no file can be there, or one that this did not write is there.
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
            samples=[(sample, picture_of(sample.records[0], root)) for sample in self.changed],
        )


def check_html(path: str | os.PathLike, *, reads: Iterable[str | os.PathLike] = ()) -> None:
    """Raise ValueError unless a comparison may be written to a file: it is new or a comparison, and none of `reads`."""
    check_replaceable(path, reads=reads, kind=_PAGE)


def compare(
    paths: Sequence[str | os.PathLike],
    *,
    metrics: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    changed: int = _CHANGED,
) -> Comparison:
    """Compare runs on the same samples.

    Args:
        paths: Run folders or files of predictions, two or more; the first is the base.
        metrics: Names; None takes those of the first run's metrics.json, and without one those of the kind of the
            samples, questions or descriptions.
        resamples: Of the paired bootstrap; over pictures where every sample's `meta` names its picture.
        seed: Of the bootstrap.
        changed: So many samples that changed are kept.

    Raises:
        ValueError: If there are not two, a file cannot be read, or the runs are not about the same samples under the
            same protocol.
    """
    paths = [Path(path) for path in paths]
    if len(paths) < 2:
        raise ValueError(f"expected two or more runs to compare, got {len(paths)}")
    runs = [_run_json(path) for path in paths]
    _expect_one_protocol(paths, runs)
    base, *others = [read_predictions(path)[0] for path in paths]
    files = [base] + [_matched(paths[0], base, path, found) for path, found in zip(paths[1:], others, strict=True)]
    metrics = metrics or _metric_names(paths[0], base)
    measured = [measure(records, metrics) for records in files]
    groups = picture_of_each(base)
    differences = {
        metric: [measured[0].difference(other, metric, groups, resamples, seed) for other in measured[1:]]
        for metric in metrics
    }
    ordering = ordering_metric(list(metrics))
    return Comparison(
        names=[str(path) for path in paths],
        items=len(base),
        values={metric: [found.values[metric] for found in measured] for metric in metrics},
        differences=differences,
        ordering=ordering,
        verdict=measured[0].verdict,
        changed=_changed_most(files, measured, ordering, changed),
        notes=_notes(runs, metrics, groups is not None),
        image_root=next((run["data"] for run in runs if run.get("data")), None),
    )


def _run_json(path: Path) -> dict[str, Any]:
    """What made a file of predictions; empty when nothing says so. A control lies in its run's controls/INPUT."""
    folder = path if path.is_dir() else path.parent
    control = folder.name if folder.parent.name == "controls" else None
    file = (folder.parent.parent if control else folder) / "run.json"
    if not file.is_file():
        return {}
    run = with_current_keys(_read_json(file))
    return {**run, "region_input": control} if control else run


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}; make it again with region-eval") from error


def _expect_one_protocol(paths: Sequence[Path], runs: Sequence[Mapping[str, Any]]) -> None:
    """Runs that do not say what made them are held together by ids and references alone."""
    told = [(path, _binding(run)) for path, run in zip(paths, runs, strict=True) if run]
    for path, binding in told[1:]:
        if binding != told[0][1]:
            raise ValueError(
                f"{told[0][0]} and {path} are of different protocols ({_said(told[0][1])}; {_said(binding)}): their "
                "numbers cannot be compared. Evaluate both under one"
            )


def _binding(run: Mapping[str, Any]) -> dict[str, Any]:
    return {"task": run.get("task"), **{key: run.get("protocol", {}).get(key) for key in _BINDING}}


def _said(binding: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in binding.items() if value is not None)


def _matched(first: Path, base: list[dict], path: Path, records: list[dict]) -> list[dict]:
    """The records of `path` in the order of those of `first`: every id in both, with the same references."""
    by_id = {record["id"]: record for record in records}
    missing = [record["id"] for record in base if record["id"] not in by_id]
    known = {record["id"] for record in base}
    unknown = [record["id"] for record in records if record["id"] not in known]
    if missing or unknown:
        what = [f"{path} lacks {len(missing)} of the {len(base)} ids of {first} ({_named(missing)})"] if missing else []
        what += [f"{path} has {len(unknown)} ids that {first} has not ({_named(unknown)})"] if unknown else []
        raise ValueError(f"{'; '.join(what)}: only runs on the same samples are compared. Give both the same ones")
    ordered = [by_id[record["id"]] for record in base]
    pairs = zip(base, ordered, strict=True)
    other = [one["id"] for one, two in pairs if sorted(one["references"]) != sorted(two["references"])]
    if other:
        raise ValueError(
            f"{first} and {path} have other references for {len(other)} of {len(base)} ids ({_named(other)}): they are "
            "of different data or protocols. Score both against the same references"
        )
    return ordered


def _metric_names(path: Path, records: Sequence[Mapping[str, Any]]) -> list[str]:
    file = (path if path.is_dir() else path.parent) / "metrics.json"
    if file.is_file():
        return list(_read_json(file)["metrics"])
    try:
        return list(metrics_for([record.get("question") for record in records]))
    except ValueError as error:
        raise ValueError(f"{path}: {error} (region-eval score --metrics), then compare the folders of scores") from None


def _changed_most(files: list[list[dict]], measured: list[Measured], ordering: str, count: int) -> list[Changed]:
    """The samples whose score is furthest from the first run's, in any of the others; none that stayed the same."""
    table = np.stack([found.items[ordering] for found in measured])  # (runs, N)
    change = np.abs(table[1:] - table[0]).max(0)
    order = [int(index) for index in np.argsort(-change, kind="stable")[:count] if change[index] > 0]
    right = [found.right(records) for found, records in zip(measured, files, strict=True)]
    changed = []
    for index in order:
        records = [records[index] for records in files]
        verdicts = [of_run.get(record["id"]) for of_run, record in zip(right, records, strict=True)]
        changed.append(Changed(records, [float(score) for score in table[:, index]], verdicts))
    return changed


def _notes(runs: Sequence[Mapping[str, Any]], metrics: Sequence[str], clustered: bool) -> list[str]:
    differ = [key for key in _SAID if len({json.dumps(run.get(key)) for run in runs if run}) > 1]
    notes = [f"they differ in {', '.join(differ)}"] if differ else []
    forms = {run["protocol"].get("region form") for run in runs if "protocol" in run}
    notes += [f"the regions are of different form: {', '.join(sorted(map(str, forms)))}"] if len(forms) > 1 else []
    if silent := sum(not run for run in runs):
        notes.append(
            f"{silent} of {len(runs)} have no run.json: that their protocol is one shows in ids and references alone"
        )
    notes.append(f"intervals: paired bootstrap over {'pictures' if clustered else 'samples'}")
    return notes


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"run {index + 1}"


def _quoted(text: str) -> str:
    """One line, at most 100 characters; what a terminal would obey is shown as an escape."""
    return repr(text[:100] + ("..." if len(text) > 100 else ""))


def _named(ids: Sequence[str]) -> str:
    return ", ".join(ids[:_NAMED]) + (" ..." if len(ids) > _NAMED else "")
