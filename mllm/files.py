"""Writing: one way to write a file, one to build a folder, one lock for each output.

A file or folder is written next to its place, synced and renamed, so that its name always stands for whole content. A
command replaces only what this project wrote: a file that carries `MADE_BY`, a folder with a marker that lists what was
written into it. The source of a command, its parents, and anything else that was there before are refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock

MADE_BY = "alpha-clip-mllm"  # in every file that a command writes on its own (PNG text, HTML generator, JSON key)
MARKER = ".made_by.json"  # in every folder that a command writes
_MARKED_WITHIN = 4096  # bytes from either end of a file in which MADE_BY must occur

StrPath = str | os.PathLike


def write_file(path: StrPath, content: str | bytes) -> None:
    """Write a file whole: next to its place, synced, renamed. Whether it may be replaced is the caller's to check.

    Raises:
        ValueError: If no file can be at `path`.
        OSError: If it cannot be written; what was there before is still there.
    """
    with replacing_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: StrPath, content: Any, indent: int | None = 1) -> None:
    """Write JSON whole; as `write_file`."""
    write_file(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def replacing_file(path: StrPath) -> Iterator[Path]:
    """A place next to `path` that becomes `path` at the end, for libraries that write a file by its name.

    Raises:
        ValueError: If no file can be at `path`.
        OSError: If it cannot be written; what was there before is still there.
    """
    target = check_file(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, target)
        _sync(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def check_file(path: StrPath) -> Path:
    """The file that `path` stands for, links followed.

    Raises:
        ValueError: If no file can be there: its folder is missing, or it is a folder, a device or a circular link.
    """
    try:
        target = Path(path).resolve()
        mode = target.stat().st_mode if target.exists() else None
    except (RuntimeError, OSError, ValueError) as error:  # RuntimeError: a circular link, before Python 3.13
        raise ValueError(f"cannot write {path}: {one_line(error)}") from error
    if mode is not None and stat.S_ISDIR(mode):
        raise ValueError(f"cannot write {path}: it is a folder, expected the name of a file")
    if mode is not None and not stat.S_ISREG(mode):
        raise ValueError(f"cannot write {path}: it is not a regular file")
    if os.path.islink(target):
        raise ValueError(f"cannot write {path}: it is a circular link")
    if not target.parent.is_dir():
        raise ValueError(f"cannot write {path}: folder not found: {target.parent}")
    return target


def check_replaceable(path: StrPath, *, reads: Iterable[StrPath] = ()) -> Path:
    """The file that `path` stands for, if a command may write it: it is new, or this project wrote it.

    Args:
        path: Where a file will be written.
        reads: Files that the command reads, which must stay.

    Raises:
        ValueError: If it is one of `reads`, was written by something else, or as `check_file`.
    """
    target = check_file(path)
    for source in reads:
        if target.exists() and os.path.exists(source) and os.path.samefile(target, source):
            raise ValueError(f"{path} is read by this command and would be overwritten; choose another name")
    if target.exists() and target.stat().st_size and not is_marked(target):
        raise ValueError(f"{path} exists and was not written by this command; choose another name, or delete it")
    return target


def is_marked(path: StrPath) -> bool:
    """Whether a file carries `MADE_BY` near its beginning or end."""
    with open(path, "rb") as file:
        head = file.read(_MARKED_WITHIN)
        file.seek(max(os.fstat(file.fileno()).st_size - _MARKED_WITHIN, 0))
        return MADE_BY.encode() in head + file.read()


@contextlib.contextmanager
def replacing_folder(
    path: StrPath, kind: str, *, reads: Iterable[StrPath] = (), known: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """A new folder that becomes `path` at the end, locked meanwhile.

    Args:
        path: The folder: new, empty, or one of the same kind that holds nothing but what was written into it.
        kind: What the folder is, stored in its marker.
        reads: Files and folders that the command reads; `path` may be neither one of them nor a parent of one.
        known: Whether a folder without a marker was written by an earlier version.

    Raises:
        ValueError: If `path` may not be replaced, or another process is writing it.
        OSError: If the folder cannot be written; what was there before is still there.
    """
    target = check_folder(path, kind, reads=reads, known=known)
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        _remove_leftovers(target)
        check_folder(path, kind, reads=reads, known=known)  # another process may have written it meanwhile
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        try:
            partial.chmod(0o777 & ~_umask())  # mkdtemp: for the owner alone
            write_json(partial / MARKER, _marker(kind, []))  # whose it is, should this process be killed
            yield partial
            write_json(partial / MARKER, _marker(kind, _entries(partial)))
            _sync_all(partial)
            _swap(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_folder(
    path: StrPath, kind: str, *, reads: Iterable[StrPath] = (), known: Callable[[Path], bool] | None = None
) -> Path:
    """The folder that `path` stands for, if it may be replaced whole; arguments and errors as `replacing_folder`."""
    target = _folder(path, reads)
    if not target.exists() or not _entries(target):
        return target
    marker = _read_marker(target)
    if marker is None and known is not None and known(target):
        return target
    if marker is None or marker.get("kind") != kind:
        raise ValueError(f"{path} exists and was not written by this command; choose another folder, or delete it")
    if added := sorted(set(_entries(target)) - set(marker.get("files", ()))):
        raise ValueError(
            f"{path} holds more than this command wrote (first: {added[0]}), which would be lost; move it away, or "
            "choose another folder"
        )
    return target


def claim_folder(
    path: StrPath, kind: str, *, reads: Iterable[StrPath] = (), known: Callable[[Path], bool] | None = None
) -> Path:
    """Make a folder that grows (a run) this project's; returns it.

    Args:
        path: The folder: new, empty, or one of the same kind.
        kind: What the folder is, stored in its marker.
        reads: Files and folders that the command reads; `path` may be neither one of them nor a parent of one.
        known: Whether a folder without a marker was written by an earlier version.

    Raises:
        ValueError: If the folder is somebody else's, or is read by the command.
        OSError: If it cannot be made.
    """
    target = _folder(path, reads)
    entries = _entries(target) if target.exists() else []
    marker = _read_marker(target)
    if marker is not None and marker.get("kind") == kind:
        return target
    if entries and (marker is not None or known is None or not known(target)):
        raise ValueError(f"{path} exists and was not written by this command; choose another folder, or delete it")
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / MARKER, _marker(kind, None))
    return target


@contextlib.contextmanager
def locked(output: StrPath, *, inside: bool = False) -> Iterator[None]:
    """Hold the lock of an output. A lock that a dead process left does not count.

    Args:
        output: The file or folder that is written.
        inside: Whether the lock lies in the folder: of a run, whose parent may be read-only.

    Raises:
        ValueError: If another process holds it; its id and host are named.
        OSError: If the lock cannot be written.
    """
    output = Path(os.path.abspath(output))
    place = output / ".lock" if inside else output.with_name(f".{output.name}.lock")
    holder = place.with_name(f"{place.name}.json")
    lock = filelock.FileLock(place, timeout=0, mode=0o666 & ~_umask())
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(
            f"{output} is being written by {_holder(holder)}; wait for it to end, or choose another output"
        ) from None
    try:
        write_json(holder, {"pid": os.getpid(), "host": socket.gethostname()})
        yield
    finally:
        if lock.is_locked:  # not so in a forked child
            holder.unlink(missing_ok=True)
            lock.release()


def one_line(error: BaseException) -> str:
    """What an error says, in one line; of a file the system's words without its number."""
    named = isinstance(error, OSError) and error.filename is not None and error.strerror
    text = f"{error.filename}: {error.strerror}" if named else str(error)
    # a file's name may hold bytes that are no text; as surrogates they could not be written anywhere
    return " ".join(text.split()).encode("utf-8", "backslashreplace").decode() or type(error).__name__


