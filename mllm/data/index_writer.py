"""Writes a region index (`mllm.data.index`) from samples."""

from __future__ import annotations

import dataclasses
import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from alpha_clip_commands.progress import step
from mllm.data.index import FORMAT, Turn, import_datasets
from mllm.data.json_files import read_json
from mllm.data.read_report import ReadReport
from mllm.data.samples import RegionSample, TarMember
from mllm.files import write_json
from mllm.folders import MARKER, replacing_folder
from vision_tower import Region

_ROWS_PER_WRITE = 20_000

SplitSample = tuple[str, RegionSample]  # split, sample
_Key = tuple[str, Any, Any]  # split, image id, region id


@step("indexing the data")
def write_index(
    out: str | os.PathLike,
    root: str | os.PathLike,
    regions: Iterable[SplitSample],
    more: Iterable[SplitSample] = (),
    *,
    layout: str,
    reports: Mapping[str, ReadReport] | None = None,
) -> dict[str, Any]:
    """Write an index and return the content of its `index.json`.

    Samples of one region (its box, its mask, its description, questions about it) become one row.

    Args:
        out: Folder of the index: new, empty, or an existing index, which is replaced atomically.
        root: Folder of the dataset. Image paths are stored relative to it.
        regions: (split, sample), one region per sample, with `image_id` and, unless the region is the whole image,
            `region_id` in `meta`. Samples of an image must be consecutive; only one image is held in memory.
        more: Further samples of the same or other regions, in any order; held in memory. A sample without a region
            refers to the region of its `region_id`; if that region does not exist, the sample is skipped and counted.
        layout: Name of the dataset's layout, for information.
        reports: Reports of the readers by name; what they skipped is stored in `index.json`.

    Raises:
        ValueError: If a sample has no `image_id`; if `out` is not an index, is `root` or contains it, or is being
            written by another process; or if a reader fails.
        OSError: If the folder cannot be written.
    """
    with replacing_folder(out, "index", reads=[root], known=_is_unmarked_index) as partial:
        writer = _TableWriter(partial, root)
        turns_without_region = _write_rows(writer, regions, more)
        info = {
            "format": FORMAT,
            "layout": layout,
            "root": os.path.relpath(os.path.realpath(root), os.path.realpath(out)),
            "turns_without_region": turns_without_region,
            **writer.close(),
            "skipped": [
                {"reader": name, "reason": reason, "count": count, "examples": report.examples[reason]}
                for name, report in (reports or {}).items()
                for reason, count in report.problems().items()
            ],
        }
        write_json(partial / "index.json", info)
    return info


def _is_unmarked_index(folder: Path) -> bool:
    """Whether a folder contains only an index written before folders were marked."""
    if {file.name for file in folder.iterdir()} - {MARKER} != {"index.json", "pictures.arrow", "regions.arrow"}:
        return False
    try:
        info = read_json(folder / "index.json", dict)
    except ValueError:
        return False
    return {"format", "made_of", "root"} <= info.keys()


def _write_rows(writer: _TableWriter, regions: Iterable[SplitSample], more: Iterable[SplitSample]) -> int:
    """Write all rows; returns the number of turns whose region does not exist."""
    further: dict[_Key, _Row] = {}
    for split, sample in more:
        _merge(further, split, sample)
    for rows in _by_image(regions):
        for key, row in rows.items():
            if (other := further.pop(key, None)) is not None:
                row.add(other.sample, other.geometries, other.turns)
        writer.write(rows)
    writer.write({key: row for key, row in further.items() if row.geometries})
    return sum(len(row.turns) for row in further.values() if not row.geometries)


@dataclasses.dataclass(slots=True)
class _Row:
    """A region while it is collected. Lists instead of dicts save memory: there can be a million rows."""

    sample: RegionSample | None
    geometries: list[Region]
    turns: list[Turn]

    def add(self, sample: RegionSample | None, geometries: Iterable[Region], turns: Iterable[Turn]) -> None:
        self.sample = self.sample or sample
        self.geometries += [region for region in geometries if region not in self.geometries]
        self.turns += [turn for turn in turns if turn not in self.turns]


