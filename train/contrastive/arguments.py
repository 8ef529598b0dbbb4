"""The arguments of contrastive training: the towers, the pairs, the loss, and HF's training arguments."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import TrainingArguments

from alpha_clip_commands.training.contrastive_arguments import PairArguments, TowerArguments
from train.arguments import check_optimizer, parse_recipe


def parse_args(argv: Sequence[str]) -> tuple[TowerArguments, PairArguments, TrainingArguments]:
    """The arguments of `alpha-clip train`.

    Raises:
        ValueError: As `parse_recipe`, and if the settings do not go together.
    """
    tower_args, pair_args, training_args = parse_recipe("alpha-clip train", (TowerArguments, PairArguments), argv)
    check_optimizer(tower_args.optimizer, tower_args.learning_rates, training_args)
    if pair_args.cache_chunk and training_args.gradient_accumulation_steps > 1:
        raise ValueError(
            "cache_chunk: gradient caching takes the place of gradient_accumulation_steps; give one of both"
        )
    if (
        training_args.deepspeed
        and (training_args.bf16 or training_args.fp16)
        and not training_args.hf_deepspeed_config.get_value("zero_optimization.stage", 0)
    ):
        raise ValueError(
            f"deepspeed: {training_args.deepspeed} is of ZeRO stage 0, which in 16 bits has no float32 weights to "
            "save; take zero1, zero2 or zero3, or leave out bf16 and fp16"
        )
    if training_args.metric_for_best_model in ("loss", "eval_loss"):  # Trainer's default where it needs one
        raise ValueError("metric_for_best_model: evaluations give no loss; name top1, top1_same_image or whole_top1")
    return tower_args, pair_args, training_args
