"""Merge a LoRA adapter into its model: a directory that loads without PEFT.

python scripts/merge_adapter.py ADAPTER OUT [--model DIR_OR_HUB_ID] [--alpha-weights CKPT_OR_DIR]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import mllm
from alpha_clip_commands.command_line import ArgumentParser, exit_code, say
from mllm.files import check_new, replacing_folder
from mllm.loading import load_adapter

PROGRAM = "merge_adapter.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 2 after an error of one line, with nothing written."""
    return exit_code(PROGRAM, lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("out", type=Path, help="new directory")
    parser.add_argument("--model", help="the model that the adapter was trained for (default: the embedded one)")
    parser.add_argument("--alpha-weights", metavar="CKPT|DIR", help="as it was trained with")
    args = parser.parse_args(argv)
    check_new(args.out)
    model, processor = mllm.load(args.model, device="cpu", alpha_weights=args.alpha_weights)
    merged = load_adapter(model, args.adapter).merge_and_unload()
    with replacing_folder(args.out, "model", reads=[args.adapter], new=True) as folder:
        merged.save_pretrained(folder)
        processor.save_pretrained(folder)
    say(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
