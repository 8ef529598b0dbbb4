"""LLaVA-1.5 with an alpha tower: stock `LlavaForConditionalGeneration`, its `vision_tower` one of ours."""

from __future__ import annotations

import os
from typing import Any

from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoTokenizer, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from mllm.processing_llava import AlphaLlavaProcessor
from vision_tower import AlphaCLIPImageProcessor, AlphaCLIPVisionConfig, AlphaCLIPVisionModel
from vision_tower.conversion import fuse, read_tower_for
from vision_tower.loading import load_checked

# Full names: since Transformers 5 a bare "vision_tower" skips nothing. A list of one's own drops the default lm_head.
NEVER_QUANTISED = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
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


def load_model(name: str | os.PathLike, config: LlavaConfig, **kwargs: Any) -> LlavaForConditionalGeneration:
    """Load a LLaVA-1.5 checkpoint, with CLIP's tower or ours, in any key layout.

    Args:
        name: Directory or hub id.
        config: Its configuration.
        **kwargs: As in `from_pretrained`.

    Raises:
        ValueError: If a weight is missing (CLIP's tower has no alpha weight, ours must), left over, or of another
            shape.
    """
    try:
        return load_checked(
            LlavaForConditionalGeneration.from_pretrained, name, config=with_alpha_tower(config), **kwargs
        )
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


def fused_llava(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """A stock LLaVA with the same answers, whose tower is stock CLIP of four channels: it needs no code of ours.

    Its `pixel_values` must be (B, 4, H, W): stock CLIP does not take three for the whole image.
    """
    fields = model.config.to_dict()
    vision = {key: value for key, value in fields["vision_config"].items() if key not in ("model_type", "auto_map")}
    fields["vision_config"] = CLIPVisionConfig(**{**vision, "num_channels": 4})
    fused = LlavaForConditionalGeneration(LlavaConfig(**fields)).to(model.dtype)
    fused.load_state_dict(fuse(model.state_dict()))  # strict
    fused.generation_config = model.generation_config
    return fused


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
