"""The CLIP that `alpha-clip train` trains: loading, and what is frozen, adapted with LoRA and fully trained."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoTokenizer, CLIPImageProcessorPil, PreTrainedModel, TrainingArguments
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from alpha_clip_commands.progress import step
from alpha_clip_commands.training.contrastive_arguments import TowerArguments
from mllm.hub import offline_options
from train.parts import ALPHA, check_parts, linear_layers, lora_config, part_of
from vision_tower import AlphaCLIPConfig, AlphaCLIPImageProcessor, AlphaCLIPModel, AlphaCLIPProcessor

PARTS = {
    "vision_model": "vision_model",
    "visual_projection": "visual_projection",
    "text_model": "text_model",
    "text_projection": "text_projection",
    "logit_scale": "logit_scale",
    ALPHA: "vision_model.embeddings.patch_embedding.alpha",
}


@contextlib.contextmanager
def without_partitioning(args: TrainingArguments) -> Iterator[None]:
    """Under ZeRO-3, load weights without partitioning them: DeepSpeed 0.19 cannot partition the temperature, which has
    no dimensions, and a CLIP is small. The weights are partitioned when training begins.
    """
    zero3 = is_deepspeed_zero3_enabled()
    if zero3:
        unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if zero3:
            set_hf_deepspeed_config(args.hf_deepspeed_config)


@step("loading the model")
def load_model(args: TowerArguments) -> tuple[AlphaCLIPModel, AlphaCLIPProcessor]:
    """A CLIP with an alpha channel, and its processor with the geometry used in training.

    Raises:
        ValueError: If the model is not found, is not a full CLIP (text tower and projections included), or its towers
            do not fit together.
    """
    config, hub = read_config(args.model), offline_options(args.model)
    # float32: at these learning rates 16-bit weights would not change; autocast computes in 16 bits
    model = AlphaCLIPModel.from_pretrained(
        args.model, config=config, attn_implementation=args.attn_implementation, dtype=torch.float32, **hub
    )
    if args.logit_scale is not None:
        with torch.no_grad():
            model.logit_scale.fill_(math.log(args.logit_scale))
    # whatever class the directory specifies, only mean and standard deviation are taken from it
    colors = CLIPImageProcessorPil.from_pretrained(args.model, **hub)
    images = AlphaCLIPImageProcessor.for_size(model.config.vision_config.image_size, args.geometry, like=colors)
    return model, AlphaCLIPProcessor(images, AutoTokenizer.from_pretrained(args.model, **hub))


def read_config(name: str) -> AlphaCLIPConfig:
    """The configuration of a CLIP with both towers.

    Raises:
        ValueError: If it is not found, or belongs to another model.
    """
    try:
        return AlphaCLIPConfig.from_pretrained(name, **offline_options(name))
    except (OSError, ValueError) as error:
        reason = error if os.path.isdir(name) else "directory not found, and no such model on a reachable hub"
        raise ValueError(
            f"expected a directory or hub id of a CLIP with both towers, got {name!r}: {reason}"
        ) from error


def prepare_model(model: AlphaCLIPModel, args: TowerArguments) -> PreTrainedModel:
    """Freeze, adapt and unfreeze the parts of a model.

    Raises:
        ValueError: If the model has no such part, layer or block.
    """
    check_parts(args, PARTS)
    blocks = model.config.vision_config.num_hidden_layers
    if args.train_blocks is not None and args.train_blocks > blocks:
        raise ValueError(f"train_blocks: the tower has {blocks} blocks, got {args.train_blocks}")
    frozen_blocks = (f"encoder.layers.{n}" for n in range(blocks - (args.train_blocks or 0)))
    frozen = tuple(f"vision_model.{name}." for name in ("embeddings", "pre_layrnorm", *frozen_blocks))
    for name, parameter in model.named_parameters():
        part = part_of(name, PARTS)
        is_frozen = part == "vision_model" and args.train_blocks is not None and name.startswith(frozen)
        parameter.requires_grad_(part in args.train_parts and not is_frozen)
    return _add_lora(model, args) if args.lora_r else model


def _add_lora(model: AlphaCLIPModel, args: TowerArguments) -> PreTrainedModel:
    """LoRA on the linear layers of the image tower; the other `train_parts` are fully trained."""
    layers = linear_layers(model, ["vision_model"], args.lora_targets)
    modules_to_save = [PARTS[part] for part in args.train_parts if part != "vision_model"]
    return get_peft_model(model, lora_config(args, layers, modules_to_save))


def unwrap_clip(model: nn.Module) -> AlphaCLIPModel:
    """The CLIP itself, without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
