"""The command `alpha-clip shapes`: write the Shapes dataset."""

from __future__ import annotations

import argparse

from mllm.data.shapes import grit_layout, visual_genome_layout


def run(args: argparse.Namespace) -> int:
    """Write the dataset; returns the exit code."""
    if args.layout == "grit":
        options = {"tars": args.tars, "min_objects": args.min_objects, "max_objects": args.max_objects}
        given = {name: value for name, value in options.items() if value is not None}
        grit_layout.write(args.out, args.images, args.seed, args.split, **given)
    else:
        visual_genome_layout.write(args.out, args.images, args.seed, args.split, places=args.places)
    return 0
