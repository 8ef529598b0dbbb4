"""Writing: one way to write a file, one to build a folder, one lock for each output.

A file or folder is written next to its place, synced and renamed, so that its name always stands for whole content. A
command replaces only what this project wrote: a file that carries `MADE_BY`, a folder with a marker that lists what was
written into it. The source of a command, its parents, and anything else that was there before are refused.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock
from safetensors import SafetensorError

from alpha_clip_commands.command_line import one_line

MADE_BY = "alpha-clip-mllm"  # in every file that a command writes on its own (PNG text, HTML generator, JSON key)
MARKER = ".made_by.json"  # in every folder that a command writes
_MARKED_WITHIN = 4096  # bytes from either end of a file in which its marker must occur
_OLD = ".old.partial"  # ending of a folder that is being replaced
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # names that `replacing_file` makes
# in the RuntimeErrors by which torch reports that a file cannot be written
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "inline_container", "iostream error")
_LONGEST_NAME = 180  # bytes of an output's name in the names made from it; a file system takes 255

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
    text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
    # half a surrogate pair is not UTF-8; what Python writes for one is JSON's own escape
    write_file(path, text.encode("utf-8", "backslashreplace"))


def made_by(kind: str) -> str:
    """The marker of a file of this kind: in a PNG's text "Software", an HTML's generator, or JSON's key "made_by"."""
    return f"{MADE_BY} {kind}"


@contextlib.contextmanager
def replacing_file(path: StrPath) -> Iterator[Path]:
    """A place next to `path` that becomes `path` at the end, for libraries that write a file by its name.

    Raises:
        ValueError: If no file can be at `path`.
        OSError: If it cannot be written; what was there before is still there.
    """
    target = check_file(path)
    partial = target.with_name(f".{_shortened(target.name)}.{secrets.token_hex(4)}.tmp")
    try:
        with failed_writes_as_os_errors(path):
            yield partial
        if target.exists():
            shutil.copymode(target, partial)
        _sync(partial)
        os.replace(partial, target)
        _sync(target.parent)
    except OSError as error:
        # the name that people know; a full disk gives none
        if error.errno is not None and error.filename in (None, str(partial)):
            error.filename = os.fspath(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def cannot_write(error: BaseException) -> bool:
    """Whether an error is one by which torch or safetensors report that a file cannot be written: a full disk, say."""
    if isinstance(error, SafetensorError):
        return str(error).startswith("Error while serializing")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _TORCH_CANNOT_WRITE)


