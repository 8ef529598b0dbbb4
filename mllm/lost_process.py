"""Torch's errors after another process of the run has died, as one line."""

from __future__ import annotations

import torch.distributed

from alpha_clip_commands.command_line import one_line

# In the errors of gloo, which are not DistErrors
_LOST_PEER = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")


def lost_process(error: BaseException) -> str | None:
    """An error of torch's processes as one line for the user; None if it is something else."""
    if isinstance(error, torch.distributed.DistError) or any(sign in str(error) for sign in _LOST_PEER):
        return f"another process of the run failed; see its error ({one_line(error)[:200]})"
    return None
