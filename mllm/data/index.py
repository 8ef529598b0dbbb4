"""The region index: memory-mapped Arrow tables of a dataset's images and regions, from which training reads.

`mllm.data.index_writer` writes an index, `mllm.data.build_index` chooses the readers for a dataset. Opening the 5.4
million regions of Visual Genome takes a moment, and the mapped pages can be reclaimed by the system at any time.

An index is a folder with `index.json` (`mllm.data.schemas.IndexInfo`) and two tables:

| table | row | columns |
|---|---|---|
| `images.arrow` | an image in a split | `image_id`; `path`, relative to the dataset's folder; `member`, `offset`, `size`: name and byte range in the tar at `path`, or null; `width`, `height` in pixels, or null; `split` |
| `regions.arrow` | a region; the regions of an image are consecutive | `image_row`; `region_id`, null for the whole image; `geometries`: the region as JSON, for example as a box and as a mask; `turns`: `kind`, `question` (null for a description), `answer`; `length`: characters of the longest turn |
"""  # noqa: E501

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm.data.json_files import read_json
from mllm.data.samples import RegionSample, TarMember
from mllm.data.schemas import IndexInfo, validate
from vision_tower import Region

FORMAT = 3
TRAIN, HELD_OUT = "train", "val"
INDEX_FOLDER = "region_index"  # in the dataset's folder
_ROWS_PER_READ = 20_000
_PACKAGE_MISSING = "a region index requires the package datasets: pip install datasets"
# Format 2 has other names of files, columns and counts.
_FORMAT_2_IMAGES = {"image": "path"}
_FORMAT_2_REGIONS = {"picture": "image_row", "forms": "geometries"}
_FORMAT_2_INFO = {"pictures": "images", "made_of": "layout", "turns_of_unknown_regions": "turns_without_region"}

Turn = tuple[str, str | None, str]  # kind, question (None for a description), answer


@dataclasses.dataclass(frozen=True, slots=True)
class IndexedRegion:
    """A region with its questions and answers.

    Attributes:
        sample: Its image and references; the region is the first of `geometries`.
        geometries: The same region as a box, as a mask, ...
        turns: (kind, question, answer). The kind is the question type of the dataset, "description" or "question".
    """

    sample: RegionSample
    geometries: tuple[Region, ...]
    turns: tuple[Turn, ...]

    def as_type(self, region_type: str) -> Region:
        """The region as a "box", as a "mask" (any geometry but a box), or as "available": a mask if there is one.

        Raises:
            ValueError: If it has no geometry of this type.
        """
        boxes = [region for region in self.geometries if region.kind in ("box", "nbox")]
        masks = [region for region in self.geometries if region.kind not in ("box", "nbox")]
        found = {"box": boxes, "mask": masks, "available": masks or boxes}[region_type]
        if not found:
            other = "box" if boxes else "mask"
            raise ValueError(f"region {self.sample.id} has no {region_type}; use region_input: {other}, or available")
        return found[0]


