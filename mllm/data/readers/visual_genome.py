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

from mllm.data.json_files import is_utf8, read_json, refuse_repeated, stream_json
from mllm.data.masks import check_region_input, region_of
from mllm.data.records import (
    MALFORMED,
    READ,
    REPEATED,
    UNKNOWN_IMAGE,
    Box,
    Folders,
    ReadReport,
    area_share,
    clamped,
    usable_record,
    usable_text,
)
from mllm.data.samples import RegionSample
from mllm.data.schemas import GenomeImage, GenomeQuestion, GenomeRegion, is_name
from vision_tower import Region

_IMAGE_FOLDERS = ("VG_100K", "VG_100K_2", "", "images")
NO_PHRASE = "without a phrase, left out"
NO_IMAGE_ID = "without a whole number as their image's id, left out"
NO_LIST = "entries without a list of records, left out"
ON_UNKNOWN_IMAGE = "questions on an unknown image, left out"
ON_OTHER_IMAGE = "questions on a region of another image, left out"
ON_LEFT_OUT = "questions on a region that was left out, left out"
ON_UNKNOWN_REGION = "questions on an unknown region, left out"
REPEATED_QUESTION = "questions with a repeated id, left out"
NO_ANSWER = "questions without text or answer, left out"
_LARGEST_ID = 2**63 - 1
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
        ValueError: If a file is missing, damaged or of another form, an image's id occurs twice, or too many records
            cannot be used (`mllm.data.records`): where masks are asked for, also those without one of their image's
            size.
    """
    reader = _Reader(Path(root), image_ids, region_input, report)
    for region_id, picture, box, record in reader.regions():
        if (phrase := usable_text(record.phrase, reader.report, region_id, NO_PHRASE)) is None:
            continue
        region = reader.region(region_id, picture, box)
        if not isinstance(region, Region):
            reader.report.leave_out(region, region_id)
            continue
        reader.report.add(READ, region_id)
        meta = {**picture.meta(box), "region_id": region_id}
        sample_id = f"vg-region-{region_id}"
        yield RegionSample(sample_id, picture.path, (region,), None, (phrase,), meta=meta)
    reader.report.finish(f"{root}: regions")


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
        reader.report.finish(f"{root}: region questions")
        return
    regions = {}  # only what questions need of 5.4 million regions
    for region_id, picture, box, _ in reader.regions(wanted=set(mapping.values())):
        regions[region_id] = picture, box
    for qa_id, picture, question, answer, extra in reader.questions(mapping, mapped=True):
        region_id = mapping[qa_id]
        if region_id not in regions:
            # questions on a region that was left out are not unusable themselves
            reader.report.add(ON_LEFT_OUT if region_id in reader.left_out else ON_UNKNOWN_REGION, qa_id)
        elif regions[region_id][0] is not picture:
            reader.report.leave_out(ON_OTHER_IMAGE, qa_id)
        elif not isinstance(region := reader.region(region_id, *regions[region_id]), Region):
            reader.report.leave_out(region, qa_id)
        else:
            reader.report.add(READ, qa_id)
            meta = {**picture.meta(regions[region_id][1]), **extra, "region_id": region_id}
            yield _question(qa_id, picture, region, question, answer, meta)
    reader.report.finish(f"{root}: region questions")


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
    reader.report.finish(f"{root}: free questions")


def read_image_files(root: str | os.PathLike) -> dict[int, str]:
    """Where the file of each image of `image_data.json` is or, if it is missing, should be; by the image's id.

    Raises:
        ValueError: If `image_data.json` cannot be read, as for `read_regions`.
    """
    return {picture.id: picture.path for picture in _Reader(Path(root), None, "box", None).pictures.values()}


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
_RegionRecord = tuple[int, _Picture, Box, GenomeRegion]
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
        check_region_input(region_input)
        self.root = root
        self.image_ids = None if image_ids is None else frozenset(image_ids)
        self.report = ReadReport() if report is None else report
        self.left_out: set[int] = set()  # ids of regions
        self.pictures = self._pictures()
        self.region_input = region_input
        self.masks = read_json(root / "region_masks.json", dict, unique_keys=True) if region_input == "mask" else {}

    def mapping(self) -> dict[int, int]:
        """Region id by question id; anything else is counted.

        Raises:
            ValueError: If the file is not a JSON object, or has a question twice.
        """
        path = self.root / "qa_to_region_mapping.json"
        found = []
        for key, value in read_json(path, dict, unique_keys=True).items():
            if key.isdecimal() and len(key) < 20 and type(value) is int:
                found.append((int(key), value))
            else:
                self.report.leave_out(f"in {path.name} of another form, left out", ascii(key)[:100])
        mapping = dict(found)
        if len(mapping) < len(found):
            refuse_repeated((qa_id for qa_id, _ in found), f"{path}: ids of questions")
        return mapping

    def regions(self, wanted: Collection[int] | None = None) -> Iterator[_RegionRecord]:
        """The regions (or the wanted ones) with an area inside a known picture; each id once."""
        seen: set[int] = set()
        for image_id, region_id, record in self._records("region_descriptions.json", "regions", "region_id"):
            if wanted is not None and region_id not in wanted:
                continue
            if (picture := self.pictures.get(image_id)) is None:
                self.report.add(UNKNOWN_IMAGE, region_id)
                self.left_out.add(region_id)
                continue
            if region_id in seen:
                self.report.leave_out(REPEATED, region_id)
                continue
            seen.add(region_id)
            region = usable_record(record, GenomeRegion, f"region {region_id}", self.report)
            box = None
            if region is not None:
                box = (region.x, region.y, region.width, region.height)
                box = clamped(box, picture.width, picture.height, self.report, region_id)
            if box is None:
                self.left_out.add(region_id)
            else:
                self.left_out.discard(region_id)  # listed for an unknown image too
                yield region_id, picture, box, region

    def questions(self, mapping: dict[int, int], mapped: bool) -> Iterator[_QuestionRecord]:
        """The answered questions that are in the mapping, or those that are not; each id once."""
        seen: set[int] = set()
        for image_id, qa_id, record in self._records("question_answers.json", "qas", "qa_id"):
            if (qa_id in mapping) != mapped:
                continue
            if image_id not in self.pictures:
                self.report.add(ON_UNKNOWN_IMAGE, qa_id)
                continue
            if qa_id in seen:
                self.report.leave_out(REPEATED_QUESTION, qa_id)
                continue
            if (row := usable_record(record, GenomeQuestion, f"question {qa_id}", self.report)) is None:
                continue
            question = usable_text(row.question, self.report, qa_id, NO_ANSWER)
            if question is None or (answer := usable_text(row.answer, self.report, qa_id, NO_ANSWER)) is None:
                continue
            seen.add(qa_id)
            kind = {"type": row.type} if row.type and is_utf8(row.type) else {}
            yield qa_id, self.pictures[image_id], question, answer, {"qa_id": qa_id, **kind}

    def region(self, region_id: int, picture: _Picture, box: Box) -> Region | str:
        """The region in the form asked for, or the reason why its mask cannot be used."""
        return region_of(self.masks.get(str(region_id)), box, (picture.height, picture.width), self.region_input)

    def _pictures(self) -> dict[int, _Picture]:
        """The images by id; anything else is counted."""
        path = self.root / "image_data.json"
        folders = Folders(self.root, _IMAGE_FOLDERS)
        images = ReadReport()
        found: list[_Picture] = []
        for number, entry in enumerate(stream_json(path)):
            if (image := usable_record(entry, GenomeImage, f"entry {number}", images)) is None:
                continue
            image_id = image.id if image.image_id is None else image.image_id
            if image_id is None or not is_name(image.url or ""):
                images.leave_out(MALFORMED, f"entry {number}: expected image_id, a whole number, and url, a name")
                continue
            images.add(READ, image_id)
            found.append(_Picture(image_id, image.width, image.height, _file_of(image_id, image.url or "", folders)))
        if images.unusable:
            images.finish(f"{path}: images")
            images.examples.pop(READ, None)
            self.report.note(images, "images")
        pictures = {picture.id: picture for picture in found}
        if len(pictures) < len(found):
            refuse_repeated((picture.id for picture in found), f"{path}: ids of images")
        return pictures

    def _records(self, name: str, key: str, id_name: str) -> Iterator[tuple[int, int, dict]]:
        """(image id, record's id, record) of a file with a list `key` for each image, for the images asked for.

        Versions differ: the image is `image_id` in each record, or `image` (1.0), or else `image_id` or `id` of the
        entry that the record is in; the record's id is `id_name`, or `id` (1.0).
        """
        for number, entry in enumerate(stream_json(self.root / name)):
            if not isinstance(entry, dict) or not isinstance(entry.get(key), list):
                self.report.leave_out(NO_LIST, f"entry {number} of {name}: expected an object with a list {key!r}")
                continue
            of_entry = _first(entry, "image_id", "id")
            for record in entry[key]:
                if not isinstance(record, dict):
                    self.report.leave_out(MALFORMED, f"a record in entry {number} of {name}: expected an object")
                    continue
                image_id, record_id = _first(record, "image_id", "image"), _first(record, id_name, "id")
                image_id = of_entry if image_id is None else image_id
                if type(image_id) is not int:
                    self.report.leave_out(NO_IMAGE_ID, f"a record in entry {number} of {name}")
                elif self.image_ids is not None and image_id not in self.image_ids:
                    continue
                elif type(record_id) is not int or abs(record_id) > _LARGEST_ID:
                    expected = f"expected {id_name}, a whole number of 64 bits"
                    self.report.leave_out(MALFORMED, f"a record in entry {number} of {name}: {expected}")
                else:
                    yield image_id, record_id, record


def _first(record: dict, name: str, other: str) -> Any:
    """The value under a name, or else under its other name."""
    value = record.get(name)
    return record.get(other) if value is None else value


def _file_of(image_id: int, url: str, folders: Folders) -> str:
    """A picture's path: in the folder of its url, else in the one that has it. Its name is that of the url; without
    one it is made from the id.
    """
    match = _NAME_IN_URL.search(url)
    if match:
        return folders.find(match[2], first=match[1])
    return folders.find(f"{image_id}.jpg", f"{image_id}.png")
