"""What a training command does around its trainer: errors, data, what makes the run, and the files it leaves."""

from __future__ import annotations

import builtins
import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Sequence, Sized
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainingArguments
from transformers.processing_utils import ProcessorMixin

from alpha_clip_commands.command_line import BAD_INPUT, FAILED, INTERRUPTED, exit_code, log_to_terminal, one_line, say
from alpha_clip_commands.progress import step
from mllm.data.index import TRAIN, RegionIndex, index_folder
from mllm.data.prepare import make_index
from mllm.files import write_file
from mllm.lost_process import lost_process
from train.output import TRAINING_RECORD, naming_what_cannot_be_written, step_of, write_record
from train.skipped import keep_skipped, only_once
from train.trainer import RegionTrainer

logger = logging.getLogger(__name__)

# What may differ between a run and its continuation: where and how it runs, not what it computes
_NOT_OF_THE_RUN = {
    "plan", "device_tflops", "output_dir", "local_rank", "deepspeed", "disable_tqdm", "report_to", "run_name",
    "logging_steps", "logging_first_step", "save_steps", "save_total_limit", "resume_from_checkpoint",
    "dataloader_num_workers", "dataloader_pin_memory", "use_cpu", "push_to_hub", "hub_token", "hub_model_id",
    "log_level", "ddp_backend", "ddp_timeout",
}  # fmt: skip


