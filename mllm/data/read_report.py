"""`ReadReport`: what a reader read and skipped; and the checks of records that all readers share.

A record that cannot be used is skipped and counted by its reason. A reader fails only if more than `MAX_ERRORS` of the
records cannot be used.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

from alpha_clip_commands.error_limit import MAX_ERRORS, MIN_ERRORS
from mllm.data.json_files import is_utf8
from mllm.data.schemas import validate

logger = logging.getLogger(__name__)

READ = "read"
CLAMPED = "clamped to the image"
NO_AREA = "skipped: no area inside the image"
UNKNOWN_IMAGE = "skipped: unknown image"
DUPLICATE_ID = "skipped: duplicate id"
MALFORMED = "skipped: not in the expected format"
NOT_UTF8 = "skipped: text is not valid UTF-8"
_MAX_EXAMPLES = 20
_MAX_IDS_LOGGED = 3

T = TypeVar("T")
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels, half-open


@dataclasses.dataclass
class ReadReport:
    """Counts of the records that a reader read, changed or skipped.

    Attributes:
        counts: Number of records by reason. `READ` counts the samples.
        examples: Ids of the first records by reason.
        unusable: Number of records that cannot be used, without those of other images or splits.
    """

    counts: Counter = dataclasses.field(default_factory=Counter)
    examples: dict[str, list] = dataclasses.field(default_factory=dict)
    unusable: int = 0

    def add(self, reason: str, example: Any) -> None:
        """Count a record."""
        self.counts[reason] += 1
        if len(kept := self.examples.setdefault(reason, [])) < _MAX_EXAMPLES:
            kept.append(example)

    def skip(self, reason: str, example: Any) -> None:
        """Count a record that cannot be used."""
        self.unusable += 1
        self.add(reason, example)

    def include(self, other: ReadReport, prefix: str) -> None:
        """Add the counts of another report, without counting its records as unusable."""
        for reason, examples in other.examples.items():
            self.counts[f"{prefix} {reason}"] += other.counts[reason]
            self.examples.setdefault(f"{prefix} {reason}", []).extend(examples[:_MAX_EXAMPLES])

    def problems(self) -> dict[str, int]:
        """Number of records by reason, without `READ`."""
        return {reason: count for reason, count in self.counts.items() if reason != READ}

    def finish(self, name: str, *, required: bool = False) -> None:
        """Log one line per reason.

        Args:
            name: What was read, for messages.
            required: Fail if no record can be used, even if there are only a few. Otherwise a small file may be
                one part of a dataset.

        Raises:
            ValueError: If more than `MAX_ERRORS` of at least `MIN_ERRORS` records cannot be used.
        """
        read = self.counts[READ]
        logger.log(logging.INFO if read else logging.WARNING, "%s: %d read", name, read)
        lines = {reason: self._line(reason) for reason in self.problems()}
        for reason, line in lines.items():
            logger.log(logging.INFO if reason == CLAMPED else logging.WARNING, "%s: %s", name, line)
        total = read + self.unusable
        too_many = total >= MIN_ERRORS and self.unusable > MAX_ERRORS * total
        if too_many or (required and self.unusable and not read):
            reasons = "; ".join(line for reason, line in lines.items() if reason != CLAMPED)
            raise ValueError(
                f"{name}: {self.unusable:,} of {total:,} records cannot be used (limit: {MAX_ERRORS:.0%}): {reasons}. "
                "Check that the files are complete and in the expected format"
            )

    def _line(self, reason: str) -> str:
        """Count, reason and first ids."""
        ids = ", ".join(map(str, self.examples[reason][:_MAX_IDS_LOGGED]))
        return f"{self.counts[reason]} {reason} (ids {ids}{' ...' if self.counts[reason] > _MAX_IDS_LOGGED else ''})"


def usable_record(record: Any, kind: type[T], name: str, report: ReadReport) -> T | None:
    """The record as a `kind` of `mllm.data.schemas`, or None (counted) if it is not one."""
    try:
        return validate(record, kind, name)
    except ValueError as error:
        report.skip(MALFORMED, str(error))
        return None


def usable_text(text: str | None, report: ReadReport, name: Any, blank: str) -> str | None:
    """The stripped text, or None (counted) if it is blank (reason `blank`) or not valid UTF-8."""
    text = (text or "").strip()
    if not text:
        report.skip(blank, name)
    elif not is_utf8(text):
        report.skip(NOT_UTF8, name)
    else:
        return text
    return None


def clamp_box(box: Sequence[float], width: int, height: int, report: ReadReport, name: Any) -> Box | None:
    """The part of a box inside the image, or None (counted) if it has no area.

    Args:
        box: x, y, width, height in pixels.
        width: Width of the image in pixels.
        height: Height of the image in pixels.
        report: Counts clamped and skipped boxes.
        name: Id of the record, for the report.
    """
    x, y, box_width, box_height = box
    stated = x, y, x + box_width, y + box_height
    inside = max(x, 0), max(y, 0), min(stated[2], width), min(stated[3], height)
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        report.skip(NO_AREA, name)
        return None
    if inside != stated:
        report.add(CLAMPED, name)
    return inside


def relative_area(box: Box, width: int, height: int) -> float:
    """Area of a box as a fraction of the image, in [0, 1]."""
    return round((box[2] - box[0]) * (box[3] - box[1]) / (width * height), 6)
