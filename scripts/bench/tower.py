"""Compare the speed of the tower and its image processor with Transformers' CLIP; both sides run alternately in one
process, and ratios are medians.

    python scripts/bench/tower.py [--pairs 7] [--photos DIR] [--only tower|compiled|images|memory]
    python scripts/bench/tower.py --original DIR     compare with the code of SunzeY/AlphaCLIP in DIR (requires loralib)

The tower has the size of ViT-L/14-336 and random weights. Prints Markdown rows for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import TABLE_HEADER, interleaved, matrix_rate, print_ratio
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from alpha_clip_commands.command_line import ArgumentParser, exit_code
from vision_tower import (
    AlphaCLIPImageProcessor,
    AlphaCLIPVisionConfig,
    AlphaCLIPVisionModel,
    AlphaCLIPVisionModelWithProjection,
    Region,
)
from vision_tower.conversion import from_original

# Source: openai/clip-vit-large-patch14-336, config.json
VIT_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

PROGRAM = "bench/tower.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return exit_code(PROGRAM, lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="timed pairs for each row (default 7)")
    parser.add_argument("--photos", type=Path, help="folder of photographs (default: random pixels, 640 x 480)")
    parser.add_argument("--original", type=Path, help="checkout of SunzeY/AlphaCLIP: compare with its code only")
    parser.add_argument("--only", choices=["tower", "compiled", "images", "memory"])
    parser.add_argument("--peak", help=argparse.SUPPRESS)  # a child process: print the peak memory of one side
    args = parser.parse_args(argv)
    if args.peak:
        print(peak_of(*args.peak.split(",")))
        return 0
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n\n{TABLE_HEADER}")
    if args.original:
        bench_original(args)
        return 0
    parts = {"tower": bench_tower, "memory": bench_memory, "compiled": bench_compiled, "images": bench_images}
    for name, part in parts.items():
        if args.only in (None, name):
            part(args)
    return 0


def print_ratios(name: str, timed: list[tuple[float, float]]) -> None:
    """Print a row: our time divided by theirs."""
    print_ratio(name, [ours / theirs for ours, theirs in timed])


def build(side: str, dtype: str) -> torch.nn.Module:
    """The tower of one side with random weights."""
    torch.manual_seed(0)
    if side == "ours":
        model = AlphaCLIPVisionModel(AlphaCLIPVisionConfig(**VIT_L_336))
    else:
        model = CLIPVisionModel(CLIPVisionConfig(**VIT_L_336))
    return model.to(DTYPES[dtype]).eval()


def runner(model: torch.nn.Module, channels: int, backward: bool) -> Callable:
    """One forward, or forward and backward, of one image."""
    pixels = torch.randn(1, channels, 336, 336, dtype=model.dtype)

    def forward() -> None:
        with torch.no_grad():
            model(pixels)

    def forward_backward() -> None:
        model(pixels).last_hidden_state.float().square().mean().backward()
        model.zero_grad()

    return forward_backward if backward else forward


def bench_tower(args: argparse.Namespace) -> None:
    """Tower against CLIPVisionModel."""
    for dtype in DTYPES:
        ours, theirs = build("ours", dtype), build("theirs", dtype)
        for backward in (False, True):
            timed = interleaved(runner(ours, 4, backward), runner(theirs, 3, backward), args.pairs)
            print_ratios(f"tower / CLIPVisionModel, {dtype}, forward{' + backward' if backward else ''}: time", timed)


def bench_original(args: argparse.Namespace) -> None:
    """Tower with its projection, plain and compiled, against the original code on the same random weights."""
    spec = importlib.util.spec_from_file_location("original", args.original / "alpha_clip" / "model.py")
    original = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(original)
    for dtype, torch_dtype in DTYPES.items():
        torch.manual_seed(0)
        theirs = original.VisionTransformer(336, 14, width=1024, layers=24, heads=16, output_dim=768)
        config, weights = from_original(theirs.state_dict())
        ours = AlphaCLIPVisionModelWithProjection(config)
        ours.load_state_dict(weights)
        ours = ours.to(torch_dtype).eval()
        theirs = theirs.to(torch_dtype).eval()
        for module in theirs.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.float()  # they compute in float32
        image, alpha = torch.randn(1, 3, 336, 336, dtype=torch_dtype), torch.randn(1, 1, 336, 336, dtype=torch_dtype)
        pixels = torch.cat([image, alpha], dim=1)
        with torch.no_grad():
            run_ours, run_theirs = (lambda: ours(pixels).image_embeds), (lambda: theirs(image, alpha))  # noqa: B023
            apart = ((run_ours() - run_theirs()).abs().max() / run_theirs().abs().max()).item()
            print_ratios(
                f"tower / the original code, {dtype}, forward: time", interleaved(run_ours, run_theirs, args.pairs)
            )
            ours.vision_model.compile()
            print_ratios(
                f"compiled tower / the original code, {dtype}, forward: time",
                interleaved(run_ours, run_theirs, args.pairs),
            )
        print(f"| (features {apart:.1e} apart, relative, {dtype}) | | | |", flush=True)


def bench_memory(args: argparse.Namespace) -> None:
    """Peak memory, each side in a separate process."""
    for dtype in DTYPES:
        for backward in ("", "backward"):
            peaks = [
                int(subprocess.check_output([sys.executable, __file__, "--peak", f"{side},{dtype},{backward}"]))
                for side in ("ours", "theirs")
            ]
            what = f"tower / CLIPVisionModel, {dtype}, forward{' + backward' if backward else ''}: peak memory"
            print(f"| {what} | {peaks[0] / peaks[1]:.3f} | | 1 |", flush=True)


def peak_of(side: str, dtype: str, backward: str) -> int:
    """Peak resident memory of one side, as the operating system counts it."""
    runner(build(side, dtype), 4 if side == "ours" else 3, bool(backward))()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def bench_compiled(args: argparse.Namespace) -> None:
    """The compiled tower against an uncompiled CLIPVisionModel, and its share of this machine's matrix rate."""
    ours, theirs = build("ours", "bf16"), build("theirs", "bf16")
    ours.compile()
    timed = interleaved(runner(ours, 4, False), runner(theirs, 3, False), args.pairs)
    print_ratios("compiled tower / CLIPVisionModel, bf16, forward: time", timed)
    tokens, width = 577, VIT_L_336["hidden_size"]
    per_layer = 2 * tokens * 12 * width * width + 4 * tokens * tokens * width
    rate = VIT_L_336["num_hidden_layers"] * per_layer / statistics.median(a for a, _ in timed)
    print(
        f"| compiled tower, bf16: share of this machine's matrix rate | {rate / matrix_rate(tokens):.2f} | | |",
        flush=True,
    )


