"""What the readers of all data sets share: a count of what was left out, boxes inside their image, places of images.

One bad record is one error: it is left out, counted by its reason and named, and the others go through. Only where more
than `MAX_ERRORS` of the records cannot be used does a reader refuse the data.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from alpha_clip_commands.error_limit import MAX_ERRORS, MIN_ERRORS
from mllm.data.json_files import is_utf8
from mllm.data.schemas import checked

logger = logging.getLogger(__name__)

READ = "read"
CLAMPED = "reaching over the picture, clamped"
NO_AREA = "without area inside the picture, left out"
UNKNOWN_IMAGE = "of an unknown image, left out"
REPEATED = "with a repeated id, left out"
MALFORMED = "of another form, left out"
NOT_UTF8 = "with text that is not UTF-8, left out"
_MAX_EXAMPLES = 20
_NAMED = 3  # ids in a message

T = TypeVar("T")
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels, half-open


@dataclasses.dataclass
class ReadReport:
    """What a reader read, changed or left out: how often, for which reason, and the first ids.

    Attributes:
        counts: Records by reason; `READ` are those that became samples.
        examples: The first ids by reason.
        unusable: Records that could not be used. Those of other images or splits, left out on purpose, do not count.
    """

    counts: Counter = dataclasses.field(default_factory=Counter)
    examples: dict[str, list] = dataclasses.field(default_factory=dict)
    unusable: int = 0

    def add(self, reason: str, example: Any) -> None:
        """Count one record."""
        self.counts[reason] += 1
        if len(kept := self.examples.setdefault(reason, [])) < _MAX_EXAMPLES:
            kept.append(example)

    def leave_out(self, reason: str, example: Any) -> None:
        """Count one record that cannot be used."""
        self.unusable += 1
        self.add(reason, example)

    def note(self, other: ReadReport, what: str) -> None:
        """Count what another reading left out, under a name of its own: they do not count as records of this one."""
        for reason, examples in other.examples.items():
            self.counts[f"{what} {reason}"] += other.counts[reason]
            self.examples.setdefault(f"{what} {reason}", []).extend(examples[:_MAX_EXAMPLES])

    def finish(self, what: str, *, needed: bool = False) -> None:
        """Log one line a reason: a warning where records were left out, or none was read.

        Args:
            what: Name of what was read, for messages.
            needed: Refuse a file of which nothing can be used, however small; else it may be a part of a data set.

        Raises:
            ValueError: If more than `MAX_ERRORS` of at least `MIN_ERRORS` records could not be used.
        """
        read = self.counts[READ]
        logger.log(logging.INFO if read else logging.WARNING, "%s: %d read", what, read)
        lines = {reason: self._line(reason) for reason in self.counts if reason != READ}
        for reason, line in lines.items():
            logger.log(logging.INFO if reason == CLAMPED else logging.WARNING, "%s: %s", what, line)
        seen = read + self.unusable
        too_many = seen >= MIN_ERRORS and self.unusable > MAX_ERRORS * seen
        if too_many or (needed and self.unusable and not read):
            reasons = "; ".join(line for reason, line in lines.items() if reason != CLAMPED)
            raise ValueError(
                f"{what}: {self.unusable:,} of {seen:,} records cannot be used (at most {MAX_ERRORS:.0%} may be "
                f"left out): {reasons}. Check that the files are complete and of the expected format"
            )

    def _line(self, reason: str) -> str:
        """How often, why, and the first ids."""
        named = ", ".join(map(str, self.examples[reason][:_NAMED]))
        return f"{self.counts[reason]} {reason} (ids {named}{' ...' if self.counts[reason] > _NAMED else ''})"


def usable_record(record: Any, kind: type[T], name: str, report: ReadReport) -> T | None:
    """A record as a `kind` of `mllm.data.schemas`; None, counted, if it is something else."""
    try:
        return checked(record, kind, name)
    except ValueError as error:
        report.leave_out(MALFORMED, str(error))
        return None


def clamped(box: Sequence[float], width: int, height: int, report: ReadReport, name: Any) -> Box | None:
    """A box x, y, width, height, checked numbers, as x0, y0, x1, y1 inside an image; None, counted, when nothing is
    left of it.
    """
    x, y, box_width, box_height = box
    stated = x, y, x + box_width, y + box_height
    inside = max(x, 0), max(y, 0), min(stated[2], width), min(stated[3], height)
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        report.leave_out(NO_AREA, name)
        return None
    if inside != stated:
        report.add(CLAMPED, name)
    return inside


def area_share(box: Box, width: int, height: int) -> float:
    """The share of a picture that a box covers, 0 to 1."""
    return round((box[2] - box[0]) * (box[3] - box[1]) / (width * height), 6)


def usable_text(words: str | None, report: ReadReport, name: Any, blank: str) -> str | None:
    """Text without the space around it; None, counted, where nothing is left (for the reason `blank`), or where it
    cannot be written.
    """
    words = (words or "").strip()
    if not words:
        report.leave_out(blank, name)
    elif not is_utf8(words):
        report.leave_out(NOT_UTF8, name)
    else:
        return words
    return None


class Folders:
    """Where the pictures of a data set lie: one listing a folder, since a look-up for each of 100,000 takes minutes."""

    def __init__(self, root: Path, folders: Sequence[str]) -> None:
        self.root = root
        self.folders = folders
        self._files = {folder: set(os.listdir(root / folder)) for folder in folders if (root / folder).is_dir()}

    def find(self, *names: str, first: str | None = None) -> str:
        """The path of the first of these names in the first folder that has it. If none has it, opening it is the
        error, so that text can be read without images.
        """
        for folder in self.folders if first is None else (first, *self.folders):
            for name in names:
                # a name with a folder in it ("train2014/1.jpg") is in no listing
                if name in self._files.get(folder, ()) or "/" in name and (self.root / folder / name).is_file():
                    return str(self.root / folder / name)
        return str(self.root / (first or self.folders[0]) / names[0])
