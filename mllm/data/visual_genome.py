"""Visual Genome's original files -> `RegionSample`s.

Read are `image_data.json`, `region_descriptions.json`, `question_answers.json`, `qa_to_region_mapping.json` of versions
1.0, 1.2 and 1.4, `region_masks.json` (COCO RLE by region id) where there is one, and pictures from `VG_100K/`,
`VG_100K_2/`, `images/` or the folder itself.

Source: homes.cs.washington.edu/~ranjay/visualgenome/api_readme.html, and the published files.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from mllm.data.samples import RegionSample
from vision_tower import Region

logger = logging.getLogger(__name__)

_IMAGE_FOLDERS = ("VG_100K", "VG_100K_2", "images", "")
_NAME_IN_URL = re.compile(r"(?:(VG_100K(?:_2)?)/)?([^/]+\.\w+)$")
_MAX_EXAMPLES = 20


@dataclasses.dataclass
class ReadReport:
    """What a reader changed or left out: how often, for which reason, with the first few ids."""

    counts: Counter = dataclasses.field(default_factory=Counter)
    examples: dict[str, list] = dataclasses.field(default_factory=dict)

    def add(self, reason: str, example: Any) -> None:
        """Count one record."""
        self.counts[reason] += 1
        if len(kept := self.examples.setdefault(reason, [])) < _MAX_EXAMPLES:
            kept.append(example)

    def log(self, what: str) -> None:
        """One line a reason."""
        for reason, count in self.counts.items():
            level = logging.INFO if reason == "read" else logging.WARNING
            logger.log(level, "%s: %d %s (%s ...)", what, count, reason, self.examples[reason][0])


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
        report: Filled with what was read, clamped and left out; logged in any case.

    Raises:
        ValueError: If a file is missing, damaged or of another form, or a region has no mask where masks are asked for.
    """
    reader = _Reader(Path(root), region_input, report)
    for region_id, (image, region) in reader.regions(image_ids):
        phrase = str(region["phrase"]).strip()
        if not phrase:
            reader.report.add("without a phrase, left out", region_id)
            continue
        reader.report.add("read", region_id)
        yield reader.sample(f"vg-region-{region_id}", image, region_id, region["box"], None, phrase, {})
    reader.report.log(f"{root}: regions")


def read_region_questions(
    root: str | os.PathLike,
    *,
    image_ids: Collection[int] | None = None,
    region_input: str = "box",
    report: ReadReport | None = None,
) -> Iterator[RegionSample]:
    """One sample for each question that `qa_to_region_mapping.json` ties to a region; the answer as reference.

    Args and Raises: as `read_regions`.
    """
    reader = _Reader(Path(root), region_input, report)
    mapping = reader.mapping()
    regions = dict(reader.regions(image_ids, count=False))
    for qa_id, _, qa in reader.questions(image_ids):
        region_id = mapping.get(str(qa_id))
        if region_id is None:
            continue
        if region_id not in regions:
            reader.report.add("questions on an unknown region, left out", qa_id)
            continue
        reader.report.add("read", qa_id)
        image, region = regions[region_id]
        extra = {"qa_id": qa_id, **({"type": qa["type"]} if "type" in qa else {})}
        yield reader.sample(f"vg-qa-{qa_id}", image, region_id, region["box"], qa["question"], qa["answer"], extra)
    reader.report.log(f"{root}: region questions")


def read_free_questions(
    root: str | os.PathLike, *, image_ids: Collection[int] | None = None, report: ReadReport | None = None
) -> Iterator[RegionSample]:
    """One sample for each question that belongs to no region: its region is the whole image.

    Args and Raises: as `read_regions`.
    """
    reader = _Reader(Path(root), "box", report)
    mapping = reader.mapping()
    for qa_id, image, qa in reader.questions(image_ids):
        if str(qa_id) not in mapping:
            reader.report.add("read", qa_id)
            extra = {"qa_id": qa_id, **({"type": qa["type"]} if "type" in qa else {})}
            yield reader.sample(f"vg-qa-{qa_id}", image, None, None, qa["question"], qa["answer"], extra)
    reader.report.log(f"{root}: free questions")


