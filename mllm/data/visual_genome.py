"""Visual Genome's original files -> `RegionSample`s.

Read are `image_data.json`, `region_descriptions.json`, `question_answers.json` and
`qa_to_region_mapping.json` of versions 1.0, 1.2 and 1.4; `region_masks.json` (COCO RLE by region
id) where masks are asked for; and pictures from `VG_100K/`, `VG_100K_2/`, the folder itself or
`images/`.

A sample's meta holds `image_id`, `width` and `height` (of the picture, in pixels), `region_id` and `area` (the share of
the picture that its box covers) where it is about a region, and of a question `qa_id` and its `type` where stated. Each
sample has its own small dict; the path of a picture is one string, shared by its samples.

Source: homes.cs.washington.edu/~ranjay/visualgenome/api_readme.html, and the published files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mllm.data.records import (
    READ,
    Box,
    Folders,
    ReadReport,
    area_share,
    clamped,
    integer,
    read_json,
    stream_json,
    text,
    wrong,
)
from mllm.data.samples import RegionSample
from vision_tower import Region

_IMAGE_FOLDERS = ("VG_100K", "VG_100K_2", "", "images")
_NAME_IN_URL = re.compile(r"(?:(VG_100K(?:_2)?)/)?([^/]+\.\w+)$")


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
        phrase = text(reader.root / "region_descriptions.json", record, "phrase")
        if not phrase:
            reader.report.add("without a phrase, left out", region_id)
            continue
        region = reader.region(region_id, picture, box)
        reader.report.add(READ, region_id)
        meta = {**picture.meta(box), "region_id": region_id}
        sample_id = f"vg-region-{region_id}"
        yield RegionSample(sample_id, picture.path, (region,), None, (phrase,), meta=meta)
    reader.report.log(f"{root}: regions")


def read_region_questions(
    root: str | os.PathLike,
    *,
    image_ids: Collection[int] | None = None,
    region_input: str = "box",
    report: ReadReport | None = None,
    located: bool = True,
) -> Iterator[RegionSample]:
    """One sample for each question that `qa_to_region_mapping.json` ties to a region.

    The answer is the reference. Of the regions, only those with a question are counted. Without `located`, samples have
    no region but its id in their meta, and the gigabyte of regions is not read: for who joins both, and has to count
    the questions whose region does not come.

    Args and Raises: as `read_regions`.
    """
    reader = _Reader(Path(root), image_ids, region_input, report)
    mapping = reader.mapping()
    if not located:
        for qa_id, picture, question, answer, extra in reader.questions(mapping, mapped=True):
            reader.report.add(READ, qa_id)
            meta = {**picture.meta(), **extra, "region_id": mapping[qa_id]}
            yield RegionSample(f"vg-qa-{qa_id}", picture.path, (), question, (answer,), meta=meta)
        reader.report.log(f"{root}: region questions")
        return
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
            reader.report.add(READ, qa_id)
            meta = {**picture.meta(regions[region_id][1]), **extra, "region_id": region_id}
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
        reader.report.add(READ, qa_id)
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

    def meta(self, box: Box | None = None) -> dict[str, Any]:
        about = {"image_id": self.id, "width": self.width, "height": self.height}
        return about if box is None else {**about, "area": area_share(box, self.width, self.height)}


# region id, picture, box inside it, the whole record
_RegionRecord = tuple[int, _Picture, Box, dict]
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
        self.masks = read_json(root / "region_masks.json", dict) if region_input == "mask" else None

    def mapping(self) -> dict[int, int]:
        """Region id by question id."""
        name = "qa_to_region_mapping.json"
        mapping = read_json(self.root / name, dict)
        if not all(key.isdecimal() and type(value) is int for key, value in mapping.items()):
            raise wrong(self.root / name, "whole numbers {'question id': region id}", mapping)
        return {int(key): value for key, value in mapping.items()}

    def regions(self, wanted: Collection[int] | None = None) -> Iterator[_RegionRecord]:
        """The regions (or the wanted ones) with an area inside a known picture; each id once."""
        path = self.root / "region_descriptions.json"
        seen: set[int] = set()
        for image_id, record in self._records(path.name, "regions"):
            region_id = integer(path, record, "region_id", "id")
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
            qa_id = integer(path, record, "qa_id", "id")
            if (qa_id in mapping) != mapped:
                continue
            question, answer = text(path, record, "question"), text(path, record, "answer")
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

    def region(self, region_id: int, picture: _Picture, box: Box) -> Region:
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
            raise wrong(path, f"the mask of region {region_id} of size {size} (h, w)", rle["size"])
        return region

    def _clamped(self, path: Path, record: dict, picture: _Picture, region_id: int) -> Box | None:
        """The box inside the picture's stated size, or None when nothing is left of it."""
        try:
            box = [record[name] for name in ("x", "y", "width", "height")]
            return clamped(box, picture.width, picture.height, self.report, region_id)
        except KeyError as error:
            raise ValueError(f"{path}: region {region_id} has no {error}; expected pixels") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def _pictures(self) -> dict[int, _Picture]:
        path = self.root / "image_data.json"
        entries = stream_json(path)
        folders = Folders(self.root, _IMAGE_FOLDERS)
        pictures = {}
        for entry in entries:
            image_id = integer(path, entry, "image_id", "id")
            width, height = (integer(path, entry, name) for name in ("width", "height"))
            pictures[image_id] = _Picture(
                image_id, width, height, _file_of(image_id, text(path, entry, "url"), folders)
            )
        return pictures

    def _records(self, name: str, key: str) -> Iterator[tuple[int, dict]]:
        """(image id, record) of a file with a list `key` for each image, for the images asked for.

        Versions differ: the image is `image_id` in each record, or `image` (1.0), or else
        `image_id` or `id` of the entry that the record is in.
        """
        path = self.root / name
        for entry in stream_json(path):
            if not isinstance(entry, dict) or not isinstance(entry.get(key), list):
                raise wrong(path, f"a list {key!r} for each image", entry)
            of_entry = entry.get("image_id", entry.get("id"))
            for record in entry[key]:
                if not isinstance(record, dict):
                    raise wrong(path, f"objects in {key!r}", record)
                image_id = record.get("image_id", record.get("image", of_entry))
                if type(image_id) is not int:
                    raise wrong(path, "a whole number 'image_id' in a record", record)
                if self.image_ids is None or image_id in self.image_ids:
                    yield image_id, record


def _file_of(image_id: int, url: str, folders: Folders) -> str:
    """A picture's path: in the folder of its url, else in the one that has it. Its name is that of the url; without
    one it is made from the id.
    """
    match = _NAME_IN_URL.search(url)
    if match:
        return folders.find(match[2], first=match[1])
    return folders.find(f"{image_id}.jpg", f"{image_id}.png")
