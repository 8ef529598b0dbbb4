"""Reads a JSONL file of your own: {"id"?, "image", "region", "question"?, "answer", "meta"?} per line.

`image` is a path relative to the file. `region` is {"box": [x0, y0, x1, y1]}, {"mask": path}, {"rle": {...}},
{"polygon": [...]}, {"points": [...], "radius": r} or {"whole": true}, as for `region-chat --batch`. `answer` (or
`references`) is the correct answer, or a list of them. A line without a question asks for a description. Lines that
cannot be used are skipped and counted; if an id is repeated, the first line is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec import UNSET

from alpha_clip_commands.command_line import one_line
from mllm.data.json_files import json_lines, parse_record
from mllm.data.read_report import READ, ReadReport
from mllm.data.samples import RegionSample
from mllm.data.schemas import JsonlSample, SampleMeta, validate
from vision_tower import Region

INVALID_LINE = "lines skipped: not in the expected format"
DUPLICATE_LINE = "lines skipped: duplicate id"


def read_jsonl(path: str | os.PathLike, *, report: ReadReport | None = None) -> Iterator[RegionSample]:
    """One sample per line. The id of a line without one is its number, from 1.

    Args:
        path: The file.
        report: Filled with the counts of read and skipped lines, which are also logged.

    Raises:
        ValueError: If the file cannot be read, or more than `MAX_ERRORS` of its lines cannot be used.
    """
    path = Path(path)
    folder = path.resolve().parent
    report = ReadReport() if report is None else report
    seen: set[str] = set()
    for number, line in json_lines(path):
        try:
            sample = _sample(folder, number, parse_record(line))
        except (ValueError, OSError, RecursionError) as error:
            report.skip(INVALID_LINE, f"line {number}: {one_line(error)}")
            continue
        if sample.id in seen:
            report.skip(DUPLICATE_LINE, f"line {number}: {sample.id}")
            continue
        seen.add(sample.id)
        report.add(READ, sample.id)
        yield sample
    report.finish(str(path), required=True)


def _sample(folder: Path, number: int, record: Any) -> RegionSample:
    """The sample of a line.

    Raises:
        ValueError: If the record is not in the expected format.
    """
    line = validate(record, JsonlSample)
    meta = {} if line.meta is UNSET else line.meta
    validate(meta, SampleMeta, "meta")
    region = region_from_record(folder, line.region)
    sample_id = str(number if line.id is UNSET else line.id)
    return RegionSample(sample_id, str(folder / line.image), (region,), line.question, _references(line), meta=meta)


def region_from_record(folder: Path, region: Any) -> Region:
    """The `region` of a line; the path of a mask is relative to `folder`.

    Raises:
        ValueError: As for `Region.from_json`.
    """
    if isinstance(region, dict) and isinstance(region.get("mask"), str) and not region["mask"].startswith("data:"):
        region = {**region, "mask": str(folder / region["mask"])}
    return Region.from_json(region)


def _references(line: JsonlSample) -> tuple[str, ...]:
    if (line.answer is UNSET) == (line.references is UNSET):
        raise ValueError('expected either "answer" or "references"')
    value = line.references if line.answer is UNSET else line.answer
    texts = [value] if isinstance(value, str) else value
    if not texts or not all(text.strip() for text in texts):
        raise ValueError(f"expected the answer as text or a list of texts, none of them empty, got {value!r:.100}")
    return tuple(texts)
