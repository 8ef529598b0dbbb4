"""What a run leaves out: images that cannot be read, regions that cannot be used. Each is counted, named in a file, and
refused when they are too many.
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
    """A line of the file: an item, and the place in the run at which it was left out.

    Attributes:
        image: The image's file.
        region: Id of the region of the image; None: the whole image file.
        reason: What is wrong, in one line.
        split: Split of the data.
        position: Of the dataset: `epoch * samples + sample`.
    """

    image: str
    region: str | None
    reason: str
    split: str
    position: int

    @property
    def name(self) -> str:
        """For messages."""
        return self.image if self.region is None else f"region {self.region} of {self.image}"


class SkippedItems:
    """The list of one dataset, in a file that all processes of a run append to.

    A line stands for each time that an item is left out, since which of them a run came to (and not only read ahead) is
    known at its end alone: then `only_once` makes it one line an item.

    Args:
        path: The file; None: the items are named in the log alone.
        split: Split of the dataset.
        max_missing: Share of the images, and of the regions, that may be left out.
        images: Number of images of the dataset.
        regions: Number of its regions.
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
        """List an item that is left out at a position.

        Raises:
            ValueError: If more were left out than `max_missing` allows.
        """
        image = _text(image)
        item = SkippedItem(image, region, one_line(error), self.split, position)
        self._read_on()
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
                f"({self.max_missing:.1%}) allows; all are {self.listed}"
            )

    @property
    def listed(self) -> str:
        """Where the items are listed, for messages."""
        return "named in the log" if self.path is None else f"listed in {self.path}"

    def _read_on(self) -> None:
        """Read what other processes have added."""
        if self.path is None or not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self._read_up_to)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._read_up_to += len(whole)
        for item in _parsed(whole):
            if item.split == self.split:
                self._note(item)

    def _note(self, item: SkippedItem) -> None:
        self._known.add((item.image, item.region, item.position))
        self._named[item.region is None].setdefault((item.image, item.region), item)


def read_skipped(path: Path) -> list[SkippedItem]:
    """The items of a file; none without a file. A line that a killed process left incomplete is skipped."""
    return list(_parsed(path.read_bytes())) if path.exists() else []


def keep_skipped(path: Path, wanted: Callable[[SkippedItem], bool]) -> None:
    """Leave only some lines in a file; without any it is removed."""
    _rewrite(path, [item for item in read_skipped(path) if wanted(item)])


def only_once(path: Path, wanted: Callable[[SkippedItem], bool]) -> list[SkippedItem]:
    """Leave only some lines in a file, of each item the first position, in the order of their names; returns them."""
    first: dict[tuple, SkippedItem] = {}
    for item in read_skipped(path):
        key = (item.image, item.region or "", item.split)
        if wanted(item) and (key not in first or item.position < first[key].position):
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
    """Add a line in one write, so that the lines of several processes do not mix."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size and os.pread(descriptor, 1, size - 1) != b"\n"  # left by a killed process
        os.write(descriptor, (b"\n" if torn else b"") + msgspec.json.encode(item) + b"\n")
    finally:
        os.close(descriptor)


def _text(name: str) -> str:
    """A file name with bytes that are not text (surrogates) escaped."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _parsed(content: bytes) -> Iterable[SkippedItem]:
    for line in content.split(b"\n"):
        try:
            yield msgspec.json.decode(line, type=SkippedItem)
        except (msgspec.MsgspecError, UnicodeDecodeError):  # empty, or torn
            continue
