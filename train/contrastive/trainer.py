"""Trainer for region-text pairs: contrastive loss, gradient caching, the released schedule, evaluation."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.utils import CONFIG_NAME

from alpha_clip_commands.training.contrastive_arguments import PairArguments
from eval.region_matching import DescribedImage, score_region_text
from train.contrastive.data import chunks_of
from train.contrastive.gradient_cache import Embeddings, cached_backward
from train.contrastive.losses import region_text_loss, released_learning_rate_factor, released_loss
from train.parts import unwrap_peft
from train.trainer import RegionTrainer

# Source: CLIP, Radford et al., arXiv 2103.00020, section 2.5: logits are never multiplied by more than 100
_MAX_LOG_SCALE = math.log(100)


class RegionTextTrainer(RegionTrainer):
    """`RegionTrainer` for batches of `RegionTextCollator`.

    Args:
        pair_args: Loss, schedule, gradient caching.
        decay_all: Apply weight decay to all trained weights.
        validation_images: Images for evaluation.
    """

    def __init__(
        self,
        *args: Any,
        pair_args: PairArguments,
        decay_all: bool,
        validation_images: Sequence[DescribedImage],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, eval_dataset=list(validation_images), **kwargs)
        self.pair_args = pair_args
        self.decay_all = decay_all
        temperature = unwrap_peft(self.model).logit_scale
        # under ZeRO-3 weights are partitioned outside of `forward`, so a frozen one is copied here
        self.frozen_logit_scale = None if temperature.requires_grad else temperature.detach().clone()
        # DeepSpeed rounds all weights to 16 bits, also frozen ones, and keeps float32 copies of trained weights only
        self.is_rounded = self.is_deepspeed_enabled and (self.args.bf16 or self.args.fp16)
        self.frozen_weights: dict[str, torch.Tensor] = {}
        if (
            self.is_rounded and self.args.should_save and unwrap_peft(self.model) is self.model
        ):  # adapters are saved without the model
            frozen = ((name, p) for name, p in self.model.named_parameters() if not p.requires_grad)
            self.frozen_weights = {name: p.detach().to("cpu", copy=True) for name, p in frozen}
        # otherwise Trainer would compute its own smoothed loss
        self.smoothing, self.label_smoother = self.args.label_smoothing_factor, None  # type: ignore[assignment]
        self.float32_weights: dict[str, torch.Tensor] = {}  # only set while a rounded model is saved

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss of this process's pairs, compared with the pairs of all processes.

        Raises:
            ValueError: If the loss is NaN or infinite; the message contains the batch.
        """
        (chunk,) = chunks_of(inputs)
        return self._loss_of(self._embed(model, chunk), inputs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in Trainer; with `cache_chunk`, the batch is embedded in chunks."""
        if not self.pair_args.cache_chunk:
            return super().training_step(model, inputs, *args, **kwargs)
        model.train()
        inputs = self._prepare_inputs(inputs)
        return cached_backward(
            chunks_of(inputs, self._chunk_count(len(inputs["text_of"]))),
            lambda chunk: self._embed(model, chunk),
            lambda rows: self._loss_of(rows, inputs),
            self._backward_chunk,
            lambda is_last: contextlib.nullcontext() if is_last else self._no_sync(model),
        )

    def _chunk_count(self, pairs: int) -> int:
        """Number of chunks of this batch, the same on every process, because DeepSpeed synchronizes at each one. No
        chunk is empty: if a process has few pairs, the chunks of the others may be larger than `cache_chunk`.
        """
        counts = torch.tensor([math.ceil(pairs / self.pair_args.cache_chunk), -pairs], device=self.args.device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX)
        most, fewest = counts.tolist()
        return min(most, -fewest)

    def _embed(self, model: nn.Module, chunk: dict[str, torch.Tensor]) -> Embeddings:
        """Normalized embeddings of a chunk's pairs, (N, D), and the factor of their cosines."""
        pixels = chunk["pixel_values"]
        outputs = model(input_ids=chunk["input_ids"], attention_mask=chunk["attention_mask"], pixel_values=pixels)
        clip = unwrap_peft(self.accelerator.unwrap_model(model))
        log_scale = clip.logit_scale if self.frozen_logit_scale is None else self.frozen_logit_scale.to(pixels.device)
        return {
            "images": outputs.image_embeds,
            "texts": outputs.text_embeds[chunk["text_of"]],
            "logit_scale": _capped(log_scale).exp().squeeze(),
        }

    def _loss_of(self, embeds: Embeddings, inputs: dict[str, Any]) -> torch.Tensor:
        """The loss of embeddings, checked for NaN and Inf."""
        texts, scale = embeds["texts"], embeds["logit_scale"]
        if self.pair_args.loss == "released":
            loss = released_loss(embeds["images"], texts, scale, label_smoothing=self.smoothing)
        else:
            settings = {"label_smoothing": self.smoothing, "equal_texts": self.pair_args.equal_texts}
            loss = region_text_loss(embeds["images"], texts, scale, inputs["text_ids"], **settings)
        self._check_finite(loss, inputs["names"])
        return loss

    def _check_finite(self, loss: torch.Tensor, names: Sequence[str]) -> None:
        """Raise ValueError on every process if the loss of any process is NaN or infinite."""
        if not self._all_processes(bool(torch.isfinite(loss.detach()))):
            shown = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
            raise ValueError(
                f"the loss is {loss.item()} at step {self.state.global_step} on process {self.args.process_index}, "
                f"batch of {len(names)} samples: {shown}; the last complete checkpoint is kept. Lower learning_rate, "
                "use bf16 instead of fp16, or check these samples"
            )

    def _all_processes(self, condition: bool) -> bool:
        """Whether a condition is true on every process."""
        flag = torch.tensor(int(condition), device=self.args.device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        return bool(flag)

    def _backward_chunk(self, surrogate: torch.Tensor, is_last: bool) -> None:
        accelerator = self.accelerator
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            accelerator.deepspeed_engine_wrapped.backward(surrogate, sync_gradients=is_last, scale_wrt_gas=False)
        else:
            accelerator.backward(surrogate)

    def _no_sync(self, model: nn.Module) -> contextlib.AbstractContextManager:
        """For all chunks except the last: DDP delays the all-reduce; DeepSpeed accumulates by itself."""
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As in Trainer, without the temperature; with `decay_all`, all weights."""
        if self.decay_all:
            return [name for name, _ in model.named_parameters()]
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("logit_scale")]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Trainer's schedule, or that of the released training.

        Raises:
            ValueError: If the cosine of the released schedule would end within the warmup.
        """
        if self.pair_args.schedule == "released" and self.lr_scheduler is None:
            warmup, steps = self.args.get_warmup_steps(num_training_steps), self.pair_args.released_steps
            if steps <= warmup:
                raise ValueError(f"released_steps: expected more than the {warmup} warmup steps, got {steps}")
            self.lr_scheduler = LambdaLR(
                self.optimizer if optimizer is None else optimizer,
                lambda step: released_learning_rate_factor(step, warmup, steps),
            )
            self._created_lr_scheduler = True
            return self.lr_scheduler
        return super().create_scheduler(num_training_steps, optimizer)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in `RegionTrainer`, after a check of the weights: the loss was checked before the last update.

        Raises:
            ValueError: On every process, if trained weights contain NaN or Inf.
        """
        trained = [
            getattr(p, "ds_tensor", p) for p in self.model.parameters() if p.requires_grad
        ]  # partitions under ZeRO-3
        if not self._all_processes(all(bool(torch.isfinite(weight).all()) for weight in trained)):
            raise ValueError(
                f"weights contain NaN or Inf after step {self.state.global_step}; no checkpoint is written, the last "
                "complete one is kept. Lower learning_rate, set max_grad_norm, or use bf16 instead of fp16"
            )
        super()._save_checkpoint(model, trial)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """As in Trainer, but always in float32, also with DeepSpeed in 16 bits: frozen weights as loaded, trained
        weights from the optimizer. Every process must call it.
        """
        if self.is_rounded:
            self.float32_weights = {**self.frozen_weights, **self._optimizer_weights()}
        super().save_model(*args, **kwargs)
        self.float32_weights = {}

    def _optimizer_weights(self) -> dict[str, torch.Tensor]:
        """DeepSpeed's float32 copies of the trained weights, gathered from all processes, on the CPU."""
        from deepspeed.utils import safe_get_full_fp32_param

        trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        return {name: safe_get_full_fp32_param(parameter).cpu() for name, parameter in trained}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """As in Trainer, with the temperature, weights and dtype that the model has without DeepSpeed."""
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        state_dict = {name: self.float32_weights.get(name, weight) for name, weight in state_dict.items()}
        if "logit_scale" in state_dict:
            log_scale = state_dict["logit_scale"].clamp(max=_MAX_LOG_SCALE)
            state_dict = {**state_dict, "logit_scale": log_scale.reshape(())}
        super()._save(output_dir, state_dict)
        config = Path(output_dir or self.args.output_dir) / CONFIG_NAME
        if self.is_rounded and self.args.should_save and config.exists():  # an adapter has no config
            # Trainer writes the dtype of the rounded model, and loading would round to it
            written = json.loads(config.read_text(encoding="utf-8"))
            config.write_text(json.dumps({**written, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Region-text matching scores. Every process evaluates all images, because ZeRO-3 needs all processes."""
        model = unwrap_peft(self.accelerator.unwrap_model(self.model_wrapped))
        with self.accelerator.autocast():
            scores = score_region_text(model, self.data_collator.processor, self.eval_dataset, truncation=True)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _capped(log_scale: torch.Tensor) -> torch.Tensor:
    """At most log 100, with a straight-through gradient, so that a larger temperature can decrease again."""
    return log_scale - (log_scale - log_scale.clamp(max=_MAX_LOG_SCALE)).detach()
