"""Resizing of images and alpha maps to the square input of a tower: "crop", "pad" and "stretch"."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
from PIL import Image

from .alpha_embedding import ALPHA_MEAN, ALPHA_STD
from .rasterization import mask_to_alpha
from .regions import Region

logger = logging.getLogger(__name__)

GEOMETRIES = ("crop", "pad", "stretch")
_STRIP = 4_000_000  # pixels of a padded image in memory at a time


def place_alpha(region: Region, height: int, width: int, side: int, geometry: str) -> np.ndarray:
    """The alpha map of a region of an image (height, width) after resizing: float32 (side, side) in [0, 1].

    Raises:
        ValueError: If the region does not fit the image, or lies outside the center crop.
    """
    if region.is_whole:
        return np.ones((side, side), np.float32)
    mask = region.mask(height, width)
    peak = float(mask.max())
    if geometry == "crop":
        peak = _peak_in_crop(mask, side, region)
    # bilinear with antialiasing, so that small regions do not fall between the samples
    mask = np.asarray(resize(mask, side, geometry, 0, Image.Resampling.BILINEAR))
    return mask_to_alpha(restore_peak(mask, peak), region.strength)


def _peak_in_crop(mask: np.ndarray, side: int, region: Region) -> float:
    """The maximum of a mask inside the center crop; logs a warning if part of the region is outside.

    Raises:
        ValueError: If all of the region is outside.
    """
    height, width = mask.shape
    new_height, new_width, top, left = _crop_sizes(height, width, side)
    # in pixels of the original image: resizing would spread the region across the border of the crop
    kept = mask[
        top * height // new_height : math.ceil((top + side) * height / new_height),
        left * width // new_width : math.ceil((left + side) * width / new_width),
    ]
    peak = float(kept.max())
    if peak <= 0:
        raise ValueError(
            f"the region {region} lies outside the center crop of the {width} x {height} image; use geometry='pad'"
        )
    if (lost := 1 - float(kept.sum() / mask.sum())) > 0.001:
        logger.warning(
            "the center crop removes %.0f%% of the region %s; geometry='pad' keeps all of it", 100 * lost, region
        )
    return peak


def restore_peak(mask: np.ndarray, peak: float) -> np.ndarray:
    """Scale a resized mask so that its maximum is again `peak`, as before resizing."""
    reached = float(mask.max())
    return mask * np.float32(peak / reached) if 0 < reached < peak else mask


def normalize_alpha(alpha: np.ndarray) -> np.ndarray:
    """(alpha - 0.5) / 0.26, the fourth channel of `pixel_values`.

    Computed in float64: alpha 1 must become exactly the float32 value that `AlphaPatchEmbedding` uses for the whole
    image.
    """
    return (alpha.astype(np.float64) - ALPHA_MEAN) / ALPHA_STD


def longest_side(width: int, height: int, side: int, geometry: str) -> int:
    """The longest side in pixels of an image during `resize`, before it is cropped or reduced to `side`."""
    resized = max(_crop_sizes(height, width, side)[:2]) if geometry == "crop" else 0
    return max(width, height, resized)


def resize(
    pixels: Image.Image | np.ndarray, side: int, geometry: str, fill: Any, resample: Image.Resampling
) -> Image.Image:
    """Resize an RGB image, or a mask as float32 (H, W), to side x side pixels.

    Args:
        pixels: Image or mask.
        side: Width and height of the result, in pixels.
        geometry: "crop", "pad" or "stretch".
        fill: Color of the padding.
        resample: PIL's filter.
    """
    height, width = pixels.shape if isinstance(pixels, np.ndarray) else pixels.size[::-1]
    if geometry == "pad" and height != width:
        return _resize_padded(pixels, side, fill, resample)
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    if geometry == "crop":
        new_height, new_width, top, left = _crop_sizes(height, width, side)
        return image.resize((new_width, new_height), resample).crop((left, top, left + side, top + side))
    return image.resize((side, side), resample)


def _crop_sizes(height: int, width: int, side: int) -> tuple[int, int, int, int]:
    """Height and width of the resized image, top and left of the crop.

    Source: CLIPImageProcessor (transformers: get_resize_output_image_size, center_crop).
    """
    scaled = int(side * max(height, width) / min(height, width))
    new_height, new_width = (side, scaled) if height <= width else (scaled, side)
    return new_height, new_width, (new_height - side) // 2, (new_width - side) // 2


def _resize_padded(pixels: Image.Image | np.ndarray, side: int, fill: Any, resample: Image.Resampling) -> Image.Image:
    """Center on a square of color `fill`, then resize. The result is bit-identical to building that square, which
    could exhaust memory for a long image.

    PIL resizes rows first, then columns, with an intermediate image of the same depth. Rows can therefore be padded
    and resized in strips, and one row represents all of the padding.

    Source: the padding is `expand2square` in haotian-liu/LLaVA, llava/mm_utils.py at c121f04.
    """
    height, width = pixels.shape if isinstance(pixels, np.ndarray) else pixels.size[::-1]
    square = max(height, width)
    top, left = (square - height) // 2, (square - width) // 2
    mode = "F" if isinstance(pixels, np.ndarray) else "RGB"
    border = Image.new(mode, (square, 1), fill).resize((side, 1), resample)
    resized = border.resize((side, square), Image.Resampling.NEAREST)
    rows = max(1, _STRIP // square)
    first, last = 0, height
    if isinstance(pixels, np.ndarray):  # rows outside the region equal the padding
        inside = np.flatnonzero(pixels.any(axis=1))
        first, last = int(inside[0]), int(inside[-1]) + 1
    for start in range(first, last, rows):
        end = min(start + rows, last)
        if isinstance(pixels, np.ndarray):
            strip = Image.fromarray(pixels[start:end])
        else:
            strip = pixels if height <= rows else pixels.crop((0, start, width, end))
        if left or width < square:
            padded = Image.new(mode, (square, end - start), fill)
            padded.paste(strip, (left, 0))
            strip = padded
        resized.paste(strip.resize((side, end - start), resample), (0, top + start))
    return resized.resize((side, side), resample)