class RegionIndex:
    """An index on disk.

    Attributes:
        info: The content of `index.json`.
        root: Folder that the image paths are relative to.
        images: Table of the images (M rows).
        regions: Table of the regions (N rows).
        image_rows: Row of the image of each region, int32 (N,).
        lengths: Characters of the longest turn of each region, int32 (N,).
        is_whole: Whether each region is the whole image, bool (N,).
        image_splits: Split of each image, str (M,).
    """

    def __init__(self, folder: str | os.PathLike, root: str | os.PathLike | None = None) -> None:
        """Open an index.

        Args:
            folder: The index, or a dataset's folder or .jsonl file that has one.
            root: Folder of the images if the dataset was moved; default: the folder stored in the index.

        Raises:
            ValueError: If the index is not found, incomplete, damaged or of another format.
        """
        data, folder = folder, find_index(folder)
        if folder is None:
            raise ValueError(f"no region index in {data}; build it with: alpha-clip prepare ...")
        self.folder = folder
        self.info = _read_info(folder)
        self.root = Path(root) if root is not None else Path(os.path.realpath(folder / self.info["root"]))
        try:
            self.images, self.regions = _open_tables(folder, self.info["format"])
        except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
            raise ValueError(f"the index {folder} is damaged ({error}); rebuild it") from error
        if [len(self.images), len(self.regions)] != [self.info["images"], self.info["regions"]]:
            raise ValueError(f"the index {folder} is incomplete; rebuild it")
        self.image_rows = _integers(self.regions, "image_row")
        self.lengths = _integers(self.regions, "length")
        whole = [chunk.is_null().to_numpy(zero_copy_only=False) for chunk in _chunks(self.regions, "region_id")]
        self.is_whole = np.concatenate(whole) if whole else np.zeros(0, bool)
        self.image_splits = np.array(self.images["split"])

    def __len__(self) -> int:
        return len(self.regions)

    def rows(self, split: str, kinds: Sequence[str] = ()) -> np.ndarray:
        """Rows of the regions of a split, in order, int64 (K,).

        Args:
            split: Name of the split.
            kinds: Only regions with a turn of one of these kinds; "question" means any kind but "description".
        """
        selected = (self.image_splits == split)[self.image_rows]
        if kinds:
            selected &= self._has_turn(kinds)
        return np.flatnonzero(selected)

    def _has_turn(self, kinds: Sequence[str]) -> np.ndarray:
        """Whether each region has a turn of one of these kinds, bool (N,)."""
        try:
            import pyarrow.compute as pc
        except ImportError:
            raise ValueError(_PACKAGE_MISSING) from None
        found = []
        for chunk in _chunks(self.regions, "turns"):
            kind = chunk.flatten().field("kind")
            wanted = np.isin(np.array(pc.unique(kind).to_pylist()), kinds)  # few kinds, many turns
            matches = pc.is_in(kind, value_set=pc.unique(kind).filter(wanted)).to_numpy(zero_copy_only=False)
            if "question" in kinds:
                matches |= pc.not_equal(kind, "description").to_numpy(zero_copy_only=False)
            sums = np.concatenate([[0], np.cumsum(matches)])
            offsets = chunk.offsets.to_numpy() - chunk.offsets[0].as_py()
            found.append(sums[offsets[1:]] > sums[offsets[:-1]])
        return np.concatenate(found) if found else np.zeros(0, bool)

    def read(self, rows: Sequence[int]) -> list[IndexedRegion]:
        """The regions in these rows."""
        table = self.regions[list(map(int, rows))]
        return [self._region({name: values[i] for name, values in table.items()}) for i in range(len(rows))]

    def descriptions(self, split: str) -> list[str]:
        """All descriptions of a split."""
        turns = self.regions.select_columns("turns")
        rows = self.rows(split, ["description"])
        blocks = (turns[rows[at : at + _ROWS_PER_READ].tolist()] for at in range(0, len(rows), _ROWS_PER_READ))
        return [
            turn["answer"]
            for block in blocks
            for row in block["turns"]
            for turn in row
            if turn["kind"] == "description"
        ]

    def missing_images(self, split: str) -> dict[str, int]:
        """Paths of missing files (images, or tars of images) of a split, and the number of images in each.

        Lists each folder once, because checking 100,000 files one by one takes minutes.
        """
        listings: dict[str, set[str]] = {}
        missing: Counter = Counter()
        for path, in_split in zip(self.images["path"], self.image_splits == split, strict=True):
            if not in_split:
                continue
            folder, name = os.path.split(self.root / path)
            if folder not in listings:
                listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
            if name not in listings[folder]:
                missing[os.path.join(folder, name)] += 1
        return dict(missing)

    def _region(self, row: dict[str, Any]) -> IndexedRegion:
        image = self.images[row["image_row"]]
        geometries = tuple(Region.from_json(json.loads(region)) for region in row["geometries"])
        turns = tuple((turn["kind"], turn["question"], turn["answer"]) for turn in row["turns"])
        meta = {"image_id": image["image_id"], "region_id": row["region_id"]}
        if image["width"] is not None:
            meta |= {"width": image["width"], "height": image["height"]}
        sample_id = f"{image['image_id']}/{'whole' if row['region_id'] is None else row['region_id']}"
        references = tuple(answer for _, question, answer in turns if question is None)
        source = str(self.root / image["path"])
        if image["member"] is not None:
            source = TarMember(source, image["member"], image["offset"], image["size"])
        sample = RegionSample(sample_id, source, geometries[:1], None, references, meta=meta)
        return IndexedRegion(sample, geometries, turns)


def find_index(path: str | os.PathLike) -> Path | None:
    """The index at a path, in a dataset's folder or next to a .jsonl file; None if there is none."""
    candidates = [Path(path), Path(path) / INDEX_FOLDER]
    if Path(path).suffix == ".jsonl":
        candidates.append(index_of_file(path))
    return next((folder for folder in candidates if (folder / "index.json").exists()), None)


def index_of_file(path: str | os.PathLike) -> Path:
    """Default index folder of a single file."""
    return Path(path).with_name(f"{Path(path).name}.{INDEX_FOLDER}")


def import_datasets() -> Any:
    """The datasets package, which only the index needs.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        import datasets
        import datasets.arrow_writer
    except ImportError:
        raise ValueError(_PACKAGE_MISSING) from None
    return datasets


def _read_info(folder: Path) -> dict[str, Any]:
    """The content of `index.json`, with the names of the current format."""
    path = folder / "index.json"
    info = read_json(path, dict)
    if info.get("format") not in (2, FORMAT):
        raise ValueError(f"{folder} has format {info.get('format')}, expected {FORMAT}; rebuild the index")
    if info["format"] == 2:
        info = {_FORMAT_2_INFO.get(name, name): value for name, value in info.items()}
    validate(info, IndexInfo, path)
    return info


def _open_tables(folder: Path, index_format: int) -> tuple[Any, Any]:
    """The memory-mapped tables of the images and of the regions."""

    def table(name: str) -> Any:
        return import_datasets().Dataset.from_file(str(folder / f"{name}.arrow"))

    if index_format == 2:
        return table("pictures").rename_columns(_FORMAT_2_IMAGES), table("regions").rename_columns(_FORMAT_2_REGIONS)
    return table("images"), table("regions")


def _chunks(table: Any, column: str) -> Sequence[Any]:
    """The Arrow arrays of a column."""
    return table.data.column(column).chunks


def _integers(table: Any, column: str) -> np.ndarray:
    """A column as int32."""
    chunks = [chunk.to_numpy() for chunk in _chunks(table, column)]
    return np.concatenate(chunks).astype(np.int32) if chunks else np.zeros(0, np.int32)
