"""Errors of torch.distributed after another process of the run has failed, as one line."""

from __future__ import annotations

import torch.distributed

from alpha_clip_commands.command_line import one_line

# parts of gloo's errors, which are not DistErrors
_LOST_PEER = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")


def lost_process(error: BaseException) -> str | None:
    """The message for an error of torch.distributed; None for any other error."""
    if isinstance(error, torch.distributed.DistError) or any(sign in str(error) for sign in _LOST_PEER):
        return f"another process of the run failed; see its error ({one_line(error)[:200]})"
    return None
