"""What lets an interrupted run resume: the settings that make it, and journals of what is done.

A journal holds JSON objects, one a line, each on disk before the next one begins. A killed process or a full disk can
leave only its last line incomplete; that line is cut off when the journal is opened again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mllm.data.schemas import validate
from mllm.files import one_line, write_json


def claim_run(record_path: Path, record: Mapping[str, Any], output: str) -> None:
    """Write down what makes a run, or check that it is what made the earlier one.

    Args:
        record_path: JSON file of the record.
        record: Whatever must be the same for two runs to write one output.
        output: The output's name, for messages.

    Raises:
        ValueError: If the output belongs to another run, or its record is damaged.
        OSError: If the record cannot be read or written.
    """
    if not record_path.exists():
        write_json(record_path, record)
        return
    remedy = f"choose another output, or delete it together with {output}"
    try:
        earlier = json.loads(record_path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        earlier = None
    if not isinstance(earlier, dict):
        raise ValueError(f"{record_path} is damaged; {remedy}")
    expect_same_run(earlier, record, output, f"choose another output, or delete it and {record_path}")


def expect_same_run(earlier: Mapping[str, Any], record: Mapping[str, Any], output: str, remedy: str) -> None:
    """Raise ValueError if an output belongs to a run with other settings."""
    if changed := [name for name in record if record[name] != earlier.get(name)]:
        raise ValueError(f"{output} belongs to a run with other {', '.join(changed)}; {remedy}")


def read_journal(path: Path, kind: type) -> list[Any]:
    """The complete lines of a journal, each checked to be a `kind`; an incomplete last line is left out.

    Raises:
        ValueError: If a line is something else; file and line are named.
        OSError: If the journal cannot be read.
    """
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            found.append(validate(json.loads(line), kind))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged (line {number}: {one_line(error)})") from error
    return found


@contextlib.contextmanager
def journal(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Open a journal, without its incomplete last line; yields a function that appends an object as a line.

    Raises:
        OSError: If it cannot be written. What was appended before is kept.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    try:
        size = os.fstat(descriptor).st_size
        end = _end_of_lines(path) if size else 0
        if end < size:
            os.ftruncate(descriptor, end)
        os.lseek(descriptor, 0, os.SEEK_END)
        yield lambda record: _append(path, descriptor, json.dumps(record, ensure_ascii=False).encode() + b"\n")
    finally:
        os.close(descriptor)


def _append(path: Path, descriptor: int, line: bytes) -> None:
    start = os.lseek(descriptor, 0, os.SEEK_END)
    written = False
    try:
        while line:
            line = line[os.write(descriptor, line) :]
        os.fsync(descriptor)
        written = True
    except OSError as error:
        error.filename = os.fspath(path)  # a write to a full disk names no file
        raise
    finally:
        if not written:  # whoever appends later must not continue half a line
            with contextlib.suppress(OSError):  # it is cut off when the journal is opened again
                os.ftruncate(descriptor, start)


def _end_of_lines(path: Path) -> int:
    return path.read_bytes().rfind(b"\n") + 1
