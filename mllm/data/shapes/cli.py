"""The command `alpha-clip shapes`: draw the Shapes world as a data set."""

from __future__ import annotations

import argparse

from mllm.data.shapes import grit_layout, visual_genome_layout


def run(args: argparse.Namespace) -> int:
    """Draw what `alpha-clip shapes` asks for; returns the exit code."""
    if args.layout == "grit":
        asked = {"tars": args.tars, "min_objects": args.min_objects, "max_objects": args.max_objects}
        given = {name: value for name, value in asked.items() if value is not None}
        grit_layout.write(args.out, args.images, args.seed, args.split, **given)
    else:
        visual_genome_layout.write(args.out, args.images, args.seed, args.split, places=args.places)
    return 0
