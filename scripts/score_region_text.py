"""Score how well a CLIP or Alpha-CLIP tells regions apart by their texts: the columns of docs/ablations.md.

    python scripts/score_region_text.py --model DIR_OR_HUB_ID --data DIR [--split test] [--view alpha]

DIR is data that `train.alpha_clip` reads (GRIT, Visual Genome, RefCOCOg, a JSONL file). Views: alpha; for a CLIP, which
has none, whole, crop, masked, blurred or circle.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.region_text import VIEWS, described_pictures, score_region_text
from mllm.chat import exit_code
from mllm.loading import pick_device
from train.alpha_clip import lookup
from train.region_text_data import held_out_samples
from train.run import open_index, splits_of
from vision_tower import AlphaCLIPImageProcessor, AlphaCLIPModel, AlphaCLIPProcessor

PROGRAM = "score_region_text.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="directory or hub id, with text tower and processor")
    parser.add_argument("--data", type=Path, required=True, help="folder or .jsonl")
    parser.add_argument("--split", default="test", help="of the data (default test)")
    parser.add_argument("--region-input", choices=("mask", "box", "available"), default="mask", help="default: mask")
    parser.add_argument("--view", choices=VIEWS, default="alpha", help="how a region is shown (default alpha)")
    parser.add_argument("--device", default="auto", help="cpu, cuda ... (default: what there is)")
    args = parser.parse_args(argv)
    return exit_code(PROGRAM, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Score and print; returns the exit code.

    Raises:
        ValueError: If model or data cannot be used, or the data has no pictures of the split.
        OSError: If something cannot be read.
    """
    index = open_index(str(args.data))
    of_split = np.flatnonzero(index.split_of_picture == args.split)
    if not len(of_split):
        raise ValueError(f"{args.data} has no pictures of the split {args.split!r}, only {splits_of([index])}")
    samples = (sample for picture in of_split for sample in held_out_samples(index, picture, args.region_input))
    pictures, hub = described_pictures(samples), lookup(args.model)
    model = AlphaCLIPModel.from_pretrained(args.model, **hub).to(pick_device(args.device))
    processor = AlphaCLIPProcessor.from_pretrained(args.model, **hub)
    if not isinstance(processor.image_processor, AlphaCLIPImageProcessor):  # a plain CLIP's
        processor.image_processor = AlphaCLIPImageProcessor.from_pretrained(args.model, **hub)
    scores = score_region_text(model, processor, pictures, view=args.view, truncation=True, progress=True)
    print(f"{len(pictures):,} pictures, {sum(len(picture.regions) for picture in pictures):,} regions, {args.view}")
    for name, value in scores.items():
        print(f"{name}: {value:.3f}" if "cosine" in name else f"{name}: {value:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
