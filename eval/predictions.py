"""Predictions on disk: our own `predictions.jsonl`, and other systems' files joined with their references."""

from __future__ import annotations

import json
import os
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alpha_clip_commands.error_limit import MAX_ERRORS, too_many_errors
from mllm.data.json_files import check_unique, is_utf8, read_json_or_lines, serializable_records
from mllm.data.samples import RegionSample, TarMember
from mllm.data.schemas import Prediction, validate
from mllm.files import replacing_file

# Names under which the files of the field keep the id and the text of a result, and the texts of a reference.
_ID_KEYS = ("id", "image_id", "annotation_id", "ann_id", "question_id")
_TEXT_KEYS = ("prediction", "caption", "generated_refexp", "answer", "text")
_REFERENCE_KEYS = ("references", "caption", "answer", "refexp")
_NAMED = 5  # ids named in a message


def record_of(sample: RegionSample, prompt: str, answer: Mapping[str, Any], data: Path) -> dict[str, Any]:
    """A line of `predictions.jsonl`. `answer` holds "prediction", or "error" for a sample that could not be answered.

    The image is named relative to the data folder, so that the file is the same wherever the data lies.
    """
    return {
        "id": sample.id,
        "image": image_name(sample, data),
        "region": sample.regions[0].to_json() if sample.regions else None,
        "question": sample.question,
        "prompt": prompt,
        **answer,
        "references": list(sample.references),
        "meta": dict(sample.meta),
    }


def image_name(sample: RegionSample, data: Path) -> str:
    """The image relative to the data folder, with forward slashes; "tar!member" inside an archive."""
    if isinstance(sample.image, TarMember):
        return f"{Path(os.path.relpath(sample.image.tar, data)).as_posix()}!{sample.image.name}"
    return "" if isinstance(sample.image, bytes) else Path(os.path.relpath(sample.image, data)).as_posix()


