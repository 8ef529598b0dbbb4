"""Published results, each with its source and protocol: which of them may stand beside a number of ours."""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Any

import yaml

# Data set of `published.yaml` -> how the names of its tasks begin
_DATA_SETS = {"RefCOCOg": "refcocog-", "Visual Genome": "vg-test/"}
# Protocol of a published number -> what was scored, for the reason why it is not what another task scores
_SCORED = {
    "refcocog-umd-val/ungrouped": "4,896 expressions, each an item with one reference",
    "refcocog-umd-val/grouped": "2,573 regions, all expressions as references: METEOR is about 1.5 times as high",
    "refcocog-google-val/grouped": "5,000 regions of another split, with all their expressions as references",
    "vg-test/subset5k": "5,000 regions that score 15 to 20 CIDEr more than all of them",
    "vg-test/full": "all 232,935 regions",
}


def rows(task: str) -> list[dict[str, Any]]:
    """The published results that were made by the protocol `task`, lowest CIDEr first.

    Returns:
        Rows {"system", "trained", "METEOR", "CIDEr", "protocol", "source", "verified", "note"}; METEOR and CIDEr are
        x100, as papers print them, and None where they are not stated.
    """
    return [dict(row) for row in _of_data_set(task) if _reason(row, task) is None]


def not_comparable(task: str) -> list[dict[str, Any]]:
    """The results on the data set of `task` that may not stand beside it: rows as `rows` gives, and a "reason"."""
    reasons = ((row, _reason(row, task)) for row in _of_data_set(task))
    return [{**row, "reason": reason} for row, reason in reasons if reason is not None]


def _of_data_set(task: str) -> list[dict[str, Any]]:
    found = [row for name, start in _DATA_SETS.items() if task.startswith(start) for row in read_published()[name]]
    return sorted(found, key=lambda row: row["CIDEr"] or 0)


def _reason(row: dict[str, Any], task: str) -> str | None:
    """Why a row is not comparable with `task`; None when it is."""
    if not row["verified"]:
        return "seen on a secondary page only"
    if row["protocol"] == "unknown":
        return "which items and references were scored is not stated"
    if row["protocol"] != task:
        return f"{row['protocol']}: {_SCORED[row['protocol']]}"
    return row["excluded"]


@functools.cache
def read_published() -> dict[str, list[dict[str, Any]]]:
    """All rows of `published.yaml` by data set, every field there."""
    absent = {"trained": None, "METEOR": None, "CIDEr": None, "verified": True, "note": None, "excluded": None}
    content = yaml.safe_load((files("eval") / "published.yaml").read_text("utf-8"))
    return {data_set: [{**absent, **row} for row in found] for data_set, found in content.items()}
