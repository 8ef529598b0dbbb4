"""A LLaVA with our tower as stock classes, and back. Stock CLIP with four channels has one patch convolution over RGB
and alpha; our tower has two, which are added.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
)
from transformers.utils import cached_file

from vision_tower import AlphaCLIPVisionConfig
from vision_tower.loading import hub_options

_RGB_WEIGHT = "embeddings.patch_embedding.weight"


def fused_config(config: LlavaConfig) -> LlavaConfig:
    """The configuration of a LLaVA with our tower, as stock classes."""
    return LlavaConfig(**{**config.to_dict(), "vision_config": fused_tower_config(config.vision_config)})


def fused_tower_config(config: AlphaCLIPVisionConfig, **changes: Any) -> CLIPVisionConfig:
    """The configuration of our tower as stock CLIP with four channels, with `changes`."""
    fields = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "auto_map")}
    return CLIPVisionConfig(**{**fields, "num_channels": 4, **changes})


def save_stock_image_processor(side: int, folder: str | os.PathLike) -> None:
    """Save CLIP's preprocessing of the three color channels; `side` is the tower's image size in pixels."""
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
        folder
    )


def is_fused(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of an export."""
    vision = getattr(config, "vision_config", None)
    return isinstance(config, LlavaConfig) and type(vision) is CLIPVisionConfig and vision.num_channels == 4


def load_fused(
    name: str | os.PathLike, *, config: LlavaConfig, **kwargs: Any
) -> tuple[LlavaForConditionalGeneration, dict]:
    """Load an export with our tower.

    Args:
        name: Directory or hub id.
        config: Its configuration, with our tower.
        **kwargs: As in `from_pretrained`, with `output_loading_info` and `ignore_mismatched_sizes`.

    Returns:
        The model, and Transformers' loading info without the fused weight.

    Raises:
        ValueError: If the patch convolution does not have four channels, or the tower is offloaded.
    """
    model, info = LlavaForConditionalGeneration.from_pretrained(name, config=config, **kwargs)
    fused = {entry for entry in info["mismatched_keys"] if entry[0].endswith(_RGB_WEIGHT) and entry[1][1:2] == (4,)}
    if not fused:
        raise ValueError(f"the weights in {name} lack the alpha channel that its config.json states (num_channels)")
    embedding = model.model.vision_tower.embeddings.patch_embedding
    if embedding.weight.is_meta or hasattr(embedding.weight, "ds_id"):  # offloaded, or partitioned (DeepSpeed's ZeRO-3)
        raise ValueError(
            f"{name} is an export, whose tower must be loaded on one device: load it with mllm.load, save model and "
            "processor with save_pretrained, and load that directory"
        )
    stored = _stored_tensor(name, _RGB_WEIGHT, hub_options(kwargs))
    with torch.no_grad():
        embedding.weight.copy_(stored[:, :3])
        embedding.alpha.weight.copy_(stored[:, 3:])
    return model, {**info, "mismatched_keys": info["mismatched_keys"] - fused}


def _stored_tensor(name: str | os.PathLike, ending: str, hub: dict) -> torch.Tensor:
    """The tensor of a checkpoint whose name has this ending."""
    index = cached_file(name, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, **hub)
    files = ["model.safetensors"]
    if index is not None:
        with open(index, encoding="utf-8") as file:
            files = [shard for stored, shard in json.load(file)["weight_map"].items() if stored.endswith(ending)]
    with safe_open(cached_file(name, files[0], **hub), "pt") as tensors:
        return tensors.get_tensor(next(stored for stored in tensors.keys() if stored.endswith(ending)))  # noqa: SIM118
