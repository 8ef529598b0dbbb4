"""A JSONL file of one's own -> `RegionSample`s: {"id"?, "image", "region", "question"?, "answer"} a line.

`image` and `region` are written as for `region-chat --batch`: a path relative to the file, and {"box": [x0, y0, x1,
y1]}, {"mask": path}, {"rle": {...}}, {"polygon": [...]}, {"points": [...], "radius": r} or {"whole": true}. `answer`
(or `references`) is the right answer or a list of them; a line without a question asks for a description. `meta` is
kept. A line that cannot be used is left out, counted and named; of two lines with one id the first is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec import UNSET

from alpha_clip_commands.command_line import one_line
from mllm.data.json_files import json_lines, parse_record
from mllm.data.records import READ, ReadReport
from mllm.data.samples import RegionSample
from mllm.data.schemas import Line, SampleMeta, checked
from vision_tower import Region

DAMAGED = "lines that cannot be used, left out"
REPEATED = "lines with the id of an earlier one, left out"


def read_jsonl(path: str | os.PathLike, *, report: ReadReport | None = None) -> Iterator[RegionSample]:
    """One sample for each line; without an id its number, from 1, is the id.

    Args:
        path: The file.
        report: Filled with what was read and left out, by line; logged in any case.

    Raises:
        ValueError: If the file cannot be read, or too many of its lines cannot be used (`mllm.data.records`).
    """
    path = Path(path)
    folder = path.resolve().parent
    report = ReadReport() if report is None else report
    seen: set[str] = set()
    for number, line in json_lines(path):
        try:
            sample = _sample(folder, number, parse_record(line))
        except (ValueError, OSError, RecursionError) as error:
            report.leave_out(DAMAGED, f"line {number}: {one_line(error)}")
            continue
        if sample.id in seen:
            report.leave_out(REPEATED, f"line {number}: {sample.id}")
            continue
        seen.add(sample.id)
        report.add(READ, sample.id)
        yield sample
    report.finish(str(path), needed=True)


def _sample(folder: Path, number: int, record: Any) -> RegionSample:
    """The sample of a line.

    Raises:
        ValueError: If the record is something else.
    """
    line = checked(record, Line)
    meta = {} if line.meta is UNSET else line.meta
    checked(meta, SampleMeta, "meta")
    region = region_in(folder, line.region)
    sample_id = str(number if line.id is UNSET else line.id)
    return RegionSample(sample_id, str(folder / line.image), (region,), line.question, _references(line), meta=meta)


def region_in(folder: Path, region: Any) -> Region:
    """The region of a line of a file in `folder`, which a mask's path is relative to.

    Raises:
        ValueError: As `Region.from_json`.
    """
    if isinstance(region, dict) and isinstance(region.get("mask"), str) and not region["mask"].startswith("data:"):
        region = {**region, "mask": str(folder / region["mask"])}
    return Region.from_json(region)


def _references(line: Line) -> tuple[str, ...]:
    if (line.answer is UNSET) == (line.references is UNSET):
        raise ValueError('expected "answer" or "references", and not both')
    value = line.references if line.answer is UNSET else line.answer
    texts = [value] if isinstance(value, str) else value
    if not texts or not all(text.strip() for text in texts):
        raise ValueError(f"expected the answer as text or a list of texts, none of them empty, got {value!r:.100}")
    return tuple(texts)
