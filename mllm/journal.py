"""Resuming interrupted runs: their settings, and journals of what is done.

A journal contains one JSON object per line. Each line is on disk before the next one is written, so a killed process or
a full disk can leave only the last line incomplete; it is removed when the journal is opened again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from alpha_clip_commands.command_line import one_line
from mllm.data.schemas import validate
from mllm.files import write_json


def claim_run(
    record_path: Path,
    record: Mapping[str, Any],
    output: str,
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """Write the settings of a run, or check that they are those of the run that is resumed.

    Args:
        record_path: JSON file of the settings.
        record: Everything that must be equal for a run to be resumed.
        output: Name of the output, for messages.
        upgrade: Maps the settings that an earlier version wrote to those of this version.

    Raises:
        ValueError: If the output belongs to a run with other settings, or the file is damaged.
        OSError: If the file cannot be read or written.
    """
    if not record_path.exists():
        write_json(record_path, record)
        return
    try:
        earlier = json.loads(record_path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        earlier = None
    if not isinstance(earlier, dict):
        raise ValueError(f"{record_path} is damaged; choose another output, or delete it together with {output}")
    expect_same_run(upgrade(earlier), record, output, f"choose another output, or delete it and {record_path}")


def expect_same_run(earlier: Mapping[str, Any], record: Mapping[str, Any], output: str, remedy: str) -> None:
    """Raise ValueError if an output belongs to a run with other settings."""
    if changed := [name for name in record if record[name] != earlier.get(name)]:
        raise ValueError(f"{output} belongs to a run with other {', '.join(changed)}; {remedy}")


def read_journal(path: Path, kind: type) -> list[Any]:
    """The complete lines of a journal, each validated as a `kind`. An incomplete last line is skipped.

    Raises:
        ValueError: If a line is invalid; the message includes file and line.
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
    """Open a journal and remove its incomplete last line; yields a function that appends an object as a line.

    Raises:
        OSError: If it cannot be written. The lines appended before are kept.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    try:
        size = os.fstat(descriptor).st_size
        end = path.read_bytes().rfind(b"\n") + 1 if size else 0
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
        error.filename = os.fspath(path)  # the error of a full disk does not include the file
        raise
    finally:
        if not written:  # the next append must not continue an incomplete line
            with contextlib.suppress(OSError):  # it is removed when the journal is opened again
                os.ftruncate(descriptor, start)
