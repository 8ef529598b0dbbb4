"""Recipes: YAML files of settings, read within limits, and the values that a setting takes."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import math
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.trainer_pt_utils import AcceleratorConfig

from mllm.files import one_line

LARGEST_RECIPE = 64 * 2**10  # bytes
MOST_BRACKETS = 1000  # nested, PyYAML takes seconds for more
MOST_VALUES = 10_000  # of a recipe, counted as often as an anchor is used
# What PyYAML raises, beside its own errors, on damaged values: an invalid date, `!!int x`, `!!bool x`.
_DAMAGE = (ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError)


def read_recipe(path: str) -> dict[str, Any]:
    """The settings of a recipe by key.

    Raises:
        ValueError: If it cannot be read, is too large, is not a mapping of texts to values, or has a key twice.
    """
    try:
        if not Path(path).is_file():
            raise ValueError(f"recipe not found, or not a file: {path}")
        with open(path, "rb") as file:
            content = file.read(LARGEST_RECIPE + 1)
        if len(content) > LARGEST_RECIPE:
            raise ValueError(f"{path} has over {LARGEST_RECIPE:,} bytes; expected a recipe, 'key: value' lines")
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}") from error
    if (brackets := text.count("[") + text.count("{")) > MOST_BRACKETS:
        raise ValueError(f"{path} has {brackets:,} opening brackets; expected a recipe, 'key: value' lines")
    try:
        recipe = yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f", line {place.line + 1}, column {place.column + 1}," if place else ""
        reason = getattr(error, "problem", None) or one_line(error)
        raise ValueError(f"{path}{where} is not YAML: {reason}") from error
    except _DAMAGE as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else f"a value cannot be read: {error}"
        raise ValueError(f"{path} is not YAML: {reason}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: expected 'key: value' lines, got {type(recipe).__name__}")
    _refuse_many(path, recipe)
    return recipe


class _RecipeLoader(yaml.SafeLoader):
    """Refuses what plain YAML lets pass: a repeated key, of which the last would win, keys that are not text, and
    numbers that mean others than they look like (010 is 8, 1:30 is 90). Merge keys (<<), which can double a mapping
    line by line, are not needed.
    """

    def construct_decimal(self, node: yaml.ScalarNode) -> int | float:
        digits = node.value.lstrip("+-").replace("_", "")
        if ":" in digits or node.tag.endswith(":int") and not (digits == "0" or digits[:1] in "123456789"):
            problem = f"expected a decimal number, got {node.value!r:.80}; put text in quotes"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return self.construct_yaml_int(node) if node.tag.endswith(":int") else self.construct_yaml_float(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = set()
        for key, _ in node.value:
            is_text = key.tag == "tag:yaml.org,2002:str"
            if not is_text or key.value in keys:
                problem = "a repeated key" if is_text else "expected text as the key"
                raise yaml.constructor.ConstructorError(None, None, f"{problem}: {key.value!r:.80}", key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep=deep)


_RecipeLoader.add_constructor("tag:yaml.org,2002:int", _RecipeLoader.construct_decimal)
_RecipeLoader.add_constructor("tag:yaml.org,2002:float", _RecipeLoader.construct_decimal)


def _refuse_many(path: str, recipe: dict) -> None:
    """Raise ValueError if a recipe has more than `MOST_VALUES` values, written out."""
    waiting, count = [recipe], 0
    while waiting and count <= MOST_VALUES:
        value = waiting.pop()
        if isinstance(value, dict | list | tuple | set):
            inner = list(value.values() if isinstance(value, dict) else value)
            count += len(inner) + 1
            waiting += inner
    if count > MOST_VALUES:
        raise ValueError(f"{path} has over {MOST_VALUES:,} values, anchors written out; expected a recipe")


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
    found = action.type(value if isinstance(value, str) else repr(value)) if action.type else value
    if action.choices is not None and found not in action.choices:
        raise ValueError(f"expected one of {', '.join(map(str, action.choices))}, got {value!r}")
    return found


def finite_number(text: str) -> float:
    """A number that is not NaN or infinite.

    Raises:
        argparse.ArgumentTypeError: If it is something else.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r:.80}")
    return number


def whole_number(text: str) -> int:
    """A whole number of up to 32 bits.

    Raises:
        argparse.ArgumentTypeError: If it is something else.
    """
    try:
        number = int(text)
    except ValueError:
        number = None
    if number is None or not -(2**31) <= number < 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number of up to 32 bits, got {text!r:.80}")
    return number


def plain_text(text: str) -> str:
    """Text that can be written and passed to the system.

    Raises:
        argparse.ArgumentTypeError: If it has NUL characters.
    """
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"expected text without NUL characters, got {text!r:.80}")
    return text


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
