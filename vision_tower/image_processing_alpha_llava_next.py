"""Image processor of LLaVA-NeXT with an alpha channel: images and regions -> tiles with four channels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, LlavaNextImageProcessorPil
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_transforms import divide_to_patches
from transformers.image_utils import ChannelDimension, ImageInput

from .geometry import normalize_alpha, place_alpha, restore_peak
from .image_processing_alpha_clip import AlphaCLIPImageProcessor, AlphaCLIPImageProcessorKwargs
from .rasterization import mask_to_alpha
from .regions import Region


class AlphaLlavaNextImageProcessorKwargs(AlphaCLIPImageProcessorKwargs, total=False):  # type: ignore[call-arg]
    """Settings of `AlphaCLIPImageProcessor` and of LLaVA-NeXT's image processor.

    geometry: "tiles".
    image_grid_pinpoints: Candidate sizes (height, width) in pixels; each image is resized to the best fit and split
        into tiles.
    """

    geometry: Any
    image_grid_pinpoints: list[list[int]]


class AlphaLlavaNextImageProcessor(AlphaCLIPImageProcessor, LlavaNextImageProcessorPil):
    """LLaVA-NeXT's image processor with regions: `pixel_values` (N, tiles, 4, S, S) float32 and `image_sizes` (N, 2).

    The first tile is the complete image, stretched to S x S. The other tiles are a grid: the image is resized and
    padded to the best size of `image_grid_pinpoints`, then split. Images with fewer tiles than others in the batch are
    padded with tiles of zeros, which the model ignores.

    The whole image is alpha 1 everywhere, padding included. A region has alpha 0 in the padding. The limits are those
    of `AlphaCLIPImageProcessor`.

    Example:
        >>> processor = AlphaLlavaNextImageProcessor(image_grid_pinpoints=[[672, 672]], size={"shortest_edge": 336},
        ...     crop_size={"height": 336, "width": 336})
        >>> region = Region.from_box(40, 60, 220, 200)
        >>> processor("photo.jpg", regions=region, return_tensors="pt")["pixel_values"]  # (1, 5, 4, 336, 336)
    """

    valid_kwargs = AlphaLlavaNextImageProcessorKwargs
    geometries = ("tiles",)
    geometry = "tiles"

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        side, sizes = self.crop_size.height, self.image_grid_pinpoints
        if not (isinstance(sizes, list) and sizes and all(_is_tileable(size, side) for size in sizes)):
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
        """Prepare images and their regions.

        Args:
            images: As in `AlphaCLIPImageProcessor`.
            regions: As in `AlphaCLIPImageProcessor`.
            geometry: "tiles".
            return_tensors: "pt" or "np"; None returns lists of arrays.
            **kwargs: As in `AlphaCLIPImageProcessor`, and `do_pad`. With `do_pad=False`, no tiles of zeros are added.

        Returns:
            `pixel_values` (N, tiles, 4, S, S): normalized RGB and (alpha - 0.5) / 0.26. `image_sizes` (N, 2): height
            and width in pixels.

        Raises:
            ValueError: As `AlphaCLIPImageProcessor`.
        """
        geometry = self.geometry if geometry is None else geometry
        do_pad = kwargs.pop("do_pad", None)
        groups = self._group_regions(images, regions, geometry, kwargs)
        tiles: list[np.ndarray] = []
        sizes: list[tuple[int, int]] = []
        settings = dict(kwargs)
        for image, (_, image_regions) in zip(self._decode_images(groups, geometry, settings), groups, strict=True):
            stock = LlavaNextImageProcessorPil.preprocess(self, image, do_pad=False, **settings)
            rgb = np.asarray(stock["pixel_values"][0], np.float32)
            for region in image_regions:
                alpha = normalize_alpha(self.place_alpha(region, image.height, image.width))
                tiles.append(np.concatenate([rgb, alpha[:, None].astype(np.float32)], axis=1))
                sizes.append((image.height, image.width))
        data: Any = self._pad_for_batching(tiles) if do_pad or do_pad is None and self.do_pad else tiles
        if return_tensors == "pt" and len({array.shape for array in data}) == 1:
            data = torch.from_numpy(np.stack(data))
        return BatchFeature({"pixel_values": data, "image_sizes": sizes}, tensor_type=return_tensors)

    def place_alpha(self, region: Region, height: int, width: int) -> np.ndarray:
        """The alpha map of a region of an image (height, width), as tiles: float32 (tiles, S, S) in [0, 1].

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
            resized = restore_peak(np.asarray(resized), float(mask.max()))
            grid = mask_to_alpha(self._pad_for_patching(resized[None], best), region.strength)
        return np.stack([whole, *(tile[0] for tile in divide_to_patches(grid, patch_size=side))])


def _is_tileable(size: Any, side: int) -> bool:
    """Whether `size` is (height, width) in multiples of `side`."""
    return (
        isinstance(size, list | tuple)
        and len(size) == 2
        and all(isinstance(length, int) and length > 0 and length % side == 0 for length in size)
    )
