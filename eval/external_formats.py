"""Files of predictions and references as other systems write them: JSONL, COCO, MDETR, GLaMM, Google Refexp."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm.data.json_files import check_unique, is_utf8, read_json_or_lines, serializable_records

# Keys of the id and text of a result, and of the texts of a reference, in the formats that are read.
_ID_KEYS = ("id", "image_id", "annotation_id", "ann_id", "question_id")
TEXT_KEYS = ("prediction", "caption", "generated_refexp", "answer", "text")
_REFERENCE_KEYS = ("references", "caption", "answer", "refexp")
_MAX_LISTED = 5  # ids in a message


def rows_by_id(path: Path) -> dict[str, dict]:
    """The rows of a file of predictions by id.

    Raises:
        ValueError: If the file cannot be read or is empty, a row has no id or text, or an id occurs twice.
    """
    by_id: dict[str, dict] = {}
    repeated = []
    for row in _prediction_rows(path):
        if not isinstance(row, dict) or not (row.keys() & {*TEXT_KEYS, "error"}):
            raise ValueError(
                f"{path}: expected objects with an id and one of {', '.join(TEXT_KEYS)}, got {reprlib.repr(row)}"
            )
        # unlike annotations of COCO and MDETR, results with an `image_id` have no other id
        sample_id = _id(path, row, _ID_KEYS)
        if sample_id in by_id:
            repeated.append(sample_id)
        by_id[sample_id] = row
    if repeated:
        raise ValueError(f"{path}: ids must differ, but {len(repeated)} occur again ({listed(repeated)})")
    if not by_id:
        raise ValueError(f"{path} is empty: expected predictions")
    return by_id


def _prediction_rows(path: Path) -> Iterable[Any]:
    content = read_json_or_lines(path, _is_jsonl_row)
    if not isinstance(content, dict):
        return content
    if others := [key for key, value in content.items() if not isinstance(value, str)]:
        raise ValueError(
            f"{path}: expected an object of id: caption, or predictions with an id each (a list of {{'image_id', "
            f"'caption'}}, or one per line), got an object with {reprlib.repr(content[others[0]])} under "
            f"{reprlib.repr(others[0])}"
        )
    return serializable_records(path, ({"id": key, "prediction": text} for key, text in content.items()))


def read_references(path: Path) -> dict[str, list[str]]:
    """The references by id, all texts of an id in the order of the file.

    Raises:
        ValueError: If the file has none of the formats that `eval.predictions.read_predictions` lists.
    """
    references: dict[str, list[str]] = {}
    complete: Counter = Counter()  # rows that have all references of an id
    for row in _reference_rows(path, read_json_or_lines(path, _is_jsonl_row)):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: expected references as objects with an id, got {reprlib.repr(row)}")
        # in COCO's annotations, the id that results refer to is `image_id`, not `id`
        sample_id = _id(path, row, _ID_KEYS[1:] if "image_id" in row else _ID_KEYS)
        value = _first(row, _REFERENCE_KEYS)
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(map(is_nonempty_text, texts)):
            raise ValueError(
                f"{path}: {sample_id} has no reference: expected text that is not empty under one of "
                f"{', '.join(_REFERENCE_KEYS)}"
            )
        complete[sample_id] += "references" in row
        references.setdefault(sample_id, []).extend(texts)
    if not references:
        raise ValueError(f"{path} is empty: expected references")
    check_unique(complete.elements(), f"{path}: ids of references")
    return references


def _reference_rows(path: Path, content: Any) -> Iterable[Any]:
    if isinstance(content, dict) and isinstance(annotations := content.get("annotations"), list):
        return _annotation_rows(path, annotations, content.get("images", []))
    if isinstance(content, dict):  # by id: a list of texts, or of {"caption": ...}
        if wrong := [key for key, values in content.items() if not isinstance(values, list)]:
            raise ValueError(f"{path}: expected a list of references for each id, got no list for {listed(wrong)}")
        return [_reference_row(key, value) for key, values in content.items() for value in values]
    return content


def _annotation_rows(path: Path, annotations: list, images: Any) -> list:
    """The captions of COCO's annotations, or of MDETR's images."""
    for name, entries in (("annotations", annotations), ("images", images)):
        if not isinstance(entries, list):
            raise ValueError(f"{path}: expected a list of {name}, got {reprlib.repr(entries)}")
        ids = (row["id"] for row in entries if isinstance(row, dict) and isinstance(row.get("id"), int | str))
        check_unique(ids, f"{path}: ids of {name}")
    captioned = bool(annotations) and isinstance(annotations[0], dict) and "caption" in annotations[0]
    return annotations if captioned else images


def _reference_row(key: str, value: Any) -> dict:
    return {"id": key, "caption": value.get("caption") if isinstance(value, dict) else value}


def is_nonempty_text(value: Any) -> bool:
    """Whether a value is text that is neither empty nor blank."""
    return isinstance(value, str) and bool(value.strip()) and is_utf8(value)


def listed(ids: Sequence[str]) -> str:
    """The first ids, for a message."""
    return ", ".join(ids[:_MAX_LISTED]) + (" ..." if len(ids) > _MAX_LISTED else "")


def _id(path: Path, row: dict, keys: Sequence[str]) -> str:
    value = _first(row, keys)
    if not isinstance(value, str | int) or isinstance(value, bool) or not is_utf8(str(value)):
        raise ValueError(
            f"{path}: expected an id (text or integer) under {', '.join(_ID_KEYS)}, got {reprlib.repr(row)}"
        )
    return str(value)


def _first(row: Mapping, keys: Sequence[str]) -> Any:
    return next((row[key] for key in keys if key in row), None)


def _is_jsonl_row(row: dict) -> bool:
    """Whether the only object of a file is a row of JSONL, not an object of id: caption such as {"id": "a cat"}."""
    named = row.keys() & {*TEXT_KEYS, *_REFERENCE_KEYS, "error"}
    captions = all(isinstance(value, str) for value in row.values())
    return isinstance(_first(row, _ID_KEYS), str | int) and (bool(named) or not captions)
