"""The values that a setting takes, of a recipe and of HF's training arguments."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import math
from typing import Any

from transformers import TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.trainer_pt_utils import AcceleratorConfig

from alpha_clip_commands.recipe import plain_text


def recipe_value(action: argparse.Action, value: Any) -> Any:
    """A value of a recipe as the flag of its key takes it.

    Raises:
        ValueError: If the flag does not take it.
    """
    if value is None:
        if action.default is not None or action.required:
            raise ValueError(f"expected a value, got null; leave the key out for its default, {action.default!r}")
        return None
    if isinstance(value, dict):
        if action.dest not in TrainingArguments._VALID_DICT_FIELDS or action.dest == "deepspeed":
            raise ValueError("expected one value or a list, got a mapping")
        known = {field.name for field in dataclasses.fields(AcceleratorConfig)}
        if action.dest == "accelerator_config" and (unknown := sorted(value.keys() - known)):
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
    """One value of a recipe as its flag takes it."""
    is_switch = action.type is string_to_bool
    if isinstance(value, bool) and not is_switch:
        raise ValueError(f"expected text or a number, got {'true' if value else 'false'}; put text in quotes")
    if is_switch:
        return string_to_bool(value if isinstance(value, bool) else str(value))
    if isinstance(action.type, type) and not issubclass(action.type, enum.Enum):
        raise ValueError("it cannot be set in a recipe")
    if not isinstance(value, str | int | float):
        raise ValueError(f"expected text or a number, got {type(value).__name__}; put text in quotes")
    if action.type is plain_text and not isinstance(value, str):
        raise ValueError(f"expected text, got the number {value}; put it in quotes")
    found = action.type(value if isinstance(value, str) else repr(value)) if callable(action.type) else value
    if action.choices is not None and found not in action.choices:
        raise ValueError(f"expected one of {', '.join(map(str, action.choices))}, got {value!r}")
    return found


# Of HF's training arguments, those that Trainer takes as they come: least and most value, with both ends.
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


def check_ranges(args: TrainingArguments) -> None:
    """Raise ValueError if one of HF's training arguments is out of range."""
    for name, (least, most) in _RANGES.items():
        value = getattr(args, name, None)  # HF's names come and go with its versions
        if value is not None and not least <= value <= most:
            expected = f"{least} or more" if most == math.inf else f"a number from {least} to {most}"
            raise ValueError(f"{name}: expected {expected}, got {value}")
    if args.max_steps != -1 and args.max_steps < 1:
        raise ValueError(f"max_steps: expected 1 or more, or -1 to train for num_train_epochs, got {args.max_steps}")
