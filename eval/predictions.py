"""Predictions: the record of a sample's prediction, and files of them, our own or another system's."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from msgspec import Struct, structs

from alpha_clip_commands.error_limit import MAX_ERRORS, too_many_errors
from eval.external_formats import TEXT_KEYS, is_nonempty_text, listed, read_references, rows_by_id
from mllm.data import schemas
from mllm.data.samples import RegionSample, TarMember
from mllm.files import replacing_file

PREDICTIONS_FILE = "predictions.jsonl"


class Prediction(Struct, kw_only=True, frozen=True):
    """The prediction for a sample: a line of `predictions.jsonl`.

    Attributes:
        id: Of the sample.
        image: Path relative to the data folder, with forward slashes; "tar!member" inside an archive.
        region: The region as JSON (see `Region.to_json`).
        question: None for a description.
        prompt: The complete prompt.
        prediction: The model's answer; None if there is none.
        truncated: Whether the answer was cut at the token limit.
        error: Why there is no answer.
        references: Correct answers, one or more.
        meta: Other properties of the sample.
    """

    id: str
    image: str | None = None
    region: dict[str, Any] | None = None
    question: str | None = None
    prompt: str | None = None
    prediction: str | None = None
    truncated: bool = False
    error: str | None = None
    references: list[str]
    meta: dict[str, Any] = {}

    @property
    def text(self) -> str:
        """The answer. `read_predictions` omits samples without one."""
        return cast(str, self.prediction)


def prediction_of(
    sample: RegionSample, prompt: str, data: Path, *, text: str | None, truncated: bool, error: str | None
) -> Prediction:
    """The prediction for a sample; `text` is the answer, or None with an `error`."""
    return Prediction(
        id=sample.id,
        image=image_name(sample, data),
        region=sample.regions[0].to_json() if sample.regions else None,
        question=sample.question,
        prompt=prompt,
        prediction=text,
        truncated=truncated,
        error=error,
        references=list(sample.references),
        meta=dict(sample.meta),
    )


def image_name(sample: RegionSample, data: Path) -> str:
    """The image relative to the data folder, so that files do not depend on where the data is."""
    if isinstance(sample.image, TarMember):
        return f"{Path(os.path.relpath(sample.image.tar, data)).as_posix()}!{sample.image.name}"
    return "" if isinstance(sample.image, bytes) else Path(os.path.relpath(sample.image, data)).as_posix()


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Write predictions as JSONL, atomically."""
    with replacing_file(path) as partial, open(partial, "wb") as file:
        file.writelines(map(_line, predictions))


def _line(prediction: Prediction) -> bytes:
    fields = structs.asdict(prediction)
    for name in ("prediction", "error"):
        if fields[name] is None:
            del fields[name]
    if not prediction.truncated:
        del fields["truncated"]
    try:
        return json.dumps(fields, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a file name with bytes that are not text
        return json.dumps(fields).encode() + b"\n"


def read_predictions(
    path: str | os.PathLike,
    references: str | os.PathLike | None = None,
    *,
    allow_missing: bool = False,
    max_errors: float = MAX_ERRORS,
) -> tuple[list[Prediction], list[str]]:
    """Read the predictions of a file, and notes on missing ones.

    Args:
        path: A run's folder or its `predictions.jsonl`; any JSONL with `id`, `prediction` and `references`; or another
            system's results: JSONL or a JSON list of {"image_id", "caption"} (COCO) or {"annotation_id",
            "generated_refexp"} (Google Refexp), or one JSON object of id: caption.
        references: For files without them: JSONL of {"id", "references"}, COCO caption annotations, or MDETR's and
            GLaMM's JSON with the expression in its images or annotations.
        allow_missing: Omit samples without a prediction, with a note, instead of raising an error.
        max_errors: Maximum share of samples that may be omitted.

    Raises:
        ValueError: If a file cannot be read or is empty, an id occurs twice, or the ids are not those of the
            references.
    """
    path = Path(path)
    if path.is_dir() and not (path / PREDICTIONS_FILE).exists():
        raise ValueError(f"{path} is not a run: expected a folder with predictions.jsonl, or a file of predictions")
    path = path / PREDICTIONS_FILE if path.is_dir() else path
    rows = rows_by_id(path)
    if references is None:
        found = [_with_own_references(path, sample_id, row) for sample_id, row in rows.items()]
    else:
        found = _joined(path, rows, Path(references))
    missing = [prediction for prediction in found if prediction.prediction is None]
    if not missing:
        return found, []
    what = f"{len(missing)} of {len(found)} samples have no prediction ({listed([p.id for p in missing])})"
    if not allow_missing or len(missing) == len(found):
        errors = sorted({prediction.error for prediction in found if prediction.error is not None})
        reason = f": {errors[0]}" if errors else ""
        raise ValueError(
            f"{path}: {what}{reason}. Fix them and rerun, or pass --allow-missing (results are marked incomplete)"
        )
    if too_many_errors(len(missing), len(found), max_errors):
        raise ValueError(f"{path}: {what}, more than --max-errors {max_errors:g} allows; nothing was scored")
    return [prediction for prediction in found if prediction.prediction is not None], [f"INCOMPLETE: {what}"]


def _with_own_references(path: Path, sample_id: str, row: dict) -> Prediction:
    references = row.get("references")
    if not isinstance(references, list) or not references or not all(map(is_nonempty_text, references)):
        raise ValueError(
            f"{path}: {sample_id} has no list of 'references' that are not empty; pass a file with --references, or "
            "score a file of {'id', 'prediction', 'references'} lines"
        )
    return _prediction(path, sample_id, row, references)


def _joined(path: Path, rows: Mapping[str, dict], references_path: Path) -> list[Prediction]:
    """The rows in the order of the references; a prediction without text if an id has no row."""
    references = read_references(references_path)
    if unknown := [sample_id for sample_id in rows if sample_id not in references]:
        raise ValueError(
            f"{path}: {len(unknown)} of {len(rows)} ids are not in {references_path} ({listed(unknown)}); are both of "
            "the same dataset and split?"
        )
    return [_prediction(path, sample_id, rows.get(sample_id, {}), texts) for sample_id, texts in references.items()]


def _prediction(path: Path, sample_id: str, row: dict, references: Sequence[str]) -> Prediction:
    """A row of any system as a prediction.

    Raises:
        ValueError: If a field has another type.
    """
    fields = schemas.validate(row, schemas.Prediction, f"{path}: {sample_id}")
    text = next((row[key] for key in TEXT_KEYS if key in row), None) if fields.error is None else None
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{path}: expected text as the prediction of {sample_id}, got {type(text).__name__}")
    return Prediction(
        id=sample_id,
        image=fields.image,
        region=fields.region,
        question=fields.question,
        prompt=fields.prompt,
        prediction=text,
        truncated=bool(fields.truncated or fields.cut),
        error=fields.error,
        references=list(references),
        meta=row.get("meta") or {},
    )
