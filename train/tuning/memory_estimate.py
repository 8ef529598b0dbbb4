"""`region-tune RECIPE --plan`: estimates memory and time of tuning a LLaVA."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel, TrainingArguments

from alpha_clip_commands.training.tuning_arguments import ModelArguments
from mllm.llava import with_alpha_tower
from mllm.loading import AlphaProcessor, load_config
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
from train.tuning.conversations import ConversationDataset
from train.tuning.trained_parts import parts_of, prepare_model

# QLoRA, arXiv 2305.14314: an 8-bit scale per block of 64 weights, a float32 scale per 256 blocks
_NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)


def meta_model(model_args: ModelArguments) -> PreTrainedModel:
    """A LLaVA without weights, frozen and adapted as for training.

    Raises:
        ValueError: If the model is not a LLaVA.
    """
    config = load_config(model_args.model)
    if config.model_type != "llava":
        raise ValueError(f"--plan supports LLaVA-1.5 only, got model_type {config.model_type!r}")
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(with_alpha_tower(config)).to(getattr(torch, model_args.dtype))
        return prepare_model(model, dataclasses.replace(model_args, load_in=None))


def estimate_memory(
    model: PreTrainedModel, model_args: ModelArguments, args: TrainingArguments, conversations: int, tokens: int,
    samples: int,
) -> MemoryEstimate:  # fmt: skip
    """Estimate memory and time of a run.

    Args:
        model: Returned by `meta_model`.
        model_args: Model arguments of the run.
        args: Training arguments of the run: batch size, accumulation, epochs, processes, checkpointing.
        conversations: Conversations per sample (`regions_per_image`).
        tokens: Tokens per conversation, including image tokens.
        samples: Samples per epoch.
    """
    frozen = frozen_bytes(model, model_args.load_in)
    batch = args.per_device_train_batch_size * conversations
    activations = activation_bytes(model, batch, tokens, args.gradient_checkpointing)
    memory = {"no DeepSpeed": (peak_without_deepspeed(trained_count(model), frozen, activations) / GIB, 0.0)}
    for name, (device, host) in model_states(model, frozen, args.world_size).items():
        memory[name] = (device + activations.all) / GIB, host / GIB
    steps = step_count(args, samples)
    hours = None
    if model_args.device_tflops:
        work = step_flops(model, batch * args.gradient_accumulation_steps, tokens, args.gradient_checkpointing)
        hours = steps * work / (model_args.device_tflops * 1e12) / 3600
    table = parameter_table(model, parts_of(unwrap_peft(model)))
    return MemoryEstimate(table, memory, activations.all / GIB, steps, hours)


def frozen_bytes(model: nn.Module, load_in: str | None = None) -> float:
    """Bytes of the frozen weights; with `load_in`, the matrices of the language model are quantized."""
    bits = {None: None, "4bit": _NF4_BITS, "8bit": 8.0}[load_in]
    total = 0.0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        packed = bits is not None and parameter.ndim == 2 and ".language_model." in name and "embed" not in name
        total += parameter.numel() * (bits / 8 if packed else parameter.element_size())
    return total


def activation_bytes(model: PreTrainedModel, batch: int, tokens: int, checkpointing: bool) -> Activations:
    """Tensors saved for the backward pass of the language model and its loss, and the gradient of the logits; with
    checkpointing, the inputs of all layers and the saved tensors of one layer.
    """
    text = model.config.get_text_config()
    language, head = model.get_decoder(), model.get_output_embeddings()
    dtype = next(language.parameters()).dtype
    embeds = torch.empty(batch, tokens, text.hidden_size, device="meta", dtype=dtype, requires_grad=True)
    labels = torch.zeros(batch, tokens, device="meta", dtype=torch.long)
    mask = torch.ones(batch, 1, tokens, tokens, device="meta", dtype=torch.bool)  # the kind of mask padding creates
    with saved_for_backward() as of_layers:
        hidden = language(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
    with saved_for_backward() as of_loss:
        logits = head(hidden)
        model.loss_function(logits=logits, labels=labels, vocab_size=text.vocab_size)
    loss = sum(of_loss.values()) + 4 * batch * tokens * text.vocab_size
    layers = sum(of_layers.values())
    layer = layers // text.num_hidden_layers
    if checkpointing:  # a layer is recomputed after the tensors of the loss are freed
        return Activations(text.num_hidden_layers * embeds.nbytes + max(loss, layer), layer)
    return Activations(layers + loss, layer)


def longest_conversation(train: ConversationDataset, processor: AlphaProcessor, turns: int) -> int:
    """Tokens of a conversation with `turns` turns of the 99th percentile of the samples' longest turns."""
    longest = int(np.argsort(train.lengths)[int(0.99 * (len(train) - 1))])
    index, rows = train.rows_of(longest)
    candidates = [turn for indexed in index.read(rows) for turn in indexed.turns]
    _, question, answer = max(candidates, key=lambda turn: len(turn[1] or "") + len(turn[2]))
    content = [{"type": "image"}, {"type": "text", "text": question or max(train.wordings, key=len)}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    tokens = len(processor.encode_conversation(messages))
    return tokens + (turns - 1) * (tokens - processor.num_image_tokens)


def step_flops(model: nn.Module, batch: int, tokens: int, checkpointing: bool) -> float:
    """Floating point operations of the matrices in a step: per weight and token 2 for the forward pass, 2 for the
    gradient of the input, 2 for the gradient of a trained weight, and 2 for the second forward pass of checkpointing.

    Source: Kaplan et al., arXiv 2001.08361, section 2.1. The attention products are not counted: at 700 tokens they are
    3% of the total for a 7B model.
    """
    total = 0.0
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2 or "embed" in name or ".vision_tower." in name:
            continue
        factor = (6 if parameter.requires_grad else 4) + (2 if checkpointing else 0)
        total += factor * parameter.numel() * batch * tokens
    return total