class _Reader:
    """The files of one folder under the names of version 1.2, whatever their version."""

    def __init__(self, root: Path, region_input: str, report: ReadReport | None) -> None:
        if region_input not in ("box", "mask"):
            raise ValueError(f"expected region_input 'box' or 'mask', got {region_input!r}")
        self.root = root
        self.report = ReadReport() if report is None else report
        self.images = {_id(entry, "image_id"): entry for entry in self._json("image_data.json", list)}
        self.masks = self._json("region_masks.json", dict) if region_input == "mask" else None
        self.files = {
            folder: set(os.listdir(root / folder)) for folder in _IMAGE_FOLDERS if (root / folder).is_dir()
        }  # one listing a folder: a look-up for each of 5.4 million regions would take hours

    def _json(self, name: str, kind: type) -> Any:
        path = self.root / name
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise ValueError(f"{path} is missing; it is one of Visual Genome's original files") from None
        except ValueError as error:
            raise ValueError(f"{path} is not whole JSON ({error}); was its download cut short?") from error
        if not isinstance(content, kind):
            raise ValueError(f"{path}: expected a JSON {kind.__name__}, got {type(content).__name__}")
        return content

    def mapping(self) -> dict[str, int]:
        """Region id by question id."""
        return self._json("qa_to_region_mapping.json", dict)

    def regions(self, image_ids: Collection[int] | None, count: bool = True) -> Iterator[tuple[int, tuple[dict, dict]]]:
        """(region id, (image entry, {"phrase", "box"})), boxes clamped; each id once."""
        seen: set[int] = set()
        report = self.report if count else ReadReport()
        for entry in self._json("region_descriptions.json", list):
            for region in _list(entry, "regions"):
                region_id = _id(region, "region_id")
                image_id = region.get("image_id", region.get("image", entry.get("image_id", entry.get("id"))))
                if image_ids is not None and image_id not in image_ids:
                    continue
                if image_id not in self.images:
                    report.add("of an unknown image, left out", region_id)
                elif region_id in seen:
                    report.add("with a repeated id, left out", region_id)
                else:
                    seen.add(region_id)
                    box = self._clamped(region, self.images[image_id], report, region_id)
                    if box is not None:
                        yield region_id, (self.images[image_id], {"phrase": region.get("phrase", ""), "box": box})

    def questions(self, image_ids: Collection[int] | None) -> Iterator[tuple[int, dict, dict]]:
        """(question id, image entry, record) for questions with text and answer."""
        for entry in self._json("question_answers.json", list):
            for qa in _list(entry, "qas"):
                qa_id = _id(qa, "qa_id")
                image_id = qa.get("image_id", qa.get("image", entry.get("image_id", entry.get("id"))))
                if image_ids is not None and image_id not in image_ids:
                    continue
                if image_id not in self.images:
                    self.report.add("questions on an unknown image, left out", qa_id)
                elif not (str(qa.get("question", "")).strip() and str(qa.get("answer", "")).strip()):
                    self.report.add("questions without text or answer, left out", qa_id)
                else:
                    yield qa_id, self.images[image_id], qa

    @staticmethod
    def _clamped(region: dict, image: dict, report: ReadReport, region_id: int) -> tuple[int, int, int, int] | None:
        """The box x0, y0, x1, y1 inside the picture's stated size, or None when nothing is left of it."""
        try:
            x, y, width, height = (region[name] for name in ("x", "y", "width", "height"))
        except KeyError as error:
            raise ValueError(f"region {region_id} has no {error}; expected x, y, width, height in pixels") from None
        box = max(x, 0), max(y, 0), min(x + width, image["width"]), min(y + height, image["height"])
        if box[0] >= box[2] or box[1] >= box[3]:
            report.add("without area inside the picture, left out", region_id)
            return None
        if box != (x, y, x + width, y + height):
            report.add("reaching over the picture, clamped", region_id)
        return box

    def sample(
        self,
        sample_id: str,
        image: dict,
        region_id: int | None,
        box: tuple | None,
        question: str | None,
        answer: str,
        extra: dict,
    ) -> RegionSample:
        """The shared record."""
        meta = {"image_id": _id(image, "image_id"), "width": image["width"], "height": image["height"], **extra}
        if region_id is None:
            region = Region.whole()
        else:
            meta["region_id"] = region_id
            region = self._region(region_id, box)
        return RegionSample(sample_id, self._image_path(image), (region,), question, (answer.strip(),), meta=meta)

    def _region(self, region_id: int, box: tuple) -> Region:
        if self.masks is None:
            return Region.from_box(*box)
        if (rle := self.masks.get(str(region_id))) is None:
            raise ValueError(
                f"{self.root / 'region_masks.json'} has no mask for region {region_id}; use region_input='box'"
            )
        return Region.from_rle(rle)

    def _image_path(self, image: dict) -> str:
        """The picture's path: the folder of its url, else the folder that has it; a missing file is noticed when it is
        opened.
        """
        match = _NAME_IN_URL.search(image.get("url") or "")
        stated, name = match.groups() if match else (None, f"{_id(image, 'image_id')}.jpg")
        for folder in (stated, *_IMAGE_FOLDERS):
            if folder is not None and name in self.files.get(folder, ()):
                return str(self.root / folder / name)
        return str(self.root / (stated or _IMAGE_FOLDERS[0]) / name)


def _id(record: dict, name: str) -> int:
    """An id under its name since 1.2, or as `id` (1.0)."""
    found = record.get(name, record.get("id"))
    if found is None:
        raise ValueError(f"expected {name!r} (or 'id', version 1.0) in a Visual Genome record, got {sorted(record)}")
    return found


def _list(entry: dict, name: str) -> list[dict]:
    if not isinstance(entry, dict) or not isinstance(entry.get(name), list):
        raise ValueError(f"expected a list {name!r} for each image, got {str(entry)[:80]}")
    return entry[name]
