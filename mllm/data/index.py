"""A memory-mapped index of a data set's regions: what training reads, at any size.

A folder with two Arrow tables and `index.json`, which says what they were made of. Visual Genome's 5.4 million regions
open at once and cost no memory that the system could not take back.

`pictures.arrow`, a row a picture and split: `image_id`, `image` (path from the data's folder), `member`, `offset`,
`size` (where `image` is a tar: the picture's name in it and its place in bytes; else null), `width`, `height` in pixels
(null: not stated), `split`. `regions.arrow`, a row a region, those of one picture side by side: `picture` (its
row), `region_id` (null: the whole image), `forms` (JSON: the same region as box, as mask ...), `turns` (kind, question
or null for a description, answer), `length` (characters of the longest turn).
"""

from __future__ import annotations

import dataclasses
import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alpha_clip_commands.progress import step
from mllm.data.json_files import read_json
from mllm.data.records import READ, ReadReport
from mllm.data.samples import RegionSample, TarMember
from mllm.data.schemas import IndexRecord, checked
from mllm.files import write_json
from mllm.folders import MARKER, replacing_folder
from vision_tower import Region

FORMAT = 2
TRAIN, HELD_OUT = "train", "val"
INDEX_FOLDER = "region_index"  # beside the data set's own files
_WRITTEN_AT_ONCE = 20_000  # rows
_NEEDED = "an index of regions needs the package datasets: pip install datasets"

Turn = tuple[str, str | None, str]  # kind, question (None: a description), answer


@dataclasses.dataclass(frozen=True, slots=True)
class RegionFacts:
    """A region with all that can be asked about it.

    `sample` opens and checks the picture; its region is the first of `forms`, the same region in several forms (box,
    mask). A turn's kind is what the data set calls its questions' type, or "description" or "question".
    """

    sample: RegionSample
    forms: tuple[Region, ...]
    turns: tuple[Turn, ...]

    def form(self, wanted: str) -> Region:
        """The region as "box", as "mask" (any form that is no box), or "available": its mask where it has one.

        Raises:
            ValueError: If it has no such form.
        """
        boxes = [form for form in self.forms if form.kind in ("box", "nbox")]
        others = [form for form in self.forms if form.kind not in ("box", "nbox")]
        found = {"box": boxes, "mask": others, "available": others or boxes}[wanted]
        if not found:
            other = "box" if boxes else "mask"
            raise ValueError(f"region {self.sample.id} has no {wanted}; use region_input: {other}, or available")
        return found[0]


