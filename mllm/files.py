"""Writing files: next to the target, synced, then renamed, so that a file is either complete or unchanged.

A command replaces a file only if this project wrote it: such a file contains `MADE_BY` (see `is_marked`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from alpha_clip_commands.command_line import one_line

MADE_BY = "alpha-clip-mllm"  # in every file that a command writes on its own (PNG text, HTML generator, JSON key)
_MARKER_RANGE = 4096  # bytes at either end of a file that are searched for the marker
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # names of the partial files of `replacing_file`
# parts of the RuntimeErrors that torch raises when a file cannot be written
_TORCH_WRITE_ERRORS = ("PytorchStreamWriter", "inline_container", "iostream error")
_MAX_NAME = 180  # bytes of an output's name within the names derived from it; file systems allow 255

StrPath = str | os.PathLike


def write_file(path: StrPath, content: str | bytes) -> None:
    """Write a file atomically. The caller checks whether it may be replaced (`check_replaceable`).

    Raises:
        ValueError: If `path` cannot be a file.
        OSError: If it cannot be written; an existing file is then unchanged.
    """
    with replacing_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: StrPath, content: Any, indent: int | None = 1) -> None:
    """Write JSON, as `write_file`."""
    text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
    # a lone surrogate cannot be encoded as UTF-8; Python's backslash escape of it is also JSON's
    write_file(path, text.encode("utf-8", "backslashreplace"))


def made_by(kind: str) -> str:
    """The marker of a file of this kind: a PNG's text "Software", an HTML page's generator, or JSON's key "made_by"."""
    return f"{MADE_BY} {kind}"


@contextlib.contextmanager
def replacing_file(path: StrPath) -> Iterator[Path]:
    """A temporary path that is renamed to `path` at the end, for libraries that write to a path.

    Raises:
        ValueError: If `path` cannot be a file.
        OSError: If it cannot be written; an existing file is then unchanged.
    """
    target = check_file(path)
    partial = target.with_name(f".{short_name(target.name)}.{secrets.token_hex(4)}.tmp")
    try:
        with failed_writes_as_os_errors(path):
            yield partial
        if target.exists():
            shutil.copymode(target, partial)
        sync(partial)
        os.replace(partial, target)
        sync(target.parent)
    except OSError as error:
        # report the output, not the temporary name; a full disk reports no name
        if error.errno is not None and error.filename in (None, str(partial)):
            error.filename = os.fspath(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def cannot_write(error: BaseException) -> bool:
    """Whether torch or safetensors raised this error because a file cannot be written, such as on a full disk."""
    if isinstance(error, SafetensorError):
        return str(error).startswith("Error while serializing")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _TORCH_WRITE_ERRORS)


@contextlib.contextmanager
def failed_writes_as_os_errors(path: StrPath) -> Iterator[None]:
    """Turn the errors of torch and safetensors when a file cannot be written into an OSError that names the output."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if not cannot_write(error):
            raise
        raise OSError(f"cannot write {path} ({one_line(error)[:200]}); is the disk full?") from error


def check_file(path: StrPath) -> Path:
    """The absolute path of an output file, with links resolved.

    Raises:
        ValueError: If it cannot be a file: its folder is not found, or it is a folder, a device, a circular link or
            read-only.
    """
    if not os.fspath(path):
        raise ValueError("expected a file name, got an empty one")
    try:
        target = Path(path).resolve()
        mode = target.stat().st_mode if target.exists() else None
    except (RuntimeError, OSError, ValueError) as error:  # RuntimeError: a circular link, before Python 3.13
        raise ValueError(f"cannot write {path}: {one_line(error)}") from error
    if mode is not None and stat.S_ISDIR(mode):
        raise ValueError(f"cannot write {path}: it is a folder, expected a file")
    if mode is not None and not stat.S_ISREG(mode):
        raise ValueError(f"cannot write {path}: it is not a regular file")
    if mode is not None and not mode & 0o222:
        raise ValueError(f"cannot write {path}: it is read-only")
    if os.path.islink(target):
        raise ValueError(f"cannot write {path}: it is a circular link")
    if os.fspath(path).endswith(("/", os.sep)):
        raise ValueError(f"cannot write {path}: expected a file name, got the name of a folder")
    if not target.parent.is_dir():
        raise ValueError(f"cannot write {path}: folder not found: {target.parent}")
    return target


def check_replaceable(path: StrPath, *, reads: Iterable[StrPath] = (), kind: str | None = None) -> Path:
    """The absolute path of an output file that is new, empty, or was written by this project.

    Args:
        path: The output.
        reads: Files that the command reads, which must not be replaced.
        kind: Kind of the file (see `made_by`); None accepts every kind.

    Raises:
        ValueError: If it is one of `reads`, or was not written by this project; and as `check_file`.
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
    """Whether a PNG, HTML or JSON file has the marker of a kind (None: of any) near its beginning or end."""
    with open(path, "rb") as file:
        head = file.read(_MARKER_RANGE)
        file.seek(max(os.fstat(file.fileno()).st_size - _MARKER_RANGE, 0))
        tail = file.read()
    # the name alone does not suffice: it is also in pyproject.toml, and in every list of installed packages
    name = re.escape((MADE_BY if kind is None else made_by(kind)).encode())
    end = b'[^"\\x00]*' if kind is None else b""
    if head.startswith(b"\x89PNG"):
        return re.search(rb"tEXtSoftware\0" + name, head) is not None
    mark = rb'"made_by": ?"' + name + end + b'"|<meta name="generator" content="' + name + end + b'"'
    return re.search(mark, head) is not None or re.search(mark, tail) is not None


def sync_files(paths: Iterable[StrPath]) -> None:
    """Sync files that a library wrote, and their folders, to disk."""
    files = [Path(path) for path in paths]
    for path in (*files, *sorted({file.parent for file in files})):
        sync(path)


def sync(path: Path) -> None:
    """Sync a file or folder to disk. Windows and some file systems cannot sync a folder."""
    is_folder = path.is_dir()
    if os.name == "nt" and is_folder:
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows syncs writable files only
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def short_name(name: str) -> str:
    """A file's name, shortened so that derived names do not exceed the limit of the file system."""
    raw = os.fsencode(name)
    if len(raw) <= _MAX_NAME:
        return name
    return f"{raw[: _MAX_NAME - 20].decode(errors='ignore')}-{hashlib.sha256(raw).hexdigest()[:16]}"


def is_temporary(name: str, of: Iterable[str]) -> bool:
    """Whether a name is that of a partial file that a killed process left of one of these files."""
    return _TEMPORARY.fullmatch(name) is not None and name[1:].rsplit(".", 2)[0] in of


def umask() -> int:
    """The umask of this process."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
