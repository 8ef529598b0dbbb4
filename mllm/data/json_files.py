"""Reading JSON that others wrote: whole files, streamed lists, lines. The limits are listed in docs/files.md."""

from __future__ import annotations

import io
import json
import os
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

LARGEST_FILE = 2 * 2**30  # bytes of a JSON file that is read whole
LARGEST_RECORD = 16 * 2**20  # bytes of a line or of an image's own JSON; characters of an entry of a streamed list
DEEPEST = 100  # levels of a record that is kept whole; what the json module itself takes is some hundreds
_READ_AT_ONCE = 2**20  # characters
_SPACE = re.compile(r"[ \t\r\n]*")
_NAMED = 5  # ids in a message
_COLLECTIONS = (list, type({}.values()))


def read_json(path: Path, kind: type, *, unique_keys: bool = False) -> Any:
    """The content of a JSON file that must be a `kind`.

    Args:
        path: The file; a byte order mark at its start is ignored.
        kind: dict or list; object for any.
        unique_keys: Refuse an object with a repeated key, of which only the last value would be seen.

    Raises:
        ValueError: If it is missing, larger than `LARGEST_FILE`, nested too deeply, cut short or something else.
    """
    with open_file(path) as file:
        try:
            text = file.read().decode("utf-8-sig")
            content = json.loads(text, object_pairs_hook=_unique if unique_keys else None)
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error}") from error
        except RecursionError:
            raise ValueError(f"{path} is nested too deeply to be read") from None
        except RepeatedError as error:
            raise ValueError(f"{path}: {error}") from None
        except ValueError as error:  # a UnicodeDecodeError too, and a number of over 4,300 digits
            raise NotWholeError(f"{path} is not whole JSON ({error}); was it cut short?") from error
    if not isinstance(content, kind):
        raise wrong(path, f"a JSON {kind.__name__}", content)
    return content


def open_file(path: Path, largest: int | None = LARGEST_FILE) -> IO[bytes]:
    """A file of a data set, opened to be read.

    Raises:
        ValueError: If it is missing, cannot be read, is not a file, or has more than `largest` bytes.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait forever
            raise ValueError(f"cannot read {path}: it is not a file")
        if largest is not None and status.st_size > largest:
            raise ValueError(f"{path} has {status.st_size:,} bytes; at most {largest:,} can be read")
        return open(path, "rb")
    except FileNotFoundError:
        raise ValueError(f"cannot read the file: {path} is missing") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from error


class NotWholeError(ValueError):
    """A file is not one JSON value."""


class RepeatedError(ValueError):
    """Two records have one id."""


def refuse_repeated(ids: Iterable[Any], what: str) -> None:
    """Raise RepeatedError if an id occurs twice: which of the two is meant cannot be known."""
    repeated = [key for key, count in Counter(ids).items() if count > 1]
    if repeated:
        named = ", ".join(map(str, repeated[:_NAMED])) + (" ..." if len(repeated) > _NAMED else "")
        raise RepeatedError(f"{what} must differ, but {len(repeated)} occur more than once ({named})")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys all differ."""
    found = dict(pairs)
    if len(found) < len(pairs):
        refuse_repeated((ascii(key) for key, _ in pairs), "keys of an object")
    return found


def parse_record(content: bytes | str) -> Any:
    """A JSON value that is kept whole, so that it is written again and passed to other processes.

    Raises:
        ValueError: If it is not JSON, has more than `LARGEST_RECORD` bytes, or as `check_kept`.
    """
    if len(content) > LARGEST_RECORD:
        raise ValueError(f"over {LARGEST_RECORD:,} bytes")
    try:
        value = json.loads(content.decode("utf-8-sig") if isinstance(content, bytes) else content)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} levels deep") from None
    check_kept(value)
    return value


def check_kept(value: Any) -> None:
    """Raise ValueError unless a value can be written as JSON again: it is nested at most `DEEPEST` levels deep, its
    numbers are finite, and its text is UTF-8 (not half of a surrogate pair).
    """
    level = [value]
    for _ in range(DEEPEST):
        containers = [outer.values() if isinstance(outer, dict) else outer for outer in level]
        level = [inner for outer in containers if isinstance(outer, _COLLECTIONS) for inner in outer]
        if not level:
            break
    else:
        raise ValueError(f"nested more than {DEEPEST} levels deep")
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ValueError("text that is not UTF-8: half of a surrogate pair") from None
    except ValueError:
        raise ValueError("a number that is NaN or infinite") from None