class RegionIndex:
    """An index on disk.

    Attributes:
        picture_of: Row of its picture for each region (N,), int32.
        length_of: Characters of its longest turn for each region (N,), int32.
        is_whole: Whether each row is about the whole image, bool (N,).
        split_of_picture: Split of each picture, text (P,).
    """

    def __init__(self, folder: str | os.PathLike, root: str | os.PathLike | None = None) -> None:
        """Open an index.

        Args:
            folder: The index, or the data set's folder, in which it is `region_index`.
            root: Folder of the pictures, if the data was moved; by default the one that the index names.

        Raises:
            ValueError: If there is none, it is of another version, or was not written to its end.
        """
        data, folder = folder, index_folder(folder)
        if folder is None:
            raise ValueError(f"expected a region index in {data}; make it: alpha-clip prepare ...")
        self.folder = folder
        self.record = read_json(folder / "index.json", dict)
        if self.record.get("format") != FORMAT:
            raise ValueError(f"{folder} has format {self.record.get('format')}, this is for {FORMAT}; make it anew")
        checked(self.record, IndexRecord, folder / "index.json")
        self.root = Path(root) if root is not None else Path(os.path.realpath(folder / self.record["root"]))
        try:
            self.pictures, self.regions = (
                _datasets().Dataset.from_file(str(folder / f"{name}.arrow")) for name in ("pictures", "regions")
            )
        except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
            raise ValueError(f"the index {folder} is damaged ({error}); make it anew") from error
        if [len(self.pictures), len(self.regions)] != [self.record["pictures"], self.record["regions"]]:
            raise ValueError(f"{folder} was not written to its end; make it anew")
        self.picture_of = _numbers(self.regions, "picture")
        self.length_of = _numbers(self.regions, "length")
        whole = [chunk.is_null().to_numpy(zero_copy_only=False) for chunk in _chunks(self.regions, "region_id")]
        self.is_whole = np.concatenate(whole) if whole else np.zeros(0, bool)
        self.split_of_picture = np.array(self.pictures["split"])

    def __len__(self) -> int:
        return len(self.regions)

    def rows(self, split: str, kinds: Sequence[str] = ()) -> np.ndarray:
        """Rows (M,) of the regions of a split, in order; with `kinds`, of those with a turn of these kinds, where
        "question" stands for every kind but "description".
        """
        chosen = (self.split_of_picture == split)[self.picture_of]
        if kinds:
            chosen &= self._have(kinds)
        return np.flatnonzero(chosen)

    def _have(self, kinds: Sequence[str]) -> np.ndarray:
        """Whether each region has a turn of these kinds, (N,)."""
        try:
            import pyarrow.compute as pc
        except ImportError:
            raise ValueError(_NEEDED) from None
        found = []
        for chunk in _chunks(self.regions, "turns"):
            kind = chunk.flatten().field("kind")
            wanted = np.isin(np.array(pc.unique(kind).to_pylist()), kinds)  # few kinds, many turns
            of_kind = pc.is_in(kind, value_set=pc.unique(kind).filter(wanted)).to_numpy(zero_copy_only=False)
            if "question" in kinds:
                of_kind |= pc.not_equal(kind, "description").to_numpy(zero_copy_only=False)
            sums = np.concatenate([[0], np.cumsum(of_kind)])
            offsets = chunk.offsets.to_numpy() - chunk.offsets[0].as_py()
            found.append(sums[offsets[1:]] > sums[offsets[:-1]])
        return np.concatenate(found) if found else np.zeros(0, bool)

    def read(self, rows: Sequence[int]) -> list[RegionFacts]:
        """Regions by their rows."""
        table = self.regions[list(map(int, rows))]
        return [self._facts({name: values[i] for name, values in table.items()}) for i in range(len(rows))]

    def descriptions(self, split: str) -> list[str]:
        """All descriptions of a split."""
        turns = self.regions.select_columns("turns")
        rows = self.rows(split, ["description"])
        blocks = (turns[rows[at : at + _WRITTEN_AT_ONCE].tolist()] for at in range(0, len(rows), _WRITTEN_AT_ONCE))
        return [
            turn["answer"]
            for block in blocks
            for row in block["turns"]
            for turn in row
            if turn["kind"] == "description"
        ]

    def missing_pictures(self, split: str) -> dict[str, int]:
        """Paths of the split's pictures that are not there, or of the tars that hold them, and the number of pictures.
        Folders are listed, as asking for each picture takes minutes.
        """
        listings: dict[str, set[str]] = {}
        missing: Counter = Counter()
        for image, of_split in zip(self.pictures["image"], self.split_of_picture == split, strict=True):
            if not of_split:
                continue
            folder, name = os.path.split(self.root / image)
            if folder not in listings:
                listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
            if name not in listings[folder]:
                missing[os.path.join(folder, name)] += 1
        return dict(missing)

    def _facts(self, row: dict[str, Any]) -> RegionFacts:
        picture = self.pictures[row["picture"]]
        forms = tuple(Region.from_json(json.loads(form)) for form in row["forms"])
        turns = tuple((turn["kind"], turn["question"], turn["answer"]) for turn in row["turns"])
        meta = {"image_id": picture["image_id"], "region_id": row["region_id"]}
        if picture["width"] is not None:
            meta |= {"width": picture["width"], "height": picture["height"]}
        name = f"{picture['image_id']}/{'whole' if row['region_id'] is None else row['region_id']}"
        references = tuple(answer for _, question, answer in turns if question is None)
        image = str(self.root / picture["image"])
        if picture["member"] is not None:
            image = TarMember(image, picture["member"], picture["offset"], picture["size"])
        sample = RegionSample(name, image, forms[:1], None, references, meta=meta)
        return RegionFacts(sample, forms, turns)


def index_folder(folder: str | os.PathLike) -> Path | None:
    """Where the index of a data folder or of a .jsonl file lies, or the folder itself if it is one; None where there
    is none.
    """
    places = [Path(folder), Path(folder) / INDEX_FOLDER]
    if Path(folder).suffix == ".jsonl":
        places.append(index_beside(folder))
    return next((place for place in places if (place / "index.json").exists()), None)


