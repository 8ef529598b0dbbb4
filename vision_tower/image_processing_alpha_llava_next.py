"""Image + regions -> the tiles of LLaVA-NeXT with four channels. Image and alpha map are cut alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, LlavaNextImageProcessorPil
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_transforms import divide_to_patches
from transformers.image_utils import ChannelDimension, ImageInput

from .image_processing_alpha_clip import (
    AlphaCLIPImageProcessor,
    AlphaCLIPImageProcessorKwargs,
    alpha_of,
    normalized_alpha,
    place_alpha,
    with_peak,
)
from .regions import Region


class AlphaLlavaNextImageProcessorKwargs(AlphaCLIPImageProcessorKwargs, total=False):  # type: ignore[call-arg]
    """The settings of `AlphaCLIPImageProcessor` and LLaVA-NeXT's.

    geometry: "tiles".
    image_grid_pinpoints: Sizes (height, width) in pixels that tiles are cut from; each image takes the best of them.
    """

    geometry: Any
    image_grid_pinpoints: list[list[int]]


class AlphaLlavaNextImageProcessor(AlphaCLIPImageProcessor, LlavaNextImageProcessorPil):
    """LLaVA-NeXT's image processor with regions: `pixel_values` (N, tiles, 4, S, S) float32 and `image_sizes` (N, 2).

    The first tile is the image as a whole, stretched to S x S; the others are a grid of tiles, cut from the image that
    is resized and padded to the best size of `image_grid_pinpoints`. An image with fewer tiles than another one of its
    batch is filled up with zeros, which the model leaves out.

    The whole image is alpha 1 everywhere, padding included; a region has alpha 0 in the padding. Limits are those of
    `AlphaCLIPImageProcessor`.
    """

    valid_kwargs = AlphaLlavaNextImageProcessorKwargs
    geometries = ("tiles",)
    geometry = "tiles"

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        side, sizes = self.crop_size.height, self.image_grid_pinpoints
        if not (isinstance(sizes, list) and sizes and all(_is_grid(size, side) for size in sizes)):
            raise ValueError(
                f"expected image_grid_pinpoints as a list of [height, width], multiples of {side} pixels, got {sizes!r}"
            )

    def preprocess(
        self,
        images: ImageInput,
        regions: Any = None,
        *,
        geometry: str | None = None,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Prepare images, each with its region.

        Args:
            images: As in `AlphaCLIPImageProcessor`.
            regions: As in `AlphaCLIPImageProcessor`: a list of N regions gives N outputs for one decoding and cutting.
            geometry: "tiles".
            return_tensors: "pt" or "np"; lists of arrays when not given.
            **kwargs: As in `AlphaCLIPImageProcessor`, and `do_pad`: off, images keep their own number of tiles.

        Returns:
            `pixel_values` (N, tiles, 4, S, S): normalised RGB, then (alpha - 0.5) / 0.26. `image_sizes` (N, 2): height
            and width in pixels.

        Raises:
            ValueError: As `AlphaCLIPImageProcessor`.
        """
        geometry = self.geometry if geometry is None else geometry
        do_pad = kwargs.pop("do_pad", None)
        grouped = self.grouped(images, regions, geometry, kwargs)
        tiles: list[np.ndarray] = []
        sizes: list[tuple[int, int]] = []
        settings = dict(kwargs)
        for picture, (_, image_regions) in zip(self.opened(grouped, geometry, settings), grouped, strict=True):
            stock = LlavaNextImageProcessorPil.preprocess(self, picture, do_pad=False, **settings)
            rgb = np.asarray(stock["pixel_values"][0], np.float32)
            for region in image_regions:
                alpha = normalized_alpha(self.place_alpha(region, picture.height, picture.width))
                tiles.append(np.concatenate([rgb, alpha[:, None].astype(np.float32)], axis=1))
                sizes.append((picture.height, picture.width))
        data: Any = self._pad_for_batching(tiles) if do_pad or do_pad is None and self.do_pad else tiles
        if return_tensors == "pt" and len({array.shape for array in data}) == 1:
            data = torch.from_numpy(np.stack(data))
        return BatchFeature({"pixel_values": data, "image_sizes": sizes}, tensor_type=return_tensors)

    def place_alpha(self, region: Region, height: int, width: int) -> np.ndarray:
        """The alpha map of a region of an (height, width) image in the image's tiles: float32 (tiles, S, S) in [0, 1].

        Raises:
            ValueError: If the region does not fit the image.
        """
        side = self.crop_size.height
        whole = place_alpha(region, height, width, side, "stretch")
        best = select_best_resolution((height, width), self.image_grid_pinpoints)
        if region.is_whole:
            grid = np.ones((1, *best), np.float32)
        else:
            mask = region.mask(height, width)
            new_height, new_width = get_patch_output_size(mask[None], best, ChannelDimension.FIRST)
            # bilinear with antialiasing, as in `place_alpha`
            resized = Image.fromarray(mask).resize((new_width, new_height), Image.Resampling.BILINEAR)
            resized = with_peak(np.asarray(resized), float(mask.max()))
            grid = alpha_of(self._pad_for_patching(resized[None], best), region.strength)
        return np.stack([whole, *(tile[0] for tile in divide_to_patches(grid, patch_size=side))])


def _is_grid(size: Any, side: int) -> bool:
    """Whether a size (height, width) is one of whole tiles."""
    return (
        isinstance(size, list | tuple)
        and len(size) == 2
        and all(isinstance(length, int) and length > 0 and length % side == 0 for length in size)
    )
