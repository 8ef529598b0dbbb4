"""Which samples a run shows that goes on in the middle of an epoch."""

import signal
from types import SimpleNamespace

from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from torch.utils.data import BatchSampler
from transformers import TrainerState

from train.stop_on_signal import StopOnSignal
from train.trainer import RegionTrainer

SAMPLES = 8


def samples_from_the_middle_of(epoch, process):
    """What one of two processes is given for the rest of an epoch, one of its two batches being done."""
    told = []
    args = SimpleNamespace(
        train_sampling_strategy="random", train_batch_size=2, gradient_accumulation_steps=1, world_size=2, seed=1
    )
    trainer = SimpleNamespace(args=args, train_dataset=range(SAMPLES), add_callback=told.append)
    sampler = RegionTrainer._get_train_sampler(trainer)
    batches = BatchSamplerShard(BatchSampler(sampler, 2, drop_last=True), num_processes=2, process_index=process)
    # as Trainer does it
    for callback in told:
        callback.on_epoch_begin(args, TrainerState(epoch=epoch + 0.5), None)
    loader = skip_first_batches(DataLoaderShard(range(10 * SAMPLES), batch_sampler=batches), 1)
    loader.set_epoch(epoch)
    return [sample for batch in loader for sample in batch.tolist()]


def test_the_epoch_reaches_the_sampler_of_several_processes():
    for epoch in (0, 1, 3):
        shown = [samples_from_the_middle_of(epoch, process) for process in (0, 1)]
        assert all(len(samples) == 2 and {s // SAMPLES for s in samples} == {epoch} for samples in shown)
        assert not set(shown[0]) & set(shown[1])


def test_what_a_shell_ignores_for_its_jobs_stays_ignored():
    stopping, before = StopOnSignal(), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stopping.on_train_begin(None, None, None)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # launchers repeat it
        assert stopping.received == signal.SIGTERM
    finally:
        stopping.restore_handlers()
        signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
