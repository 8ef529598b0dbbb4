"""Finds pictures that have a JSON of the same name: side by side in folders, or in uncompressed tars.

Layouts: `<id>.json` and `<id>.jpg` (.jpeg, .png, .webp) in a folder and its sub-folders; or, as img2dataset writes
webdatasets, `*.tar` with `<key>.json`, `<key>.jpg` and others, which are passed over. Where there are tars, they alone
are read. One JSON is held at a time, of a tar those whose picture has not come yet.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from mllm.data.index import INDEX_FOLDER
from mllm.data.json_files import LARGEST_RECORD, is_utf8, open_file
from mllm.data.records import ReadReport
from mllm.data.samples import TarMember

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
NO_PICTURE = "with JSON but without a picture, left out"
NO_JSON = "pictures without a JSON, left out"
REPEATED = "whose name occurs again, left out"
NOT_TEXT = "whose name is not UTF-8, left out"
TOO_LARGE = f"whose JSON has over {LARGEST_RECORD:,} bytes, left out"
LONG_NAME = "whose name is too long, left out"
NO_ACCESS = "that cannot be read, left out"
CUT_SHORT = "tars cut short or damaged, used up to there"
LONGEST_NAME = 1024  # characters of a name in a tar
_LARGEST_HEADER = 64 * 2**10  # bytes of the headers that carry long names; tarfile reads them whole
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
_NAMING = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
# What tarfile raises on damaged files: its headers are parsed as numbers and text.
_DAMAGE = (tarfile.TarError, OSError, ValueError, EOFError, LookupError, OverflowError)


class PicturePair(NamedTuple):
    """A picture, its JSON as bytes, and the name that both share: a path with forward slashes, without suffix."""

    key: str
    record: bytes
    image: str | TarMember


def find_pairs(root: str | os.PathLike, report: ReadReport) -> Iterator[PicturePair]:
    """All pairs, in the order of the sorted tars or of the sorted files.

    Args:
        root: Folder.
        report: Filled with what was left out.

    Raises:
        ValueError: If there is no such folder, or a tar is compressed.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}")
    if tars := _tars(root):
        seen: set[str] = set()
        for tar in tars:
            yield from _pairs_in_tar(tar, seen, report)
    else:
        yield from _pairs_in_folder(root, report)


def has_pairs(root: str | os.PathLike) -> bool:
    """Whether a folder has tars, or a picture with a JSON.

    Raises:
        ValueError: If a tar is compressed.
    """
    root = Path(root)
    return bool(_tars(root)) or next(_pairs_in_folder(root, ReadReport()), None) is not None


def _tars(root: Path) -> list[Path]:
    """The tars in a folder.

    Raises:
        ValueError: If one is compressed.
    """
    names = sorted(os.listdir(root)) if root.is_dir() else []
    for name in names:
        if name.endswith(_COMPRESSED) or (name.endswith(".tar") and _head(root / name).startswith(_MAGIC)):
            raise ValueError(
                f"{root / name} is compressed; pictures are read at their place in plain tars: unpack it to a .tar"
            )
    return [root / name for name in names if name.endswith(".tar")]


