"""`RegionSample`, the record that everything downstream shares, and the opening of pictures."""

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

# What tarfile and its decompressors raise on damaged archives; what PIL raises is the decoder's matter.
_ARCHIVE_DAMAGE = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, tarfile.TarError)


class TarMember(NamedTuple):
    """A file inside a tar archive. With `offset` and `size`, in bytes, of its content inside an uncompressed archive it
    is read at once; without them the archive is searched for it.
    """

    tar: str
    name: str
    offset: int | None = None
    size: int | None = None


ImageSource = str | TarMember | bytes


@dataclasses.dataclass(frozen=True, slots=True)
class RegionSample:
    """A picture, its region or regions, and what is known or asked about them.

    Attributes:
        id: Unique in its data set.
        image: Where the picture is; opened by `open_image`, not before.
        regions: In pixels of the picture as displayed.
        question: None asks for a description.
        references: Right answers.
        candidates: Answers to choose from, or None.
        meta: What the data set says besides; `width` and `height` in pixels where it states them.
    """

    id: str
    image: ImageSource
    regions: tuple[Region, ...]
    question: str | None
    references: tuple[str, ...]
    candidates: tuple[str, ...] | None = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def open_image(self) -> Image.Image:
        """The picture, RGB, as displayed (EXIF orientation applied).

        Raises:
            ValueError: If it cannot be read, or has another size than the data set states, which
                would shift its regions.
        """
        image = load_image(self.image)
        stated = self.meta.get("width"), self.meta.get("height")
        if None not in stated and stated != image.size:
            raise ValueError(
                f"sample {self.id}: {describe_source(self.image)} is {image.width} x "
                f"{image.height} pixels, its data set says {stated[0]} x {stated[1]}; regions "
                "would be shifted. Use the data set's own picture files"
            )
        return image


def displayed_size(source: ImageSource | os.PathLike) -> tuple[int, int]:
    """Width and height in pixels of a picture as displayed, read from its head alone.

    Raises:
        ValueError: If there is no such file, or it is no picture; of a damaged picture the head may be whole.
    """
    name = describe_source(source)
    return image_size(_content(source, name), name=name)


def load_image(source: ImageSource | os.PathLike) -> Image.Image:
    """Open a picture: RGB, EXIF orientation applied, transparency laid onto white; see `vision_tower.image_decoding`.

    Args:
        source: A path, a member of a tar archive, or the bytes of a file.

    Raises:
        ValueError: If there is no such file, it is no picture, is damaged or cut short, or is so
            large that it must be an attack. The message is one line that names the file.
    """
    name = describe_source(source)
    return decode_image(_content(source, name), name=name)


def describe_source(source: ImageSource | os.PathLike) -> str:
    """A name for messages, in one line."""
    if isinstance(source, TarMember):
        return f"{describe(source.name)} in {describe(source.tar)}"
    return describe(source)


def _content(source: ImageSource | os.PathLike, name: str) -> str | os.PathLike | bytes:
    """The bytes of a tar member; a path or bytes as they are."""
    if not isinstance(source, TarMember):
        return source
    try:
        if source.offset is not None:
            return _at_its_place(source)
        with tarfile.open(source.tar) as archive:
            try:
                file = archive.extractfile(source.name)
            except KeyError:
                file = None
            if file is None:
                raise FileNotFoundError(source.name)
            return file.read()
    except FileNotFoundError:
        raise ValueError(f"there is no image file {name}") from None
    except _ARCHIVE_DAMAGE as error:
        # tarfile's messages have a line per method it tried
        raise ValueError(f"cannot read the image {name}: {one_line(error)}") from error


def _at_its_place(member: TarMember) -> bytes:
    """The bytes at a member's place; its header, right before them, tells whether the archive is still the same."""
    with open(member.tar, "rb") as file:
        file.seek(max(member.offset - tarfile.BLOCKSIZE, 0))
        header, content = file.read(tarfile.BLOCKSIZE), file.read(member.size)
    try:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.TarError:
        found = tarfile.TarInfo()
    # a name that is long or not ASCII stands whole only in a header before this one
    cut = len(member.name) > tarfile.LENGTH_NAME or not member.name.isascii()
    if found.size != member.size or not (cut or found.name == member.name):
        raise ValueError(f"it does not lie at byte {member.offset}; was the archive written anew? Make the index anew")
    if len(content) != member.size:
        raise EOFError(f"expected {member.size} bytes, got {len(content)}; was the archive cut short?")
    return content
