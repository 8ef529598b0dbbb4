"""Trainer for conversations: label smoothing, and answers to validation questions at each evaluation."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from train.parts import unwrap_peft
from train.trainer import RegionTrainer
from train.tuning.evaluation import AnswerScorer


class ConversationTrainer(RegionTrainer):
    """`RegionTrainer` for batches of `ConversationCollator`.

    Args:
        scorer: Answers validation questions at each evaluation, or None.
    """

    def __init__(self, *args: Any, scorer: AnswerScorer | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scorer = scorer
        self.encoder_decoder = self.model.config.get_text_config().is_encoder_decoder
        if self.label_smoother is not None and not self.encoder_decoder:
            # Trainer shifts the labels of causal models that it knows by name; LLaVA and BLIP-2 are not among them
            self.label_smoother = partial(self.label_smoother, shift_labels=True)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in Trainer, which passes no labels to the model with label smoothing; T5 then needs decoder input IDs."""
        if self.label_smoother is not None and self.encoder_decoder:
            unwrapped = unwrap_peft(self.accelerator.unwrap_model(model))
            shift = unwrapped.language_model.prepare_decoder_input_ids_from_labels
            inputs = {**inputs, "decoder_input_ids": shift(labels=inputs["labels"])}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Loss on the validation samples, and scores of the generated answers."""
        metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.scorer is not None:
            process, count = self.accelerator.process_index, self.accelerator.num_processes
            with self.accelerator.autocast():  # as in training: trained and frozen weights may differ in dtype
                answered = self.scorer.answer(self.model, process, count)
            scores = self.scorer.score(gather_object(answered))
            scores = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
            self.log(scores)
            metrics |= scores
        return metrics
