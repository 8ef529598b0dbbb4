"""Visual Genome's original files -> `RegionSample`s.

Read are `image_data.json`, `region_descriptions.json`, `question_answers.json` and
`qa_to_region_mapping.json` of versions 1.0, 1.2 and 1.4; `region_masks.json` (COCO RLE by region
id) where masks are asked for; and pictures from `VG_100K/`, `VG_100K_2/`, the folder itself or
`images/`.

A sample's meta holds `image_id`, `width` and `height` (of the picture, in pixels), `region_id`
where it is about a region, and of a question `qa_id` and its `type` where stated. Each sample has
its own small dict; the path of a picture is one string, shared by its samples.

Source: homes.cs.washington.edu/~ranjay/visualgenome/api_readme.html, and the published files.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mllm.data.samples import RegionSample
from vision_tower import Region

logger = logging.getLogger(__name__)

_IMAGE_FOLDERS = ("VG_100K", "VG_100K_2", "", "images")
_NAME_IN_URL = re.compile(r"(?:(VG_100K(?:_2)?)/)?([^/]+\.\w+)$")
_MAX_EXAMPLES = 20
_READ = "read"
_CLAMPED = "reaching over the picture, clamped"

_Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels, half-open


@dataclasses.dataclass
class ReadReport:
    """What a reader read, changed or left out: how often, for which reason, and the first ids."""

    counts: Counter = dataclasses.field(default_factory=Counter)
    examples: dict[str, list] = dataclasses.field(default_factory=dict)

    def add(self, reason: str, example: Any) -> None:
        """Count one record."""
        self.counts[reason] += 1
        if len(kept := self.examples.setdefault(reason, [])) < _MAX_EXAMPLES:
            kept.append(example)

    def log(self, what: str) -> None:
        """One line a reason: a warning where records were left out, or none was read."""
        read = self.counts[_READ]
        logger.log(logging.INFO if read else logging.WARNING, "%s: %d read", what, read)
        for reason, count in self.counts.items():
            if reason != _READ:
                level = logging.INFO if reason == _CLAMPED else logging.WARNING
                first = ", ".join(map(str, self.examples[reason][:3]))
                logger.log(level, "%s: %d %s (ids %s ...)", what, count, reason, first)


def read_regions(
    root: str | os.PathLike,
    *,
    image_ids: Collection[int] | None = None,
    region_input: str = "box",
    report: ReadReport | None = None,
) -> Iterator[RegionSample]:
    """One sample for each region description: no question, the phrase as reference.

    Args:
        root: Folder of the files.
        image_ids: Only these images, for example those of a split.
        region_input: "box", or "mask" (from `region_masks.json`).
        report: Filled with what was read, clamped and left out; logged in any case, at the end.

    Raises:
        ValueError: If a file is missing, damaged or of another form, or a region has no mask of its
            picture's size where masks are asked for.
    """
    reader = _Reader(Path(root), image_ids, region_input, report)
    for region_id, picture, box, record in reader.regions():
        phrase = _text(reader.root / "region_descriptions.json", record, "phrase")
        if not phrase:
            reader.report.add("without a phrase, left out", region_id)
            continue
        region = reader.region(region_id, picture, box)
        reader.report.add(_READ, region_id)
        meta = {**picture.meta(), "region_id": region_id}
        sample_id = f"vg-region-{region_id}"
        yield RegionSample(sample_id, picture.path, (region,), None, (phrase,), meta=meta)
    reader.report.log(f"{root}: regions")


def read_region_questions(
    root: str | os.PathLike,
    *,
    image_ids: Collection[int] | None = None,
    region_input: str = "box",
    report: ReadReport | None = None,
) -> Iterator[RegionSample]:
    """One sample for each question that `qa_to_region_mapping.json` ties to a region.

    The answer is the reference. Of the regions, only those with a question are counted.

    Args and Raises: as `read_regions`.
    """
    reader = _Reader(Path(root), image_ids, region_input, report)
    mapping = reader.mapping()
    regions = {}  # only what questions need of 5.4 million regions
    for region_id, picture, box, _ in reader.regions(wanted=set(mapping.values())):
        regions[region_id] = picture, box
    for qa_id, picture, question, answer, extra in reader.questions(mapping, mapped=True):
        region_id = mapping[qa_id]
        if region_id in reader.left_out:
            reader.report.add("questions on a region that was left out, left out", qa_id)
        elif region_id not in regions:
            reader.report.add("questions on an unknown region, left out", qa_id)
        elif regions[region_id][0] is not picture:
            reader.report.add("questions on a region of another image, left out", qa_id)
        else:
            region = reader.region(region_id, *regions[region_id])
            reader.report.add(_READ, qa_id)
            meta = {**picture.meta(), **extra, "region_id": region_id}
            yield _question(qa_id, picture, region, question, answer, meta)
    reader.report.log(f"{root}: region questions")


def read_free_questions(
    root: str | os.PathLike,
    *,
    image_ids: Collection[int] | None = None,
    report: ReadReport | None = None,
) -> Iterator[RegionSample]:
    """One sample for each question that belongs to no region: its region is the whole image.

    Args and Raises: as `read_regions`.
    """
    reader = _Reader(Path(root), image_ids, "box", report)
    mapping = reader.mapping()
    whole = Region.whole()
    for qa_id, picture, question, answer, extra in reader.questions(mapping, mapped=False):
        reader.report.add(_READ, qa_id)
        yield _question(qa_id, picture, whole, question, answer, {**picture.meta(), **extra})
    reader.report.log(f"{root}: free questions")


def _question(
    qa_id: int,
    picture: _Picture,
    region: Region,
    question: str,
    answer: str,
    meta: dict[str, Any],
) -> RegionSample:
    sample_id = f"vg-qa-{qa_id}"
    return RegionSample(sample_id, picture.path, (region,), question, (answer,), meta=meta)


class _Picture(NamedTuple):
    """An entry of `image_data.json`, whatever its version, and where its file should be."""

    id: int
    width: int
    height: int
    path: str

    def meta(self) -> dict[str, Any]:
        return {"image_id": self.id, "width": self.width, "height": self.height}


# region id, picture, box inside it, the whole record
_RegionRecord = tuple[int, _Picture, _Box, dict]
# question id, picture, question, answer, what meta says of it
_QuestionRecord = tuple[int, _Picture, str, str, dict[str, Any]]


class _Reader:
    """The files of one folder under one set of names, whatever their version."""

    def __init__(
        self,
        root: Path,
        image_ids: Collection[int] | None,
        region_input: str,
        report: ReadReport | None,
    ) -> None:
        if region_input not in ("box", "mask"):
            raise ValueError(f"expected region_input 'box' or 'mask', got {region_input!r}")
        self.root = root
        self.image_ids = None if image_ids is None else frozenset(image_ids)
        self.report = ReadReport() if report is None else report
        self.left_out: set[int] = set()  # ids of regions
        self.pictures = self._pictures()
        self.masks = self._json("region_masks.json", dict) if region_input == "mask" else None

    def mapping(self) -> dict[int, int]:
        """Region id by question id."""
        name = "qa_to_region_mapping.json"
        mapping = self._json(name, dict)
        if not all(key.isdecimal() and type(value) is int for key, value in mapping.items()):
            raise _wrong(self.root / name, "whole numbers {'question id': region id}", mapping)
        return {int(key): value for key, value in mapping.items()}

    def regions(self, wanted: Collection[int] | None = None) -> Iterator[_RegionRecord]:
        """The regions (or the wanted ones) with an area inside a known picture; each id once."""
        path = self.root / "region_descriptions.json"
        seen: set[int] = set()
        for image_id, record in self._records(path.name, "regions"):
            region_id = _integer(path, record, "region_id", "id")
            if wanted is not None and region_id not in wanted:
                continue
            picture, box = self.pictures.get(image_id), None
            if picture is None:
                self.report.add("of an unknown image, left out", region_id)
            elif region_id in seen:
                self.report.add("with a repeated id, left out", region_id)
                continue
            else:
                seen.add(region_id)
                box = self._clamped(path, record, picture, region_id)
            if box is None:
                self.left_out.add(region_id)
            else:
                self.left_out.discard(region_id)  # listed for an unknown image too
                yield region_id, picture, box, record

    def questions(self, mapping: dict[int, int], mapped: bool) -> Iterator[_QuestionRecord]:
        """The answered questions that are in the mapping, or those that are not; each id once."""
        path = self.root / "question_answers.json"
        seen: set[int] = set()
        for image_id, record in self._records(path.name, "qas"):
            qa_id = _integer(path, record, "qa_id", "id")
            if (qa_id in mapping) != mapped:
                continue
            question, answer = _text(path, record, "question"), _text(path, record, "answer")
            if image_id not in self.pictures:
                self.report.add("questions on an unknown image, left out", qa_id)
            elif qa_id in seen:
                self.report.add("questions with a repeated id, left out", qa_id)
            elif not (question and answer):
                self.report.add("questions without text or answer, left out", qa_id)
            else:
                seen.add(qa_id)
                kind = {"type": record["type"]} if "type" in record else {}
                yield qa_id, self.pictures[image_id], question, answer, {"qa_id": qa_id, **kind}

    def region(self, region_id: int, picture: _Picture, box: _Box) -> Region:
        """The region in the form asked for."""
        if self.masks is None:
            return Region.from_box(*box)
        path = self.root / "region_masks.json"
        if (rle := self.masks.get(str(region_id))) is None:
            raise ValueError(f"{path} has no mask for region {region_id}; use region_input='box'")
        try:
            region = Region.from_rle(rle)
        except ValueError as error:
            raise ValueError(f"{path}: mask of region {region_id}: {error}") from error
        size = [picture.height, picture.width]
        if list(rle["size"]) != size:
            raise _wrong(path, f"the mask of region {region_id} of size {size} (h, w)", rle["size"])
        return region

    def _clamped(self, path: Path, record: dict, picture: _Picture, region_id: int) -> _Box | None:
        """The box inside the picture's stated size, or None when nothing is left of it."""
        for name in ("x", "y", "width", "height"):
            if name not in record:
                raise ValueError(f"{path}: region {region_id} has no {name!r}; expected pixels")
            value = record[name]
            if type(value) not in (int, float) or not math.isfinite(value):
                raise _wrong(path, f"pixels in {name!r} of region {region_id}", value)
        x, y = record["x"], record["y"]
        stated = x, y, x + record["width"], y + record["height"]
        box = max(x, 0), max(y, 0), min(stated[2], picture.width), min(stated[3], picture.height)
        if box[0] >= box[2] or box[1] >= box[3]:
            self.report.add("without area inside the picture, left out", region_id)
            return None
        if box != stated:
            self.report.add(_CLAMPED, region_id)
        return box

    def _pictures(self) -> dict[int, _Picture]:
        path = self.root / "image_data.json"
        entries = self._json(path.name, list)
        # one listing a folder: a look-up on disk for each of 108,077 pictures could take minutes
        folders = [folder for folder in _IMAGE_FOLDERS if (self.root / folder).is_dir()]
        files = {folder: set(os.listdir(self.root / folder)) for folder in folders}
        pictures = {}
        for entry in entries:
            image_id = _integer(path, entry, "image_id", "id")
            width, height = (_integer(path, entry, name) for name in ("width", "height"))
            file = self.root / _file_of(image_id, _text(path, entry, "url"), files)
            pictures[image_id] = _Picture(image_id, width, height, str(file))
        return pictures

    def _records(self, name: str, key: str) -> Iterator[tuple[int, dict]]:
        """(image id, record) of a file with a list `key` for each image, for the images asked for.

        Versions differ: the image is `image_id` in each record, or `image` (1.0), or else
        `image_id` or `id` of the entry that the record is in.
        """
        path = self.root / name
        for entry in self._json(name, list):
            if not isinstance(entry, dict) or not isinstance(entry.get(key), list):
                raise _wrong(path, f"a list {key!r} for each image", entry)
            of_entry = entry.get("image_id", entry.get("id"))
            for record in entry[key]:
                if not isinstance(record, dict):
                    raise _wrong(path, f"objects in {key!r}", record)
                image_id = record.get("image_id", record.get("image", of_entry))
                if type(image_id) is not int:
                    raise _wrong(path, "a whole number 'image_id' in a record", record)
                if self.image_ids is None or image_id in self.image_ids:
                    yield image_id, record

    def _json(self, name: str, kind: type) -> Any:
        path = self.root / name
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise ValueError(f"{path} is missing; it is one of Visual Genome's files") from None
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{path} is not whole JSON ({error}); was it cut short?") from error
        if not isinstance(content, kind):
            raise _wrong(path, f"a JSON {kind.__name__}", content)
        return content


