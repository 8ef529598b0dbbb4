"""`alpha-clip merge`: merge a LoRA adapter into its model, which then loads without PEFT."""

from __future__ import annotations

import argparse

import mllm
from alpha_clip_commands.command_line import say
from mllm.folders import check_new, replacing_folder
from mllm.loading import load_adapter


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    check_new(args.out)
    model, processor = mllm.load(args.model, device="cpu", alpha_weights=args.alpha_weights)
    merged = load_adapter(model, args.adapter).merge_and_unload()
    with replacing_folder(args.out, "model", reads=[args.adapter], new=True) as folder:
        merged.save_pretrained(folder)
        processor.save_pretrained(folder)
    say(f"wrote {args.out}")
    return 0
