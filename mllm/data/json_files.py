"""Reads JSON files, JSON lines and JSON records of untrusted content. The limits are listed in docs/files.md.

Large JSON lists are read entry by entry: `mllm.data.json_stream`.
"""

from __future__ import annotations

import contextlib
import json
import os
import reprlib
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

MAX_FILE_SIZE = 2 * 2**30  # bytes of a JSON file that is read as a whole
MAX_RECORD_SIZE = 16 * 2**20  # bytes of a line or of an image's JSON; characters of an entry of a streamed list
MAX_DEPTH = 100  # levels of a stored record; the json module itself fails after some hundreds
_MAX_IDS_SHOWN = 5
_COLLECTIONS = (list, type({}.values()))


class ContentError(ValueError):
    """The content of a file is valid JSON, but not what was expected."""


class DuplicateError(ContentError):
    """Two records have the same id."""


class InvalidJsonError(ValueError):
    """A file is not a JSON value."""


def read_json(path: Path, kind: type, *, unique_keys: bool = False) -> Any:
    """Read a JSON file.

    Args:
        path: The file. A byte order mark is ignored.
        kind: Expected type of the content: dict, list, or object for any.
        unique_keys: Fail if a key of an object is repeated; the json module would keep only its last value.

    Raises:
        ValueError: If the file is missing, larger than `MAX_FILE_SIZE`, nested too deeply, not valid JSON
            (`InvalidJsonError`) or of another type.
    """
    with open_file(path) as file, json_errors(path):
        text = file.read().decode("utf-8-sig")
        content = json.loads(text, object_pairs_hook=_unique_dict if unique_keys else None)
    if not isinstance(content, kind):
        raise unexpected(path, f"a JSON {kind.__name__}", content)
    return content


def read_json_or_lines(path: Path, is_record: Callable[[dict], bool]) -> dict[str, Any] | Iterable[Any]:
    """The records of a JSON list or of JSON lines; or the content of a JSON object.

    Args:
        path: The file.
        is_record: Whether the only object of a file is one record (a file of one line) or an object of records.

    Raises:
        ValueError: If the file is neither, or a record fails `check_serializable`.
    """
    lines = json_lines(path)
    first, second = next(lines, (1, b""))[1], next(lines, None)
    if not first:
        return []
    if first.lstrip().startswith(b"{"):
        try:
            record = parse_record(first)
        except ValueError:
            record = None  # an object over several lines
        if record is not None and (second is not None or is_record(record)):
            return _parse_lines(path)
    lines.close()  # type: ignore[attr-defined]
    try:
        content = read_json(path, object, unique_keys=True)
    except InvalidJsonError:
        if second is None or not first.lstrip().startswith(b"{"):
            raise
        return _parse_lines(path)
    if isinstance(content, list):
        return serializable_records(path, content)
    if not isinstance(content, dict):
        raise unexpected(path, "a JSON list, or one object per line", content)
    return content


def json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and content of each line that is not blank.

    Only the first `MAX_RECORD_SIZE` + 1 bytes of a line are read, so that `parse_record` rejects longer lines.

    Raises:
        ValueError: If the file cannot be read.
    """
    number = 0
    with open_file(path, None) as file, json_errors(path):
        while line := file.readline(MAX_RECORD_SIZE + 1):
            number += 1
            rest = line
            while len(rest) > MAX_RECORD_SIZE and not rest.endswith(b"\n"):
                rest = file.readline(MAX_RECORD_SIZE + 1)
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, line


def parse_record(content: bytes | str) -> Any:
    """A JSON value that can be stored and sent to other processes.

    Raises:
        ValueError: If it is not JSON, has more than `MAX_RECORD_SIZE` bytes, or fails `check_serializable`.
    """
    if len(content) > MAX_RECORD_SIZE:
        raise ValueError(f"over {MAX_RECORD_SIZE:,} bytes")
    try:
        value = json.loads(content.decode("utf-8-sig") if isinstance(content, bytes) else content)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    check_serializable(value)
    return value


def _parse_lines(path: Path) -> Iterator[Any]:
    for number, line in json_lines(path):
        try:
            yield parse_record(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; the file may be truncated") from error


def serializable_records(path: Path, records: Iterable[Any]) -> Iterator[Any]:
    """The records, each checked by `check_serializable`."""
    for number, record in enumerate(records):
        try:
            check_serializable(record)
        except ValueError as error:
            raise ValueError(f"{path}, record {number}: {error}") from error
        yield record


def check_serializable(value: Any) -> None:
    """Check that a value can be written as JSON.

    Raises:
        ValueError: If it is nested more than `MAX_DEPTH` levels deep, or contains NaN, an infinite number or text that
            is not valid UTF-8 (a lone surrogate).
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        containers = [outer.values() if isinstance(outer, dict) else outer for outer in level]
        level = [inner for outer in containers if isinstance(outer, _COLLECTIONS) for inner in outer]
        if not level:
            break
    else:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ValueError("text is not valid UTF-8 (lone surrogate)") from None
    except ValueError:
        raise ValueError("NaN or infinite number") from None


def is_utf8(text: str) -> bool:
    """Whether text can be encoded: file names and JSON can contain lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_unique(ids: Iterable[Any], name: str) -> None:
    """Raise `DuplicateError` if an id occurs twice."""
    repeated = [key for key, count in Counter(ids).items() if count > 1]
    if repeated:
        shown = ", ".join(map(str, repeated[:_MAX_IDS_SHOWN])) + (" ..." if len(repeated) > _MAX_IDS_SHOWN else "")
        raise DuplicateError(f"{name} must be unique, but {len(repeated)} occur more than once ({shown})")


def _unique_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        check_unique((ascii(key) for key, _ in pairs), "keys of an object")
    return found


def open_file(path: Path, max_size: int | None = MAX_FILE_SIZE) -> IO[bytes]:
    """Open a file for reading.

    Raises:
        ValueError: If it is missing, cannot be read, is not a regular file, or has more than `max_size` bytes.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait forever
            raise ValueError(f"cannot read {path}: not a regular file")
        if max_size is not None and status.st_size > max_size:
            raise ValueError(f"{path} has {status.st_size:,} bytes; the limit is {max_size:,}")
        return open(path, "rb")
    except FileNotFoundError:
        raise ValueError(f"file not found: {path}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from error


@contextlib.contextmanager
def json_errors(path: Path) -> Iterator[None]:
    """Convert what reading and parsing JSON raise to a ValueError that names the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except ContentError as error:
        raise type(error)(f"{path}: {error}") from None
    except ValueError as error:  # also a UnicodeDecodeError, and a number of more than 4,300 digits
        raise InvalidJsonError(f"{path} is not valid JSON ({error}); it may be truncated") from error


def unexpected(path: Path, expected: str, got: Any) -> ValueError:
    """The error of a file with other content than expected."""
    # reprlib: the content may be gigabytes
    return ValueError(f"{path}: expected {expected}, got {reprlib.repr(got)}")
