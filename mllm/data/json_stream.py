"""Reads a JSON list entry by entry: Visual Genome's regions take 1.2 GB on disk, and 8 GB as Python objects."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm.data.json_files import MAX_RECORD_SIZE, ContentError, json_errors, open_file

_READ_SIZE = 2**20  # characters
_SPACE = re.compile(r"[ \t\r\n]*")


def stream_json(path: Path) -> Iterator[Any]:
    """The entries of a JSON list.

    Raises:
        ValueError: As for `read_json`, or if an entry has more than `MAX_RECORD_SIZE` characters. The entries before
            the error are returned first.
    """
    with open_file(path, None) as file, json_errors(path):
        parser = _ListParser(io.TextIOWrapper(file, "utf-8-sig", newline=""))
        if (first := parser.take()) != "[":
            got = f"text that begins with {first!r}" if first else "an empty file"
            raise ContentError(f"expected a JSON list, got {got}")
        if parser.peek() == "]":
            parser.take()
        else:
            yield parser.entry()
            while parser.take() == ",":
                yield parser.entry()
        if rest := parser.peek():
            raise ValueError(f"after the end of the list: {rest!r}")


class _ListParser:
    """Parses the text of a JSON list, of which a part is in memory."""

    def __init__(self, file: io.TextIOBase) -> None:
        self.file = file
        self.text = ""
        self.position = 0
        self.discarded = 0  # characters of the file before `text`
        self.decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is not whitespace; empty at the end of the file."""
        while True:
            self.position = _SPACE.match(self.text, self.position).end()
            if self.position < len(self.text) or not self._read(_READ_SIZE):
                return self.text[self.position : self.position + 1]

    def take(self) -> str:
        """As `peek`, but consumes the character."""
        found = self.peek()
        self.position += len(found)
        return found

    def entry(self) -> Any:
        """The next entry. It is complete if a comma or the end of the list follows: a number could continue."""
        self.peek()
        size = _READ_SIZE
        while True:
            try:
                entry, end = self.decode(self.text, self.position)
                end = _SPACE.match(self.text, end).end()
                if self.text[end : end + 1] in (",", "]"):
                    self.position = end
                    return entry
                problem, place = "expected a comma or the end of the list", end
            except json.JSONDecodeError as error:
                problem, place = error.msg, error.pos
            length = len(self.text) - self.position
            if length > MAX_RECORD_SIZE:
                raise ContentError(
                    f"the entry at character {self.discarded + self.position:,} has over {MAX_RECORD_SIZE:,} "
                    f"characters, or is not JSON ({problem} at character {self.discarded + place:,})"
                )
            place += self.discarded
            if not self._read(min(size, MAX_RECORD_SIZE + 1 - length)):
                raise ValueError(f"{problem}, character {place:,}")
            size *= 2

    def _read(self, size: int) -> bool:
        """Read more text and discard what was parsed; returns False at the end of the file."""
        more = self.file.read(size)
        self.discarded += self.position
        self.text, self.position = self.text[self.position :] + more, 0
        return bool(more)
