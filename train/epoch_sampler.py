"""The order of the training samples."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from train.region_dataset import RegionDataset


class EpochSampler(Sampler[int]):
    """A new permutation for each epoch, which depends on the seed and the epoch only.

    Yields `epoch * N + sample`. `SetEpoch` and Trainer call `set_epoch`.

    Args:
        count: Number of samples N.
        seed: Seed of the run.
        lengths: (N,), length of each sample. If given, samples of similar length are in the same batch.
        batch_size: Samples per optimizer step, over all processes; used with `lengths`.
    """

    def __init__(self, count: int, seed: int, lengths: np.ndarray | None = None, batch_size: int = 1) -> None:
        self.count = count
        self.seed = seed
        self.lengths = None if lengths is None else lengths.tolist()
        self.batch_size = batch_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.lengths is None:
            order = torch.randperm(self.count, generator=generator).tolist()
        else:
            order = LengthGroupedSampler(self.batch_size, lengths=self.lengths, generator=generator)
        return (self.epoch * self.count + sample for sample in order)


def build_sampler(dataset: RegionDataset, args: TrainingArguments) -> EpochSampler:
    """The sampler of a training run."""
    lengths = dataset.lengths if args.train_sampling_strategy == "group_by_length" else None
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return EpochSampler(len(dataset), args.seed, lengths, batch)


class SetEpoch(TrainerCallback):
    """Calls `set_epoch` at the start of each epoch.

    Trainer does this too, but it does not reach the sampler when a run with several processes resumes in the middle of
    an epoch: the sampler is then nested too deeply, and the run would restart with the order of epoch 0.
    """

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        """Set the epoch."""
        self.sampler.set_epoch(int(state.epoch))