def index_beside(path: str | os.PathLike) -> Path:
    """Where the index of a single file goes."""
    return Path(path).with_name(f"{Path(path).name}.{INDEX_FOLDER}")


@step("indexing the data")
def write_index(
    out: str | os.PathLike,
    root: str | os.PathLike,
    regions: Iterable[tuple[str, RegionSample]],
    more: Iterable[tuple[str, RegionSample]] = (),
    *,
    made_of: str,
    reports: Mapping[str, ReadReport] | None = None,
) -> dict[str, Any]:
    """Write an index and return its record, the content of `index.json`.

    A region that occurs several times (as a box and as a mask, described and asked about) becomes one row. Of
    `regions` the rows of one picture are held at a time, so those of a picture must follow each other; `more`, what
    else is known about the same or other regions, is held in memory whole.

    Args:
        out: Folder of the index: new, empty, or an index, which is replaced at the end, in one go.
        root: The data set's folder, which the pictures' paths are made relative to.
        regions: (split, sample) in the order of the pictures; each sample of one region, its meta with `image_id` and,
            unless it is about the whole image, `region_id`.
        more: As `regions`, in any order. A sample without a region is about the one of its `region_id`; if that never
            comes, it is left out and counted in the record.
        made_of: What the data is, for people.
        reports: What each reading left out, once it is through; kept in the record.

    Raises:
        ValueError: If a sample lacks its ids, `out` holds anything else, is `root` or a parent of it, or is being
            written by another process; or what the readers raise.
        OSError: If the folder cannot be written.
    """
    with replacing_folder(out, "index", reads=[root], known=_is_index) as partial:
        return _write(partial, Path(out), Path(root), regions, more, made_of, reports or {})


def _is_index(folder: Path) -> bool:
    """Whether a folder is an index that an earlier version wrote, which had no marker, and nothing else."""
    if {file.name for file in folder.iterdir()} - {MARKER} != {"index.json", "pictures.arrow", "regions.arrow"}:
        return False
    try:
        record = read_json(folder / "index.json", dict)
    except ValueError:
        return False
    return {"format", "made_of", "root"} <= record.keys()


def _write(
    partial: Path,
    out: Path,
    root: Path,
    regions: Iterable[tuple[str, RegionSample]],
    more: Iterable[tuple[str, RegionSample]],
    made_of: str,
    reports: Mapping[str, ReadReport],
) -> dict[str, Any]:
    """Write an index into a folder that will become `out`; the others as in `write_index`."""
    known: dict[tuple, _Row] = {}
    for split, sample in more:
        _merge(known, split, sample)
    writer = _Writer(partial, root)
    for rows in _by_picture(regions):
        for key, row in rows.items():
            if (other := known.pop(key, None)) is not None:
                row.add(other.sample, other.forms, other.turns)
        writer.write(rows)
    writer.write({key: row for key, row in known.items() if row.forms})
    record = {
        "format": FORMAT,
        "made_of": made_of,
        "root": os.path.relpath(os.path.realpath(root), os.path.realpath(out)),
        "turns_of_unknown_regions": sum(len(row.turns) for row in known.values() if not row.forms),
        **writer.close(),
        "left_out": {
            name: {reason: {"count": count, "first": report.examples[reason]} for reason, count in left.items()}
            for name, report in reports.items()
            if (left := {reason: count for reason, count in report.counts.items() if reason != READ})
        },
    }
    write_json(partial / "index.json", record)
    return record


@dataclasses.dataclass(slots=True)
class _Row:
    """A region as it is collected, each form and turn once. Lists and no dicts: a million of them are held."""

    sample: RegionSample | None
    forms: list[Region]
    turns: list[Turn]

    def add(self, sample: RegionSample | None, forms: Iterable[Region], turns: Iterable[Turn]) -> None:
        self.sample = self.sample or sample
        self.forms += [form for form in forms if form not in self.forms]
        self.turns += [turn for turn in turns if turn not in self.turns]


def _merge(rows: dict[tuple, _Row], split: str, sample: RegionSample) -> None:
    """Add a sample to the row of its region."""
    meta = sample.meta
    if "image_id" not in meta:
        raise ValueError(f"sample {sample.id} has no image_id; an index needs it")
    kind = "description" if sample.question is None else meta.get("type", "question")
    key = (split, meta["image_id"], meta.get("region_id"))
    if (row := rows.get(key)) is None:
        row = rows[key] = _Row(None, [], [])
    turns = [(kind, sample.question, answer) for answer in sample.references]
    row.add(sample if sample.regions else None, sample.regions, turns)


