"""Reading other people's JSON: whole or streamed, with errors that name the file, and a count of what was left out."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ijson

logger = logging.getLogger(__name__)

READ = "read"
CLAMPED = "reaching over the picture, clamped"
NO_AREA = "without area inside the picture, left out"
_MAX_EXAMPLES = 20

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels, half-open


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
        read = self.counts[READ]
        logger.log(logging.INFO if read else logging.WARNING, "%s: %d read", what, read)
        for reason, count in self.counts.items():
            if reason != READ:
                level = logging.INFO if reason == CLAMPED else logging.WARNING
                first = ", ".join(map(str, self.examples[reason][:3]))
                logger.log(level, "%s: %d %s (ids %s ...)", what, count, reason, first)


def read_json(path: Path, kind: type) -> Any:
    """The content of a JSON file that must be a `kind`.

    Raises:
        ValueError: If it is missing, cut short or something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; it is one of the data set's files") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not whole JSON ({error}); was it cut short?") from error
    if not isinstance(content, kind):
        raise wrong(path, f"a JSON {kind.__name__}", content)
    return content


def stream_json(path: Path) -> Iterator[Any]:
    """The entries of a JSON list, one after the other: Visual Genome's regions are 1.2 GB, and 8 GB as objects.

    Raises:
        ValueError: As `read_json`; for a file that is cut short after the entries before the cut.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
            if head not in (b"[", b""):
                raise ValueError(
                    f"{path}: expected a JSON list, got what begins with {head.decode('ascii', 'replace')!r}"
                )
            file.seek(0)
            yield from ijson.items(file, "item", use_float=True)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; it is one of the data set's files") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except ijson.JSONError as error:
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"{path} is not whole JSON ({reason}); was it cut short?") from error


def clamped(box: Sequence[float], width: int, height: int, report: ReadReport, name: Any) -> Box | None:
    """A box x, y, width, height as x0, y0, x1, y1 inside a picture; None, counted, when nothing is left of it.

    Raises:
        ValueError: If it is not four finite numbers.
    """
    if len(box) != 4 or not all(type(value) in (int, float) and math.isfinite(value) for value in box):
        raise ValueError(f"expected x, y, width and height in pixels as the box of {name}, got {reprlib.repr(box)}")
    x, y, box_width, box_height = box
    stated = x, y, x + box_width, y + box_height
    inside = max(x, 0), max(y, 0), min(stated[2], width), min(stated[3], height)
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        report.add(NO_AREA, name)
        return None
    if inside != stated:
        report.add(CLAMPED, name)
    return inside


def area_share(box: Box, width: int, height: int) -> float:
    """The share of a picture that a box covers, 0 to 1."""
    return round((box[2] - box[0]) * (box[3] - box[1]) / (width * height), 6)


class Folders:
    """Where the pictures of a data set lie: one listing a folder, since a look-up for each of 100,000 takes minutes."""

    def __init__(self, root: Path, folders: Sequence[str]) -> None:
        self.root = root
        self.folders = folders
        self._files = {folder: set(os.listdir(root / folder)) for folder in folders if (root / folder).is_dir()}

    def find(self, *names: str, first: str | None = None) -> str:
        """The path of the first of these names in the first folder that has it. That it is in none is said when it is
        opened, so that text can be read without pictures.
        """
        for folder in self.folders if first is None else (first, *self.folders):
            for name in names:
                if name in self._files.get(folder, ()):
                    return str(self.root / folder / name)
        return str(self.root / (first or self.folders[0]) / names[0])


def integer(path: Path, record: dict, *names: str) -> int:
    """The whole number under the first of these names that the record has.

    Raises:
        ValueError: If there is none.
    """
    if not isinstance(record, dict):
        raise wrong(path, f"an object with {names[0]!r}", record)
    value = next((record[name] for name in names if name in record), None)
    if type(value) is not int:
        named = " or ".join(map(repr, names))
        raise wrong(path, f"{named}, a whole number, in a record", record)
    return value


def text(path: Path, record: dict, name: str) -> str:
    """Text without the space around it; empty for null or nothing.

    Raises:
        ValueError: If it is something else.
    """
    value = record.get(name)
    if value is not None and not isinstance(value, str):
        raise wrong(path, f"text in {name!r}", record)
    return (value or "").strip()


def wrong(path: Path, expected: str, got: Any) -> ValueError:
    """The error of a file that holds something else."""
    # reprlib: the content may be gigabytes
    return ValueError(f"{path}: expected {expected}, got {reprlib.repr(got)}")