@contextlib.contextmanager
def failed_writes_as_os_errors(path: StrPath) -> Iterator[None]:
    """Turn what torch and safetensors raise when a file cannot be written into an OSError that names the output."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if not cannot_write(error):
            raise
        raise OSError(f"cannot write {path} ({one_line(error)[:200]}); is the disk full?") from error


def check_file(path: StrPath) -> Path:
    """The file that `path` stands for, links followed.

    Raises:
        ValueError: If no file can be there: its folder is missing, or it is a folder, a device, a circular link or
            read-only.
    """
    if not os.fspath(path):
        raise ValueError("cannot write a file without a name; give one")
    try:
        target = Path(path).resolve()
        mode = target.stat().st_mode if target.exists() else None
    except (RuntimeError, OSError, ValueError) as error:  # RuntimeError: a circular link, before Python 3.13
        raise ValueError(f"cannot write {path}: {one_line(error)}") from error
    if mode is not None and stat.S_ISDIR(mode):
        raise ValueError(f"cannot write {path}: it is a folder, expected the name of a file")
    if mode is not None and not stat.S_ISREG(mode):
        raise ValueError(f"cannot write {path}: it is not a regular file")
    if mode is not None and not mode & 0o222:
        raise ValueError(f"cannot write {path}: it is read-only")
    if os.path.islink(target):
        raise ValueError(f"cannot write {path}: it is a circular link")
    if os.fspath(path).endswith(("/", os.sep)):
        raise ValueError(f"cannot write {path}: it names a folder, expected the name of a file")
    if not target.parent.is_dir():
        raise ValueError(f"cannot write {path}: folder not found: {target.parent}")
    return target


def check_replaceable(path: StrPath, *, reads: Iterable[StrPath] = (), kind: str | None = None) -> Path:
    """The file that `path` stands for, if a command may write it: it is new, empty, or this project wrote it.

    Args:
        path: Where a file will be written.
        reads: Files that the command reads, which must stay.
        kind: What the file is (see `made_by`); None accepts every kind.

    Raises:
        ValueError: If it is one of `reads`, was written by something else, or as `check_file`.
    """
    target = check_file(path)
    check_unread(target, reads)
    if target.exists() and target.stat().st_size and not is_marked(target, kind):
        raise ValueError(f"{path} exists and was not written by this command; choose another name, or delete it")
    return target


def check_unread(path: StrPath, reads: Iterable[StrPath]) -> None:
    """Raise ValueError if a file is one of those that the command `reads`."""
    for source in reads:
        if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
            raise ValueError(f"{path} is read by this command and would be overwritten; choose another name")


def is_marked(path: StrPath, kind: str | None = None) -> bool:
    """Whether a PNG, HTML or JSON file carries the marker of a kind, or of any, near its beginning or end."""
    with open(path, "rb") as file:
        head = file.read(_MARKED_WITHIN)
        file.seek(max(os.fstat(file.fileno()).st_size - _MARKED_WITHIN, 0))
        tail = file.read()
    # the name alone would not do: it is in pyproject.toml, and in every list of installed packages
    name = re.escape((MADE_BY if kind is None else made_by(kind)).encode())
    end = b'[^"\\x00]*' if kind is None else b""
    if head.startswith(b"\x89PNG"):
        return re.search(rb"tEXtSoftware\0" + name, head) is not None
    mark = rb'"made_by": ?"' + name + end + b'"|<meta name="generator" content="' + name + end + b'"'
    return re.search(mark, head) is not None or re.search(mark, tail) is not None


@contextlib.contextmanager
def replacing_folder(
    path: StrPath,
    kind: str,
    *,
    reads: Iterable[StrPath] = (),
    known: Callable[[Path], bool] | None = None,
    new: bool = False,
) -> Iterator[Path]:
    """A new folder that becomes `path` at the end, locked meanwhile.

    Args:
        path: The folder: new, empty, or one of the same kind that holds nothing but what was written into it.
        kind: What the folder is, stored in its marker.
        reads: Files and folders that the command reads; `path` may be neither one of them nor a parent of one.
        known: Whether a folder without a marker was written by an earlier version.
        new: Whether nothing may be there yet, not even a folder of the same kind; it then keeps no marker.

    Raises:
        ValueError: If `path` may not be replaced, or another process is writing it.
        OSError: If the folder cannot be written; what was there before is still there.
    """
    target = check_folder(path, kind, reads=reads, known=known, new=new)
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        check_folder(path, kind, reads=reads, known=known, new=new)  # another process may have written it meanwhile
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
    """A folder next to a locked output, removed at the end. What killed processes left there is removed first."""
    target = Path(os.path.abspath(output))
    _remove_leftovers(target)
    prefix = f".{_shortened(target.name)}."
    folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=target.parent))
    try:
        folder.chmod(0o777 & ~_umask())  # mkdtemp: for the owner alone
        _write_marker(folder, kind, [])  # whose it is, should this process be killed
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_new(path: StrPath) -> None:
    """Raise ValueError if anything is at `path`, be it a broken link, or nothing can be made there."""
    if not os.fspath(path):
        raise ValueError("cannot write an output without a name; give one")
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
    """The folder that `path` stands for, if it may be replaced whole; arguments and errors as `replacing_folder`."""
    if new:
        check_new(path)
    target = _folder(path, reads)
    if target.exists() and Path.cwd().is_relative_to(target):
        raise ValueError(f"{path} is or contains the current folder; choose another folder, or start from elsewhere")
    if target.exists() and os.path.ismount(target):
        raise ValueError(f"{path} is a mount point, which cannot be replaced; choose a folder in it")
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


def check_shared_folder(path: StrPath, kind: str, *, reads: Iterable[StrPath] = ()) -> None:
    """Raise ValueError unless files may be written into a folder that may hold others: it is not a folder of another
    command, and neither one of those that the command `reads` nor a parent of one.
    """
    target = _folder(path, reads)
    marker = _read_marker(target)
    if marker is not None and marker.get("kind") != kind:
        raise ValueError(f"{path} was written by another command ({marker.get('kind')}); choose another folder")


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
        ValueError: If the folder was not written by this command, or is read by it.
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
    _write_marker(target, kind, None)
    return target


@contextlib.contextmanager
def locked(output: StrPath, *, inside: bool = False) -> Iterator[None]:
    """Hold the lock of an output. A lock that a dead process left does not count, and half a file that one left under
    a temporary name is removed.

    Args:
        output: The file or folder that is written.
        inside: Whether the lock lies in the folder: of a run, whose parent may be read-only.

    Raises:
        ValueError: If another process holds it; its id and host are named.
        OSError: If the lock cannot be written.
    """
    output = Path(os.path.realpath(output))  # a link and what it names are one output
    place = output / ".lock" if inside else output.with_name(f".{_shortened(output.name)}.lock")
    holder = place.with_name(f"{place.name}.json")
    lock = filelock.FileLock(place, timeout=0, mode=0o666 & ~_umask())
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(
            f"{output} is being written by {_holder(holder)}; wait for it to end, or choose another output"
        ) from None
    except OSError as error:
        raise ValueError(f"cannot write {output}: {one_line(error)}") from error
    try:
        names = {_shortened(holder.name)} | (set() if inside else {_shortened(output.name)})
        _remove_temporaries(place.parent, names)
        write_json(holder, {"pid": os.getpid(), "host": socket.gethostname()})
        yield
    finally:
        if lock.is_locked:  # not so in a forked child
            with contextlib.suppress(OSError):  # read-only by now: the error that ends the command is another
                holder.unlink(missing_ok=True)
                if os.name != "nt":  # which does not remove open files; elsewhere filelock retries if it got one
                    place.unlink(missing_ok=True)
            lock.release()


def _remove_temporaries(folder: Path, names: Iterable[str]) -> None:
    """Remove what killed processes were writing of these files, which only the holder of the lock writes."""
    for file in folder.glob(".*.tmp"):
        if _is_temporary(file.name, names) and file.is_file() and not file.is_symlink():
            file.unlink(missing_ok=True)


def _holder(path: Path) -> str:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return f"process {int(record['pid'])} on {record['host']!s}"
    except (OSError, ValueError, KeyError, TypeError):  # not written yet, or locked too (Windows)
        return "another process"


def _folder(path: StrPath, reads: Iterable[StrPath]) -> Path:
    """The folder that `path` stands for, links followed.

    Raises:
        ValueError: If no folder can be there, it is read-only, or it is or contains what the command reads.
    """
    if not os.fspath(path):
        raise ValueError("cannot write a folder without a name; give one")
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
        if any(os.path.samefile(folder, target) for folder in above):  # also where letters' case does not count
            raise ValueError(f"{path} is or contains {source}, which this command reads; choose another folder")
    return target


def _check_parent(path: StrPath) -> None:
    """Raise ValueError unless the folder that `path` will be made in, the next one above that is there, takes it."""
    for above in Path(os.path.abspath(path)).parents:
        if os.path.lexists(above):
            if not above.is_dir():
                raise ValueError(f"cannot write {path}: {above} is not a folder")
            if not os.access(above, os.W_OK):
                raise ValueError(f"cannot write {path}: {above} is read-only")
            return


def _entries(folder: Path) -> list[str]:
    """The files in a folder and its subfolders (and empty subfolders), besides marker and lock."""
    found = []
    for inner, folders, names in os.walk(folder):
        names += [name for name in folders if os.path.islink(os.path.join(inner, name))]
        if names or not folders:
            below = Path(inner).relative_to(folder)
            found += [(below / name).as_posix() for name in names or [""]]
    own = {".", MARKER, ".lock", ".lock.json"}
    return sorted(name for name in set(found) - own if not _is_temporary(name, (MARKER, ".lock.json")))


def _is_temporary(name: str, of: Iterable[str]) -> bool:
    """Whether a name is one under which a killed process was writing one of these files."""
    return _TEMPORARY.fullmatch(name) is not None and name[1:].rsplit(".", 2)[0] in of


def _write_marker(folder: Path, kind: str, files: list[str] | None) -> None:
    """Mark a folder as this project's, with the files that may be replaced (None: all, as it grows)."""
    write_json(folder / MARKER, {"made_by": MADE_BY, "kind": kind, **({} if files is None else {"files": files})})


