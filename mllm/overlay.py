"""An image with its region drawn on it, to see what the model gets."""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from mllm.files import check_replaceable, made_by, replacing_file
from vision_tower import Region

_DIMMED = 0.35  # brightness outside the region
_OUTLINE = (255, 60, 200)
_KIND = "overlay"
_SMALL, _RADIUS = 0.04, 0.05  # of the longer side: a smaller region gets a ring of this radius
_MIN_SIDE = 384  # pixels; smaller images are enlarged


def draw_overlay(image: Image.Image, region: Region, caption: str | None = None) -> Image.Image:
    """Dim the image outside the region, outline the region, and add a caption below.

    A ring is drawn around a region that is too small to be seen.

    Args:
        image: RGB.
        region: In pixels of the image.
        caption: Text below the image.

    Raises:
        ValueError: If the region does not fit the image.
    """
    # the processor already warns about a clipped region
    alpha, mask = (draw(image.height, image.width, warn=False) for draw in (region.to_alpha, region.mask))
    scale = max(1, -(-_MIN_SIDE // max(image.size)))
    pixels = np.asarray(image, np.float32).repeat(scale, 0).repeat(scale, 1)
    alpha, mask = (plane.repeat(scale, 0).repeat(scale, 1) for plane in (alpha, mask))
    pixels *= (_DIMMED + (1 - _DIMMED) * alpha)[..., None]
    width = max(2, max(pixels.shape[:2]) // 250)
    inside = mask >= 0.5 * mask.max()  # the mask, not alpha, which exceeds 0.5 everywhere at low strength
    if not region.is_whole:
        pixels[_edge(inside, width)] = _OUTLINE
    overlay = Image.fromarray(np.rint(pixels).astype(np.uint8))
    if not region.is_whole:
        _ring_if_small(overlay, inside, width)
    return overlay if caption is None else _with_caption(overlay, caption)


def check_overlay(path: str | os.PathLike, *, reads: Iterable[str | os.PathLike] = ()) -> None:
    """Raise ValueError unless `path` is new or an overlay, and not one of the files that the command `reads`."""
    check_replaceable(path, reads=reads, kind=_KIND)


def save_overlay(path: str | os.PathLike, image: Image.Image, region: Region, caption: str | None = None) -> None:
    """Write the overlay as PNG, atomically. The caller checks whether it may be replaced (`check_overlay`).

    Raises:
        ValueError: If `path` cannot be a file, or the region does not fit the image.
        OSError: If it cannot be written.
    """
    save_png(path, draw_overlay(image, region, caption), _KIND)


def save_png(path: str | os.PathLike, image: Image.Image, kind: str) -> None:
    """Write an image as PNG with the marker of its kind.

    Raises:
        ValueError: If `path` cannot be a file.
        OSError: If it cannot be written.
    """
    marker = PngInfo()
    marker.add_text("Software", made_by(kind))
    with replacing_file(path) as partial:
        image.save(partial, "PNG", pnginfo=marker)


def _edge(inside: np.ndarray, width: int) -> np.ndarray:
    """The band of `width` pixels just outside a mask."""
    grown = inside
    for _ in range(width):
        padded = np.pad(grown, 1)
        grown = padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return grown & ~inside


def _ring_if_small(overlay: Image.Image, inside: np.ndarray, width: int) -> None:
    """Draw a ring around a region of a few pixels."""
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    if max(bottom - top, right - left) >= _SMALL * max(overlay.size):
        return
    x, y, radius = (left + right) / 2, (top + bottom) / 2, _RADIUS * max(overlay.size)
    ring = (x - radius, y - radius, x + radius, y + radius)
    ImageDraw.Draw(overlay).ellipse(ring, outline=_OUTLINE, width=2 * width)


def _with_caption(overlay: Image.Image, caption: str) -> Image.Image:
    font = ImageFont.load_default(size=max(14, overlay.width // 24))
    lines, line = [], ""
    for word in _breakable(caption, font, overlay.width - 16):
        if line and font.getlength(f"{line} {word}") > overlay.width - 16:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    text = "\n".join([*lines, line])
    left, top, right, bottom = ImageDraw.Draw(overlay).multiline_textbbox((8, 6), text, font=font)
    framed = Image.new("RGB", (overlay.width, overlay.height + int(bottom) + 10), "white")
    framed.paste(overlay)
    ImageDraw.Draw(framed).multiline_text((8, overlay.height + 6), text, fill="black", font=font)
    return framed


def _breakable(caption: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The words of a caption; words wider than `width` pixels are split."""
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
