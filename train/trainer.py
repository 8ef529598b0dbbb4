"""Trainer for data about regions: sample order, learning rates per part, complete checkpoints, exact resume."""

from __future__ import annotations

import copy
import logging
import math
import shutil
import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mllm.data.index import TRAIN
from mllm.files import sync_files, write_json
from train.epoch_sampler import EpochSampler, SetEpoch, build_sampler
from train.optimizers import MuonWithAdamW
from train.output import COMPLETE, explain_write_errors, read_completion, remove_older_checkpoints
from train.parts import part_of
from train.skipped import SkippedItem
from train.stop_on_signal import STOP_SIGNALS, StopOnSignal

logger = logging.getLogger(__name__)


class RegionTrainer(Trainer):
    """Transformers' Trainer with the changes that both training programs need.

    Args:
        parts: Prefix of the parameter names by part.
        rates: Learning rate by part; other parts use `learning_rate`.
        optimizer_name: "trainer" or "muon".
        run_config: Settings that determine the result, stored with each checkpoint.
    """

    def __init__(
        self,
        *args: Any,
        parts: Mapping[str, str],
        rates: Mapping[str, float],
        optimizer_name: str,
        run_config: Mapping[str, Any],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.parts = dict(parts)
        self.rates = dict(rates)
        self.optimizer_name = optimizer_name
        self.run_config = dict(run_config)
        # Trainer would remove an older checkpoint before the new one is complete
        self.save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.stopping = StopOnSignal()
        self.add_callback(self.stopping)
        self._unlogged: dict[str, Any] | None = None  # losses that were not logged before the checkpoint was written

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        sampler = build_sampler(self.train_dataset if train_dataset is None else train_dataset, self.args)
        self.add_callback(SetEpoch(sampler))
        return sampler

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """As in Trainer, but the workers ignore stop signals, which launchers send to the whole process group. They are
        ended by `run_command`.
        """
        loader = super()._get_dataloader(*args, **kwargs)
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper uses the workers of the inner loader
        inner.worker_init_fn = partial(_ignore_signals, inner.worker_init_fn)
        return loader

    def resume(self, checkpoint: Path) -> None:
        """Train from a checkpoint to the end; the log is that of an uninterrupted run."""
        self.args.eval_on_start = False
        self._unlogged = read_completion(checkpoint).get("unlogged")
        self.train(resume_from_checkpoint=str(checkpoint))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in Trainer, which would train one more step when it resumes at the last step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self._unlogged is not None:  # Trainer would start with a loss of 0
            self._tr_loss.fill_(self._unlogged["losses"][self.args.process_index])
            self._globalstep_last_logged = self._unlogged["since"]
            self._unlogged = None
        super()._run_epoch(*args, **kwargs)

    def used_before(self, step: int) -> Callable[[SkippedItem], bool]:
        """A predicate: whether training reached a skipped item before the end of a step.

        The list of skipped items contains more: loader workers read ahead, and a killed run went beyond its last
        checkpoint.
        """
        args, count = self.args, len(self.train_dataset)
        rounds = count / (args.train_batch_size * args.world_size)  # batches per process and epoch
        rounds = math.floor(rounds) if args.dataloader_drop_last else math.ceil(rounds)
        accumulated = args.gradient_accumulation_steps
        epoch, steps = divmod(step, max(math.ceil(rounds / accumulated), 1))
        sampler = copy.copy(build_sampler(self.train_dataset, args))
        sampler.set_epoch(epoch)
        used = set(list(sampler)[: steps * accumulated * args.train_batch_size * args.world_size])
        return lambda item: item.split != TRAIN or item.position < epoch * count or item.position in used

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in Trainer, with a separate learning rate for each part in `rates`.

        Raises:
            ValueError: If a part with a learning rate is not trained.
        """
        model = self.model if model is None else model
        args = self.args
        rates = self._rates_by_name(model)
        if self.optimizer_name == "muon":
            betas = (args.adam_beta1, args.adam_beta2)
            self.optimizer = MuonWithAdamW(
                model, args.learning_rate, args.weight_decay, betas, args.adam_epsilon, rates
            )
        elif rates and self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(model))
            groups: dict[tuple, list] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault((rates.get(name, args.learning_rate), name in decayed), []).append(parameter)
            optimizer, settings = self.get_optimizer_cls_and_kwargs(args, model)
            self.optimizer = optimizer(
                [
                    {"params": members, "lr": rate, "weight_decay": args.weight_decay if decay else 0.0}
                    for (rate, decay), members in groups.items()
                ],
                **settings,
            )
        return super().create_optimizer(model)

    def _rates_by_name(self, model: nn.Module) -> dict[str, float]:
        """The learning rate of each trained parameter whose part is in `rates`.

        Raises:
            ValueError: If a part with a learning rate is not trained.
        """
        part = {name: part_of(name, self.parts) for name, weight in model.named_parameters() if weight.requires_grad}
        if frozen := sorted(self.rates.keys() - part.values()):
            raise ValueError(f"learning_rates: {', '.join(frozen)}: not trained; add it to train_parts")
        return {name: self.rates[of] for name, of in part.items() if of in self.rates}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in Trainer; a checkpoint is complete when it contains `complete.json`, which is written last."""
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with explain_write_errors(f"the checkpoint {folder}", self.args.output_dir):
            if self.args.should_save:  # an incomplete checkpoint of a killed run
                shutil.rmtree(folder, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            # of each process, since the last log entry
            unlogged = {"losses": gather_object([self._tr_loss.item()]), "since": self._globalstep_last_logged}
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                sync_files(file for file in folder.rglob("*") if file.is_file())
                step = self.state.global_step
                write_json(folder / COMPLETE, {"step": step, "unlogged": unlogged, "run_config": self.run_config})
                best = self.state.best_model_checkpoint
                remove_older_checkpoints(self.args.output_dir, self.save_total_limit, best)


def _ignore_signals(init: Callable[[int], None] | None, worker: int) -> None:
    """Start a loader worker that ignores stop signals."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if init is not None:
        init(worker)
