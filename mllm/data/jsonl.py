"""A JSONL file of one's own -> `RegionSample`s: {"id"?, "image", "region", "question"?, "answer"} a line.

`image` and `region` are written as for `region-chat --batch`: a path relative to the file, and {"box": [x0, y0, x1,
y1]}, {"mask": path}, {"rle": {...}}, {"polygon": [...]}, {"points": [...], "radius": r} or {"whole": true}. `answer`
(or `references`) is the right answer or a list of them; a line without a question asks for a description. `meta` is
kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mllm.data.samples import RegionSample
from vision_tower import Region

_KEYS = {"id", "image", "region", "question", "answer", "references", "meta"}


def read_jsonl(path: str | os.PathLike) -> Iterator[RegionSample]:
    """One sample for each line; without an id its number, from 1, is the id.

    Raises:
        ValueError: If the file cannot be read, or a line is damaged, incomplete or has the id of an earlier one. The
            line is named.
    """
    path = Path(path)
    seen: set[str] = set()
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    sample = _sample(path.resolve().parent, number, json.loads(line))
                    if sample.id in seen:
                        raise ValueError(f"the id {sample.id!r} occurs again; ids must differ")
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}, column {error.colno}: {error.msg}") from error
                except (ValueError, OSError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
                seen.add(sample.id)
                yield sample
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _sample(folder: Path, number: int, record: Any) -> RegionSample:
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    if unknown := record.keys() - _KEYS:
        raise ValueError(f"unknown keys {sorted(unknown)}; expected {', '.join(sorted(_KEYS))}")
    sample_id, image = record.get("id", number), record.get("image")
    if not isinstance(sample_id, str | int) or isinstance(sample_id, bool):
        raise ValueError(f"expected the id as text or a number, got {sample_id!r}")
    if not isinstance(image, str) or not isinstance(record.get("region"), dict):
        raise ValueError('expected "image": path and "region": {...} ({"whole": true} for the whole image)')
    question = record.get("question")
    if question is not None and not isinstance(question, str):
        raise ValueError(f"expected the question as text, got {question!r}")
    meta = record.get("meta", {})
    if not isinstance(meta, Mapping):
        raise ValueError(f"expected meta as an object, got {meta!r}")
    region = region_in(folder, record["region"])
    return RegionSample(str(sample_id), str(folder / image), (region,), question, _references(record), meta=dict(meta))


def region_in(folder: Path, region: Any) -> Region:
    """The region of a line of a file in `folder`, which a mask's path is relative to.

    Raises:
        ValueError: As `Region.from_json`.
    """
    if isinstance(region, dict) and isinstance(region.get("mask"), str) and not region["mask"].startswith("data:"):
        region = {**region, "mask": str(folder / region["mask"])}
    return Region.from_json(region)


def _references(record: dict) -> tuple[str, ...]:
    if ("answer" in record) == ("references" in record):
        raise ValueError('expected "answer" or "references", and not both')
    value = record["answer"] if "answer" in record else record["references"]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"expected the answer as text or a list of texts, got {value!r}")
    return tuple(texts)
