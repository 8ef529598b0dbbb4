"""The arguments of `alpha-clip train`, parsed into dataclasses."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import TrainingArguments

from alpha_clip_commands.region_tune import TRAIN_ALPHA_CLIP
from alpha_clip_commands.training.contrastive_arguments import PairArguments, TowerArguments
from train.arguments import check_optimizer, parse_recipe


def parse_args(argv: Sequence[str]) -> tuple[TowerArguments, PairArguments, TrainingArguments]:
    """The arguments of `alpha-clip train`.

    Raises:
        ValueError: As `parse_recipe`, and if settings contradict each other.
    """
    tower_args, pair_args, training_args = parse_recipe(TRAIN_ALPHA_CLIP, argv)
    check_optimizer(tower_args, training_args)
    if pair_args.cache_chunk and training_args.gradient_accumulation_steps > 1:
        raise ValueError("cache_chunk: gradient caching replaces gradient_accumulation_steps; set only one of them")
    if (
        training_args.deepspeed
        and (training_args.bf16 or training_args.fp16)
        and not training_args.hf_deepspeed_config.get_value("zero_optimization.stage", 0)
    ):
        raise ValueError(
            f"deepspeed: {training_args.deepspeed} has ZeRO stage 0, which has no float32 weights to save with bf16 or "
            "fp16; use zero1, zero2 or zero3, or remove bf16 and fp16"
        )
    if training_args.metric_for_best_model in ("loss", "eval_loss"):  # Trainer's default
        raise ValueError("metric_for_best_model: evaluations have no loss; use top1, top1_same_image or whole_top1")
    return tower_args, pair_args, training_args