def bench_images(args: argparse.Namespace) -> None:
    """Image + region -> pixel_values against CLIPImageProcessor, on decoded images."""
    if args.photos:
        images = [
            Image.open(file).convert("RGB") for file in sorted(args.photos.iterdir()) if file.suffix in (".jpg", ".png")
        ]
    else:
        rng = np.random.default_rng(0)
        images = [Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)) for _ in range(8)]
    size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    clip = CLIPImageProcessor(**size)
    print(f"| ({len(images)} {'photographs' if args.photos else 'random images'}) | | | |")

    def stock() -> None:
        for image in images:
            clip(image, return_tensors="pt")

    def regions(form: str) -> list[Region]:
        boxes = [(p.width * 0.4, p.height * 0.4, p.width * 0.7, p.height * 0.6) for p in images]
        made = [Region.from_box(*(int(v) for v in box)) for box in boxes]
        if form == "mask":
            made = [Region.from_mask(r.mask(p.height, p.width) > 0) for r, p in zip(made, images, strict=True)]
        return made

    for geometry in ("crop", "pad"):
        ours = AlphaCLIPImageProcessor(geometry=geometry, **size)
        for form in ("box", "mask"):
            given = list(zip(images, regions(form), strict=True))
            timed = interleaved(lambda: [ours(p, r, return_tensors="pt") for p, r in given], stock, 3 * args.pairs)  # noqa: B023
            print_ratios(f"image + {form}, {geometry} / CLIPImageProcessor: time", timed)
    ours = AlphaCLIPImageProcessor(geometry="crop", **size)
    image = images[0]
    eight = [Region.from_box(image.width // 2 - 4 * i - 8, 100, image.width // 2 + 10 * i + 8, 160) for i in range(8)]
    timed = interleaved(
        lambda: ours(image, eight, return_tensors="pt"),
        lambda: [ours(image, region, return_tensors="pt") for region in eight],
        3 * args.pairs,
    )
    print_ratios("8 regions of one image / 8 calls: time", timed)


if __name__ == "__main__":
    raise SystemExit(main())
