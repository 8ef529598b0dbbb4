"""LLaVA-NeXT (LLaVA-1.6) with an alpha tower: stock `LlavaNextForConditionalGeneration`, its `vision_tower` one of
ours. What does not differ from LLaVA-1.5 is `mllm.llava`'s.
"""

from __future__ import annotations

import os
from typing import Any

from safetensors import SafetensorError
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedConfig,
)

from mllm import llava
from mllm.llava import NEVER_QUANTIZED, load_alpha_weights, vision_tower
from mllm.processing_llava_next import AlphaLlavaNextProcessor
from vision_tower import AlphaLlavaNextImageProcessor
from vision_tower.loading import load_checked

__all__ = [
    "NEVER_QUANTIZED",
    "PARTS",
    "build_llava_next_processor",
    "load_alpha_weights",
    "load_model",
    "load_processor",
    "vision_tower",
]

# image_newline: the learned vector after each row of the tiles' patches
PARTS = {**llava.PARTS, "image_newline": "model.image_newline"}


def load_model(name: str | os.PathLike, config: LlavaNextConfig, **kwargs: Any) -> LlavaNextForConditionalGeneration:
    """Load a LLaVA-NeXT checkpoint, with CLIP's tower or ours, in any key layout.

    Args:
        name: Directory or hub id.
        config: Its configuration.
        **kwargs: As in `from_pretrained`.

    Raises:
        ValueError: If the tower is another one, or a weight is missing (CLIP's tower has no alpha weight, ours must),
            left over, or of another shape.
    """
    if getattr(config.vision_config, "num_channels", 3) != 3:
        raise ValueError(
            f"expected a LLaVA-NeXT with a CLIP vision tower of 3 channels or ours, got {name} with one of "
            f"{config.vision_config.num_channels}; exports of LLaVA-NeXT are not supported"
        )
    load = LlavaNextForConditionalGeneration.from_pretrained
    try:
        return load_checked(load, name, config=llava.with_alpha_tower(config), **kwargs)
    except SafetensorError as error:
        raise ValueError(
            f"the weights in {name} are damaged ({error}); were they copied or downloaded whole?"
        ) from error


def load_processor(name: str | os.PathLike, config: LlavaNextConfig, **hub: Any) -> AlphaLlavaNextProcessor:
    """The processor of a LLaVA-NeXT directory that knows nothing of regions: its tokenizer, image settings and chat
    template, in our format.

    Raises:
        ValueError: If it has no chat template (each language model has its own), or the tiles are not the model's.
    """
    stock = AutoProcessor.from_pretrained(name, backend="pil", **hub)
    if stock.chat_template is None:
        raise ValueError(
            f"{name} has no chat template, and LLaVA-NeXT's differ by language model; save its processor with one "
            "(chat_template.jinja)"
        )
    images = AutoImageProcessor.from_pretrained(name, backend="pil", **hub)
    sizes = [list(size) for size in images.image_grid_pinpoints]
    if sizes != [list(size) for size in config.image_grid_pinpoints]:
        raise ValueError(
            f"{name}: the image processor's image_grid_pinpoints are {sizes}, those of config.json "
            f"{config.image_grid_pinpoints}; the model would read other tiles than it is given"
        )
    tokenizer = getattr(stock, "tokenizer", stock)  # a directory without a processor gives the tokenizer
    return build_llava_next_processor(tokenizer, config, images, chat_template=stock.chat_template)


def build_llava_next_processor(
    tokenizer: Any, config: LlavaNextConfig, like: Any, chat_template: str | None = None
) -> AlphaLlavaNextProcessor:
    """An `AlphaLlavaNextProcessor` whose tiles and token count fit `config`, with the colors of another image processor
    (`like`).
    """
    side = config.vision_config.image_size
    image_processor = AlphaLlavaNextImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(like.image_mean),
        image_std=list(like.image_std),
        resample=like.resample,
        image_grid_pinpoints=[list(size) for size in config.image_grid_pinpoints],
    )
    return AlphaLlavaNextProcessor(
        image_processor,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=chat_template,
        num_additional_image_tokens=1,  # CLIP's class token
    )


class _AlphaLlavaNextProcessorKey(PreTrainedConfig):
    """As `_AlphaLlavaProcessorKey` in `mllm.llava`, for the image processor too."""

    model_type = "alpha_llava_next_processor"


AutoImageProcessor.register(
    _AlphaLlavaNextProcessorKey, image_processor_classes={"pil": AlphaLlavaNextImageProcessor}, exist_ok=True
)
AutoProcessor.register(_AlphaLlavaNextProcessorKey, AlphaLlavaNextProcessor, exist_ok=True)
