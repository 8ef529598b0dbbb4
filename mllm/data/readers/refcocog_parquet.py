"""Reads RefCOCOg from the parquet files of lmms-lab-encoder/RefCOCOg on the Hub, which contain the images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alpha_clip_commands.command_line import one_line
from mllm.data.read_report import MALFORMED, READ, ReadReport
from mllm.data.samples import RegionSample
from mllm.data.schemas import ParquetRow, validate
from vision_tower import Region

NO_TEXT = "skipped: no text"
_REQUIRED = ("image", "answer", "bbox")
_OPTIONAL = ("file_name",)


def read_refcocog_parquet(root: str | os.PathLike, *, report: ReadReport | None = None) -> Iterator[RegionSample]:
    """One sample per row; all answers of a row are its references.

    Args:
        root: Folder of the files.
        report: Filled with the counts of read and skipped rows, which are also logged.

    Raises:
        ValueError: If no file is found, a file is damaged or lacks a column, pyarrow is not installed, or more than
            `MAX_ERRORS` of the rows cannot be used.
    """
    files = sorted(Path(root).rglob("*.parquet"))
    if not files:
        raise ValueError(f"no parquet files in {root}; expected those of lmms-lab-encoder/RefCOCOg")
    report = ReadReport() if report is None else report
    number = 0
    for file in files:
        for row in _rows(file):
            if (sample := _sample(number, row, report)) is not None:
                yield sample
            number += 1
    report.finish(f"{root}: rows", required=True)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file.

    Raises:
        ValueError: If it is damaged or lacks a column.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError("reading parquet files requires pyarrow: pip install datasets") from None
    try:
        with parquet.ParquetFile(path) as file:
            if missing := set(_REQUIRED) - set(file.schema_arrow.names):
                raise ValueError(f"missing columns: {', '.join(sorted(missing))}; expected rows of lmms-lab's RefCOCOg")
            columns = [name for name in (*_REQUIRED, *_OPTIONAL) if name in file.schema_arrow.names]
            for batch in file.iter_batches(64, columns=columns):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {one_line(error)}") from error


def _sample(number: int, record: dict[str, Any], report: ReadReport) -> RegionSample | None:
    """The sample of a row, whose box is x, y, width, height in pixels; None (counted) if it cannot be used."""
    name = f"row-{number}"
    try:
        row = validate(record, ParquetRow, name)
        x, y, width, height = row.bbox
        region = Region.from_box(x, y, x + width, y + height)
    except ValueError as error:
        report.skip(MALFORMED, str(error))
        return None
    answers = tuple(text for text in row.answer if text.strip())
    if not answers:
        report.skip(NO_TEXT, name)
        return None
    report.add(READ, name)
    # several rows can have the same image, which only its file name shows
    meta = {"image_id": row.file_name} if row.file_name else {}
    return RegionSample(name, row.image.content, (region,), None, answers, meta=meta)
