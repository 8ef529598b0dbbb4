"""Finds images with a JSON file of the same name, in folders or in uncompressed tars.

Layouts: `<id>.json` and `<id>.jpg` (.jpeg, .png, .webp) in a folder and its subfolders; or tars in the WebDataset
format of img2dataset, with `<key>.json`, `<key>.jpg` and other files, which are ignored. If a folder has tars, only
they are read. Only one JSON is held in memory, and for a tar those whose image has not been found yet.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from mllm.data.index import INDEX_FOLDER
from mllm.data.json_files import MAX_RECORD_SIZE, is_utf8, open_file
from mllm.data.read_report import ReadReport
from mllm.data.samples import TarMember

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
NO_IMAGE = "skipped: JSON without an image"
NO_JSON = "skipped: image without a JSON"
DUPLICATE_NAME = "skipped: duplicate name"
NAME_NOT_UTF8 = "skipped: the name is not valid UTF-8"
JSON_TOO_LARGE = f"skipped: JSON of over {MAX_RECORD_SIZE:,} bytes"
NAME_TOO_LONG = "skipped: the name is too long"
UNREADABLE_JSON = "skipped: the JSON cannot be read"
DAMAGED_TAR = "tars truncated or damaged, used up to the damage"
MAX_NAME_LENGTH = 1024  # characters of a name in a tar
_MAX_HEADER_SIZE = 64 * 2**10  # bytes of a header with a long name, which tarfile holds in memory
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
_NAME_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
# What tarfile raises on damaged files, whose headers it parses as numbers and text
_TAR_ERRORS = (tarfile.TarError, OSError, ValueError, EOFError, LookupError, OverflowError)


class ImageJsonPair(NamedTuple):
    """An image, its JSON as bytes, and their common name: a path with forward slashes, without suffix."""

    key: str
    record: bytes
    image: str | TarMember


def find_pairs(root: str | os.PathLike, report: ReadReport) -> Iterator[ImageJsonPair]:
    """All pairs, in the order of the sorted tars or of the sorted files.

    Args:
        root: Folder.
        report: Filled with the counts of skipped files.

    Raises:
        ValueError: If the folder is not found, or a tar is compressed.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"folder not found: {root}")
    if tars := _tars(root):
        seen: set[str] = set()
        for tar in tars:
            yield from _pairs_in_tar(tar, seen, report)
    else:
        yield from _pairs_in_folder(root, report)


def has_pairs(root: str | os.PathLike) -> bool:
    """Whether a folder has tars, or an image with a JSON.

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
                f"{root / name} is compressed, but images are read at their offsets in the tar; decompress it to a .tar"
            )
    return [root / name for name in names if name.endswith(".tar")]


def _head(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with open(path, "rb") as file:
        return file.read(8)


def _pairs_in_folder(root: Path, report: ReadReport) -> Iterator[ImageJsonPair]:
    """The pairs in a folder and its subfolders, without the dataset.json and the index."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith((INDEX_FOLDER, ".")))
        inner = Path(folder).relative_to(root)
        of_stem: dict[str, list[str]] = {}
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if name.startswith("."):  # our marker of a written folder; macOS metadata
                continue
            if suffix.lower() in (".json", *IMAGE_SUFFIXES):
                of_stem.setdefault(stem, []).append(name)
        if folder == os.fspath(root) and of_stem.get("dataset") == ["dataset.json"]:
            del of_stem["dataset"]
        for stem, found in of_stem.items():
            key = (inner / stem).as_posix()
            records = [name for name in found if name.lower().endswith(".json")]
            images = [name for name in found if name not in records]
            if (reason := _pair_problem(key, len(records), len(images))) is not None:
                report.add(reason, ascii(key) if reason == NAME_NOT_UTF8 else key)
                continue
            try:
                with open_file(Path(folder, records[0]), None) as file:
                    record = file.read(MAX_RECORD_SIZE + 1)
            except (ValueError, OSError):
                report.skip(UNREADABLE_JSON, key)
                continue
            if len(record) > MAX_RECORD_SIZE:
                report.skip(JSON_TOO_LARGE, key)
                continue
            yield ImageJsonPair(key, record, str(Path(folder, images[0])))


