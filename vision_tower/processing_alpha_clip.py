"""Processor of `AlphaCLIPModel`: text as in CLIP, images with their regions."""

from __future__ import annotations

from typing import Any

from transformers import BatchFeature, CLIPProcessor
from transformers.image_utils import ImageInput

from .region_arguments import check_call, take_regions


class AlphaCLIPProcessor(CLIPProcessor):
    """CLIP's tokenizer and `AlphaCLIPImageProcessor` behind one call."""

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        regions: Any = None,
        **kwargs,
    ) -> BatchFeature:
        """Prepare images with their regions, texts, or both.

        Args:
            images: One image or a list.
            text: One text or a list.
            regions: As in `AlphaCLIPImageProcessor`; None means the whole image.
            **kwargs: As in `CLIPProcessor`.

        Returns:
            `pixel_values` (N, 4, S, S) where there are images, `input_ids` and `attention_mask` (M, T) where there are
            texts.

        Raises:
            ValueError: If an argument would be dropped with its region, there are regions without images, or a region
                does not fit its image.
        """
        regions = take_regions(regions, kwargs)
        check_call(self, images, regions, kwargs)
        if regions is not None:
            kwargs["regions"] = regions
        return super().__call__(images=images, text=text, **kwargs)
