"""Contrastive training on one GPU: ViT-L/14-336 in bf16, and the largest batch that gradient caching allows.

    python scripts/bench/alpha_clip_gpu.py [--batch 256] [--chunk 128]

It has not been run, because no GPU was available. Weights and images are random.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from alpha_clip import add_sizes, build, trainer_of
from gradient_cache import random_batch
from timing import matrix_rate, seconds

from alpha_clip_commands.command_line import ArgumentParser, exit_code

PROGRAM = "bench/alpha_clip_gpu.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return exit_code(PROGRAM, lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, width=1024, layers=24, image_size=336, patch_size=14, text_width=768)
    parser.add_argument("--batch", type=int, default=256, help="pairs of a step")
    parser.add_argument("--chunk", type=int, default=128, help="pairs embedded at a time in the largest batch")
    parser.add_argument("--largest", type=int, default=32_768, help="stop doubling the cached batch here")
    args = parser.parse_args(argv)
    print(f"torch {torch.__version__}\n")
    with tempfile.TemporaryDirectory() as folder:
        bench(args, Path(folder))
    return 0


def bench(args: argparse.Namespace, folder: Path) -> None:
    """Regions per second, peak memory, share of the GPU's matrix rate, and the largest cached batch."""
    model = build(args).to("cuda")
    rate = matrix_rate(577 * 64, "cuda")
    print("| batch, bf16 | regions per second | peak memory, GiB | share of the matrix rate |\n|---|---|---|---|")
    tokens = (args.image_size // args.patch_size) ** 2 + 1
    forward = args.layers * (2 * tokens * 12 * args.width**2 + 4 * tokens**2 * args.width)  # per region

    def row(name: str, pairs: int, chunk: int, steps: int) -> bool:
        trainer = trainer_of(model, folder, "bf16", cpu=False, cache_chunk=chunk)
        batch = random_batch(model, pairs, shared=True)
        torch.cuda.reset_peak_memory_stats()

        def step() -> None:
            trainer.training_step(trainer.model_wrapped, batch)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()

        try:
            step()
            took = statistics.median(seconds(step) for _ in range(steps))
        except torch.OutOfMemoryError:
            trainer.optimizer.zero_grad()
            torch.cuda.empty_cache()
            print(f"| {pairs}, {name} | out of memory | | |", flush=True)
            return False
        share = 3 * forward * pairs / took / rate  # forward and backward; recomputation does not count
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"| {pairs}, {name} | {pairs / took:.0f} | {peak:.1f} | {share:.2f} |", flush=True)
        return True

    row("plain", args.batch, 0, 5)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    row("checkpointed", args.batch, 0, 5)
    pairs = 4096
    while pairs <= args.largest and row(f"checkpointed, in chunks of {args.chunk}", pairs, args.chunk, 1):
        pairs *= 2


if __name__ == "__main__":
    raise SystemExit(main())