def run_command(name: str, train: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run a training command; errors that a user can fix become one line and exit code 2. Its loader workers
    always end with it; so does its process after an error, when it would wait for the other ranks.
    """
    others = multiprocessing.active_children()
    code = FAILED
    try:
        code = exit_code(name, lambda: _explaining(name, train, argv))
        return code
    finally:
        end_workers(others)
        _leave_process_group(code)


def _explaining(name: str, train: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Train; errors of libraries that a user can do something about become ones of one line.

    Raises:
        ValueError: As `train`, or that a loader worker has raised.
        OSError: As `train`, or where memory, a worker or another process is the reason.
    """
    try:
        return train(argv)
    except KeyboardInterrupt:
        say(f"{name}: interrupted", sys.stderr)
        raise
    except BrokenPipeError:  # whoever read the output has closed it
        raise
    except (ValueError, OSError, RuntimeError, MemoryError, EOFError, SafetensorError) as error:
        message = explanation(error)
        if message is None:
            raise
        raise OSError(message) from error


def explanation(error: BaseException) -> str | None:
    """An error of torch or another library as one line for the user; None for a bug in the code."""
    text = str(error)
    no_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if text.startswith("Caught ") and not no_memory:  # by a loader worker; its traceback, then the error
        kind = text.split(maxsplit=2)[1]
        caught = getattr(builtins, kind, None)
        is_input = isinstance(caught, type) and issubclass(caught, ValueError | OSError)
        return text.rpartition(f"{kind}: ")[2] if is_input or isinstance(error, ValueError | OSError) else None
    if isinstance(error, ConnectionResetError | EOFError):  # of a pipe to a worker that ended while it was read
        return (
            f"lost the connection to a loader worker or another process ({one_line(error)}); rerun the same command to "
            "resume"
        )
    if isinstance(error, ValueError | OSError):
        return one_line(error)
    last_line = (text.strip() or type(error).__name__).splitlines()[-1]
    if no_memory or "out of memory" in text or "allocate memory" in text:
        return (
            f"out of memory ({last_line[:200]}); lower per_device_train_batch_size (and raise "
            "gradient_accumulation_steps), set gradient_checkpointing: true, or use more GPUs with --deepspeed; then "
            "rerun the same command to resume"
        )
    if "DataLoader worker" in text:
        return (
            f"{one_line(error).rstrip('.')}. If the system ran out of memory, lower dataloader_num_workers; rerun the "
            "same command to resume"
        )
    if (lost := lost_process(error)) is not None:
        return lost
    return f"cannot read or write weights: {one_line(error)}" if isinstance(error, SafetensorError) else None


def end_workers(others: Sequence[BaseProcess]) -> None:
    """End the processes that loaders have started, all but `others`. They ignore SIGTERM, so that a launcher's does not
    reach them, and Python would wait for them at its exit without end.
    """
    left = [process for process in multiprocessing.active_children() if process not in others]
    if not left:
        return
    # torch looks out for workers that end, and would raise an error
    with _ignoring_ended_children():
        for process in left:
            process.kill()
        for process in left:
            process.join()
        error = sys.exc_info()[1]
        while error is not None:  # their frames hold the loaders
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__
        gc.collect()


@contextlib.contextmanager
def _ignoring_ended_children():
    in_main = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main else None
    try:
        yield
    finally:
        if in_main:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def train_and_save(trainer: RegionTrainer, checkpoint: Path | None) -> int:
    """Train from the checkpoint or from the start, and save; returns the exit code.

    Raises:
        ValueError: If the data is less than a batch.
    """
    refuse_less_than_a_batch(trainer)
    try:
        if checkpoint is None:
            trainer.train()
        else:
            logger.info("resuming from %s", checkpoint)
            if trainer.args.process_index == 0:
                keep_skipped(trainer.train_dataset.skipped.path, trainer.was_shown(step_of(checkpoint)))
            trainer.accelerator.wait_for_everyone()
            trainer.resume(checkpoint)
        if trainer.state.global_step < trainer.state.max_steps and (stopped := trainer.stopping.received):
            name = signal.Signals(stopped).name
            logger.warning(
                "stopped at step %d by %s; rerun the same command to resume", trainer.state.global_step, name
            )
            return 128 + stopped
        save(trainer, trainer.processing_class)  # which a signal does not interrupt
    finally:
        trainer.stopping.stop_listening()
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


def what_makes_the_run(training_args: TrainingArguments, *others: Any) -> dict[str, Any]:
    """The settings that decide what is learned: a checkpoint is resumed only under the same ones."""
    settings = training_args.to_sanitized_dict()
    for arguments in others:
        settings |= vars(arguments)
    run = {name: value for name, value in settings.items() if name not in _NOT_OF_THE_RUN}
    return {**run, "world_size": training_args.world_size}


def open_indexes(folders: Sequence[str], training_args: TrainingArguments) -> list[RegionIndex]:
    """The indexes of data folders, made now by one process of all machines where there are none (a large data set
    takes longer than the others wait: `alpha-clip prepare` makes it beforehand).
    """
    with training_args.main_process_first(local=False, desc="the index of the data"):
        return [open_index(folder) for folder in folders]


def open_index(folder: str) -> RegionIndex:
    """The index of a data folder, made now where there is none."""
    if index_folder(folder) is None:
        make_index(folder)
    return RegionIndex(folder)


@step("looking for the training images")
def refuse_missing_pictures(indexes: Sequence[RegionIndex], max_missing: float, args: TrainingArguments) -> None:
    """List the missing images of the training split in `missing_images.txt`.

    Raises:
        ValueError: If they are more than the share `max_missing`.
    """
    missing: Counter = Counter()
    for index in indexes:
        missing.update(index.missing_pictures(TRAIN))
    pictures = sum(int((index.split_of_picture == TRAIN).sum()) for index in indexes)
    listed = Path(args.output_dir) / "missing_images.txt"
    if args.process_index == 0:
        listed.unlink(missing_ok=True)
        if missing:
            write_file(listed, "".join(f"{name}\n" for name in missing).encode("utf-8", "backslashreplace"))
    count = missing.total()
    if count > max_missing * pictures:
        raise ValueError(
            f"{count} of {pictures} training images are missing (first: {next(iter(missing))}; all: {listed}), more "
            f"than max_missing ({max_missing:.1%}) allows"
        )
    if missing:
        logger.warning("%d of %d training images are missing and are skipped; listed in %s", count, pictures, listed)


def refuse_empty(samples: Sized, indexes: Sequence[RegionIndex], expected: str) -> None:
    """Raise ValueError where there are no samples: what is expected, and the splits that the data has."""
    if not len(samples):
        splits = ", ".join(sorted({name for index in indexes for name in index.record["splits"]}))
        raise ValueError(f"{expected}, the data has only {splits}")


def save(trainer: RegionTrainer, processor: ProcessorMixin) -> None:
    """Write the model or its adapter, the processor, and last what was done to the output folder. Killed meanwhile, the
    run is not finished: without the record it saves again.
    """
    out = Path(trainer.args.output_dir)
    with naming_what_cannot_be_written(f"the model to {out}", out):
        if trainer.is_world_process_zero():
            (out / TRAINING_RECORD).unlink(missing_ok=True)
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(out))
        if trainer.is_world_process_zero():
            processor.save_pretrained(out)
            listed = trainer.train_dataset.skipped.path
            skipped = only_once(listed, trainer.was_shown(trainer.state.global_step))
            if skipped:
                logger.warning("%d images and regions were skipped; they are listed in %s", len(skipped), listed)
            write_record(out, trainer.run, trainer.state.log_history, skipped)


def log_on_one_process(args: TrainingArguments) -> None:
    """Log what the first process says; of the others only errors."""
    log_to_terminal(logging.INFO if args.process_index == 0 else logging.ERROR)


def _leave_process_group(code: int) -> None:
    """Leave it together, with nothing of the run alive: else a process may end with SIGABRT under ZeRO-3. After an
    error the others may not come along: end at once, which they notice.
    """
    if not torch.distributed.is_initialized():
        return
    if code in (FAILED, BAD_INPUT, INTERRUPTED) and torch.distributed.get_world_size() > 1:
        if sys.exc_info()[1] is not None:
            traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    gc.collect()
    torch.distributed.destroy_process_group()