def _holder(path: Path) -> str:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return f"process {int(record['pid'])} on {record['host']!s}"
    except (OSError, ValueError, KeyError, TypeError):  # not written yet, or locked too (Windows)
        return "another process"


def _folder(path: StrPath, reads: Iterable[StrPath]) -> Path:
    """The folder that `path` stands for, links followed.

    Raises:
        ValueError: If no folder can be there, or it is or contains what the command reads.
    """
    try:
        target = Path(path).resolve()
        exists = target.exists()
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"cannot write {path}: {one_line(error)}") from error
    if (exists and not target.is_dir()) or os.path.islink(target):
        raise ValueError(f"cannot write {path}: it is not a folder")
    for source in reads:
        if os.path.exists(source) and Path(source).resolve().is_relative_to(target):
            raise ValueError(f"{path} is or contains {source}, which this command reads; choose another folder")
    return target


def _entries(folder: Path) -> list[str]:
    """The files in a folder and its subfolders (and empty subfolders), besides marker and lock."""
    found = []
    for inner, folders, names in os.walk(folder):
        if names or not folders:
            below = Path(inner).relative_to(folder)
            found += [(below / name).as_posix() for name in names or [""]]
    return sorted(set(found) - {".", MARKER, ".lock", ".lock.json"})


def _marker(kind: str, files: list[str] | None) -> dict[str, Any]:
    return {"made_by": MADE_BY, "kind": kind, **({} if files is None else {"files": files})}


def _read_marker(folder: Path) -> dict[str, Any] | None:
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and marker.get("made_by") == MADE_BY else None


def _remove_leftovers(target: Path) -> None:
    """Remove what killed processes left next to a folder: only what carries our marker."""
    for leftover in target.parent.glob(f".{_escaped(target.name)}.*.partial"):
        if leftover.is_dir() and _read_marker(leftover) is not None:
            shutil.rmtree(leftover)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _swap(partial: Path, target: Path) -> None:
    """Put a finished folder in its place; the one that was there is removed last."""
    old = None
    if target.exists():
        old = target.with_name(f".{target.name}.{os.getpid()}.old.partial")
        os.rename(target, old)
    os.rename(partial, target)
    _sync(target.parent)
    if old is not None:
        shutil.rmtree(old)


def _sync_all(folder: Path) -> None:
    for inner, _, names in os.walk(folder):
        for name in names:
            _sync(Path(inner, name))
        _sync(Path(inner))


def _sync(path: Path) -> None:
    """Have the system write a file or folder to disk; Windows cannot do so with a folder."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
