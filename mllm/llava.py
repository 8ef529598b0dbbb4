"""LLaVA-1.5 with an alpha tower: stock `LlavaForConditionalGeneration`, its `vision_tower` one of ours."""

from __future__ import annotations

import os
from typing import Any

from safetensors import SafetensorError
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
)

from mllm.fused import is_fused, load_fused
from mllm.processing_llava import AlphaLlavaProcessor
from vision_tower import AlphaCLIPImageProcessor, AlphaCLIPVisionConfig, AlphaCLIPVisionModel
from vision_tower.conversion import read_tower_for
from vision_tower.loading import load_checked

# Full names: since Transformers 5 a bare "vision_tower" skips nothing. A list of one's own drops the default lm_head.
NEVER_QUANTIZED = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
# what can be trained or frozen -> its parameters' prefix
PARTS = {
    "vision_tower": "model.vision_tower",
    "multi_modal_projector": "model.multi_modal_projector",
    "language_model": "model.language_model",
    "lm_head": "lm_head",
}


def vision_tower(model: LlavaForConditionalGeneration) -> AlphaCLIPVisionModel:
    """The model's tower."""
    return model.model.vision_tower


def with_alpha_tower(config: LlavaConfig) -> LlavaConfig:
    """`config` with our tower in place of CLIP's, of three channels or four (`mllm.convert.export`); a config that
    has it already is returned as it is.

    Raises:
        ValueError: If the tower is neither CLIP nor ours.
    """
    vision = config.vision_config
    if isinstance(vision, AlphaCLIPVisionConfig):
        return config
    if type(vision) is not CLIPVisionConfig or vision.num_channels not in (3, 4):
        channels = getattr(vision, "num_channels", "unknown")
        raise ValueError(
            f"expected a LLaVA with a CLIP vision tower of 3 or 4 channels, got {vision.model_type!r} of {channels}"
        )
    fields = vision.to_dict()
    fields.pop("model_type")
    config.vision_config = AlphaCLIPVisionConfig(**{**fields, "num_channels": 3})
    return config


def load_model(name: str | os.PathLike, config: LlavaConfig, **kwargs: Any) -> LlavaForConditionalGeneration:
    """Load a LLaVA-1.5 checkpoint, with CLIP's tower, ours, or that of an export, in any key layout.

    Args:
        name: Directory or hub id.
        config: Its configuration.
        **kwargs: As in `from_pretrained`.

    Raises:
        ValueError: If a weight is missing (CLIP's tower has no alpha weight, ours must), left over, or of another
            shape.
    """
    load = load_fused if is_fused(config) else LlavaForConditionalGeneration.from_pretrained
    try:
        return load_checked(load, name, config=with_alpha_tower(config), **kwargs)
    except SafetensorError as error:
        raise ValueError(
            f"the weights in {name} are damaged ({error}); were they copied or downloaded whole?"
        ) from error


def load_alpha_weights(model: LlavaForConditionalGeneration, source: str | os.PathLike) -> None:
    """Overwrite the tower of a loaded LLaVA, whose own one is plain CLIP, with Alpha-CLIP's: all of it, since every
    layer was trained.

    Args:
        model: With an alpha tower; changed in place.
        source: An original checkpoint (.pth, .safetensors) or a directory of ours.

    Raises:
        ValueError: If the checkpoint is no whole Alpha-CLIP tower, or one of another size.
    """
    tower = vision_tower(model)
    tower.load_state_dict(read_tower_for(tower.config, source))  # strict; casts to the tower's dtype and device


def load_processor(name: str | os.PathLike, config: LlavaConfig, **hub: Any) -> AlphaLlavaProcessor:
    """The processor of a LLaVA-1.5 directory that knows nothing of regions: its tokenizer and image settings, in our
    format.

    Pictures are padded to a square, as LLaVA-1.5 was trained; a centre crop could cut the region away.
    """
    stock = AutoImageProcessor.from_pretrained(name, backend="pil", **hub)
    image_processor = AlphaCLIPImageProcessor.for_size(config.vision_config.image_size, "pad", like=stock)
    return build_llava_processor(image_processor, AutoTokenizer.from_pretrained(name, **hub), config)


def build_llava_processor(image_processor: AlphaCLIPImageProcessor, tokenizer: Any, config: LlavaConfig):
    """An `AlphaLlavaProcessor` whose token count fits `config`."""
    return AlphaLlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLIP's class token
    )


class _AlphaLlavaProcessorKey(PreTrainedConfig):
    """AutoProcessor finds a class by a config; LlavaConfig is taken by LlavaProcessor, which our models keep as their
    config.
    """

    model_type = "alpha_llava_processor"


# Not beside the class: a remote copy of it must not register itself, least of all in place of this one.
AutoProcessor.register(_AlphaLlavaProcessorKey, AlphaLlavaProcessor, exist_ok=True)
