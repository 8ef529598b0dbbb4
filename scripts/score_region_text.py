"""Score how well a CLIP or Alpha-CLIP tells regions apart by their texts: the columns of docs/ablations.md.

    python scripts/score_region_text.py --model DIR_OR_HUB_ID --data DIR [--split test] [--view alpha]

DIR is data that `train.alpha_clip` reads (GRIT, Visual Genome, RefCOCOg, a JSONL file). Views: alpha; for a CLIP, which
has none, whole, crop, masked, blurred or circle. The pictures of a plain CLIP are padded to a square.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from alpha_clip_commands.command_line import ArgumentParser, exit_code, say
from eval.region_text import VIEWS, score_region_text
from mllm.data.records import MAX_ERRORS
from mllm.loading import hub_lookup, pick_device
from train.alpha_clip import held_out
from train.region_text_arguments import PairArguments
from train.region_text_data import RegionTextDataset
from train.run import open_index
from vision_tower import AlphaCLIPImageProcessor, AlphaCLIPModel, AlphaCLIPProcessor

PROGRAM = "score_region_text.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return exit_code(PROGRAM, lambda: run(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id, with text tower and processor")
    parser.add_argument("--data", type=Path, required=True, help="folder or .jsonl")
    parser.add_argument("--split", default="test", help="of the data (default test)")
    parser.add_argument("--pictures", type=int, default=2000, help="at most, evenly spaced; all are held in memory")
    parser.add_argument("--region-input", choices=("mask", "box", "available"), default="mask", help="default: mask")
    parser.add_argument("--view", choices=VIEWS, default="alpha", help="how a region is shown (default alpha)")
    parser.add_argument("--device", default="auto", help="cpu, cuda ... (default: what there is)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Score and print; returns the exit code.

    Raises:
        ValueError: If model or data cannot be used, or the data has no pictures of the split.
        OSError: If something cannot be read.
    """
    data = PairArguments(data=[str(args.data)], region_input=args.region_input, max_missing=MAX_ERRORS)
    dataset = RegionTextDataset([open_index(str(args.data))], data, args.split, 0, None)
    pictures = held_out(dataset, args.pictures)
    hub = hub_lookup(args.model)
    model = AlphaCLIPModel.from_pretrained(args.model, **hub).to(pick_device(args.device))
    if args.view == "alpha" and not model.vision_model.embeddings.patch_embedding.alpha.weight.any():
        raise ValueError(f"view: the alpha weight of {args.model} is zero, it sees no region; take another --view")
    processor = AlphaCLIPProcessor.from_pretrained(args.model, **hub)
    if not isinstance(processor.image_processor, AlphaCLIPImageProcessor):  # a plain CLIP's, which cuts the sides off
        side = model.config.vision_config.image_size
        processor.image_processor = AlphaCLIPImageProcessor.for_size(side, "pad", like=processor.image_processor)
    about = f"{model.device}, {str(model.dtype).removeprefix('torch.')}, {model.config._attn_implementation}"
    say(f"{args.model}: {about}, {processor.image_processor.geometry}", sys.stderr)
    scores = score_region_text(model, processor, pictures, view=args.view, truncation=True, progress=True)
    print(f"{len(pictures):,} pictures, {sum(len(picture.regions) for picture in pictures):,} regions, {args.view}")
    for name, value in scores.items():
        print(f"{name}: {value:.3f}" if "cosine" in name else f"{name}: {value:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