def _by_picture(samples: Iterable[tuple[str, RegionSample]]) -> Iterator[dict[tuple, _Row]]:
    """The regions of one picture after the other, by key."""
    rows: dict[tuple, _Row] = {}
    current = None
    for split, sample in samples:
        picture = split, sample.meta.get("image_id")
        if picture != current and rows:
            yield rows
            rows = {}
        current = picture
        _merge(rows, split, sample)
    if rows:
        yield rows


class _Writer:
    """Writes both tables, some thousand rows at once."""

    def __init__(self, folder: Path, root: Path) -> None:
        datasets = _datasets()
        whole, words = datasets.Value("int64"), datasets.Value("string")
        turn = {"kind": words, "question": words, "answer": words}
        self.columns = {
            "pictures": {
                "image_id": words,
                "image": words,
                "member": words,
                "offset": whole,
                "size": whole,
                "width": whole,
                "height": whole,
                "split": words,
            },
            "regions": {
                "picture": whole,
                "region_id": whole,
                "forms": datasets.List(words),
                "turns": datasets.List(turn),
                "length": whole,
            },
        }
        self.tables = {
            name: datasets.arrow_writer.ArrowWriter(
                path=str(folder / f"{name}.arrow"), features=datasets.Features(columns)
            )
            for name, columns in self.columns.items()
        }
        self.waiting: dict[str, list[tuple]] = {name: [] for name in self.columns}
        self.root = str(root)
        self.picture_rows: dict[tuple, int] = {}
        self.splits: Counter = Counter()
        self.count = 0

    def write(self, rows: dict[tuple, _Row]) -> None:
        """Take rows; they are on disk after `close`."""
        for (split, image_id, region_id), row in rows.items():
            picture = self._picture(split, image_id, row.sample)
            turns = [dict(zip(("kind", "question", "answer"), turn, strict=True)) for turn in row.turns]
            length = max(len(question or "") + len(answer) for _, question, answer in row.turns)
            forms = [json.dumps(form.to_json()) for form in row.forms]
            self.waiting["regions"].append((picture, region_id, forms, turns, length))
            self.splits[split] += 1
        self.count += len(rows)
        if len(self.waiting["regions"]) >= _WRITTEN_AT_ONCE:
            self._flush()

    def close(self) -> dict[str, Any]:
        """Write what is left; returns the counts."""
        self._flush()
        for table in self.tables.values():
            table.finalize()
        return {"pictures": len(self.picture_rows), "regions": self.count, "splits": dict(sorted(self.splits.items()))}

    def _picture(self, split: str, image_id: Any, sample: RegionSample) -> int:
        """The row of the sample's picture, a new one when it is the first of it."""
        key = split, image_id
        if (row := self.picture_rows.get(key)) is None:
            if isinstance(sample.image, bytes):
                raise ValueError(f"sample {sample.id}: an index takes pictures that lie in files, got bytes")
            file, *member = sample.image if isinstance(sample.image, TarMember) else (sample.image, None, None, None)
            path = posixpath.join(*Path(os.path.relpath(file, self.root)).parts)
            size = sample.meta.get("width"), sample.meta.get("height")
            row = self.picture_rows[key] = len(self.picture_rows)
            self.waiting["pictures"].append((str(image_id), path, *member, *size, split))
        return row

    def _flush(self) -> None:
        for name, rows in self.waiting.items():
            if rows:
                columns = zip(self.columns[name], zip(*rows, strict=True), strict=True)
                self.tables[name].write_batch({column: list(values) for column, values in columns})
                rows.clear()


def _chunks(table: Any, column: str) -> Sequence[Any]:
    """A column as Arrow's arrays."""
    return table.data.column(column).chunks


def _numbers(table: Any, column: str) -> np.ndarray:
    """A column of whole numbers, int32."""
    chunks = [chunk.to_numpy() for chunk in _chunks(table, column)]
    return np.concatenate(chunks).astype(np.int32) if chunks else np.zeros(0, np.int32)


def _datasets() -> Any:
    """The package, which the index alone needs."""
    try:
        import datasets
        import datasets.arrow_writer
    except ImportError:
        raise ValueError(_NEEDED) from None
    return datasets
