"""`alpha-clip train RECIPE --plan`: estimates memory and time of contrastive training."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from alpha_clip_commands.training.contrastive_arguments import PairArguments
from train.contrastive.trained_parts import PARTS
from train.memory_estimate import (
    GIB,
    Activations,
    MemoryEstimate,
    model_states,
    peak_without_deepspeed,
    saved_for_backward,
    step_count,
    trained_count,
)
from train.parts import parameter_table, unwrap_peft
from vision_tower import AlphaCLIPModel

_TEXT_TOKENS = 16  # per text, including start and end; GRIT's phrases have a few words
# float32 matrices of N x all pairs in the loss: for each direction logits, target and two in softmax
_SIMILARITY_MATRICES = 8


def estimate_memory(
    model: PreTrainedModel,
    pair_args: PairArguments,
    args: TrainingArguments,
    images: int,
    device_tflops: float | None = None,
) -> MemoryEstimate:
    """Estimate memory and time of a run.

    Args:
        model: On the meta device, frozen and adapted as for training.
        pair_args: Pair arguments of the run: regions per image, chunks.
        args: Training arguments of the run: batch size, accumulation, epochs, processes, checkpointing.
        images: Images per epoch.
        device_tflops: Throughput of a device in 10^12 floating point operations per second.
    """
    clip, world = unwrap_peft(model), args.world_size
    pairs = args.per_device_train_batch_size * pair_args.regions_per_image
    chunk = min(pair_args.cache_chunk or pairs, pairs)
    activations = tower_activations(clip, chunk, 2 if args.bf16 or args.fp16 else 4, args.gradient_checkpointing)
    similarities = _SIMILARITY_MATRICES * 4 * pairs * pairs * world
    frozen = float(sum(p.nbytes for p in model.parameters() if not p.requires_grad))
    kept = (activations.all + similarities) / GIB
    peak = peak_without_deepspeed(trained_count(model), frozen, activations) + similarities
    memory = {"no DeepSpeed": (peak / GIB, 0.0)}
    for name, (device, host) in model_states(model, frozen, world).items():
        if "offload" not in name:
            memory[name] = (device / GIB + kept, host / GIB)
    steps = step_count(args, images)
    hours = None
    if device_tflops:
        work = step_flops(clip, pairs * args.gradient_accumulation_steps, bool(pair_args.cache_chunk), args)
        hours = steps * work / (device_tflops * 1e12) / 3600
    return MemoryEstimate(parameter_table(model, PARTS), memory, kept, steps, hours)


def tower_activations(clip: AlphaCLIPModel, pairs: int, bytes_each: int, checkpointing: bool) -> Activations:
    """Tensors saved for the backward pass of the trained towers and of one block of the image tower; with
    checkpointing, the inputs of all blocks and the saved tensors of one block.
    """
    vision = clip.config.vision_config
    pixels = torch.empty(pairs, 4, vision.image_size, vision.image_size, device="meta")
    of_images = _activations(clip.vision_model, pixels, _patches(clip), bytes_each, checkpointing)
    if not _is_trained(clip.text_model):
        return of_images
    texts = torch.empty(pairs, _TEXT_TOKENS, dtype=torch.int64, device="meta")
    of_texts = _activations(clip.text_model, texts, _TEXT_TOKENS, bytes_each, checkpointing)
    return Activations(of_images.all + of_texts.all, of_images.layer)


def _activations(
    tower: nn.Module, inputs: torch.Tensor, tokens: int, bytes_each: int, checkpointing: bool
) -> Activations:
    with saved_for_backward() as saved:
        tower(inputs)
    everything = sum(saved.values()) * bytes_each // 4  # counted in float32
    blocks = tower.config.num_hidden_layers
    block = everything // blocks
    if checkpointing:
        of_inputs = blocks * len(inputs) * tokens * tower.config.hidden_size * bytes_each
        return Activations(of_inputs + block, block)
    return Activations(everything, block)


def step_flops(clip: AlphaCLIPModel, pairs: int, cached: bool, args: TrainingArguments) -> float:
    """Floating point operations of the matrices in a step: per weight and token 2 for a forward pass, 4 for the
    backward pass of a trained tower, and 2 for each additional forward pass (gradient caching, checkpointing).

    Source: Kaplan et al., arXiv 2001.08361, section 2.1. The attention products are not counted.
    """
    work = 0
    for tower, tokens in ((clip.vision_model, _patches(clip)), (clip.text_model, _TEXT_TOKENS)):
        passes = 2 * (1 + cached) + (4 + 2 * args.gradient_checkpointing) * _is_trained(tower)
        work += passes * tokens * _matrices(tower)
    return pairs * work


def _patches(clip: AlphaCLIPModel) -> int:
    """Tokens of an image, including the class token."""
    vision = clip.config.vision_config
    return (vision.image_size // vision.patch_size) ** 2 + 1


def _is_trained(tower: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in tower.parameters())


def _matrices(module: nn.Module) -> int:
    """Number of weights in linear layers and convolutions."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d))
