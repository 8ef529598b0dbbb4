"""The process of a training command: error messages, exit codes, loader workers and other ranks."""

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
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess

import torch
from safetensors import SafetensorError
from transformers import TrainingArguments

from alpha_clip_commands.command_line import BAD_INPUT, FAILED, INTERRUPTED, exit_code, log_to_terminal, one_line, say
from mllm.lost_process import lost_process


def run_command(name: str, train: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run a training command; errors that the user can fix become one line and exit code 2. Loader workers always end
    with the command. After an error, so does the process, instead of waiting for the other ranks.
    """
    children = multiprocessing.active_children()
    code = FAILED
    try:
        code = exit_code(name, lambda: _run_explained(name, train, argv))
        return code
    finally:
        end_workers(children)
        _leave_process_group(code)


def _run_explained(name: str, train: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Train; errors of libraries that the user can fix become one-line messages.

    Raises:
        ValueError: From `train` or a loader worker.
        OSError: From `train`, or if memory, a worker or another process is the cause.
    """
    try:
        return train(argv)
    except KeyboardInterrupt:
        say(f"{name}: interrupted", sys.stderr)
        raise
    except BrokenPipeError:  # the reader of the output closed it
        raise
    except (ValueError, OSError, RuntimeError, MemoryError, EOFError, SafetensorError) as error:
        message = explanation(error)
        if message is None:
            raise
        raise OSError(message) from error


def explanation(error: BaseException) -> str | None:
    """A one-line message for an error of torch or another library; None for a bug in the code."""
    text = str(error)
    is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if text.startswith("Caught ") and not is_memory:  # in a loader worker: its traceback, then the error
        kind = text.split(maxsplit=2)[1]
        caught = getattr(builtins, kind, None)
        is_input = isinstance(caught, type) and issubclass(caught, ValueError | OSError)
        return text.rpartition(f"{kind}: ")[2] if is_input or isinstance(error, ValueError | OSError) else None
    if isinstance(error, ConnectionResetError | EOFError):  # the pipe of a worker that ended
        return (
            f"lost the connection to a loader worker or another process ({one_line(error)}); rerun the same command to "
            "resume"
        )
    if isinstance(error, ValueError | OSError):
        return one_line(error)
    last_line = (text.strip() or type(error).__name__).splitlines()[-1]
    if is_memory or "out of memory" in text or "allocate memory" in text:
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
    """Kill the child processes that loaders have started, all except `others`. They ignore SIGTERM (launchers send it
    to the whole group), so Python would wait for them forever at exit.
    """
    left = [process for process in multiprocessing.active_children() if process not in others]
    if not left:
        return
    with _ignoring_ended_children():  # torch's handler would raise an error
        for process in left:
            process.kill()
        for process in left:
            process.join()
        error = sys.exc_info()[1]
        while error is not None:  # tracebacks keep the loaders alive
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


def _leave_process_group(code: int) -> None:
    """Destroy the process group, with no object of the run alive: otherwise a process may end with SIGABRT under
    ZeRO-3. After an error, exit at once, because the other ranks may not take part; they notice the exit.
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


def log_on_main_process(args: TrainingArguments) -> None:
    """Log at level INFO on the main process, and only errors on the others."""
    log_to_terminal(logging.INFO if args.process_index == 0 else logging.ERROR)
