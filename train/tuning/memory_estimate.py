"""`region-tune RECIPE --plan`: what a run takes, told without loading weights.

Parameters come from the model built on the meta device. States under ZeRO-2 and 3 are DeepSpeed's own estimates for
what is trained (they do not model frozen weights, which are added). Activations are counted, not estimated: the
language model's forward pass runs on the meta device, and what autograd keeps for the backward pass is added up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel, TrainingArguments

from alpha_clip_commands.training.tuning_arguments import ModelArguments
from mllm.llava import with_alpha_tower
from mllm.loading import AlphaProcessor, load_config
from train.lora import parts_of, prepare_model, trained_table
from train.sampling import ConversationDataset

GIB = 2**30
# bytes of a trained weight without DeepSpeed, all float32: weight and AdamW's two moments; its gradient
_KEPT_BYTES, _GRADIENT_BYTES = 12, 4
_NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # QLoRA, arXiv 2305.14314: 8-bit scales a block of 64, float32 a block of 256


class Activations(NamedTuple):
    """Bytes of what the backward pass needs: all of it when it begins, and a layer's."""

    all: int
    layer: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        parameters: Table of what is frozen, adapted and trained.
        memory: GiB a rank by way of running: (device, host), the host's for offloaded states and loading.
        activations: GiB of what the backward pass needs, the same in each.
        steps: Optimizer steps of the run.
        hours: With a rate; None without.
    """

    parameters: str
    memory: dict[str, tuple[float, float]]
    activations: float
    steps: int
    hours: float | None

    def table(self) -> str:
        """The plan as text."""
        lines = [self.parameters, "", f"{'memory of a rank, GiB':<24}{'device':>10}{'host':>10}"]
        lines += [f"{name:<24}{device:>10.1f}{host:>10.1f}" for name, (device, host) in self.memory.items()]
        hours = "unknown: give --device_tflops" if self.hours is None else f"{self.hours:.1f}"
        lines += [f"of it activations {self.activations:.1f}", "", f"steps {self.steps:,}   hours {hours}"]
        return "\n".join(lines)


def meta_model(model_args: ModelArguments) -> PreTrainedModel:
    """A LLaVA, frozen and adapted as it will be trained, without weights.

    Raises:
        ValueError: If it is another model.
    """
    config = load_config(model_args.model)
    if config.model_type != "llava":
        raise ValueError(f"--plan knows LLaVA-1.5, got model_type {config.model_type!r}")
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(with_alpha_tower(config)).to(getattr(torch, model_args.dtype))
        return prepare_model(model, dataclasses.replace(model_args, load_in=None))


def plan(
    model: PreTrainedModel, model_args: ModelArguments, args: TrainingArguments, conversations: int, tokens: int,
    samples: int, device_tflops: float | None = None,
) -> Plan:  # fmt: skip
    """Plan a run.

    Args:
        model: Of `meta_model`.
        model_args: Of the run.
        args: Of the run: batch, accumulation, epochs, processes, checkpointing.
        conversations: Of a sample (`regions_per_image`).
        tokens: Of a conversation, its image's among them.
        samples: Of an epoch.
        device_tflops: What a device computes in this kind of work, 10^12 floating point operations a second.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = frozen_bytes(model, model_args.load_in)
    batch = args.per_device_train_batch_size * conversations
    kept = activation_bytes(model, batch, tokens, args.gradient_checkpointing)
    world = args.world_size
    memory = {
        name: ((device + kept.all) / GIB, host / GIB)
        for name, (device, host) in states(model, trained, frozen, world).items()
    }
    memory = {"no DeepSpeed": (plain_peak(trained, frozen, kept) / GIB, 0.0), **memory}
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * (samples // per_step or 1))
    hours = None
    if device_tflops:
        work = step_flops(model, batch * args.gradient_accumulation_steps, tokens, args.gradient_checkpointing)
        hours = steps * work / (device_tflops * 1e12) / 3600
    return Plan(trained_table(model, parts_of(model.get_base_model() if model_args.lora_r else model)), memory,
                kept.all / GIB, steps, hours)  # fmt: skip


def plain_peak(trained: int, frozen: float, activations: Activations) -> float:
    """Bytes of one process without DeepSpeed at their most: all activations are there before the first gradient, one
    layer's with the last gradient.
    """
    most = max(activations.all, activations.layer + _GRADIENT_BYTES * trained)
    return frozen + _KEPT_BYTES * trained + most


def states(model: nn.Module, trained: int, frozen: float, world: int) -> dict[str, tuple[float, float]]:
    """Bytes of weights, gradients and optimizer a rank, (device, host), by way of running on one machine.

    Source: `estimate_zero2_model_states_mem_needs` and `estimate_zero3_model_states_mem_needs` of DeepSpeed; ZeRO-1 as
    ZeRO-2 with whole gradients (2 bytes).
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2

    largest = max(
        sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()
    )  # as DeepSpeed's model_to_params counts it
    host2, device2 = zero2(trained, num_gpus_per_node=world, cpu_offload=False)
    host2_offload, device2_offload = zero2(trained, num_gpus_per_node=world, cpu_offload=True)
    host3, device3, _ = zero3(trained, largest, num_gpus_per_node=world, cpu_offload=False, cpu_offload_params=False)
    host3_offload, device3_offload, _ = zero3(trained, largest, num_gpus_per_node=world)
    return {
        "ZeRO-1": (frozen + (2 + 2) * trained + 16 * trained / world, host2),
        "ZeRO-2": (frozen + device2, host2),
        "ZeRO-2, offload": (frozen + device2_offload, host2_offload),
        "ZeRO-3": (frozen / world + device3, host3),
        "ZeRO-3, offload": (float(device3_offload), host3_offload + frozen),
    }


def frozen_bytes(model: nn.Module, load_in: str | None) -> float:
    """Bytes of the frozen weights; the language model's matrices as bitsandbytes keeps them."""
    bits = {None: None, "4bit": _NF4_BITS, "8bit": 8.0}[load_in]
    total = 0.0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        packed = bits is not None and parameter.ndim == 2 and ".language_model." in name and "embed" not in name
        total += parameter.numel() * (bits / 8 if packed else parameter.element_size())
    return total


def activation_bytes(model: PreTrainedModel, batch: int, tokens: int, checkpointing: bool) -> Activations:
    """What autograd keeps for the backward pass of the language model and its loss, and the gradient of the
    logits that it begins with; with checkpointing the inputs of the layers, and all of one layer.
    """
    text = model.config.get_text_config()
    language, head = model.get_decoder(), model.get_output_embeddings()
    dtype = next(language.parameters()).dtype
    embeds = torch.empty(batch, tokens, text.hidden_size, device="meta", dtype=dtype, requires_grad=True)
    labels = torch.zeros(batch, tokens, device="meta", dtype=torch.long)
    mask = torch.ones(batch, 1, tokens, tokens, device="meta", dtype=torch.bool)  # as padding makes one
    with kept_for_backward() as whole:
        hidden = language(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
    with kept_for_backward() as of_loss:
        logits = head(hidden)
        model.loss_function(logits=logits, labels=labels, vocab_size=text.vocab_size)
    loss = sum(of_loss.values()) + 4 * batch * tokens * text.vocab_size
    layers = sum(whole.values())
    layer = layers // text.num_hidden_layers
    if checkpointing:  # a layer's own come back when the loss's are gone
        return Activations(text.num_hidden_layers * embeds.nbytes + max(loss, layer), layer)
    return Activations(layers + loss, layer)


def longest_conversation(train: ConversationDataset, processor: AlphaProcessor, turns: int) -> int:
    """Tokens of a conversation of `turns` turns as long as 99 % of the samples' longest are at most."""
    longest = int(np.argsort(train.lengths)[int(0.99 * (len(train) - 1))])
    index, rows = train.rows_of(longest)
    asked = [turn for facts in index.read(rows) for turn in facts.turns]
    _, question, answer = max(asked, key=lambda turn: len(turn[1] or "") + len(turn[2]))
    content = [{"type": "image"}, {"type": "text", "text": question or max(train.wordings, key=len)}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    tokens = len(processor.encode_conversation(messages))
    return tokens + (turns - 1) * (tokens - processor.num_image_tokens)


@contextlib.contextmanager
def kept_for_backward() -> Iterator[dict[int, int]]:
    """Bytes by storage of what autograd keeps inside the context; parameters are not counted."""
    kept: dict[Any, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter) and not (tensor.is_leaf and tensor.requires_grad):
            storage = tensor.untyped_storage()
            if not isinstance(getattr(tensor, "_base", None), nn.Parameter):
                kept[storage._cdata] = storage.nbytes()
                alive.append(tensor)  # a freed storage's place could be another's
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def step_flops(model: nn.Module, batch: int, tokens: int, checkpointing: bool) -> float:
    """Floating point operations of the matrices in a step: 2 a weight and token forward, 2 back through it, 2 more for
    the gradient of one that is trained, and a second forward pass with checkpointing.

    Source: Kaplan et al., arXiv 2001.08361, section 2.1. Attention's own products are left out: at 700 tokens they are
    3 % of a 7B model's.
    """
    total = 0.0
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2 or "embed" in name or ".vision_tower." in name:
            continue
        factor = (6 if parameter.requires_grad else 4) + (2 if checkpointing else 0)
        total += factor * parameter.numel() * batch * tokens
    return total
