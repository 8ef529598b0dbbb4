"""The command that exports a LLaVA to a directory that needs no code of ours but the processor's.

Example:
    export_model.py DIR OUT
    export_model.py llava-hf/llava-1.5-7b-hf OUT --alpha-weights clip_l14_336_grit_20m_4xe.pth --adapter ADAPTER
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import mllm
from mllm.command_line import ArgumentParser, exit_code, say
from mllm.export import export
from mllm.files import check_new

PROGRAM = "export_model.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 2 after an error of one line, with nothing written."""
    return exit_code(PROGRAM, lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="DIR|HUB_ID", help="a LLaVA-1.5, with our tower or CLIP's")
    parser.add_argument("out", metavar="OUT", type=Path, help="new directory")
    parser.add_argument("--adapter", metavar="DIR", type=Path, help="a LoRA adapter to merge first")
    parser.add_argument("--alpha-weights", metavar="CKPT|DIR", help="replace the tower's weights first")
    parser.add_argument("--dtype", default="auto", help="such as float16 (default: as stored)")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    args = parser.parse_args(argv)
    check_new(args.out)
    model, processor = mllm.load(
        args.model, device="cpu", dtype=args.dtype, revision=args.revision, alpha_weights=args.alpha_weights
    )
    export(model, processor, args.out, adapter=args.adapter)
    say(f'wrote {args.out}; AutoProcessor.from_pretrained("{args.out}", trust_remote_code=True) loads its processor')
    return 0
