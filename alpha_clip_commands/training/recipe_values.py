"""The values of a recipe, parsed like flags, and the ranges of Transformers' training arguments."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Mapping
from typing import Any

from alpha_clip_commands.flag_values import plain_text, switch
from alpha_clip_commands.training.recipe import read_recipe
from alpha_clip_commands.training.renamed_settings import REMOVED, current_settings
from alpha_clip_commands.training.training_fields import accelerator_fields, dictionary_fields


def read_values(path: str, actions: Mapping[str, argparse.Action], nullable: Collection[str]) -> dict[str, Any]:
    """The settings of a recipe by key, each parsed like its flag.

    Args:
        path: The recipe.
        actions: The flags by key.
        nullable: Keys that may be null, because that is their default.

    Raises:
        ValueError: If the recipe cannot be read, or a key or value is invalid.
    """
    values = current_settings(read_recipe(path))
    if removed := sorted(values.keys() & REMOVED):
        raise ValueError(f"{path}: {removed[0]} was removed: {REMOVED[removed[0]]}; delete the key")
    if unknown := sorted(values.keys() - actions.keys()):
        raise ValueError(f"{path}: unknown keys {', '.join(unknown)}")
    found = {}
    for key, value in values.items():
        try:
            if value is not None:
                found[key] = _value(actions[key], value)
            elif key in nullable:
                found[key] = None
            else:
                raise ValueError("expected a value, got null; to use the default, delete the key")
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"{path}: {key}: {error}") from error
    return found


def _value(action: argparse.Action, value: Any) -> Any:
    if isinstance(value, dict):
        if action.dest not in dictionary_fields() or action.dest == "deepspeed":
            raise ValueError("expected one value or a list, got a mapping")
        known = accelerator_fields()
        if action.dest == "accelerator_config" and (unknown := sorted(value.keys() - set(known))):
            raise ValueError(f"unknown keys {', '.join(unknown)}; expected {', '.join(sorted(known))}")
        return value
    if action.dest == "report_to" and isinstance(value, list):
        return [_one_value(action, item) for item in value]
    if action.nargs in ("+", "*"):
        return [_one_value(action, item) for item in (value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        raise ValueError("expected one value, got a list")
    return _one_value(action, value)


def _one_value(action: argparse.Action, value: Any) -> Any:
    is_switch = action.type is switch
    if isinstance(value, bool) and not is_switch:
        raise ValueError(f"expected text or a number, got {'true' if value else 'false'}; put text in quotes")
    if is_switch:
        return value if isinstance(value, bool) else switch(str(value))
    if not isinstance(value, str | int | float):
        raise ValueError(f"expected text or a number, got {type(value).__name__}; put text in quotes")
    if action.type is plain_text and not isinstance(value, str):
        raise ValueError(f"expected text, got the number {value}; put it in quotes")
    found = action.type(value if isinstance(value, str) else repr(value)) if callable(action.type) else value
    if action.choices is not None and found not in action.choices:
        raise ValueError(f"expected one of {', '.join(map(str, action.choices))}, got {value!r}")
    return found


# Training arguments that Transformers does not check: minimum and maximum, both allowed.
_RANGES = {
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "eval_accumulation_steps": (1, math.inf),
    "num_train_epochs": (0, math.inf),
    "learning_rate": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "label_smoothing_factor": (0, 1),
    "neftune_noise_alpha": (0, math.inf),
    "logging_steps": (0, math.inf),
    "eval_steps": (0, math.inf),
    "eval_delay": (0, math.inf),
    "save_steps": (0, math.inf),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
    "dataloader_num_workers": (0, 1024),
    "dataloader_prefetch_factor": (1, math.inf),
    "ddp_timeout": (1, math.inf),
}


def check_ranges(values: Mapping[str, Any]) -> None:
    """Raise ValueError if one of Transformers' training arguments is out of range."""
    for name, (least, most) in _RANGES.items():
        value = values.get(name)  # the names depend on the version of Transformers
        if isinstance(value, int | float) and not least <= value <= most:
            expected = f"{least} or more" if most == math.inf else f"a number from {least} to {most}"
            raise ValueError(f"{name}: expected {expected}, got {value}")
    steps = values.get("max_steps", -1)
    if steps != -1 and steps < 1:
        raise ValueError(f"max_steps: expected 1 or more, or -1 to train for num_train_epochs, got {steps}")
