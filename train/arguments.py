"""Recipe and flags -> dataclasses and Transformers' training arguments; checks of DeepSpeed files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from transformers import HfArgumentParser, TrainingArguments

from alpha_clip_commands.region_tune import Program, read_settings
from alpha_clip_commands.training.shared_arguments import PartArguments
from mllm.data.json_files import check_kept, read_json
from mllm.data.schemas import checked


def parse_recipe(program: Program, argv: Sequence[str]) -> tuple:
    """Parse `[RECIPE] [--flag value ...]` into the dataclasses of a program and Transformers' training arguments.

    Raises:
        ValueError: If the recipe cannot be read, or a key, flag or value is invalid.
    """
    settings = read_settings(program, argv)
    if settings.get("deepspeed") is not None:
        check_deepspeed_file(settings["deepspeed"])
    if settings.get("plan") and not torch.accelerator.is_available():
        settings.setdefault("use_cpu", True)  # an estimate does not need the devices of the run
    # Trainer would remove the columns that `forward` does not accept before our collator runs
    defaults = {"remove_unused_columns": False, "report_to": "none"}
    return HfArgumentParser((*program.kinds, TrainingArguments)).parse_dict(defaults | settings)


def check_optimizer(args: PartArguments, training_args: TrainingArguments) -> None:
    """Raise ValueError if the optimizer or per-part learning rates cannot be used with DeepSpeed's settings."""
    if not training_args.deepspeed:
        return
    if args.learning_rates and "optimizer" in json.loads(Path(training_args.deepspeed).read_text("utf-8")):
        raise ValueError(
            f"learning_rates: {training_args.deepspeed} defines an optimizer with a single learning rate (offloading "
            "requires it); use a file without an optimizer, such as zero2 or zero3"
        )
    if args.optimizer == "muon":
        raise ValueError("optimizer: muon cannot be used with DeepSpeed; use optimizer: trainer")


class _ZeroSettings(msgspec.Struct):
    """The fields of "zero_optimization" that are used."""

    stage: Annotated[int, msgspec.Meta(ge=0, le=3)] = 0


class _DeepSpeedSettings(msgspec.Struct):
    """The fields of a DeepSpeed file that are used."""

    zero_optimization: _ZeroSettings = msgspec.field(default_factory=_ZeroSettings)
    optimizer: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None
    bf16: dict[str, Any] | None = None
    fp16: dict[str, Any] | None = None


def check_deepspeed_file(path: str) -> None:
    """Raise ValueError if a DeepSpeed JSON file is damaged, or one of its settings is invalid."""
    try:
        settings = read_json(Path(path), dict, unique_keys=True)
        check_kept(settings)
        checked(settings, _DeepSpeedSettings, Path(path))
    except ValueError as error:
        raise ValueError(str(error) if path in str(error) else f"{path}: {error}") from error
