"""Trainer for conversations about regions: order of samples, learning rates by part, whole checkpoints, evaluation."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import select
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
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from alpha_clip_commands.command_line import stopping_signals
from mllm.data.index import TRAIN
from mllm.files import sync_files, write_json
from train.lora import part_of
from train.optimizers import MuonWithAdamW
from train.output import WHOLE, naming_what_cannot_be_written, remove_older_checkpoints
from train.sampling import EpochSampler, PictureDataset
from train.skipped import SkippedItem
from train.tuning.evaluation import AnswerScorer

logger = logging.getLogger(__name__)

STOPPING = stopping_signals()


class RegionTrainer(Trainer):
    """Transformers' Trainer; only what differs is here.

    Args:
        parts: Prefix of the parameters' names by part.
        rates: Learning rate by part, where another than `learning_rate`.
        optimizer_name: "trainer" or "muon".
        run: What makes this run (recipe), stored with each checkpoint.
        scorer: Answers held-out questions at each evaluation, or None.
    """

    def __init__(
        self,
        *args: Any,
        parts: Mapping[str, str],
        rates: Mapping[str, float],
        optimizer_name: str,
        run: Mapping[str, Any],
        scorer: AnswerScorer | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.parts = dict(parts)
        self.rates = dict(rates)
        self.optimizer_name = optimizer_name
        self.run = dict(run)
        self.scorer = scorer
        # Trainer would remove an older checkpoint before the new one is whole
        self.save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.encoder_decoder = self.model.config.get_text_config().is_encoder_decoder
        if self.label_smoother is not None and not self.encoder_decoder:
            # Trainer shifts the labels of the causal models that it knows by name: neither LLaVA nor BLIP-2
            self.label_smoother = partial(self.label_smoother, shift_labels=True)
        self.stopping = StopOnSignal()
        self.add_callback(self.stopping)
        self._unlogged: dict[str, Any] | None = None  # losses that a checkpoint was written before the log of

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        sampler = sampler_of(self.train_dataset if train_dataset is None else train_dataset, self.args)
        self.add_callback(TellEpoch(sampler))
        return sampler

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """As in Trainer; a signal to the whole process group, as launchers send it, does not end the workers. They are
        ended by `run_command`.
        """
        loader = super()._get_dataloader(*args, **kwargs)
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's cover starts the workers of the one inside
        inner.worker_init_fn = partial(_ignoring_signals, inner.worker_init_fn)
        return loader

    def resume(self, checkpoint: Path) -> None:
        """Train from a checkpoint to the end; what is logged is what an uninterrupted run logs."""
        self.args.eval_on_start = False
        whole = json.loads((checkpoint / WHOLE).read_text(encoding="utf-8"))
        self._unlogged = whole.get("unlogged")
        self.train(resume_from_checkpoint=str(checkpoint))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in Trainer, which would train one step more when it resumes at the last one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self._unlogged is not None:  # Trainer would begin with no loss
            self._tr_loss.fill_(self._unlogged["losses"][self.args.process_index])
            self._globalstep_last_logged = self._unlogged["since"]
            self._unlogged = None
        super()._run_epoch(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in Trainer; where it keeps the labels from the model, to smooth them, a T5 must be given what they say of
        its input.
        """
        if self.label_smoother is not None and self.encoder_decoder:
            model_inside = self.accelerator.unwrap_model(model)
            model_inside = model_inside.get_base_model() if hasattr(model_inside, "get_base_model") else model_inside
            shift = model_inside.language_model.prepare_decoder_input_ids_from_labels
            inputs = {**inputs, "decoder_input_ids": shift(labels=inputs["labels"])}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def was_shown(self, step: int) -> Callable[[SkippedItem], bool]:
        """Whether the run came to an item that was left out before the end of a step, by what it trains on alone:
        loader workers read ahead, and a killed run went beyond its last checkpoint.
        """
        args, count = self.args, len(self.train_dataset)
        rounds = count / (args.train_batch_size * args.world_size)  # batches of each process in an epoch
        rounds = math.floor(rounds) if args.dataloader_drop_last else math.ceil(rounds)
        accumulated = args.gradient_accumulation_steps
        epoch, steps = divmod(step, max(math.ceil(rounds / accumulated), 1))
        sampler = copy.copy(sampler_of(self.train_dataset, args))
        sampler.set_epoch(epoch)
        shown = set(list(sampler)[: steps * accumulated * args.train_batch_size * args.world_size])
        return lambda item: item.split != TRAIN or item.position < epoch * count or item.position in shown

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in Trainer, with a learning rate of its own for each part that has one.

        Raises:
            ValueError: If such a part is not trained.
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
        """The learning rate of each trained parameter whose part has its own.

        Raises:
            ValueError: If a part with a learning rate is not trained.
        """
        part = {name: part_of(name, self.parts) for name, weight in model.named_parameters() if weight.requires_grad}
        if frozen := sorted(self.rates.keys() - part.values()):
            raise ValueError(f"learning_rates: {', '.join(frozen)}: not trained; name it in train_parts too")
        return {name: self.rates[of] for name, of in part.items() if of in self.rates}

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Loss on the held-out samples, and how their questions are answered."""
        metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.scorer is not None:
            with (
                self.accelerator.autocast()
            ):  # as in training: trained weights may be of another dtype than frozen ones
                answered = self.scorer.answer(
                    self.model, self.accelerator.process_index, self.accelerator.num_processes
                )
            scores = self.scorer.score(gather_object(answered))
            scores = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
            self.log(scores)
            metrics |= scores
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in Trainer; a checkpoint is whole once `whole.json` is in it, the last file to be written."""
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with naming_what_cannot_be_written(f"the checkpoint {folder}", self.args.output_dir):
            if self.args.should_save:  # left incomplete by a run that was killed here
                shutil.rmtree(folder, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            # of each process, since the last log
            unlogged = {"losses": gather_object([self._tr_loss.item()]), "since": self._globalstep_last_logged}
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                sync_files(file for file in folder.rglob("*") if file.is_file())
                step = self.state.global_step
                write_json(folder / WHOLE, {"step": step, "unlogged": unlogged, "run": self.run})
                best = self.state.best_model_checkpoint
                remove_older_checkpoints(self.args.output_dir, self.save_total_limit, best)


def sampler_of(dataset: PictureDataset, args: TrainingArguments) -> EpochSampler:
    """The order of a run's samples."""
    lengths = dataset.lengths if args.train_sampling_strategy == "group_by_length" else None
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return EpochSampler(len(dataset), args.seed, lengths, batch)


def _ignoring_signals(init: Callable[[int], None] | None, worker: int) -> None:
    """Begin a worker of a data loader that its process alone ends."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    if init is not None:
        init(worker)


class TellEpoch(TrainerCallback):
    """Tells the sampler which epoch begins. Trainer does so too, but where a run of several processes goes on in the
    middle of an epoch, the sampler is wrapped deeper than it reaches, and would begin with epoch 0 again.
    """

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        """Tell."""
        self.sampler.set_epoch(int(state.epoch))


class StopOnSignal(TrainerCallback):
    """SIGTERM, SIGHUP or Ctrl-C: finish the step, save a checkpoint, end. All processes agree on the step.

    Attributes:
        received: The signal; 0 while there was none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Listen; not to what is ignored, as Ctrl-C is by a shell's background jobs."""
        heard = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._receive) for number in heard}

    def stop_listening(self) -> None:
        """Give the signals back: after the last save, which they do not interrupt, or an error."""
        while self._before:
            signal.signal(*self._before.popitem())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Ask for a checkpoint and the end, once any process got the signal."""
        if args.world_size > 1:
            flag = torch.tensor(int(self.received), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.received = int(flag)
        if self.received and state.global_step < state.max_steps:
            forget_closed_outputs()
            control.should_save = control.should_training_stop = True

    def _receive(self, number: int, frame: Any) -> None:
        self.received = number
        forget_closed_outputs()
        if number == signal.SIGINT:  # a second Ctrl-C need not wait for the end of the step; launchers repeat SIGTERM
            signal.signal(number, self._before[number])


def forget_closed_outputs() -> None:
    """Let stdout and stderr go nowhere once their terminal or pipe is closed, as SIGHUP says and Ctrl-C does to
    `| tee`: a progress bar that cannot be written would end the run before it has saved.
    """
    if not hasattr(select, "poll"):
        return
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
