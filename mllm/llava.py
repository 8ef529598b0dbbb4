"""LLaVA-1.5 with an alpha tower: stock `LlavaForConditionalGeneration`, its `vision_tower` one of ours."""

from __future__ import annotations

import os
from typing import Any

from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoTokenizer, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from mllm.processing import AlphaLlavaProcessor
from vision_tower import AlphaCLIPImageProcessor, AlphaCLIPVisionConfig
from vision_tower.modeling_alpha_clip import check_loaded


def with_alpha_tower(config: LlavaConfig) -> LlavaConfig:
    """`config` with our tower in place of CLIP's; a config that has it already is returned as it is.

    Raises:
        ValueError: If the tower is neither CLIP nor ours.
    """
    vision = config.vision_config
    if isinstance(vision, AlphaCLIPVisionConfig):
        return config
    if type(vision) is not CLIPVisionConfig:
        raise ValueError(f"expected a LLaVA with a CLIP vision tower, got {vision.model_type!r}")
    fields = vision.to_dict()
    fields.pop("model_type")
    config.vision_config = AlphaCLIPVisionConfig(**fields)
    return config


def load_llava(name: str | os.PathLike, config: LlavaConfig, **kwargs: Any) -> LlavaForConditionalGeneration:
    """Load a LLaVA-1.5 checkpoint, with CLIP's tower or ours, in any key layout.

    Args:
        name: Directory or hub id.
        config: Its configuration.
        **kwargs: As in `from_pretrained`.

    Raises:
        ValueError: If a weight other than the alpha convolution is missing, left over, or of another shape.
    """
    # mismatches are let through to the report, which names them
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    config = with_alpha_tower(config)
    try:
        model, report = LlavaForConditionalGeneration.from_pretrained(name, config=config, **kwargs)
    except SafetensorError as error:
        raise ValueError(
            f"the weights in {name} are damaged ({error}); were they copied or downloaded whole?"
        ) from error
    check_loaded("LLaVA with an alpha tower", name, report)
    return model


def load_llava_processor(name: str | os.PathLike, config: LlavaConfig, **hub: Any) -> AlphaLlavaProcessor:
    """The processor of a LLaVA-1.5 directory that knows nothing of regions: its tokenizer and image settings, in our
    format.

    Pictures are padded to a square, as LLaVA-1.5 was trained; a centre crop could cut the region away.
    """
    stock = AutoImageProcessor.from_pretrained(name, backend="pil", **hub)
    side = config.vision_config.image_size
    image_processor = AlphaCLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(stock.image_mean),
        image_std=list(stock.image_std),
        geometry="pad",
    )
    return build_llava_processor(image_processor, AutoTokenizer.from_pretrained(name, **hub), config)


def build_llava_processor(image_processor: AlphaCLIPImageProcessor, tokenizer: Any, config: LlavaConfig):
    """An `AlphaLlavaProcessor` whose token count fits `config`; the tokenizer is set to pad on the left, for
    batches.
    """
    tokenizer.padding_side = "left"
    return AlphaLlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLIP's class token
    )