def _pair_problem(key: str, records: int, images: int) -> str | None:
    """The reason why files with the same name are not a pair; None if they are."""
    if not is_utf8(key):
        return NAME_NOT_UTF8
    if records > 1 or images > 1:
        return DUPLICATE_NAME
    if not records or not images:
        return NO_JSON if images else NO_IMAGE
    return None


def _pairs_in_tar(path: Path, seen: set[str], report: ReadReport) -> Iterator[ImageJsonPair]:
    """The pairs in a tar, each as soon as it is complete.

    If a name is repeated before its pair is complete, both files are skipped: they could be of different images.
    """
    waiting: dict[str, dict[str, bytes | TarMember | None]] = {}
    repeated: set[str] = set()
    damaged_at = None
    for member in _members(path):
        if isinstance(member, int):
            damaged_at = member
            break
        key, half, content = member
        if len(key) > MAX_NAME_LENGTH or not is_utf8(key):
            report.skip(NAME_TOO_LONG if len(key) > MAX_NAME_LENGTH else NAME_NOT_UTF8, f"{key[:50]!a} in {path.name}")
            continue
        halves = waiting.setdefault(key, {})
        if key in seen or half in halves:
            del waiting[key]
            seen.add(key)
            if key not in repeated:
                repeated.add(key)
                report.add(DUPLICATE_NAME, f"{key} in {path.name}")
            continue
        halves[half] = content
        if len(halves) == 2:
            del waiting[key]
            seen.add(key)
            if halves["json"] is None:
                report.skip(JSON_TOO_LARGE, f"{key} in {path.name}")
            else:
                yield ImageJsonPair(key, halves["json"], halves["image"])
    if damaged_at is not None:
        report.add(DAMAGED_TAR, f"{path.name} at byte {damaged_at}")  # the other file of a pair may be after the damage
        return
    for key, halves in waiting.items():
        report.add(NO_IMAGE if "json" in halves else NO_JSON, f"{key} in {path.name}")


def _members(path: Path) -> Iterator[tuple[str, str, bytes | TarMember | None] | int]:
    """(name without suffix, "json" or "image", content or location) of each JSON and image.

    The content of a JSON that is too large is None. If the tar is damaged, the last item is the byte position of the
    damage: tarfile itself treats a damaged header, or a missing end-of-archive mark, as the end of the archive.
    """
    position = 0
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as archive:
            length = os.fstat(file.fileno()).st_size
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # otherwise it keeps all members
                end = member.offset_data + member.size
                if member.size < 0 or end > length or archive.offset <= position:
                    yield position
                    return
                position = min(archive.offset, length)  # the last member may not be padded to a full block
                if (found := _pair_file(path, file, member)) is not None:
                    yield found
            file.seek(position)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                yield position
    except _TAR_ERRORS:
        yield position


class _Member(tarfile.TarInfo):
    """A member whose name headers have a limited size: tarfile would read a name of a gigabyte into memory."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _NAME_HEADERS and self.size > _MAX_HEADER_SIZE:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(archive)


def _pair_file(path: Path, file: BinaryIO, member: tarfile.TarInfo) -> tuple[str, str, bytes | TarMember | None] | None:
    """A member in the form that `_members` yields; None if it is neither an image nor JSON."""
    if not member.isreg() or member.issparse():
        return None
    name = PurePosixPath(member.name)
    suffix = name.suffix.lower()
    if suffix not in (".json", *IMAGE_SUFFIXES):
        return None
    key = name.with_suffix("").as_posix()
    if suffix in IMAGE_SUFFIXES:
        return key, "image", TarMember(str(path), member.name, member.offset_data, member.size)
    if member.size > MAX_RECORD_SIZE:
        return key, "json", None
    file.seek(member.offset_data)
    return key, "json", file.read(member.size)
