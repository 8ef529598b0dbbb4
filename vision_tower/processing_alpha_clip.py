"""Processor of `AlphaCLIPModel`: CLIP's processor with regions."""

from __future__ import annotations

from typing import Any

from transformers import BatchFeature, CLIPProcessor
from transformers.image_utils import ImageInput

from .region_arguments import check_call, take_regions


class AlphaCLIPProcessor(CLIPProcessor):
    """CLIP's tokenizer and `AlphaCLIPImageProcessor` in one processor.

    Example:
        >>> processor = AlphaCLIPProcessor.from_pretrained("DIR_OR_HUB_ID")
        >>> region = Region.from_box(40, 60, 220, 200)
        >>> inputs = processor(image, ["a dog", "a cat"], regions=region, padding=True, return_tensors="pt")
        >>> probabilities = AlphaCLIPModel.from_pretrained("DIR_OR_HUB_ID")(**inputs).logits_per_image.softmax(-1)
    """

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        regions: Any = None,
        **kwargs,
    ) -> BatchFeature:
        """Prepare images and their regions, texts, or both.

        Args:
            images: One image or a list.
            text: One text or a list.
            regions: As in `AlphaCLIPImageProcessor`. None is the whole image.
            **kwargs: As in `CLIPProcessor`.

        Returns:
            `pixel_values` (N, 4, S, S) for images, `input_ids` and `attention_mask` (M, T) for texts.

        Raises:
            ValueError: If an argument would be ignored, there are regions without images, or a region
                does not fit its image.
        """
        regions = take_regions(regions, kwargs)
        check_call(self, images, regions, kwargs)
        if regions is not None:
            kwargs["regions"] = regions
        return super().__call__(images=images, text=text, **kwargs)
