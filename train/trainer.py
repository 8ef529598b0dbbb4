"""Trainer for conversations about regions: order of samples, learning rates by part, whole checkpoints, evaluation."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mllm.loading import EMBEDDED_MODEL
from train.evaluation import AnswerScorer
from train.lora import part_of
from train.optimizers import MuonWithAdamW
from train.sampling import EpochSampler

logger = logging.getLogger(__name__)

WHOLE = "whole.json"  # written last into a checkpoint: without it one is half-written
STOPPING = (signal.SIGTERM, signal.SIGINT)
TRAINING_RECORD = "training_record.json"  # beside a finished model: what made it, and its curves


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
        if self.label_smoother is not None and not self.model.config.get_text_config().is_encoder_decoder:
            # Trainer shifts the labels of the causal models that it knows by name: neither LLaVA nor BLIP-2
            self.label_smoother = partial(self.label_smoother, shift_labels=True)
        self.stopping = StopOnSignal()
        self.add_callback(self.stopping)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        grouped = args.train_sampling_strategy == "group_by_length"
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        sampler = EpochSampler(len(dataset), args.seed, dataset.lengths if grouped else None, batch)
        self.add_callback(TellEpoch(sampler))
        return sampler

    def get_train_dataloader(self) -> DataLoader:
        """As in Trainer; a signal to the whole process group, as launchers send it, does not end the workers."""
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's cover starts the workers of the one inside
        inner.worker_init_fn = partial(_ignoring_signals, inner.worker_init_fn)
        return loader

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
        try:
            if self.args.should_save:  # left half-written by a run that was killed here
                shutil.rmtree(folder, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_synced(folder / WHOLE, {"step": self.state.global_step, "run": self.run})
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError on a full disk
            last = last_whole_checkpoint(self.args.output_dir)
            raise OSError(
                f"cannot write the checkpoint {folder} ({' '.join(str(error).split())[:200]}); is the disk full? "
                f"The last whole one is {last or 'none'}: make room, and the same command goes on from there"
            ) from error


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
    """SIGTERM, or Ctrl-C: finish the step, save a checkpoint, end. All processes agree on the step.

    Attributes:
        received: The signal; 0 while there was none, or where it came in the last step.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Listen; not to what is ignored, as Ctrl-C is by a shell's background jobs."""
        heard = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._receive) for number in heard}

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Stop listening."""
        self.stop_listening()
        if state.global_step >= state.max_steps:
            self.received = 0

    def stop_listening(self) -> None:
        """Give the signals back, also where training ended in an error."""
        while self._before:
            signal.signal(*self._before.popitem())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Ask for a checkpoint and the end, once any process got the signal."""
        if args.world_size > 1:
            flag = torch.tensor(int(self.received), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.received = int(flag)
        if self.received and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def _receive(self, number: int, frame: Any) -> None:
        self.received = number
        if number == signal.SIGINT:  # a second Ctrl-C need not wait for the end of the step; launchers repeat SIGTERM
            signal.signal(number, self._before[number])


def last_whole_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The newest whole checkpoint of a run's folder."""
    folders = (marker.parent for marker in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{WHOLE}"))
    return max(folders, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def checkpoint_to_resume(output_dir: str | os.PathLike, run: Mapping[str, Any]) -> Path | None:
    """The newest whole checkpoint, None where there is none. Half-written ones are no checkpoints.

    Raises:
        ValueError: If the folder is of another run: other model, data or settings; or if it is what the run reads.
    """
    for read in (run.get("model") or EMBEDDED_MODEL, run.get("alpha_weights"), *run.get("data", ())):
        if read is not None and os.path.exists(read) and os.path.realpath(read) == os.path.realpath(output_dir):
            raise ValueError(f"output_dir: {output_dir} is what the run reads, and would be overwritten; give another")
    checkpoint, record = last_whole_checkpoint(output_dir), Path(output_dir) / TRAINING_RECORD
    if checkpoint is not None:
        refuse_other_run(checkpoint, checkpoint / WHOLE, run)
    elif record.exists():
        refuse_other_run(record, record, run)  # a finished one, its checkpoints deleted
    return checkpoint


def refuse_other_run(shown: Path, file: Path, run: Mapping[str, Any]) -> None:
    """Raise ValueError if what a file stores as its run is not this one; `shown` is named."""
    stored = json.loads(file.read_text(encoding="utf-8")).get("run", {})
    now = json.loads(json.dumps(run))  # as it would be stored
    changed = sorted(key for key in stored.keys() | now.keys() if stored.get(key) != now.get(key))
    if changed:
        first, others = changed[0], f"; also {', '.join(changed[1:])}" if changed[1:] else ""
        raise ValueError(
            f"{shown} is of another run: {first} was {stored.get(first)!r}, is {now.get(first)!r}{others}. Give "
            "another --output_dir, or the settings of that run to go on"
        )


def write_synced(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that the file is either whole on disk or absent."""
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
