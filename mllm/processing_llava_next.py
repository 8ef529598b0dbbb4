"""Processor of LLaVA-NeXT with an alpha tower, whose number of image tokens depends on the image size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import LlavaNextProcessor

from mllm.messages import Message, image_items, image_source
from mllm.processing_llava import RegionPrompts
from vision_tower.image_decoding import decode_image
from vision_tower.region_arguments import region_list


class AlphaLlavaNextProcessor(RegionPrompts, LlavaNextProcessor):
    """Text + images + regions -> inputs of LLaVA-NeXT with an alpha tower.

    Called like `LlavaNextProcessor`, with `regions` as in `AlphaLlavaProcessor`. Its image processor is an
    `AlphaLlavaNextImageProcessor`, which returns `pixel_values` (N, tiles, 4, S, S) and `image_sizes` (N, 2).

    A processor keeps the chat template that it is loaded with, as the published models have different ones; the default
    is that of LLaVA-1.5. If a template leaves BOS to the tokenizer, control tokens in message texts are an error.
    """

    def slot_tokens(self, messages: Sequence[Message]) -> Iterable[int]:
        """As in `RegionPrompts`.

        Raises:
            ValueError: If an image item has no image.
        """
        counts = []
        for item in image_items(messages):
            image = decode_image(
                self.image_processor.fetch_images(image_source(item)), max_pixels=self.image_processor.max_pixels
            )
            side = self.image_processor.crop_size.height
            count = self._get_number_of_features(image.height, image.width, side, side)
            count -= self.vision_feature_select_strategy == "default"
            counts += [count] * len(region_list(item.get("region")))
        return counts
