"""A picture with its region drawn on it, to see what the model was shown."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vision_tower import Region

_DIMMED = 0.35  # brightness outside the region
_OUTLINE = (255, 60, 200)
_MIN_SIDE = 384  # pixels; smaller pictures are enlarged


def draw_overlay(image: Image.Image, region: Region, caption: str | None = None) -> Image.Image:
    """The picture with everything outside the region dimmed, an outline around it, and a caption underneath.

    Args:
        image: RGB.
        region: In pixels of the picture.
        caption: Text under the picture.

    Raises:
        ValueError: If the region does not fit the picture.
    """
    alpha, mask = region.to_alpha(image.height, image.width), region.mask(image.height, image.width)
    scale = max(1, -(-_MIN_SIDE // max(image.size)))
    pixels = np.asarray(image, np.float32).repeat(scale, 0).repeat(scale, 1)
    alpha, mask = (plane.repeat(scale, 0).repeat(scale, 1) for plane in (alpha, mask))
    pixels *= (_DIMMED + (1 - _DIMMED) * alpha)[..., None]
    if not region.is_whole:
        # of the mask: at a low strength alpha is above half everywhere
        pixels[_edge(mask >= 0.5 * mask.max(), width=max(2, max(pixels.shape[:2]) // 250))] = _OUTLINE
    picture = Image.fromarray(np.rint(pixels).astype(np.uint8))
    return picture if caption is None else _with_caption(picture, caption)


def save_overlay(path: str | os.PathLike, image: Image.Image, region: Region, caption: str | None = None) -> None:
    """Write the overlay as PNG; the file is replaced only when the new one is whole.

    Raises:
        ValueError: If the folder does not exist, or the region does not fit the picture.
    """
    check_folder(path)
    picture = draw_overlay(image, region, caption)
    # not mkstemp, whose files nobody else may read
    temporary = Path(path).resolve().parent / f".{Path(path).name}.{os.getpid()}.tmp"
    try:
        picture.save(temporary, "PNG")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_folder(path: str | os.PathLike) -> None:
    """Raise ValueError if no file can be at `path`: its folder is missing, or it is a folder itself."""
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {folder}")
    if Path(path).is_dir():
        raise ValueError(f"cannot write {path}: it is a folder, expected the name of a file")


def keep_picture(picture: str | os.PathLike, path: str | os.PathLike) -> None:
    """Raise ValueError if writing `path` would overwrite the picture that is talked about."""
    if os.path.exists(path) and os.path.exists(picture) and os.path.samefile(picture, path):
        raise ValueError(f"{path} is the picture itself, which would be lost; choose another name")


def _edge(inside: np.ndarray, width: int) -> np.ndarray:
    """The band of `width` pixels just outside a mask."""
    grown = inside
    for _ in range(width):
        padded = np.pad(grown, 1)
        grown = padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return grown & ~inside


def _with_caption(picture: Image.Image, caption: str) -> Image.Image:
    font = ImageFont.load_default(size=max(14, picture.width // 24))
    lines, line = [], ""
    for word in _breakable(caption, font, picture.width - 16):
        if line and font.getlength(f"{line} {word}") > picture.width - 16:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    text = "\n".join([*lines, line])
    left, top, right, bottom = ImageDraw.Draw(picture).multiline_textbbox((8, 6), text, font=font)
    framed = Image.new("RGB", (picture.width, picture.height + int(bottom) + 10), "white")
    framed.paste(picture)
    ImageDraw.Draw(framed).multiline_text((8, picture.height + 6), text, fill="black", font=font)
    return framed


def _breakable(caption: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The words of a caption; one wider than `width` pixels in pieces."""
    pieces = []
    for word in caption.split():
        piece = ""
        for letter in word:
            if piece and font.getlength(piece + letter) > width:
                pieces.append(piece)
                piece = ""
            piece += letter
        pieces.append(piece)
    return pieces
