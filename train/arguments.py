"""The arguments of a run: model, data, and HF's training arguments. A recipe (YAML) first, flags win, unknown keys are
errors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from alpha_clip_commands.flag_values import finite_number, plain_text, switch, whole_number
from alpha_clip_commands.training.recipe import deepspeed_file, split_recipe
from alpha_clip_commands.training.recipe_values import check_ranges, read_values
from alpha_clip_commands.training.tuning_arguments import DataArguments, ModelArguments, PartArguments
from mllm.data.json_files import check_serializable, read_json
from mllm.data.schemas import validate


def refuse_unknown_parts(args: PartArguments, parts: Collection[str]) -> None:
    """Raise ValueError if `train_parts` or `learning_rates` name a part that the model does not have."""
    for setting, named in (("train_parts", args.train_parts), ("learning_rates", args.rate_of_part())):
        if unknown := sorted(set(named) - set(parts)):
            raise ValueError(f"{setting}: expected names out of {', '.join(parts)}, got {unknown}")


# of a flag, by HF's type: stricter, with errors of their own
_TYPES = {int: whole_number, float: finite_number, str: plain_text, string_to_bool: switch}


def parse_args(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """The arguments of `region-tune`, as `parse_recipe`.

    Raises:
        ValueError: As `parse_recipe`, and if model, data and training settings do not go together.
    """
    model_args, data_args, training_args = parse_recipe("region-tune", (ModelArguments, DataArguments), argv)
    check_optimizer(model_args.optimizer, model_args.learning_rates, training_args)
    return model_args, data_args, training_args


def parse_recipe(prog: str, kinds: Sequence[type], argv: Sequence[str]) -> tuple:
    """Parse `[RECIPE] [--flag value ...]` into dataclasses, HF's training arguments last. `--deepspeed zero2` is
    the shipped file of that name.

    Raises:
        ValueError: If the recipe cannot be read, or a key, a flag or a value of them is not one that there is.
    """
    recipe, flags = split_recipe(argv)
    parser = _Parser((*kinds, TrainingArguments), prog=prog)
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('alpha-clip-mllm')}")
    # Trainer would drop what `forward` does not name before our collator sees it
    parser.set_defaults(remove_unused_columns=False, report_to="none")
    for action in parser._actions:
        action.type = _TYPES.get(action.type, action.type)
        if action.dest == "deepspeed":
            action.type = _deepspeed_file
    if recipe:
        _set_recipe(parser, recipe)
    if not torch.accelerator.is_available() and parser.parse_known_args(flags)[0].plan:
        parser.set_defaults(use_cpu=True)  # a plan computes nothing: it need not have the devices
    *arguments, training_args, unknown = parser.parse_args_into_dataclasses(flags, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"unknown flags or values without a flag: {' '.join(unknown)}; --help lists the flags")
    check_ranges(vars(training_args))
    return *arguments, training_args


class _Parser(HfArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _set_recipe(parser: HfArgumentParser, path: str) -> None:
    """Make the values of a recipe the parser's defaults, each read as its flag would be.

    Raises:
        ValueError: If the recipe cannot be read, or a key or value is not one that there is.
    """
    actions = {}
    for action in parser._actions:
        actions.setdefault(action.dest, action)  # --no_X comes after --X
    defaults = {key: action.default for key, action in actions.items() if not action.required}
    for key, value in read_values(path, actions, defaults).items():
        parser.set_defaults(**{key: value})
        actions[key].required = False


def check_optimizer(optimizer: str, learning_rates: Sequence[str], training_args: TrainingArguments) -> None:
    """Raise ValueError where the optimizer does not go with learning rates of parts or with DeepSpeed's settings."""
    if not training_args.deepspeed:
        return
    if learning_rates and "optimizer" in json.loads(Path(training_args.deepspeed).read_text("utf-8")):
        raise ValueError(
            f"learning_rates: {training_args.deepspeed} brings an optimizer of one learning rate (offloading needs "
            "it); take a file without it, zero2 or zero3"
        )
    if optimizer == "muon":
        raise ValueError("optimizer: muon runs without DeepSpeed only; use optimizer: trainer")


class _ZeroSettings(msgspec.Struct):
    """What is used of "zero_optimization"."""

    stage: Annotated[int, msgspec.Meta(ge=0, le=3)] = 0


class _DeepSpeedSettings(msgspec.Struct):
    """What is used of a DeepSpeed file."""

    zero_optimization: _ZeroSettings = msgspec.field(default_factory=_ZeroSettings)
    optimizer: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None
    bf16: dict[str, Any] | None = None
    fp16: dict[str, Any] | None = None


def _deepspeed_file(name: str) -> str:
    """A DeepSpeed JSON by the name of a shipped one, or by its path; its settings are checked."""
    path = deepspeed_file(name)
    try:
        settings = read_json(path, dict, unique_keys=True)
        check_serializable(settings)
        validate(settings, _DeepSpeedSettings, path)
    except ValueError as error:
        named = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise argparse.ArgumentTypeError(named) from error
    return str(path)
