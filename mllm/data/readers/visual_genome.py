"""Reads Visual Genome's original files, versions 1.0, 1.2 and 1.4.

The files are `image_data.json`, `region_descriptions.json`, `question_answers.json`, `qa_to_region_mapping.json`, for
masks `region_masks.json` (COCO RLE by region id), and the images in `VG_100K/`, `VG_100K_2/`, the folder itself or
`images/`.

A sample's `meta` has `image_id`, `width` and `height`; for a region `region_id` and `area` (of its box, as a fraction
of the image); for a question `qa_id` and, if stated, its `type`.

Source: homes.cs.washington.edu/~ranjay/visualgenome/api_readme.html, and the published files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mllm.data.image_folders import ImageFolders
from mllm.data.json_files import check_unique, is_utf8, read_json
from mllm.data.json_stream import stream_json
from mllm.data.masks import check_region_type, select_region
from mllm.data.read_report import (
    DUPLICATE_ID,
    MALFORMED,
    READ,
    UNKNOWN_IMAGE,
    Box,
    ReadReport,
    clamp_box,
    relative_area,
    usable_record,
    usable_text,
)
from mllm.data.samples import RegionSample
from mllm.data.schemas import VisualGenomeImage, VisualGenomeQuestion, VisualGenomeRegion, is_file_name
from vision_tower import Region

_IMAGE_FOLDERS = ("VG_100K", "VG_100K_2", "", "images")
NO_PHRASE = "skipped: no phrase"
NO_IMAGE_ID = "skipped: the image id is not an integer"
NO_LIST = "entries skipped: no list of records"
QUESTION_UNKNOWN_IMAGE = "questions skipped: unknown image"
QUESTION_OTHER_IMAGE = "questions skipped: the region is of another image"
QUESTION_SKIPPED_REGION = "questions skipped: the region was skipped"
QUESTION_UNKNOWN_REGION = "questions skipped: unknown region"
QUESTION_DUPLICATE_ID = "questions skipped: duplicate id"
QUESTION_NO_TEXT = "questions skipped: no question or answer"
_MAX_ID = 2**63 - 1
_NAME_IN_URL = re.compile(r"(?:(VG_100K(?:_2)?)/)?([^/]+\.\w+)$")


def read_regions(
    root: str | os.PathLike,
    *,
    image_ids: Collection[int] | None = None,
    region_type: str = "box",
    report: ReadReport | None = None,
) -> Iterator[RegionSample]:
    """One sample per region description, whose reference is the phrase.

    Args:
        root: Folder of the files.
        image_ids: Only these images, for example those of a split; default: all.
        region_type: "box", or "mask" (from `region_masks.json`).
        report: Filled with the counts of read, clamped and skipped records, which are also logged.

    Raises:
        ValueError: If a file is missing, damaged or in another format, an image id occurs twice, or more than
            `MAX_ERRORS` of the records cannot be used. With "mask", a region without a mask of its image's size cannot
            be used.
    """
    reader = _Reader(Path(root), image_ids, region_type, report)
    for region_id, image, box, record in reader.regions():
        if (phrase := usable_text(record.phrase, reader.report, region_id, NO_PHRASE)) is None:
            continue
        region = reader.region(region_id, image, box)
        if not isinstance(region, Region):
            reader.report.skip(region, region_id)
            continue
        reader.report.add(READ, region_id)
        meta = {**image.meta(box), "region_id": region_id}
        sample_id = f"vg-region-{region_id}"
        yield RegionSample(sample_id, image.path, (region,), None, (phrase,), meta=meta)
    reader.report.finish(f"{root}: regions")


def read_region_questions(
    root: str | os.PathLike,
    *,
    image_ids: Collection[int] | None = None,
    region_type: str = "box",
    report: ReadReport | None = None,
    located: bool = True,
) -> Iterator[RegionSample]:
    """One sample per question about a region (`qa_to_region_mapping.json`), whose reference is the answer.

    Only regions with a question are counted in the report.

    Args:
        root: Folder of the files.
        image_ids: As for `read_regions`.
        region_type: As for `read_regions`.
        report: As for `read_regions`.
        located: If False, samples have the id of the region in `meta` but no region, and the gigabyte of regions is not
            read. The caller joins both and counts questions whose region does not exist.

    Raises:
        ValueError: As for `read_regions`.
    """
    reader = _Reader(Path(root), image_ids, region_type, report)
    mapping = reader.mapping()
    if not located:
        for qa_id, image, question, answer, extra in reader.questions(mapping, mapped=True):
            reader.report.add(READ, qa_id)
            meta = {**image.meta(), **extra, "region_id": mapping[qa_id]}
            yield RegionSample(f"vg-qa-{qa_id}", image.path, (), question, (answer,), meta=meta)
        reader.report.finish(f"{root}: region questions")
        return
    regions = {}  # only those with questions, of 5.4 million
    for region_id, image, box, _ in reader.regions(region_ids=set(mapping.values())):
        regions[region_id] = image, box
    for qa_id, image, question, answer, extra in reader.questions(mapping, mapped=True):
        region_id = mapping[qa_id]
        if region_id not in regions:
            # the question itself is not unusable
            is_skipped = region_id in reader.skipped_regions
            reader.report.add(QUESTION_SKIPPED_REGION if is_skipped else QUESTION_UNKNOWN_REGION, qa_id)
        elif regions[region_id][0] is not image:
            reader.report.skip(QUESTION_OTHER_IMAGE, qa_id)
        elif not isinstance(region := reader.region(region_id, *regions[region_id]), Region):
            reader.report.skip(region, qa_id)
        else:
            reader.report.add(READ, qa_id)
            meta = {**image.meta(regions[region_id][1]), **extra, "region_id": region_id}
            yield _question(qa_id, image, region, question, answer, meta)
    reader.report.finish(f"{root}: region questions")


def read_image_questions(
    root: str | os.PathLike,
    *,
    image_ids: Collection[int] | None = None,
    report: ReadReport | None = None,
) -> Iterator[RegionSample]:
    """One sample per question about no region in particular; its region is the whole image.

    Args and Raises: as for `read_regions`.
    """
    reader = _Reader(Path(root), image_ids, "box", report)
    mapping = reader.mapping()
    whole = Region.whole()
    for qa_id, image, question, answer, extra in reader.questions(mapping, mapped=False):
        reader.report.add(READ, qa_id)
        yield _question(qa_id, image, whole, question, answer, {**image.meta(), **extra})
    reader.report.finish(f"{root}: questions about the whole image")


def read_image_paths(root: str | os.PathLike) -> dict[int, str]:
    """The path of each image in `image_data.json` by its id; the expected path if the file is missing.

    Raises:
        ValueError: As for `read_regions`.
    """
    return {image.id: image.path for image in _Reader(Path(root), None, "box", None).images.values()}


def _question(
    qa_id: int,
    image: _Image,
    region: Region,
    question: str,
    answer: str,
    meta: dict[str, Any],
) -> RegionSample:
    sample_id = f"vg-qa-{qa_id}"
    return RegionSample(sample_id, image.path, (region,), question, (answer,), meta=meta)


class _Image(NamedTuple):
    """An entry of `image_data.json` of any version, with the path of its file."""

    id: int
    width: int
    height: int
    path: str

    def meta(self, box: Box | None = None) -> dict[str, Any]:
        meta = {"image_id": self.id, "width": self.width, "height": self.height}
        return meta if box is None else {**meta, "area": relative_area(box, self.width, self.height)}


# region id, image, clamped box, record
_RegionRecord = tuple[int, _Image, Box, VisualGenomeRegion]
# question id, image, question, answer, further meta
_QuestionRecord = tuple[int, _Image, str, str, dict[str, Any]]


class _Reader:
    """Reads the files of a folder, of any version."""

    def __init__(
        self,
        root: Path,
        image_ids: Collection[int] | None,
        region_type: str,
        report: ReadReport | None,
    ) -> None:
        check_region_type(region_type)
        self.root = root
        self.image_ids = None if image_ids is None else frozenset(image_ids)
        self.report = ReadReport() if report is None else report
        self.skipped_regions: set[int] = set()  # ids
        self.images = self._images()
        self.region_type = region_type
        self.masks = read_json(root / "region_masks.json", dict, unique_keys=True) if region_type == "mask" else {}

    def mapping(self) -> dict[int, int]:
        """Region id by question id. Invalid entries are counted.

        Raises:
            ValueError: If the file is not a JSON object, or the id of a question occurs twice.
        """
        path = self.root / "qa_to_region_mapping.json"
        found = []
        for key, value in read_json(path, dict, unique_keys=True).items():
            if key.isdecimal() and len(key) < 20 and type(value) is int:
                found.append((int(key), value))
            else:
                self.report.skip(f"entries of {path.name} skipped: not in the expected format", ascii(key)[:100])
        mapping = dict(found)
        if len(mapping) < len(found):
            check_unique((qa_id for qa_id, _ in found), f"{path}: ids of questions")
        return mapping

    def regions(self, region_ids: Collection[int] | None = None) -> Iterator[_RegionRecord]:
        """The regions (default: all) with an area inside a known image; each id once."""
        seen: set[int] = set()
        for image_id, region_id, record in self._records("region_descriptions.json", "regions", "region_id"):
            if region_ids is not None and region_id not in region_ids:
                continue
            if (image := self.images.get(image_id)) is None:
                self.report.add(UNKNOWN_IMAGE, region_id)
                self.skipped_regions.add(region_id)
                continue
            if region_id in seen:
                self.report.skip(DUPLICATE_ID, region_id)
                continue
            seen.add(region_id)
            region = usable_record(record, VisualGenomeRegion, f"region {region_id}", self.report)
            box = None
            if region is not None:
                box = (region.x, region.y, region.width, region.height)
                box = clamp_box(box, image.width, image.height, self.report, region_id)
            if box is None:
                self.skipped_regions.add(region_id)
            else:
                self.skipped_regions.discard(region_id)  # also listed with an unknown image
                yield region_id, image, box, region

    def questions(self, mapping: dict[int, int], mapped: bool) -> Iterator[_QuestionRecord]:
        """The answered questions whose id is in the mapping, or is not; each id once."""
        seen: set[int] = set()
        for image_id, qa_id, record in self._records("question_answers.json", "qas", "qa_id"):
            if (qa_id in mapping) != mapped:
                continue
            if image_id not in self.images:
                self.report.add(QUESTION_UNKNOWN_IMAGE, qa_id)
                continue
            if qa_id in seen:
                self.report.skip(QUESTION_DUPLICATE_ID, qa_id)
                continue
            if (row := usable_record(record, VisualGenomeQuestion, f"question {qa_id}", self.report)) is None:
                continue
            question = usable_text(row.question, self.report, qa_id, QUESTION_NO_TEXT)
            if question is None or (answer := usable_text(row.answer, self.report, qa_id, QUESTION_NO_TEXT)) is None:
                continue
            seen.add(qa_id)
            kind = {"type": row.type} if row.type and is_utf8(row.type) else {}
            yield qa_id, self.images[image_id], question, answer, {"qa_id": qa_id, **kind}

    def region(self, region_id: int, image: _Image, box: Box) -> Region | str:
        """The region as a box or as a mask, or the reason why the mask cannot be used."""
        return select_region(self.masks.get(str(region_id)), box, (image.height, image.width), self.region_type)

    def _images(self) -> dict[int, _Image]:
        """The images by id. Invalid entries are counted."""
        path = self.root / "image_data.json"
        folders = ImageFolders(self.root, _IMAGE_FOLDERS)
        image_report = ReadReport()
        found: list[_Image] = []
        for number, entry in enumerate(stream_json(path)):
            if (image := usable_record(entry, VisualGenomeImage, f"entry {number}", image_report)) is None:
                continue
            image_id = image.id if image.image_id is None else image.image_id
            if image_id is None or not is_file_name(image.url or ""):
                image_report.skip(MALFORMED, f"entry {number}: expected image_id, an integer, and url, a file name")
                continue
            image_report.add(READ, image_id)
            found.append(_Image(image_id, image.width, image.height, _image_path(image_id, image.url or "", folders)))
        if image_report.unusable:
            image_report.finish(f"{path}: images")
            image_report.examples.pop(READ, None)
            self.report.include(image_report, "images")
        by_id = {image.id: image for image in found}
        if len(by_id) < len(found):
            check_unique((image.id for image in found), f"{path}: ids of images")
        return by_id

    def _records(self, name: str, key: str, id_name: str) -> Iterator[tuple[int, int, dict]]:
        """(image id, record id, record) of the selected images, from a file with a list `key` for each image.

        The image id is `image_id` in the record, `image` (version 1.0), or else `image_id` or `id` of the entry that
        contains the record. The record id is `id_name`, or `id` (version 1.0).
        """
        for number, entry in enumerate(stream_json(self.root / name)):
            if not isinstance(entry, dict) or not isinstance(entry.get(key), list):
                self.report.skip(NO_LIST, f"entry {number} of {name}: expected an object with a list {key!r}")
                continue
            entry_image = _first(entry, "image_id", "id")
            for record in entry[key]:
                if not isinstance(record, dict):
                    self.report.skip(MALFORMED, f"a record in entry {number} of {name}: expected an object")
                    continue
                image_id, record_id = _first(record, "image_id", "image"), _first(record, id_name, "id")
                image_id = entry_image if image_id is None else image_id
                if type(image_id) is not int:
                    self.report.skip(NO_IMAGE_ID, f"a record in entry {number} of {name}")
                elif self.image_ids is not None and image_id not in self.image_ids:
                    continue
                elif type(record_id) is not int or abs(record_id) > _MAX_ID:
                    expected = f"expected {id_name}, a 64-bit integer"
                    self.report.skip(MALFORMED, f"a record in entry {number} of {name}: {expected}")
                else:
                    yield image_id, record_id, record


def _first(record: dict, name: str, other: str) -> Any:
    """The value of a field, or else of its other name."""
    value = record.get(name)
    return record.get(other) if value is None else value


def _image_path(image_id: int, url: str, folders: ImageFolders) -> str:
    """The path of an image: the file name is in its url, or else its id; the folder of the url is searched first."""
    match = _NAME_IN_URL.search(url)
    if match:
        return folders.find(match[2], first=match[1])
    return folders.find(f"{image_id}.jpg", f"{image_id}.png")
