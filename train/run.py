"""What a training command does around its trainer: errors, data, what makes the run, and the files it leaves."""

from __future__ import annotations

import gc
import logging
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.processing_utils import ProcessorMixin

from mllm.data.index import TRAIN, RegionIndex, index_folder
from mllm.data.prepare import make_index
from train.sampling import skipped_pictures
from train.trainer import TRAINING_RECORD, RegionTrainer, write_synced

logger = logging.getLogger(__name__)

INTERRUPTED = 128 + signal.SIGINT  # as a shell reports it

# What may differ between a run and its continuation: where and how it runs, not what it computes
_NOT_OF_THE_RUN = {
    "plan", "device_tflops", "output_dir", "local_rank", "deepspeed", "disable_tqdm", "report_to", "run_name",
    "logging_steps", "logging_first_step", "save_steps", "save_total_limit", "resume_from_checkpoint",
    "dataloader_num_workers", "dataloader_pin_memory", "use_cpu", "push_to_hub", "hub_token", "hub_model_id",
    "log_level", "ddp_backend", "ddp_timeout",
}  # fmt: skip


def run_command(name: str, train: Callable[[Sequence[str]], int], argv: Sequence[str] | None) -> int:
    """Run a training command; what a user can mend becomes one line and exit code 2."""
    try:
        return train(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError) as error:
        # of a worker's error the last line, below its traceback
        message = str(error).strip().splitlines()[-1] if str(error).startswith("Caught ") else one_line(error)
        print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)  # noqa: T201
        return INTERRUPTED
    finally:
        _leave_process_group()


def train_and_save(trainer: RegionTrainer, checkpoint: Path | None) -> int:
    """Train from the checkpoint or from the start, and save; returns the exit code.

    Raises:
        ValueError: If the data is less than a batch.
    """
    refuse_less_than_a_batch(trainer)
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        trainer.stopping.stop_listening()
    if stopped := trainer.stopping.received:
        name = signal.Signals(stopped).name
        logger.warning("stopped at step %d by %s; the same command goes on", trainer.state.global_step, name)
        return 128 + stopped
    if checkpoint is not None and checkpoint.name.endswith(f"-{trainer.state.max_steps}"):
        logger.info("that was the last step; the model is written once more")
    save(trainer, trainer.processing_class)
    return 0


def refuse_less_than_a_batch(trainer: RegionTrainer) -> None:
    """Raise ValueError where `dataloader_drop_last` would leave nothing to train on."""
    args, samples = trainer.args, len(trainer.train_dataset)
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and samples < batch:
        raise ValueError(
            f"the data has {samples} samples, fewer than one batch of {batch}, and dataloader_drop_last leaves out "
            "what does not fill a batch; lower per_device_train_batch_size, or add data"
        )


def one_line(error: Exception) -> str:
    """What an error says, of a file the system's words without its number."""
    named = isinstance(error, OSError) and error.filename is not None and error.strerror
    return f"{error.filename}: {error.strerror}" if named else str(error)


def what_makes_the_run(training_args: TrainingArguments, *others: Any) -> dict[str, Any]:
    """The settings that decide what is learned: a checkpoint goes on only under the same ones."""
    settings = training_args.to_sanitized_dict()
    for arguments in others:
        settings |= vars(arguments)
    run = {name: value for name, value in settings.items() if name not in _NOT_OF_THE_RUN}
    return {**run, "world_size": training_args.world_size}


def open_indexes(folders: Sequence[str], training_args: TrainingArguments) -> list[RegionIndex]:
    """The indexes of data folders, made now by one process of all machines where there are none (a large data set
    takes longer than the others wait: scripts/prepare_data.py makes it beforehand).
    """
    with training_args.main_process_first(local=False, desc="the index of the data"):
        return [open_index(folder) for folder in folders]


def open_index(folder: str) -> RegionIndex:
    """The index of a data folder, made now where there is none."""
    if index_folder(folder) is None:
        make_index(folder)
    return RegionIndex(folder)


def refuse_missing_pictures(indexes: Sequence[RegionIndex], max_missing: float, out: Path) -> None:
    """List the missing pictures of the training split in `missing_images.txt`.

    Raises:
        ValueError: If they are more than the share `max_missing`.
    """
    missing: Counter = Counter()
    for index in indexes:
        missing.update(index.missing_pictures(TRAIN))
    pictures = sum(int((index.split_of_picture == TRAIN).sum()) for index in indexes)
    if not missing:
        return
    listed = out / "missing_images.txt"
    listed.write_text("\n".join(missing) + "\n", encoding="utf-8")
    count = missing.total()
    if count > max_missing * pictures:
        raise ValueError(
            f"{count} of {pictures} training pictures are missing (first: {next(iter(missing))}; all: {listed}), more "
            f"than max_missing ({max_missing:.1%}) allows"
        )
    logger.warning("%d of %d training pictures are missing, left out; listed in %s", count, pictures, listed)


def splits_of(indexes: Sequence[RegionIndex]) -> str:
    """The splits that the data has, for messages."""
    return ", ".join(sorted({name for index in indexes for name in index.record["splits"]}))


def save(trainer: RegionTrainer, processor: ProcessorMixin) -> None:
    """Write the model or its adapter, the processor, and what was done to the output folder."""
    out = trainer.args.output_dir
    trainer.save_model(out)
    if trainer.is_world_process_zero():
        processor.save_pretrained(out)
        skipped = sorted(skipped_pictures(trainer.train_dataset.skipped))
        record = {"run": trainer.run, "skipped_pictures": skipped, "log": trainer.state.log_history}
        write_synced(Path(out) / TRAINING_RECORD, record)


def log_on_one_process(args: TrainingArguments) -> None:
    """Log what the first process says; of the others only errors."""
    # DeepSpeed's calls, thousands of times
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    logging.basicConfig(level=logging.INFO if args.process_index == 0 else logging.ERROR, format="%(message)s")


def _leave_process_group() -> None:
    """Leave it together, with nothing of the run alive: else a process may end with SIGABRT under ZeRO-3."""
    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()
