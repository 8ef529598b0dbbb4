"""Writing folders: built next to the target, synced, then renamed.

Every folder that a command writes contains a marker, `MARKER`, which lists the files written into it. A command never
replaces the folders that it reads, their parents, or files that it did not write.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from alpha_clip_commands.command_line import one_line
from mllm.files import (
    MADE_BY,
    StrPath,
    failed_writes_as_os_errors,
    is_temporary,
    short_name,
    sync,
    umask,
    write_json,
)
from mllm.locks import locked

MARKER = ".made_by.json"
_OLD = ".old.partial"  # suffix of a folder that is being replaced


@contextlib.contextmanager
def replacing_folder(
    path: StrPath,
    kind: str,
    *,
    reads: Iterable[StrPath] = (),
    known: Callable[[Path], bool] | None = None,
    new: bool = False,
) -> Iterator[Path]:
    """A temporary folder that is renamed to `path` at the end; `path` is locked meanwhile.

    Args:
        path: The output: new, empty, or a folder of the same kind with no other files than those written into it.
        kind: Kind of the folder, stored in its marker.
        reads: Files and folders that the command reads; `path` must not be or contain one of them.
        known: Recognizes a folder without a marker that an earlier version wrote.
        new: Whether `path` must not exist; the folder then gets no marker.

    Raises:
        ValueError: If `path` may not be replaced, or another process is writing it.
        OSError: If the folder cannot be written; an existing one is then unchanged.
    """
    target = check_folder(path, kind, reads=reads, known=known, new=new)
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        # again: another process may have written it before the lock
        check_folder(path, kind, reads=reads, known=known, new=new)
        with work_folder(target, kind) as partial:
            with failed_writes_as_os_errors(path):
                yield partial
            _write_marker(partial, kind, _entries(partial))
            _sync_all(partial)
            _swap(partial, target, kind)
            if new:
                (target / MARKER).unlink()


@contextlib.contextmanager
def work_folder(output: StrPath, kind: str) -> Iterator[Path]:
    """A temporary folder next to a locked output, removed at the end. Removes leftovers of killed processes first."""
    target = Path(os.path.abspath(output))
    _remove_leftovers(target)
    prefix = f".{short_name(target.name)}."
    folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=target.parent))
    try:
        folder.chmod(0o777 & ~umask())  # mkdtemp gives access to the owner only
        _write_marker(folder, kind, [])  # identifies the leftover if this process is killed
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_new(path: StrPath) -> None:
    """Raise ValueError if `path` exists, also as a broken link, or cannot be created."""
    if not os.fspath(path):
        raise ValueError("expected the name of an output, got an empty one")
    if os.path.lexists(path):
        raise ValueError(f"{path} exists; choose a new name or delete it")
    _check_parent(path)


def check_folder(
    path: StrPath,
    kind: str,
    *,
    reads: Iterable[StrPath] = (),
    known: Callable[[Path], bool] | None = None,
    new: bool = False,
) -> Path:
    """The absolute path of a folder that may be replaced; arguments and errors as in `replacing_folder`."""
    if new:
        check_new(path)
    target = _folder(path, reads)
    if target.exists() and Path.cwd().is_relative_to(target):
        raise ValueError(f"{path} is or contains the current folder; choose another folder, or change the current one")
    if target.exists() and os.path.ismount(target):
        raise ValueError(f"{path} is a mount point, which cannot be replaced; choose a folder below it")
    if not target.exists() or not _entries(target):
        return target
    marker = _read_marker(target)
    if marker is None and known is not None and known(target):
        return target
    if marker is None or marker.get("kind") != kind:
        raise ValueError(f"{path} exists and was not written by this command; choose another folder, or delete it")
    if added := sorted(set(_entries(target)) - set(marker.get("files", ()))):
        raise ValueError(
            f"{path} contains files that this command did not write (first: {added[0]}), which would be lost; move "
            "them away, or choose another folder"
        )
    return target


def check_shared_folder(path: StrPath, kind: str, *, reads: Iterable[StrPath] = ()) -> None:
    """Raise ValueError if a folder that may contain other files was written by another command, or is or contains one
    of those that the command `reads`.
    """
    target = _folder(path, reads)
    marker = _read_marker(target)
    if marker is not None and marker.get("kind") != kind:
        raise ValueError(f"{path} was written by another command ({marker.get('kind')}); choose another folder")


def claim_folder(
    path: StrPath, kind: str, *, reads: Iterable[StrPath] = (), known: Callable[[Path], bool] | None = None
) -> Path:
    """Create and mark a folder to which files are added later, such as a run; returns its absolute path.

    Args:
        path: The output: new, empty, or a folder of the same kind.
        kind: Kind of the folder, stored in its marker.
        reads: Files and folders that the command reads; `path` must not be or contain one of them.
        known: Recognizes a folder without a marker that an earlier version wrote.

    Raises:
        ValueError: If the folder was not written by this command, or is read by it.
        OSError: If it cannot be created.
    """
    target = _folder(path, reads)
    entries = _entries(target) if target.exists() else []
    marker = _read_marker(target)
    if marker is not None and marker.get("kind") == kind:
        return target
    if entries and (marker is not None or known is None or not known(target)):
        raise ValueError(f"{path} exists and was not written by this command; choose another folder, or delete it")
    target.mkdir(parents=True, exist_ok=True)
    _write_marker(target, kind, None)
    return target


def _folder(path: StrPath, reads: Iterable[StrPath]) -> Path:
    """The absolute path of an output folder, with links resolved.

    Raises:
        ValueError: If it cannot be a folder, is read-only, or is or contains something that the command reads.
    """
    if not os.fspath(path):
        raise ValueError("expected the name of a folder, got an empty one")
    try:
        target = Path(path).resolve()
        exists = target.exists()
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"cannot write {path}: {one_line(error)}") from error
    if (exists and not target.is_dir()) or os.path.islink(target):
        raise ValueError(f"cannot write {path}: it is not a folder")
    if exists and not target.stat().st_mode & 0o222:
        raise ValueError(f"cannot write {path}: it is read-only")
    _check_parent(target)
    for source in reads if exists else ():
        above = [Path(source).resolve(), *Path(source).resolve().parents] if os.path.exists(source) else []
        if any(os.path.samefile(folder, target) for folder in above):  # also on case-insensitive file systems
            raise ValueError(f"{path} is or contains {source}, which this command reads; choose another folder")
    return target


def _check_parent(path: StrPath) -> None:
    """Raise ValueError unless `path` can be created in its nearest existing parent."""
    for above in Path(os.path.abspath(path)).parents:
        if os.path.lexists(above):
            if not above.is_dir():
                raise ValueError(f"cannot write {path}: {above} is not a folder")
            if not os.access(above, os.W_OK):
                raise ValueError(f"cannot write {path}: {above} is read-only")
            return


def _entries(folder: Path) -> list[str]:
    """The files in a folder and its subfolders, and empty subfolders, without marker and lock."""
    found = []
    for inner, folders, names in os.walk(folder):
        names += [name for name in folders if os.path.islink(os.path.join(inner, name))]
        if names or not folders:
            below = Path(inner).relative_to(folder)
            found += [(below / name).as_posix() for name in names or [""]]
    own = {".", MARKER, ".lock", ".lock.json"}
    return sorted(name for name in set(found) - own if not is_temporary(name, (MARKER, ".lock.json")))


def _write_marker(folder: Path, kind: str, files: list[str] | None) -> None:
    """Write the marker of a folder, with the files that may be replaced (None: no list, as files are added later)."""
    write_json(folder / MARKER, {"made_by": MADE_BY, "kind": kind, **({} if files is None else {"files": files})})


def _read_marker(folder: Path) -> dict[str, Any] | None:
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return marker if isinstance(marker, dict) and marker.get("made_by") == MADE_BY else None


def _remove_leftovers(target: Path) -> None:
    """Remove the marked folders that killed processes left next to an output. If one was killed between moving the
    previous output away and the new one into its place, restore the previous one.
    """
    for leftover in sorted(target.parent.glob(f".{glob.escape(short_name(target.name))}.*.partial")):
        if leftover.is_dir() and not leftover.is_symlink() and _read_marker(leftover) is not None:
            if leftover.name.endswith(_OLD) and not os.path.lexists(target):
                os.rename(leftover, target)
            else:
                shutil.rmtree(leftover)


def _swap(partial: Path, target: Path, kind: str) -> None:
    """Rename a finished folder to its target; the previous one is removed last."""
    if not target.exists():
        os.rename(partial, target)
        sync(target.parent)
        return
    if _read_marker(target) is None:  # the old folder's; identifies the leftover if this process is killed
        _write_marker(target, kind, _entries(target))
    old = target.with_name(f".{short_name(target.name)}.{secrets.token_hex(4)}{_OLD}")
    os.rename(target, old)
    try:
        os.rename(partial, target)
        sync(target.parent)
    finally:
        if not os.path.lexists(target):
            os.rename(old, target)
    shutil.rmtree(old, ignore_errors=True)  # the next run removes what remains


def _sync_all(folder: Path) -> None:
    for inner, _, names in os.walk(folder):
        for name in names:
            if not os.path.islink(os.path.join(inner, name)):
                sync(Path(inner, name))
        sync(Path(inner))
