"""`alpha-clip score`: region-text matching with a CLIP or Alpha-CLIP (docs/ablations.md)."""

from __future__ import annotations

import argparse
import sys

from alpha_clip_commands.command_line import say
from alpha_clip_commands.error_limit import MAX_ERRORS
from alpha_clip_commands.training.contrastive_arguments import PairArguments
from eval.region_matching import score_region_text
from mllm.hub import offline_options
from mllm.loading import pick_device
from train.contrastive.data import RegionTextDataset
from train.contrastive.evaluation import validation_images
from train.run import open_index
from vision_tower import AlphaCLIPImageProcessor, AlphaCLIPModel, AlphaCLIPProcessor


def run(args: argparse.Namespace) -> int:
    """Score and print; returns the exit code.

    Raises:
        ValueError: If model or data cannot be used, or the data has no images in the split.
        OSError: If a file cannot be read.
    """
    data = PairArguments(data=[str(args.data)], region_input=args.region_input, max_missing=MAX_ERRORS)
    dataset = RegionTextDataset([open_index(str(args.data))], data, args.split, 0, None)
    images = validation_images(dataset, args.images)
    hub = offline_options(args.model)
    model = AlphaCLIPModel.from_pretrained(args.model, **hub).to(pick_device(args.device))
    if args.view == "alpha" and not model.vision_model.embeddings.patch_embedding.alpha.weight.any():
        raise ValueError(f"view: the alpha weight of {args.model} is zero, so it ignores regions; use another --view")
    processor = AlphaCLIPProcessor.from_pretrained(args.model, **hub)
    if not isinstance(processor.image_processor, AlphaCLIPImageProcessor):  # CLIP's own image processor crops the sides
        side = model.config.vision_config.image_size
        processor.image_processor = AlphaCLIPImageProcessor.for_size(side, "pad", like=processor.image_processor)
    about = f"{model.device}, {str(model.dtype).removeprefix('torch.')}, {model.config._attn_implementation}"
    say(f"{args.model}: {about}, {processor.image_processor.geometry}", sys.stderr)
    scores = score_region_text(model, processor, images, view=args.view, truncation=True, progress=True)
    say(f"{len(images):,} images, {sum(len(image.regions) for image in images):,} regions, {args.view}")
    for name, value in scores.items():
        say(f"{name}: {value:.3f}" if "cosine" in name else f"{name}: {value:.1%}")
    return 0