def _merge(rows: dict[_Key, _Row], split: str, sample: RegionSample) -> None:
    """Add a sample to the row of its region."""
    meta = sample.meta
    if "image_id" not in meta:
        raise ValueError(f"sample {sample.id} has no image_id, which an index requires")
    kind = "description" if sample.question is None else meta.get("type", "question")
    key = (split, meta["image_id"], meta.get("region_id"))
    if (row := rows.get(key)) is None:
        row = rows[key] = _Row(None, [], [])
    turns = [(kind, sample.question, answer) for answer in sample.references]
    row.add(sample if sample.regions else None, sample.regions, turns)


def _by_image(samples: Iterable[SplitSample]) -> Iterator[dict[_Key, _Row]]:
    """The rows of one image at a time."""
    rows: dict[_Key, _Row] = {}
    current = None
    for split, sample in samples:
        image = split, sample.meta.get("image_id")
        if image != current and rows:
            yield rows
            rows = {}
        current = image
        _merge(rows, split, sample)
    if rows:
        yield rows


class _TableWriter:
    """Writes both Arrow tables in blocks of rows."""

    def __init__(self, folder: Path, root: str | os.PathLike) -> None:
        datasets = import_datasets()
        integer, text = datasets.Value("int64"), datasets.Value("string")
        self.columns = {
            "images": {
                "image_id": text,
                "path": text,
                "member": text,
                "offset": integer,
                "size": integer,
                "width": integer,
                "height": integer,
                "split": text,
            },
            "regions": {
                "image_row": integer,
                "region_id": integer,
                "geometries": datasets.List(text),
                "turns": datasets.List({"kind": text, "question": text, "answer": text}),
                "length": integer,
            },
        }
        self.tables = {
            name: datasets.arrow_writer.ArrowWriter(
                path=str(folder / f"{name}.arrow"), features=datasets.Features(columns)
            )
            for name, columns in self.columns.items()
        }
        self.pending: dict[str, list[tuple]] = {name: [] for name in self.columns}
        self.root = str(root)
        self.image_rows: dict[tuple, int] = {}
        self.splits: Counter = Counter()

    def write(self, rows: dict[_Key, _Row]) -> None:
        """Add rows; all rows are on disk after `close`."""
        for (split, image_id, region_id), row in rows.items():
            image_row = self._image_row(split, image_id, row.sample)
            turns = [dict(zip(("kind", "question", "answer"), turn, strict=True)) for turn in row.turns]
            length = max(len(question or "") + len(answer) for _, question, answer in row.turns)
            geometries = [json.dumps(region.to_json()) for region in row.geometries]
            self.pending["regions"].append((image_row, region_id, geometries, turns, length))
            self.splits[split] += 1
        if len(self.pending["regions"]) >= _ROWS_PER_WRITE:
            self._flush()

    def close(self) -> dict[str, Any]:
        """Write the remaining rows; returns the counts."""
        self._flush()
        for table in self.tables.values():
            table.finalize()
        return {
            "images": len(self.image_rows),
            "regions": self.splits.total(),
            "splits": dict(sorted(self.splits.items())),
        }

    def _image_row(self, split: str, image_id: Any, sample: RegionSample) -> int:
        """The row of the sample's image, which is added if it is new."""
        key = split, image_id
        if (row := self.image_rows.get(key)) is None:
            if isinstance(sample.image, bytes):
                raise ValueError(f"sample {sample.id}: an index requires image files, got an image as bytes")
            file, *member = sample.image if isinstance(sample.image, TarMember) else (sample.image, None, None, None)
            path = posixpath.join(*Path(os.path.relpath(file, self.root)).parts)
            size = sample.meta.get("width"), sample.meta.get("height")
            row = self.image_rows[key] = len(self.image_rows)
            self.pending["images"].append((str(image_id), path, *member, *size, split))
        return row

    def _flush(self) -> None:
        for name, rows in self.pending.items():
            if rows:
                columns = zip(self.columns[name], zip(*rows, strict=True), strict=True)
                self.tables[name].write_batch({column: list(values) for column, values in columns})
                rows.clear()