def _file_of(image_id: int, url: str, files: dict[str, set[str]]) -> str:
    """A picture's path in the root: the folder of its url, else the one that has it.

    Its name is that of the url; without one it is made from the id. That it is in no folder is said
    when it is opened, so that text can be read without pictures.
    """
    match = _NAME_IN_URL.search(url)
    stated, names = None, (f"{image_id}.jpg", f"{image_id}.png")
    if match:
        stated, names = match[1], (match[2],)
    for folder in (stated, *_IMAGE_FOLDERS):
        for name in names:
            if name in files.get(folder, ()):
                return os.path.join(folder, name)
    return os.path.join(stated or _IMAGE_FOLDERS[0], names[0])


def _integer(path: Path, record: dict, *names: str) -> int:
    """The whole number under the first of these names that the record has."""
    if not isinstance(record, dict):
        raise _wrong(path, f"an object with {names[0]!r}", record)
    value = next((record[name] for name in names if name in record), None)
    if type(value) is not int:
        named = " or ".join(map(repr, names))
        raise _wrong(path, f"{named}, a whole number, in a record", record)
    return value


def _text(path: Path, record: dict, name: str) -> str:
    """Text without the space around it; empty for null or nothing."""
    value = record.get(name)
    if value is not None and not isinstance(value, str):
        raise _wrong(path, f"text in {name!r}", record)
    return (value or "").strip()


def _wrong(path: Path, expected: str, got: Any) -> ValueError:
    # reprlib: the content may be gigabytes
    return ValueError(f"{path}: expected {expected}, got {reprlib.repr(got)}")
