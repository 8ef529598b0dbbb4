"""The named parts of a model: the parameters they contain, their counts, and LoRA on their layers."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from peft import LoraConfig
from torch import nn

from alpha_clip_commands.training.shared_arguments import PartArguments

ALPHA = "alpha"  # the alpha convolution, a part inside the tower


def check_parts(args: PartArguments, parts: Collection[str]) -> None:
    """Raise ValueError if `train_parts` or `learning_rates` contain a part that the model does not have."""
    for setting, given in (("train_parts", args.train_parts), ("learning_rates", args.rate_of_part())):
        if unknown := sorted(set(given) - set(parts)):
            raise ValueError(f"{setting}: expected one of {', '.join(parts)}, got {unknown}")


def unwrap_peft(model: nn.Module) -> Any:
    """The model itself, without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def part_of(name: str, parts: Mapping[str, str]) -> str | None:
    """The part that a parameter belongs to, with or without PEFT's prefixes; `alpha` takes precedence over the tower.

    Args:
        name: Name of the parameter.
        parts: Prefix of the parameter names by part.
    """
    plain = original_name(name)
    if is_in(plain, parts[ALPHA]):
        return ALPHA
    return next((part for part, prefix in parts.items() if is_in(plain, prefix)), None)


def original_name(name: str) -> str:
    """A parameter name without PEFT's additions."""
    name = re.sub(r"^(module\.)?(base_model\.model\.)?", "", name)
    return re.sub(r"\.(base_layer|original_module|modules_to_save\.\w+|lora_[AB]\.\w+)(?=\.|$)", "", name)


def is_in(name: str, prefix: str) -> bool:
    """Whether a module or parameter is the one with this prefix, or inside it."""
    return name == prefix or name.startswith(f"{prefix}.")


def parameter_table(model: nn.Module, parts: Mapping[str, str]) -> str:
    """Number of frozen, LoRA and fully trained parameters, one line per part."""
    counts = {part: {"frozen": 0, "LoRA": 0, "trained": 0} for part in parts}
    for name, parameter in model.named_parameters():
        part = part_of(name, parts)
        if part is None or ".original_module." in name:
            continue
        how = "frozen" if not parameter.requires_grad else "LoRA" if ".lora_" in name else "trained"
        counts[part][how] += _size(parameter)
    rows = [(part, *(f"{count:,}" if count else "-" for count in row.values())) for part, row in counts.items()]
    total = [sum(row[how] for row in counts.values()) for how in ("frozen", "LoRA", "trained")]
    rows.append(("all", *(f"{count:,}" for count in total)))
    return "\n".join(f"{a:<24}{b:>16}{c:>14}{d:>16}" for a, b, c, d in [("part", "frozen", "LoRA", "trained"), *rows])


def _size(parameter: nn.Parameter) -> int:
    """Number of elements, also if the parameter is partitioned (ZeRO-3) or packed (4-bit)."""
    if hasattr(parameter, "ds_numel"):
        return parameter.ds_numel
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


def lora_config(args: PartArguments, layers: Sequence[str], modules_to_save: Sequence[str]) -> LoraConfig:
    """PEFT's configuration: LoRA on `layers`, full training of `modules_to_save`."""
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=2 * args.lora_r if args.lora_alpha is None else args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=layer_pattern(layers),
        modules_to_save=list(modules_to_save) or None,
    )


def linear_layers(model: nn.Module, prefixes: Sequence[str], leaves: Sequence[str] = ()) -> list[str]:
    """Names of the linear layers under the prefixes, optionally only those with these last names; never `lm_head`.

    Raises:
        ValueError: If no layer has one of the last names.
    """
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(is_in(name, p) for p in prefixes) and not name.endswith("lm_head")
    ]
    known = {name.rpartition(".")[2] for name in linear}
    if unknown := set(leaves) - known:
        raise ValueError(f"lora_targets: expected one of {', '.join(sorted(known))}, got {sorted(unknown)}")
    return [name for name in linear if not leaves or name.rpartition(".")[2] in leaves]


def layer_pattern(names: Sequence[str]) -> str:
    """A short regular expression that matches these layer names, with any block number."""
    shapes = sorted({re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name)) for name in names})
    return "|".join(shapes)
