"""`--plan`: estimates of memory and training time without loading weights; shared by both training programs.

Parameters are counted on a model built on the meta device. The sizes of weights, gradients and optimizer states under
ZeRO come from DeepSpeed's estimators for the trained weights; frozen weights, which the estimators ignore, are added.
Activations are counted: a forward pass runs on the meta device, and the tensors that autograd saves are summed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import TrainingArguments

GIB = 2**30
# bytes per trained weight without DeepSpeed, in float32: the weight and AdamW's two moments; its gradient
_STATE_BYTES, _GRADIENT_BYTES = 12, 4


class Activations(NamedTuple):
    """Bytes of the tensors saved for the backward pass: all at its start, and those of one layer."""

    all: int
    layer: int


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Estimated cost of a run.

    Attributes:
        parameters: Table of frozen, LoRA and fully trained parameters.
        memory: (device, host) GiB per rank by setup; host memory is for offloaded states and loading.
        activations: GiB of activations, the same for each setup.
        steps: Optimizer steps of the run.
        hours: Training time, or None if the throughput is not given.
    """

    parameters: str
    memory: dict[str, tuple[float, float]]
    activations: float
    steps: int
    hours: float | None

    def table(self) -> str:
        """The estimate as text."""
        lines = [self.parameters, "", f"{'memory per rank, GiB':<24}{'device':>10}{'host':>10}"]
        lines += [f"{name:<24}{device:>10.1f}{host:>10.1f}" for name, (device, host) in self.memory.items()]
        hours = "unknown; pass --device_tflops" if self.hours is None else f"{self.hours:.1f}"
        lines += [f"including activations {self.activations:.1f}", "", f"steps {self.steps:,}   hours {hours}"]
        return "\n".join(lines)


def step_count(args: TrainingArguments, samples: int) -> int:
    """Optimizer steps of a run over `samples` samples per epoch."""
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * max(samples // per_step, 1))


def trained_count(model: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def peak_without_deepspeed(trained: int, frozen: float, activations: Activations) -> float:
    """Peak bytes of one process: either all activations before the first gradient exists, or one layer's activations
    together with all gradients.
    """
    return frozen + _STATE_BYTES * trained + max(activations.all, activations.layer + _GRADIENT_BYTES * trained)


def model_states(model: nn.Module, frozen: float, world: int) -> dict[str, tuple[float, float]]:
    """(device, host) bytes of weights, gradients and optimizer states per rank by ZeRO stage, on one machine.

    Args:
        model: The model with frozen and trained weights.
        frozen: Bytes of the frozen weights.
        world: Number of processes.

    Source: DeepSpeed's `estimate_zero2_model_states_mem_needs` and `estimate_zero3_model_states_mem_needs`; ZeRO-1 is
    ZeRO-2 with unpartitioned gradients (2 bytes).
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2

    trained = trained_count(model)
    largest = max(
        sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()
    )  # as in DeepSpeed's model_to_params
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


@contextlib.contextmanager
def saved_for_backward() -> Iterator[dict[int, int]]:
    """Bytes by storage of the tensors that autograd saves inside the context, without parameters."""
    saved: dict[Any, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter) and not (tensor.is_leaf and tensor.requires_grad):
            storage = tensor.untyped_storage()
            if not isinstance(getattr(tensor, "_base", None), nn.Parameter):
                saved[storage._cdata] = storage.nbytes()
                alive.append(tensor)  # the address of a freed storage could be reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
