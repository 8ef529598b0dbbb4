"""`alpha-clip train RECIPE --plan true`: what a contrastive run takes, told without loading weights.

As `train/tuning/memory_estimate.py`, whose states and table it uses; the activations counted are those of the towers
that are trained, on the meta device, and the similarities of the batch.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from alpha_clip_commands.training.contrastive_arguments import PairArguments
from train.lora import trained_table
from train.tuning.memory_estimate import GIB, Activations, Plan, frozen_bytes, kept_for_backward, plain_peak, states
from vision_tower import AlphaCLIPModel

_PHRASE = 16  # tokens of a region's text, with both its ends; GRIT's phrases are of a few words
_SIMILARITIES = (
    8  # matrices of N x all pairs in float32 about the loss: of each direction logits, target, two of softmax
)


def plan_contrast(
    model: PreTrainedModel,
    clip: AlphaCLIPModel,
    pair_args: PairArguments,
    args: TrainingArguments,
    parts: dict[str, str],
    pictures: int,
    device_tflops: float | None = None,
) -> Plan:
    """Plan a run.

    Args:
        model: On the meta device, frozen and adapted as it will be trained.
        clip: The same model without PEFT's cover.
        pair_args: Of the run: regions a picture, chunks.
        args: Of the run: batch, accumulation, epochs, processes, checkpointing.
        parts: Prefix of the parameters' names by part.
        pictures: Of an epoch.
        device_tflops: What a device computes in this kind of work, 10^12 floating point operations a second.
    """
    world = args.world_size
    pairs = args.per_device_train_batch_size * pair_args.regions_per_image
    at_once = min(pair_args.cache_chunk or pairs, pairs)
    kept = tower_activations(clip, at_once, 2 if args.bf16 or args.fp16 else 4, args.gradient_checkpointing)
    similarities = _SIMILARITIES * 4 * pairs * pairs * world
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = frozen_bytes(model, None)
    most = (kept.all + similarities) / GIB
    memory = {"no DeepSpeed": ((plain_peak(trained, frozen, kept) + similarities) / GIB, 0.0)}
    for name, (device, host) in states(model, trained, frozen, world).items():
        if "offload" not in name:
            memory[name] = (device / GIB + most, host / GIB)
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * max(pictures // per_step, 1))
    hours = None
    if device_tflops:
        work = step_flops(clip, pairs * args.gradient_accumulation_steps, bool(pair_args.cache_chunk), args)
        hours = steps * work / (device_tflops * 1e12) / 3600
    return Plan(trained_table(model, parts), memory, most, steps, hours)


def tower_activations(clip: AlphaCLIPModel, pairs: int, bytes_each: int, checkpointing: bool) -> Activations:
    """What autograd keeps for the backward pass of the towers that are trained, and what it keeps of one block of the
    image tower; with checkpointing the inputs of the blocks, and all of one block. Texts count as phrases.
    """
    vision = clip.config.vision_config
    pixels = torch.empty(pairs, 4, vision.image_size, vision.image_size, device="meta")
    kept = _activations(clip.vision_model, pixels, _patches(clip), bytes_each, checkpointing)
    if not _is_trained(clip.text_model):
        return kept
    phrases = torch.empty(pairs, _PHRASE, dtype=torch.int64, device="meta")
    of_texts = _activations(clip.text_model, phrases, _PHRASE, bytes_each, checkpointing)
    return Activations(kept.all + of_texts.all, kept.layer)


def _activations(
    tower: nn.Module, inputs: torch.Tensor, tokens: int, bytes_each: int, checkpointing: bool
) -> Activations:
    with kept_for_backward() as kept:
        tower(inputs)
    everything = sum(kept.values()) * bytes_each // 4  # counted in float32
    blocks = tower.config.num_hidden_layers
    block = everything // blocks
    if checkpointing:
        of_inputs = blocks * len(inputs) * tokens * tower.config.hidden_size * bytes_each
        return Activations(of_inputs + block, block)
    return Activations(everything, block)


def step_flops(clip: AlphaCLIPModel, pairs: int, cached: bool, args: TrainingArguments) -> float:
    """Floating point operations of a step's matrices: 2 a weight and token forward, 4 back through a tower that is
    trained, and 2 for each further forward pass (gradient caching embeds both towers twice; checkpointing).

    Source: Kaplan et al., arXiv 2001.08361, section 2.1; attention's own products are left out.
    """
    work = 0
    for tower, tokens in ((clip.vision_model, _patches(clip)), (clip.text_model, _PHRASE)):
        passes = 2 * (1 + cached) + (4 + 2 * args.gradient_checkpointing) * _is_trained(tower)
        work += passes * tokens * _matrices(tower)
    return pairs * work


def _patches(clip: AlphaCLIPModel) -> int:
    """Tokens of a picture, the class token among them."""
    vision = clip.config.vision_config
    return (vision.image_size // vision.patch_size) ** 2 + 1


def _is_trained(tower: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in tower.parameters())


def _matrices(module: nn.Module) -> int:
    """Weights of the linear layers and convolutions."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d))