def _read_marker(folder: Path) -> dict[str, Any] | None:
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return marker if isinstance(marker, dict) and marker.get("made_by") == MADE_BY else None


def _remove_leftovers(target: Path) -> None:
    """Remove what killed processes left next to a folder, only what carries our marker; or put the folder back, where
    one was killed between moving the old away and the new into its place.
    """
    for leftover in sorted(target.parent.glob(f".{glob.escape(_shortened(target.name))}.*.partial")):
        if leftover.is_dir() and not leftover.is_symlink() and _read_marker(leftover) is not None:
            if leftover.name.endswith(_OLD) and not os.path.lexists(target):
                os.rename(leftover, target)
            else:
                shutil.rmtree(leftover)


def _shortened(name: str) -> str:
    """A file's name, short enough to be part of a longer one."""
    raw = os.fsencode(name)
    if len(raw) <= _LONGEST_NAME:
        return name
    return f"{raw[: _LONGEST_NAME - 20].decode(errors='ignore')}-{hashlib.sha256(raw).hexdigest()[:16]}"


def _swap(partial: Path, target: Path, kind: str) -> None:
    """Put a finished folder in its place; the one that was there is removed last."""
    if not target.exists():
        os.rename(partial, target)
        _sync(target.parent)
        return
    if _read_marker(target) is None:  # of an earlier version, or empty: whose it is, should this process be killed
        _write_marker(target, kind, _entries(target))
    old = target.with_name(f".{_shortened(target.name)}.{secrets.token_hex(4)}{_OLD}")
    os.rename(target, old)
    try:
        os.rename(partial, target)
        _sync(target.parent)
    finally:
        if not os.path.lexists(target):
            os.rename(old, target)
    shutil.rmtree(old, ignore_errors=True)  # what cannot be removed is a leftover for the next time


def sync_files(paths: Iterable[StrPath]) -> None:
    """Have the system write files that a library wrote, and the folders that they are in, to disk."""
    files = [Path(path) for path in paths]
    for path in (*files, *sorted({file.parent for file in files})):
        _sync(path)


def _sync_all(folder: Path) -> None:
    for inner, _, names in os.walk(folder):
        for name in names:
            if not os.path.islink(os.path.join(inner, name)):
                _sync(Path(inner, name))
        _sync(Path(inner))


def _sync(path: Path) -> None:
    """Have the system write a file or folder to disk. Windows, and some file systems, cannot do so with a folder."""
    is_folder = path.is_dir()
    if os.name == "nt" and is_folder:
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows: only what may be written
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
