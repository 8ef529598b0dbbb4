"""One lock per output: a second process that writes the same output is an error that names the first."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

import filelock

from alpha_clip_commands.command_line import one_line
from mllm.files import StrPath, is_temporary, short_name, umask, write_json


@contextlib.contextmanager
def locked(output: StrPath, *, inside: bool = False) -> Iterator[None]:
    """Hold the lock of an output. The lock of a dead process is ignored, and its temporary files are removed.

    Args:
        output: The output file or folder.
        inside: Whether the lock is in the folder itself, for a run whose parent may be read-only.

    Raises:
        ValueError: If another process holds it; the message includes its id and host.
        OSError: If the lock cannot be written.
    """
    output = Path(os.path.realpath(output))  # a link and its target are the same output
    place = output / ".lock" if inside else output.with_name(f".{short_name(output.name)}.lock")
    holder = place.with_name(f"{place.name}.json")
    lock = filelock.FileLock(place, timeout=0, mode=0o666 & ~umask())
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(
            f"{output} is being written by {_holder(holder)}; wait until it ends, or choose another output"
        ) from None
    except OSError as error:
        raise ValueError(f"cannot write {output}: {one_line(error)}") from error
    try:
        names = {short_name(holder.name)} | (set() if inside else {short_name(output.name)})
        _remove_temporaries(place.parent, names)
        write_json(holder, {"pid": os.getpid(), "host": socket.gethostname()})
        yield
    finally:
        if lock.is_locked:  # False in a forked child
            with contextlib.suppress(OSError):  # now read-only: the command has failed with another error
                holder.unlink(missing_ok=True)
                if os.name != "nt":  # Windows cannot remove open files
                    place.unlink(missing_ok=True)
            lock.release()


def _remove_temporaries(folder: Path, names: Iterable[str]) -> None:
    """Remove the partial files of killed processes; only the holder of the lock writes these files."""
    for file in folder.glob(".*.tmp"):
        if is_temporary(file.name, names) and file.is_file() and not file.is_symlink():
            file.unlink(missing_ok=True)


def _holder(path: Path) -> str:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return f"process {int(record['pid'])} on {record['host']!s}"
    except (OSError, ValueError, KeyError, TypeError):  # not written yet, or locked as well (Windows)
        return "another process"
