"""The steps that both training programs share: run configuration, data checks, training, saving."""

from __future__ import annotations

import logging
import signal
from collections import Counter
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.processing_utils import ProcessorMixin

from alpha_clip_commands.progress import step
from mllm.data.index import TRAIN, RegionIndex, index_folder
from mllm.data.prepare import make_index
from mllm.files import write_file
from train.output import TRAINING_RECORD, explain_write_errors, step_of, write_training_record
from train.skipped import deduplicate_skipped, filter_skipped
from train.trainer import RegionTrainer

logger = logging.getLogger(__name__)

# Settings that may change when a run is resumed: they do not affect the result
_NOT_IN_RUN_CONFIG = {
    "plan", "device_tflops", "output_dir", "local_rank", "deepspeed", "disable_tqdm", "report_to", "run_name",
    "logging_steps", "logging_first_step", "save_steps", "save_total_limit", "resume_from_checkpoint",
    "dataloader_num_workers", "dataloader_pin_memory", "use_cpu", "push_to_hub", "hub_token", "hub_model_id",
    "log_level", "ddp_backend", "ddp_timeout",
}  # fmt: skip


def run_config(training_args: TrainingArguments, *others: Any) -> dict[str, Any]:
    """The settings that determine the result: a checkpoint is resumed only with the same ones."""
    settings = training_args.to_sanitized_dict()
    for arguments in others:
        settings |= vars(arguments)
    config = {name: value for name, value in settings.items() if name not in _NOT_IN_RUN_CONFIG}
    return {**config, "world_size": training_args.world_size}


def open_indexes(folders: Sequence[str], training_args: TrainingArguments) -> list[RegionIndex]:
    """The indexes of data folders. Missing ones are created by one process of all machines; for large datasets this
    takes longer than the other processes wait, so run `alpha-clip prepare` first.
    """
    with training_args.main_process_first(local=False, desc="the index of the data"):
        return [open_index(folder) for folder in folders]


def open_index(folder: str) -> RegionIndex:
    """The index of a data folder, created if it does not exist."""
    if index_folder(folder) is None:
        make_index(folder)
    return RegionIndex(folder)


def check_not_empty(samples: Sized, indexes: Sequence[RegionIndex], expected: str) -> None:
    """Raise ValueError if there are no samples, with what was expected and the splits of the data."""
    if not len(samples):
        splits = ", ".join(sorted({name for index in indexes for name in index.record["splits"]}))
        raise ValueError(f"{expected}, got data with the splits {splits}")


@step("checking the training images")
def check_missing_images(indexes: Sequence[RegionIndex], max_missing: float, args: TrainingArguments) -> None:
    """List the missing images of the training split in `missing_images.txt`.

    Raises:
        ValueError: If their share exceeds `max_missing`.
    """
    missing: Counter = Counter()
    for index in indexes:
        missing.update(index.missing_pictures(TRAIN))
    images = sum(int((index.split_of_picture == TRAIN).sum()) for index in indexes)
    listed = Path(args.output_dir) / "missing_images.txt"
    if args.process_index == 0:
        listed.unlink(missing_ok=True)
        if missing:
            write_file(listed, "".join(f"{name}\n" for name in missing).encode("utf-8", "backslashreplace"))
    count = missing.total()
    if count > max_missing * images:
        raise ValueError(
            f"{count} of {images} training images are missing (first: {next(iter(missing))}; all: {listed}), more "
            f"than max_missing ({max_missing:.1%}) allows"
        )
    if missing:
        logger.warning("%d of %d training images are missing and are skipped; listed in %s", count, images, listed)


def train_and_save(trainer: RegionTrainer, checkpoint: Path | None) -> int:
    """Train from a checkpoint or from scratch, and save the result; returns the exit code.

    Raises:
        ValueError: If the data has less than one batch.
    """
    check_one_batch(trainer)
    try:
        if checkpoint is None:
            trainer.train()
        else:
            logger.info("resuming from %s", checkpoint)
            if trainer.args.process_index == 0:
                filter_skipped(trainer.train_dataset.skipped.path, trainer.used_before(step_of(checkpoint)))
            trainer.accelerator.wait_for_everyone()
            trainer.resume(checkpoint)
        if trainer.state.global_step < trainer.state.max_steps and (stopped := trainer.stopping.received):
            name = signal.Signals(stopped).name
            logger.warning(
                "stopped at step %d by %s; rerun the same command to resume", trainer.state.global_step, name
            )
            return 128 + stopped
        save(trainer, trainer.processing_class)  # not interrupted by signals
    finally:
        trainer.stopping.restore_handlers()
    return 0


def check_one_batch(trainer: RegionTrainer) -> None:
    """Raise ValueError if `dataloader_drop_last` would drop the only batch."""
    args, samples = trainer.args, len(trainer.train_dataset)
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and samples < batch:
        raise ValueError(
            f"the data has {samples} samples, fewer than one batch of {batch}, and dataloader_drop_last drops "
            "incomplete batches; lower per_device_train_batch_size, or add data"
        )


def save(trainer: RegionTrainer, processor: ProcessorMixin) -> None:
    """Write the model or its adapter, the processor, and the training record. The record is written last: if the
    process is killed before, rerunning the command saves again.
    """
    out = Path(trainer.args.output_dir)
    with explain_write_errors(f"the model to {out}", out):
        if trainer.is_world_process_zero():
            (out / TRAINING_RECORD).unlink(missing_ok=True)
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(out))
        if trainer.is_world_process_zero():
            processor.save_pretrained(out)
            listed = trainer.train_dataset.skipped.path
            skipped = deduplicate_skipped(listed, trainer.used_before(trainer.state.global_step))
            if skipped:
                logger.warning("%d images and regions were skipped; they are listed in %s", len(skipped), listed)
            write_training_record(out, trainer.run_config, trainer.state.log_history, skipped)
