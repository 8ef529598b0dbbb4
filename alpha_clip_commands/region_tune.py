"""The training commands `region-tune` and `alpha-clip train`: their arguments are checked before torch is imported.
Training itself is in `train.finetune` and `train.alpha_clip`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from alpha_clip_commands.command_line import exit_code, hide_loading_bars, leave_current_folder
from alpha_clip_commands.progress import STARTING, step
from alpha_clip_commands.training.programs import TRAIN_ALPHA_CLIP, TUNE, Program, check


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `region-tune`; returns the exit code."""
    return _start(TUNE, "train.finetune", sys.argv[1:] if argv is None else argv)


def train_alpha_clip(argv: Sequence[str] | None = None) -> int:
    """Entry point of `alpha-clip train`; returns the exit code."""
    return _start(TRAIN_ALPHA_CLIP, "train.alpha_clip", sys.argv[1:] if argv is None else argv)


def _start(program: Program, module: str, argv: Sequence[str]) -> int:
    argv = list(argv)

    def ready() -> int:
        check(program, argv)
        leave_current_folder()
        with step(STARTING):
            importlib.import_module(module)
            hide_loading_bars()
        return 0

    return exit_code(program.name, ready) or sys.modules[module].run(argv)


if __name__ == "__main__":
    raise SystemExit(main())