def _head(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with open(path, "rb") as file:
        return file.read(8)


def _pairs_in_folder(root: Path, report: ReadReport) -> Iterator[PicturePair]:
    """The pairs of a folder and its sub-folders; a record of the data set and an index in it are passed over."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith((INDEX_FOLDER, ".")))
        inner = Path(folder).relative_to(root)
        of_stem: dict[str, list[str]] = {}
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if name.startswith("."):  # the marker of a folder that we wrote; what macOS puts beside files
                continue
            if suffix.lower() in (".json", *PICTURES):
                of_stem.setdefault(stem, []).append(name)
        if folder == os.fspath(root) and of_stem.get("dataset") == ["dataset.json"]:
            del of_stem["dataset"]
        for stem, found in of_stem.items():
            key = (inner / stem).as_posix()
            records = [name for name in found if name.lower().endswith(".json")]
            pictures = [name for name in found if name not in records]
            if (reason := _why_no_pair(key, len(records), len(pictures))) is not None:
                report.add(reason, ascii(key) if reason == NOT_TEXT else key)
                continue
            try:
                with open_file(Path(folder, records[0]), None) as file:
                    record = file.read(LARGEST_RECORD + 1)
            except (ValueError, OSError):
                report.leave_out(NO_ACCESS, key)
                continue
            if len(record) > LARGEST_RECORD:
                report.leave_out(TOO_LARGE, key)
                continue
            yield PicturePair(key, record, str(Path(folder, pictures[0])))


def _why_no_pair(key: str, records: int, pictures: int) -> str | None:
    """The reason why files of one name make no pair; None if they do."""
    if not is_utf8(key):
        return NOT_TEXT
    if records > 1 or pictures > 1:
        return REPEATED
    if not records or not pictures:
        return NO_JSON if pictures else NO_PICTURE
    return None


def _pairs_in_tar(path: Path, seen: set[str], report: ReadReport) -> Iterator[PicturePair]:
    """The pairs of a tar, each as soon as its second half comes.

    A name that comes again before its pair is whole could mix two pictures: then both are left out.
    """
    waiting: dict[str, dict[str, bytes | TarMember | None]] = {}
    repeated: set[str] = set()
    damaged_at = None
    for member in _members(path):
        if isinstance(member, int):
            damaged_at = member
            break
        key, half, content = member
        if len(key) > LONGEST_NAME or not is_utf8(key):
            report.leave_out(LONG_NAME if len(key) > LONGEST_NAME else NOT_TEXT, f"{key[:50]!a} in {path.name}")
            continue
        halves = waiting.setdefault(key, {})
        if key in seen or half in halves:
            del waiting[key]
            seen.add(key)
            if key not in repeated:
                repeated.add(key)
                report.add(REPEATED, f"{key} in {path.name}")
            continue
        halves[half] = content
        if len(halves) == 2:
            del waiting[key]
            seen.add(key)
            if halves["json"] is None:
                report.leave_out(TOO_LARGE, f"{key} in {path.name}")
            else:
                yield PicturePair(key, halves["json"], halves["picture"])
    if damaged_at is not None:
        report.add(CUT_SHORT, f"{path.name} at byte {damaged_at}")  # what waits may have its half behind it
        return
    for key, halves in waiting.items():
        report.add(NO_PICTURE if "json" in halves else NO_JSON, f"{key} in {path.name}")


def _members(path: Path) -> Iterator[tuple[str, str, bytes | TarMember | None] | int]:
    """(name without suffix, "json" or "picture", content or place) of each, without content where that is too large;
    where the tar is damaged, last that byte.

    tarfile alone takes a damaged header, or the end of a file without the mark that ends archives, for the end.
    """
    position = 0
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as archive:
            length = os.fstat(file.fileno()).st_size
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                end = member.offset_data + member.size
                if member.size < 0 or end > length or archive.offset <= position:
                    yield position
                    return
                position = min(archive.offset, length)  # the last content may not be filled up to a block
                if (found := _half(path, file, member)) is not None:
                    yield found
            file.seek(position)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                yield position
    except _DAMAGE:
        yield position


class _Member(tarfile.TarInfo):
    """A member whose headers are of a sensible size: a name of a gigabyte would be read whole."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _NAMING and self.size > _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(archive)


def _half(path: Path, file: BinaryIO, member: tarfile.TarInfo) -> tuple[str, str, bytes | TarMember | None] | None:
    """What a member is; None if it is neither a picture nor JSON."""
    if not member.isreg() or member.issparse():
        return None
    name = PurePosixPath(member.name)
    suffix = name.suffix.lower()
    if suffix not in (".json", *PICTURES):
        return None
    key = name.with_suffix("").as_posix()
    if suffix in PICTURES:
        return key, "picture", TarMember(str(path), member.name, member.offset_data, member.size)
    if member.size > LARGEST_RECORD:
        return key, "json", None
    file.seek(member.offset_data)
    return key, "json", file.read(member.size)
