"""Merge a LoRA adapter into its model: a directory that loads without PEFT.

python scripts/merge_adapter.py ADAPTER OUT [--model DIR_OR_HUB_ID] [--alpha-weights CKPT_OR_DIR]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import mllm
from mllm.loading import load_adapter


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 2 after an error of one line, with nothing written."""
    parser = argparse.ArgumentParser(
        prog="merge_adapter.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", type=Path)
    parser.add_argument("out", type=Path, help="new directory")
    parser.add_argument("--model", help="the model that the adapter was trained for (default: the embedded one)")
    parser.add_argument("--alpha-weights", metavar="CKPT|DIR", help="as it was trained with")
    args = parser.parse_args(argv)
    try:
        if args.out.exists():
            raise ValueError(f"{args.out} exists; choose a new name or delete it")
        model, processor = mllm.load(args.model, device="cpu", alpha_weights=args.alpha_weights)
        merged = load_adapter(model, args.adapter).merge_and_unload()
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
            merged.save_pretrained(Path(folder) / "merged")
            processor.save_pretrained(Path(folder) / "merged")
            os.replace(Path(folder) / "merged", args.out)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