def write_predictions(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records, one a line; the file is there only when it is whole."""
    with replacing_file(path) as partial, open(partial, "wb") as file:
        file.writelines(_line(record) for record in records)


def _line(record: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a file name with bytes that are not text
        return json.dumps(record).encode() + b"\n"


def read_predictions(
    path: str | os.PathLike,
    references: str | os.PathLike | None = None,
    *,
    allow_missing: bool = False,
    max_errors: float = MAX_ERRORS,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of a file of predictions, and a note for each thing that was left out.

    Args:
        path: A run's folder or its `predictions.jsonl`; any JSONL with `id`, `prediction` and `references`; or another
            system's results: JSONL or a JSON list of {"image_id", "caption"} (COCO) or {"annotation_id",
            "generated_refexp"} (Google Refexp), or one JSON object of id: caption.
        references: For files without them: JSONL of {"id", "references"}, COCO caption annotations, or MDETR's and
            GLaMM's JSON with the expression in its images or annotations.
        allow_missing: Leave out samples without a prediction (and say so) instead of refusing the file.
        max_errors: Share of the samples that may be left out, at most.

    Raises:
        ValueError: If a file cannot be read, is empty, holds an id twice, or its ids are not those of the references.
    """
    path = Path(path)
    if path.is_dir() and not (path / "predictions.jsonl").exists():
        raise ValueError(f"{path} is not a run: expected a folder with predictions.jsonl, or a file of predictions")
    path = path / "predictions.jsonl" if path.is_dir() else path
    results = _by_id(path, _rows(path), _TEXT_KEYS)
    if references is None:
        records = [_complete(path, sample_id, row) for sample_id, row in results.items()]
    else:
        records = _joined(path, results, Path(references))
    missing = [record["id"] for record in records if record["prediction"] is None]
    if not missing:
        return records, []
    what = f"{len(missing)} of {len(records)} samples have no prediction ({_named(missing)})"
    if not allow_missing or len(missing) == len(records):
        errors = {record["error"] for record in records if record.get("error") is not None}
        why = f": {sorted(errors)[0]}" if errors else ""
        raise ValueError(
            f"{path}: {what}{why}. Fix them and rerun, or pass --allow-missing (results are marked incomplete)"
        )
    if too_many_errors(len(missing), len(records), max_errors):
        raise ValueError(f"{path}: {what}, more than --max-errors {max_errors:g} allows; nothing was scored")
    return [record for record in records if record["prediction"] is not None], [f"INCOMPLETE: {what}"]


def _complete(path: Path, sample_id: str, row: dict) -> dict[str, Any]:
    """One of our own lines, checked."""
    references = row.get("references")
    if not isinstance(references, list) or not references or not all(map(_is_words, references)):
        raise ValueError(
            f"{path}: {sample_id} has no list of 'references', texts that are not empty; give a file of them with "
            "--references, or score a file of {'id', 'prediction', 'references'} lines"
        )
    return {**row, "id": sample_id, "prediction": _text(path, sample_id, row), "meta": row.get("meta") or {}}


def _is_words(value: Any) -> bool:
    """Whether a value is text that is not empty or blank: a reference."""
    return isinstance(value, str) and bool(value.strip()) and is_utf8(value)


def _text(path: Path, sample_id: str, row: dict) -> str | None:
    """The prediction of a row, all of whose fields are checked; None where there is none."""
    if validate(row, Prediction, f"{path}: {sample_id}").error is not None:
        return None
    value = next((row[key] for key in _TEXT_KEYS if key in row), None)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{path}: expected text as the prediction of {sample_id}, got {type(value).__name__}")
    return value


def _joined(path: Path, results: dict[str, dict], references_path: Path) -> list[dict[str, Any]]:
    """The results in the order of the references; every id must be in both."""
    references = read_references(references_path)
    if unknown := [sample_id for sample_id in results if sample_id not in references]:
        raise ValueError(
            f"{path}: {len(unknown)} of {len(results)} ids are unknown to {references_path} ({_named(unknown)}); "
            "are both of the same data set and split?"
        )
    records = []
    for sample_id, texts in references.items():
        row = results.get(sample_id, {})
        text = _text(path, sample_id, row) if row else None
        kept = {key: row[key] for key in ("error", "question", "image", "region") if key in row}
        records.append(
            {"id": sample_id, **kept, "prediction": text, "references": texts, "meta": row.get("meta") or {}}
        )
    return records


def read_references(path: str | os.PathLike) -> dict[str, list[str]]:
    """The references by id: all texts of an id in the order of the file.

    Raises:
        ValueError: If the file is none of the forms that `read_predictions` names.
    """
    path = Path(path)
    references: dict[str, list[str]] = {}
    whole: Counter = Counter()  # rows that say of an id all there is
    for row in _reference_rows(path, read_json_or_lines(path, _is_line)):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: expected references as objects with an id, got {reprlib.repr(row)}")
        sample_id, value = _id(path, row, without="image_id" in row), _first(row, _REFERENCE_KEYS)
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(map(_is_words, texts)):
            raise ValueError(
                f"{path}: {sample_id} has no reference, text that is not empty, under one of "
                f"{', '.join(_REFERENCE_KEYS)}"
            )
        whole[sample_id] += "references" in row
        references.setdefault(sample_id, []).extend(texts)
    if not references:
        raise ValueError(f"{path} holds no reference")
    check_unique(whole.elements(), f"{path}: ids of references")
    return references


def _reference_rows(path: Path, content: Any) -> Iterable[Any]:
    if isinstance(content, dict) and isinstance(rows := content.get("annotations"), list):
        images = content.get("images", [])
        for name, entries in (("annotations", rows), ("images", images)):
            if not isinstance(entries, list):
                raise ValueError(f"{path}: expected a list of {name}, got {reprlib.repr(entries)}")
            ids = (row["id"] for row in entries if isinstance(row, dict) and isinstance(row.get("id"), int | str))
            check_unique(ids, f"{path}: ids of {name}")
        captioned = bool(rows) and isinstance(rows[0], dict) and "caption" in rows[0]
        return rows if captioned else images  # MDETR: the expression is its image's caption
    if isinstance(content, dict):  # by id: a list of texts, or of {"caption": ...}
        if wrong := [key for key, values in content.items() if not isinstance(values, list)]:
            raise ValueError(f"{path}: expected a list of references for each id, got none for {_named(wrong)}")
        return [_entry(key, value) for key, values in content.items() for value in values]
    return content


def _entry(key: str, value: Any) -> dict:
    text = value.get("caption") if isinstance(value, dict) else value
    return {"id": key, "caption": text}


def _rows(path: Path) -> Iterable[Any]:
    content = read_json_or_lines(path, _is_line)
    if not isinstance(content, dict):
        return content
    if others := [key for key, value in content.items() if not isinstance(value, str)]:
        raise ValueError(
            f"{path}: expected an object of id: caption, or predictions with an id each (a list of {{'image_id', "
            f"'caption'}}, or one a line), got an object with {reprlib.repr(content[others[0]])} under "
            f"{reprlib.repr(others[0])}"
        )
    return serializable_records(path, ({"id": key, "prediction": text} for key, text in content.items()))


def _by_id(path: Path, rows: Iterable[Any], keys: Sequence[str]) -> dict[str, dict]:
    by_id: dict[str, dict] = {}
    twice = []
    for row in rows:
        if not isinstance(row, dict) or not (row.keys() & {*keys, "error"}):
            raise ValueError(
                f"{path}: expected objects with an id and one of {', '.join(keys)}, got {reprlib.repr(row)}"
            )
        # COCO's annotations and MDETR's have ids of their own beside `image_id`; results have only that
        sample_id = _id(path, row, without=False)
        if sample_id in by_id:
            twice.append(sample_id)
        by_id[sample_id] = row
    if twice:
        raise ValueError(f"{path}: ids must differ, but {len(twice)} occur again ({_named(twice)})")
    if not by_id:
        raise ValueError(f"{path} is empty: it holds no prediction")
    return by_id


def _id(path: Path, row: Any, without: bool) -> str:
    """The id of a row as text; `without` passes over "id", which in COCO's annotations is not what results name."""
    value = _first(row, _ID_KEYS[without:]) if isinstance(row, dict) else None
    if not isinstance(value, str | int) or isinstance(value, bool) or not is_utf8(str(value)):
        raise ValueError(
            f"{path}: expected an id (text or whole number) under {', '.join(_ID_KEYS)}, got {reprlib.repr(row)}"
        )
    return str(value)


def _first(row: Mapping, keys: Sequence[str]) -> Any:
    return next((row[key] for key in keys if key in row), None)


def _is_line(row: dict) -> bool:
    """Whether the only object of a file is a line of JSONL, and not an object of id: caption: {"id": "a cat"} is one
    whose id is "id".
    """
    named = row.keys() & {*_TEXT_KEYS, *_REFERENCE_KEYS, "error"}
    captions = all(isinstance(value, str) for value in row.values())
    return isinstance(_first(row, _ID_KEYS), str | int) and (bool(named) or not captions)


def _named(ids: Sequence[str]) -> str:
    return ", ".join(ids[:_NAMED]) + (" ..." if len(ids) > _NAMED else "")