def is_utf8(words: str) -> bool:
    """Whether text can be written: names of files and JSON can hold halves of surrogate pairs."""
    try:
        words.encode()
    except UnicodeEncodeError:
        return False
    return True


def json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and content of each line that is not blank. A line too long for `parse_record` is
    cut off.

    Raises:
        ValueError: If the file cannot be read.
    """
    number = 0
    try:
        with open_file(path, None) as file:
            while line := file.readline(LARGEST_RECORD + 1):
                number += 1
                rest = line
                while len(rest) > LARGEST_RECORD and not rest.endswith(b"\n"):
                    rest = file.readline(LARGEST_RECORD + 1)
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def stream_json(path: Path) -> Iterator[Any]:
    """The entries of a JSON list, one after the other: Visual Genome's regions are 1.2 GB, and 8 GB as objects.

    Raises:
        ValueError: As `read_json`, for a file that is cut short after the entries before the cut; or if an entry has
            more than `LARGEST_RECORD` characters.
    """
    with open_file(path, None) as file:
        try:
            text = _Text(io.TextIOWrapper(file, "utf-8-sig", newline=""))
            if (first := text.take()) != "[":
                got = f"got what begins with {first!r}" if first else "it is empty; was it cut short?"
                raise ValueError(f"expected a JSON list, {got}")
            if text.peek() == "]":
                text.take()
            else:
                yield text.entry()
                while text.take() == ",":
                    yield text.entry()
            if rest := text.peek():
                raise ValueError(f"not whole JSON (after the end of the list: {rest!r})")
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error}") from error
        except RecursionError:
            raise ValueError(f"{path}: an entry is nested too deeply to be read") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not whole JSON ({error}); was it cut short?") from error
        except ValueError as error:
            is_cut = str(error).startswith("not whole JSON")
            raise ValueError(f"{path} is {error}" if is_cut else f"{path}: {error}") from error


class _Text:
    """The text of a JSON list, of which a part is held at a time."""

    def __init__(self, file: io.TextIOBase) -> None:
        self.file = file
        self.text = ""
        self.at = 0
        self.before = 0  # characters of the file that are no longer held
        self.decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is not a space; empty at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or not self._read(_READ_AT_ONCE):
                return self.text[self.at : self.at + 1]

    def take(self) -> str:
        """As `peek`, passing over it."""
        found = self.peek()
        self.at += len(found)
        return found

    def entry(self) -> Any:
        """The next entry. It is whole where a comma or the end of the list follows: a number could continue."""
        self.peek()
        size = _READ_AT_ONCE
        while True:
            try:
                entry, end = self.decode(self.text, self.at)
                end = _SPACE.match(self.text, end).end()
                if self.text[end : end + 1] in (",", "]"):
                    self.at = end
                    return entry
                problem, place = "expected a comma or the end of the list", end
            except json.JSONDecodeError as error:
                problem, place = error.msg, error.pos
            length = len(self.text) - self.at
            if length > LARGEST_RECORD:
                raise ValueError(
                    f"the entry at character {self.before + self.at:,} has over {LARGEST_RECORD:,} characters, or is "
                    f"not JSON ({problem} at character {self.before + place:,})"
                )
            place += self.before
            if not self._read(min(size, LARGEST_RECORD + 1 - length)):
                raise ValueError(f"not whole JSON ({problem}, character {place:,}); was it cut short?")
            size *= 2

    def _read(self, size: int) -> bool:
        """Read more and drop what was parsed; returns whether there was more."""
        more = self.file.read(size)
        self.before += self.at
        self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)


def wrong(path: Path, expected: str, got: Any) -> ValueError:
    """The error of a file that holds something else."""
    # reprlib: the content may be gigabytes
    return ValueError(f"{path}: expected {expected}, got {reprlib.repr(got)}")
