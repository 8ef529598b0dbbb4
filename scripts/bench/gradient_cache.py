"""Gradient caching: memory, gradients and time of a batch of 1024 in chunks, compared with plain batches.

    python scripts/bench/gradient_cache.py [--batch 1024] [--chunk 64] [--pairs 3]

Float32 and random weights; both sides run alternately in one process, and ratios are medians.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from alpha_clip import VOCABULARY, add_cpu_time, add_sizes, build, timer_of, trainer_of
from timing import seconds

from alpha_clip_commands.command_line import ArgumentParser, exit_code
from vision_tower import AlphaCLIPModel

PROGRAM = "bench/gradient_cache.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return exit_code(PROGRAM, lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, width=192, layers=6, image_size=96, patch_size=12, text_width=128)
    add_cpu_time(parser)
    parser.add_argument("--batch", type=int, default=1024, help="pairs of the large batch")
    parser.add_argument("--chunk", type=int, default=64, help="pairs embedded at a time, and of the small batch")
    parser.add_argument("--pairs", type=int, default=3, help="timed pairs of cached and plain steps; 0 for none")
    args = parser.parse_args(argv)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    with tempfile.TemporaryDirectory() as folder:
        bench(args, Path(folder))
    return 0


def random_batch(model: AlphaCLIPModel, pairs: int, device: str = "cpu", shared: bool = False) -> dict[str, Any]:
    """Pairs of noise images and random texts of 16 tokens; two pairs share a text. With `shared`, all pairs share one
    image in memory.
    """
    generator, side = torch.Generator().manual_seed(1), model.config.vision_config.image_size
    pixels = torch.randn(1 if shared else pairs, 4, side, side, generator=generator).to(device)
    texts = max(pairs // 2, 1)
    ids = torch.randint(2, VOCABULARY, (texts, 16), generator=generator)
    ids[:, -1] = 1  # where the text tower's output is read
    of_pair = torch.arange(pairs) % texts
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "text_of": of_pair, "text_ids": of_pair.clone()}
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    return {**batch, "pixel_values": pixels.expand(pairs, -1, -1, -1), "names": ["noise"]}


def bench(args: argparse.Namespace, folder: Path) -> None:
    """Memory growth, gradients and time of gradient caching, compared with plain batches."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(args).to(device)
    trainers = {
        chunk: trainer_of(model, folder, "fp32", device == "cpu", cache_chunk=chunk) for chunk in (0, args.chunk)
    }
    batches = {pairs: random_batch(model, pairs, device) for pairs in (args.chunk, args.batch)}
    # the same pairs in reverse order, to measure the effect of rounding
    of_pairs = ("pixel_values", "text_of", "text_ids")
    batches[0] = batches[args.batch] | {name: batches[args.batch][name].flip(0) for name in of_pairs}

    def step(pairs: int, chunk: int) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()  # kept, so that gradients do not count as growth
        trainers[chunk].training_step(model, batches[pairs])

    step(args.chunk, 0)
    grown = {
        (pairs, chunk): growth(lambda: step(pairs, chunk), device) / 2**20  # noqa: B023
        for pairs, chunk in ((args.chunk, 0), (args.batch, args.chunk), (args.batch, 0))
    }
    print("| batch, float32 | without weights, gradients and images, MiB | relative to small |\n|---|---|---|")
    for (pairs, chunk), size in grown.items():
        how = f"in chunks of {chunk}" if chunk else "plain"
        print(f"| {pairs}, {how} | {size:.0f} | {size / grown[args.chunk, 0]:.2f} |", flush=True)
    gradients = {}
    for name, pairs, chunk in (("plain", args.batch, 0), ("cached", args.batch, args.chunk), ("other order", 0, 0)):
        step(pairs, chunk)
        gradients[name] = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    print(f"\ngradients of {args.batch} in float32, worst difference from those of the plain batch")
    for name in ("cached", "other order"):
        print(f"- {name}: {differences(gradients[name], gradients['plain'])}")
    ratios = []
    for _ in range(args.pairs):
        cached, plain = (seconds(lambda: step(args.batch, chunk), timer_of(args)) for chunk in (args.chunk, 0))  # noqa: B023
        ratios.append(cached / plain)
    if ratios:
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} pairs"
        print(f"time of a step, cached / plain: {statistics.median(ratios):.2f} ({spread})")


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> str:
    """The largest difference, relative to the largest gradient of all tensors and of the same tensor."""
    apart = {name: float((found[name] - gradient).abs().max()) for name, gradient in expected.items()}
    sizes = {name: float(gradient.abs().max()) for name, gradient in expected.items()}
    # key biases shift all scores of a row equally, so their gradient is rounding only
    own = {name: apart[name] / size for name, size in sizes.items() if not name.endswith("k_proj.bias")}
    worst = max(own, key=own.get)
    return (
        f"{max(apart.values()) / max(sizes.values()):.1e} of the largest gradient; {own[worst]:.1e} of the largest in "
        f"its own tensor ({worst}; key biases left out)"
    )


def growth(run: Callable[[], Any], device: str) -> int:
    """Peak bytes of tensors during a call, minus those before it; on a CPU as counted by PyTorch's profiler."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    in_order = sorted(events, key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in in_order), initial=0))


if __name__ == "__main__":
    raise SystemExit(main())
