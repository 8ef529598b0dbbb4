"""The arguments of `region-tune`, parsed into dataclasses."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import TrainingArguments

from alpha_clip_commands.region_tune import TUNE
from alpha_clip_commands.training.tuning_arguments import DataArguments, ModelArguments
from train.arguments import check_optimizer, parse_recipe


def parse_args(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """The arguments of `region-tune`.

    Raises:
        ValueError: As `parse_recipe`, and if settings contradict each other.
    """
    model_args, data_args, training_args = parse_recipe(TUNE, argv)
    check_optimizer(model_args, training_args)
    return model_args, data_args, training_args
