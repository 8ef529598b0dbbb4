"""Skipped items: images that cannot be read and regions that cannot be used. They are counted and listed in a file; too
many are an error.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from alpha_clip_commands.command_line import one_line
from mllm.files import write_file

logger = logging.getLogger(__name__)

SKIPPED = "skipped.jsonl"


class SkippedItem(msgspec.Struct, frozen=True):
    """A line of the file: a skipped item and its position in the run.

    Attributes:
        image: The image file.
        region: ID of the region; None if the image itself cannot be read.
        reason: The error, in one line.
        split: Split of the data.
        position: Position in the dataset: `epoch * samples + sample`.
    """

    image: str
    region: str | None
    reason: str
    split: str
    position: int

    @property
    def name(self) -> str:
        """The item in messages."""
        return self.image if self.region is None else f"region {self.region} of {self.image}"


class SkippedItems:
    """The skipped items of one dataset, in a file to which all processes of a run append.

    The file has one line each time an item is skipped, because only at the end is it known which lines training reached
    (loader workers read ahead). `deduplicate_skipped` then reduces it to one line per item.

    Args:
        path: The file. If None, the items are only logged.
        split: Split of the dataset.
        max_missing: Maximum share of the images, and of the regions, that may be skipped.
        images: Number of images in the dataset.
        regions: Number of regions in the dataset.
    """

    def __init__(self, path: Path | None, split: str, max_missing: float, images: int, regions: int) -> None:
        self.path = path
        self.split = split
        self.max_missing = max_missing
        self.images = images
        self.regions = regions
        self._read_up_to = 0  # bytes
        self._known: set[tuple[str, str | None, int]] = set()
        self._named: dict[bool, dict[tuple[str, str | None], SkippedItem]] = {True: {}, False: {}}  # is an image: items

    def add(self, position: int, image: str, region: str | None, error: ValueError) -> None:
        """Record a skipped item.

        Raises:
            ValueError: If more items were skipped than `max_missing` allows.
        """
        image = _text(image)
        item = SkippedItem(image, region, one_line(error), self.split, position)
        self._read_new_lines()
        if (image, region, position) not in self._known:
            if (image, region) not in self._named[region is None]:
                logger.warning("skipped %s: %s", item.name, item.reason)
            if self.path is not None:
                _append(self.path, item)
            self._note(item)
        named, total = self._named[region is None], self.images if region is None else self.regions
        if len(named) > self.max_missing * total:
            first = next(iter(named.values()))
            what = "images cannot be read" if region is None else "regions cannot be used"
            raise ValueError(
                f"{len(named)} of {total} {what} (first: {first.name}: {first.reason}), more than max_missing "
                f"({self.max_missing:.1%}) allows; all of them are {self.listed}"
            )

    @property
    def listed(self) -> str:
        """Where the items are listed, for messages."""
        return "in the log" if self.path is None else f"listed in {self.path}"

    def _read_new_lines(self) -> None:
        """Read the lines that other processes have appended."""
        if self.path is None or not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self._read_up_to)
            content = file.read()
        lines = content[: content.rfind(b"\n") + 1]
        self._read_up_to += len(lines)
        for item in _parsed(lines):
            if item.split == self.split:
                self._note(item)

    def _note(self, item: SkippedItem) -> None:
        self._known.add((item.image, item.region, item.position))
        self._named[item.region is None].setdefault((item.image, item.region), item)


def read_skipped(path: Path) -> list[SkippedItem]:
    """The items in a file, if it exists. A line that a killed process left incomplete is ignored."""
    return list(_parsed(path.read_bytes())) if path.exists() else []


def filter_skipped(path: Path, keep: Callable[[SkippedItem], bool]) -> None:
    """Keep only the lines for which `keep` is true; an empty file is removed."""
    _rewrite(path, [item for item in read_skipped(path) if keep(item)])


def deduplicate_skipped(path: Path, keep: Callable[[SkippedItem], bool]) -> list[SkippedItem]:
    """Keep one line per item, its first position for which `keep` is true, sorted by item; returns the items."""
    first: dict[tuple, SkippedItem] = {}
    for item in read_skipped(path):
        key = (item.image, item.region or "", item.split)
        if keep(item) and (key not in first or item.position < first[key].position):
            first[key] = item
    items = [first[key] for key in sorted(first)]
    _rewrite(path, items)
    return items


def _rewrite(path: Path, items: list[SkippedItem]) -> None:
    if items:
        write_file(path, b"".join(msgspec.json.encode(item) + b"\n" for item in items))
    else:
        path.unlink(missing_ok=True)


def _append(path: Path, item: SkippedItem) -> None:
    """Append a line with one write, so that lines of several processes do not mix."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size and os.pread(descriptor, 1, size - 1) != b"\n"  # by a killed process
        os.write(descriptor, (b"\n" if torn else b"") + msgspec.json.encode(item) + b"\n")
    finally:
        os.close(descriptor)


def _text(name: str) -> str:
    """A file name with undecodable bytes (surrogates) escaped."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _parsed(content: bytes) -> Iterable[SkippedItem]:
    for line in content.split(b"\n"):
        try:
            yield msgspec.json.decode(line, type=SkippedItem)
        except (msgspec.MsgspecError, UnicodeDecodeError):  # empty or incomplete
            continue
