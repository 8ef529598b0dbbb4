"""Stopping a run with a signal: finish the step, save a checkpoint, exit."""

from __future__ import annotations

import os
import select
import signal
from typing import Any

import torch
from transformers import TrainerCallback

from alpha_clip_commands.command_line import stopping_signals

STOP_SIGNALS = stopping_signals()


class StopOnSignal(TrainerCallback):
    """On SIGTERM, SIGHUP or Ctrl-C, finishes the step, saves a checkpoint and stops. All processes stop at the same
    step.

    Attributes:
        received: The received signal, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Install the handlers, except for signals that are ignored, such as Ctrl-C in a background job of a shell."""
        handled = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._receive) for number in handled}

    def restore_handlers(self) -> None:
        """Restore the previous handlers: after an error, or after the last save, which signals must not interrupt."""
        while self._previous:
            signal.signal(*self._previous.popitem())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Request a checkpoint and the end of training if any process received a signal."""
        if args.world_size > 1:
            flag = torch.tensor(int(self.received), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.received = int(flag)
        if self.received and state.global_step < state.max_steps:
            discard_output_of_closed_streams()
            control.should_save = control.should_training_stop = True

    def _receive(self, number: int, frame: Any) -> None:
        self.received = number
        discard_output_of_closed_streams()
        if number == signal.SIGINT:  # a second Ctrl-C stops at once; launchers send SIGTERM repeatedly
            signal.signal(number, self._previous[number])


def discard_output_of_closed_streams() -> None:
    """Redirect stdout and stderr to the null device if their terminal or pipe is closed, which SIGHUP indicates and
    Ctrl-C causes with `| tee`. A progress bar that cannot be written would end the run before it has saved.
    """
    if not hasattr(select, "poll"):
        return
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0)):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
