"""Trainer of region-text pairs: their loss, gradient caching, the released schedule, evaluation."""

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
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from transformers.utils import CONFIG_NAME

from alpha_clip_commands.training.contrastive_arguments import PairArguments
from eval.region_matching import DescribedImage, score_region_text
from train.contrastive.data import chunks_of
from train.contrastive.gradient_cache import Embeddings, cached_backward
from train.contrastive.losses import region_patch_embeds, region_text_loss, released_learning_rate_factor, released_loss
from train.trainer import RegionTrainer
from vision_tower import AlphaCLIPModel

# Source: CLIP, Radford et al., arXiv 2103.00020, section 2.5: logits are never scaled by more than 100
_LARGEST_LOGIT_SCALE = math.log(100)


class RegionTextTrainer(RegionTrainer):
    """`RegionTrainer` for batches of `RegionTextCollator`; only what differs is here.

    Args:
        pair_args: Loss, schedule, gradient caching.
        decay_all: Weight decay on every trained weight.
        pictures: Held-out pictures for evaluation.
    """

    def __init__(
        self, *args: Any, pair_args: PairArguments, decay_all: bool, pictures: Sequence[DescribedImage], **kwargs: Any
    ) -> None:
        super().__init__(*args, eval_dataset=list(pictures), **kwargs)
        self.pair_args = pair_args
        self.decay_all = decay_all
        temperature = clip_in(self.model).logit_scale
        # ZeRO-3 keeps no whole weight outside of `forward`; a frozen one is known
        self.frozen_logit_scale = None if temperature.requires_grad else temperature.detach().clone()
        # DeepSpeed rounds the whole model to 16 bits, frozen towers too, and keeps copies of trained weights alone
        self.was_rounded = self.is_deepspeed_enabled and (self.args.bf16 or self.args.fp16)
        self.frozen_weights: dict[str, torch.Tensor] = {}
        if self.was_rounded and self.args.should_save and clip_in(self.model) is self.model:  # adapters are saved alone
            frozen = ((name, p) for name, p in self.model.named_parameters() if not p.requires_grad)
            self.frozen_weights = {name: p.detach().to("cpu", copy=True) for name, p in frozen}
        # Trainer would smooth labels of its own
        self.smoothing, self.label_smoother = self.args.label_smoothing_factor, None  # type: ignore[assignment]
        self.whole_weights: dict[str, torch.Tensor] = {}  # while a rounded model is saved

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss of this process's pairs among those of all processes.

        Raises:
            ValueError: If it is no number; the batch is named.
        """
        (chunk,) = chunks_of(inputs)
        return self._loss_of(self._embed(model, chunk), inputs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in Trainer; with `cache_chunk` the batch is embedded chunk by chunk."""
        if not self.pair_args.cache_chunk:
            return super().training_step(model, inputs, *args, **kwargs)
        model.train()
        inputs = self._prepare_inputs(inputs)
        return cached_backward(
            chunks_of(inputs, self._count_of_chunks(len(inputs["text_of"]))),
            lambda chunk: self._embed(model, chunk),
            lambda rows: self._loss_of(rows, inputs),
            self._backward_chunk,
            lambda is_last: contextlib.nullcontext() if is_last else self._unsynchronised(model),
        )

    def _count_of_chunks(self, pairs: int) -> int:
        """Chunks of this batch, as many on every process: DeepSpeed's wait for each other at each. None is empty, even
        where a process has so few pairs that others embed more than `cache_chunk` at a time.
        """
        counts = torch.tensor([math.ceil(pairs / self.pair_args.cache_chunk), -pairs], device=self.args.device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX)
        most, fewest = counts.tolist()
        return min(most, -fewest)

    def _embed(self, model: nn.Module, chunk: dict[str, torch.Tensor]) -> Embeddings:
        """Embeddings of a chunk's pairs, (N, D) each of length 1, and the factor of their cosines."""
        with_patches = self.pair_args.patch_weight > 0
        pixels = chunk["pixel_values"]
        outputs = model(
            input_ids=chunk["input_ids"],
            attention_mask=chunk["attention_mask"],
            pixel_values=pixels,
            output_hidden_states=with_patches,
        )
        clip = clip_in(self.accelerator.unwrap_model(model))
        log_scale = clip.logit_scale if self.frozen_logit_scale is None else self.frozen_logit_scale.to(pixels.device)
        embeds = {
            "images": outputs.image_embeds,
            "texts": outputs.text_embeds[chunk["text_of"]],
            "logit_scale": _capped(log_scale).exp().squeeze(),
        }
        if with_patches:  # what LLaVA reads: the last block but one, without the class token
            tokens = outputs.vision_model_output.hidden_states[-2][:, 1:]
            pooled = region_patch_embeds(tokens, pixels[:, 3:], clip.config.vision_config.patch_size)
            with self.accelerator.autocast():  # `forward` has its own
                projected = clip.visual_projection(clip.vision_model.post_layernorm(pooled))
            embeds["patches"] = functional.normalize(projected, dim=-1)
        return embeds

    def _loss_of(self, embeds: Embeddings, inputs: dict[str, Any]) -> torch.Tensor:
        """The loss of embeddings, checked."""
        texts, scale = embeds["texts"], embeds["logit_scale"]
        if self.pair_args.loss == "released":
            loss = released_loss(embeds["images"], texts, scale, label_smoothing=self.smoothing)
        else:
            settings = {"label_smoothing": self.smoothing, "equal_texts": self.pair_args.equal_texts}
            loss = region_text_loss(embeds["images"], texts, scale, inputs["text_ids"], **settings)
            if "patches" in embeds:
                of_patches = region_text_loss(embeds["patches"], texts, scale, inputs["text_ids"], **settings)
                loss = loss + self.pair_args.patch_weight * of_patches
        self._refuse_nan(loss, inputs["names"])
        return loss

    def _refuse_nan(self, loss: torch.Tensor, names: Sequence[str]) -> None:
        """Raise ValueError on every process if the loss of any is no number."""
        if not self._everywhere(bool(torch.isfinite(loss.detach()))):
            shown = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
            raise ValueError(
                f"the loss is {loss.item()} at step {self.state.global_step} on process {self.args.process_index}, "
                f"batch of {len(names)} samples: {shown}; the last whole checkpoint is kept. Lower learning_rate, take "
                "bf16 in place of fp16, or look at these samples"
            )

    def _everywhere(self, fine: bool) -> bool:
        """Whether it is so on every process."""
        flag = torch.tensor(int(fine), device=self.args.device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        return bool(flag)

    def _backward_chunk(self, surrogate: torch.Tensor, is_last: bool) -> None:
        accelerator = self.accelerator
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            accelerator.deepspeed_engine_wrapped.backward(surrogate, sync_gradients=is_last, scale_wrt_gas=False)
        else:
            accelerator.backward(surrogate)

    def _unsynchronised(self, model: nn.Module) -> contextlib.AbstractContextManager:
        """For all chunks but the last: DDP waits with the exchange of gradients; DeepSpeed's engine adds up itself."""
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As in Trainer, without the temperature; with `decay_all` every weight."""
        if self.decay_all:
            return [name for name, _ in model.named_parameters()]
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("logit_scale")]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Trainer's, or the released training's.

        Raises:
            ValueError: If the released one's cosine would end within the warm-up.
        """
        if self.pair_args.schedule == "released" and self.lr_scheduler is None:
            warmup, steps = self.args.get_warmup_steps(num_training_steps), self.pair_args.released_steps
            if steps <= warmup:
                raise ValueError(f"released_steps: expected more than the {warmup} steps of the warm-up, got {steps}")
            self.lr_scheduler = LambdaLR(
                self.optimizer if optimizer is None else optimizer,
                lambda step: released_learning_rate_factor(step, warmup, steps),
            )
            self._created_lr_scheduler = True
            return self.lr_scheduler
        return super().create_scheduler(num_training_steps, optimizer)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in `RegionTrainer`, once the weights are numbers: the loss was looked at before they were changed.

        Raises:
            ValueError: If they are none, on every process.
        """
        trained = [getattr(p, "ds_tensor", p) for p in self.model.parameters() if p.requires_grad]  # ZeRO-3's pieces
        if not self._everywhere(all(bool(torch.isfinite(weight).all()) for weight in trained)):
            raise ValueError(
                f"the weights are no numbers after step {self.state.global_step}; no checkpoint is written, the last "
                "whole one is kept. Lower learning_rate, set max_grad_norm, or take bf16 in place of fp16"
            )
        super()._save_checkpoint(model, trial)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """As in Trainer; also after DeepSpeed in 16 bits what is saved is float32: frozen weights as they were loaded,
        trained ones as the optimizer has them. Every process must call it.
        """
        if self.was_rounded:
            self.whole_weights = {**self.frozen_weights, **self._optimizers_weights()}
        super().save_model(*args, **kwargs)
        self.whole_weights = {}

    def _optimizers_weights(self) -> dict[str, torch.Tensor]:
        """DeepSpeed's float32 copies of the trained weights, of all processes; on the CPU."""
        from deepspeed.utils import safe_get_full_fp32_param

        trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        return {name: safe_get_full_fp32_param(parameter).cpu() for name, parameter in trained}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """As in Trainer; temperature, precision and what the configuration says of it are those of before DeepSpeed."""
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        state_dict = {name: self.whole_weights.get(name, weight) for name, weight in state_dict.items()}
        if "logit_scale" in state_dict:
            log_scale = state_dict["logit_scale"].clamp(max=_LARGEST_LOGIT_SCALE)
            state_dict = {**state_dict, "logit_scale": log_scale.reshape(())}
        super()._save(output_dir, state_dict)
        config = Path(output_dir or self.args.output_dir) / CONFIG_NAME
        if self.was_rounded and self.args.should_save and config.exists():  # an adapter has none
            # it says what the model in memory is of, and whoever loads would round to that
            stated = json.loads(config.read_text(encoding="utf-8"))
            config.write_text(json.dumps({**stated, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """How well regions are told apart by their texts; every process does it whole, as ZeRO-3 needs all of them."""
        model = clip_in(self.accelerator.unwrap_model(self.model_wrapped))
        with self.accelerator.autocast():
            scores = score_region_text(model, self.data_collator.processor, self.eval_dataset, truncation=True)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _capped(log_scale: torch.Tensor) -> torch.Tensor:
    """At most log 100; the gradient passes, so that a temperature beyond it comes down again."""
    return log_scale - (log_scale - log_scale.clamp(max=_LARGEST_LOGIT_SCALE)).detach()


def clip_in(model: nn.Module) -> AlphaCLIPModel:
    """The CLIP itself, without PEFT's cover."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
