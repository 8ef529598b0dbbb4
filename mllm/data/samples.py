"""`RegionSample`, the record shared by all datasets, trainers and tasks; and the loading of its images."""

from __future__ import annotations

import dataclasses
import lzma
import os
import tarfile
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from PIL import Image

from alpha_clip_commands.command_line import one_line
from vision_tower import Region
from vision_tower.image_decoding import decode_image, describe, image_size

# What tarfile and its decompressors raise on damaged archives. Errors of PIL are handled by the decoder.
_ARCHIVE_ERRORS = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, tarfile.TarError)


class TarMember(NamedTuple):
    """A file in a tar archive.

    With `offset` and `size` of its content, in bytes in an uncompressed archive, it is read directly; without them, the
    archive is searched.
    """

    tar: str
    name: str
    offset: int | None = None
    size: int | None = None


ImageSource = str | TarMember | bytes


@dataclasses.dataclass(frozen=True, slots=True)
class RegionSample:
    """An image, one or several regions, and optionally a question about them.

    Attributes:
        id: Unique in its dataset.
        image: Source of the image, which `open_image` loads.
        regions: In pixels of the image as displayed.
        question: None asks for a description.
        references: Correct answers.
        candidates: Possible answers, or None.
        meta: Further fields of the dataset, for example `image_id`, and `width` and `height` in pixels.
    """

    id: str
    image: ImageSource
    regions: tuple[Region, ...]
    question: str | None
    references: tuple[str, ...]
    candidates: tuple[str, ...] | None = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def open_image(self) -> Image.Image:
        """The image, RGB, as displayed (EXIF orientation applied).

        Raises:
            ValueError: If it cannot be read, or differs in size from `meta`, because its regions would be shifted.
        """
        image = load_image(self.image)
        stated = self.meta.get("width"), self.meta.get("height")
        if None not in stated and stated != image.size:
            raise ValueError(
                f"sample {self.id}: {describe_source(self.image)} is {image.width} x {image.height} pixels, but its "
                f"dataset states {stated[0]} x {stated[1]}; regions would be shifted. Use the original image files"
            )
        return image


def displayed_size(source: ImageSource | os.PathLike) -> tuple[int, int]:
    """Width and height in pixels of an image as displayed, read from the file header only.

    Raises:
        ValueError: If the file is not found or not an image. Damage after the header is not detected.
    """
    name = describe_source(source)
    return image_size(_content(source, name), name=name)


def load_image(source: ImageSource | os.PathLike) -> Image.Image:
    """Load an image: RGB, EXIF orientation applied, transparency composited onto white.

    Args:
        source: A path, a member of a tar archive, or the bytes of a file.

    Raises:
        ValueError: If the file is not found, not an image, damaged, truncated, or larger than the limit of
            `vision_tower.image_decoding`. The message is one line that names the file.
    """
    name = describe_source(source)
    return decode_image(_content(source, name), name=name)


def describe_source(source: ImageSource | os.PathLike) -> str:
    """A name for messages, in one line."""
    if isinstance(source, TarMember):
        return f"{describe(source.name)} in {describe(source.tar)}"
    return describe(source)


def _content(source: ImageSource | os.PathLike, name: str) -> str | os.PathLike | bytes:
    """The bytes of a tar member; a path or bytes unchanged."""
    if not isinstance(source, TarMember):
        return source
    try:
        if source.offset is not None:
            return _read_at_offset(source)
        with tarfile.open(source.tar) as archive:
            try:
                file = archive.extractfile(source.name)
            except KeyError:
                file = None
            if file is None:
                raise FileNotFoundError(source.name)
            return file.read()
    except FileNotFoundError:
        raise ValueError(f"image file not found: {name}") from None
    except _ARCHIVE_ERRORS as error:
        # tarfile's messages have one line per compression method that it tried
        raise ValueError(f"cannot read the image {name}: {one_line(error)}") from error


def _read_at_offset(member: TarMember) -> bytes:
    """The bytes at a member's offset. The header before them shows whether the archive has changed."""
    with open(member.tar, "rb") as file:
        file.seek(max(member.offset - tarfile.BLOCKSIZE, 0))
        header, content = file.read(tarfile.BLOCKSIZE), file.read(member.size)
    try:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.TarError:
        found = tarfile.TarInfo()
    # a name that is long or not ASCII is complete only in an earlier header
    is_partial = len(member.name) > tarfile.LENGTH_NAME or not member.name.isascii()
    if found.size != member.size or not (is_partial or found.name == member.name):
        raise ValueError(f"not found at byte {member.offset}; if the archive was rewritten, rebuild the index")
    if len(content) != member.size:
        raise EOFError(f"expected {member.size} bytes, got {len(content)}; the archive may be truncated")
    return content
