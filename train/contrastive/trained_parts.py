"""What `alpha-clip train` freezes, adapts with LoRA and fully trains."""

from __future__ import annotations

from peft import get_peft_model
from transformers import PreTrainedModel

from alpha_clip_commands.training.contrastive_arguments import TowerArguments
from train.parts import ALPHA, check_parts, linear_layers, lora_config, part_of
from vision_tower import AlphaCLIPModel

PARTS = {
    "vision_model": "vision_model",
    "visual_projection": "visual_projection",
    "text_model": "text_model",
    "text_projection": "text_projection",
    "logit_scale": "logit_scale",
    ALPHA: "vision_model.embeddings.patch_embedding.alpha",
}


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
