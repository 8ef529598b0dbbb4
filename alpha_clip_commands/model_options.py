"""The options that select and load a model, shared by all commands."""

from __future__ import annotations

import argparse
from importlib.metadata import version

from alpha_clip_commands.command_line import check_found, check_model

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model options and --version."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", help="directory or hub id of a LLaVA or BLIP-2 (default: the embedded model, synthetic scenes only)"
    )
    group.add_argument(
        "--alpha-weights",
        metavar="CKPT|DIR",
        help="Alpha-CLIP weights that replace the tower's; released LLaVAs contain plain CLIP",
    )
    group.add_argument("--adapter", metavar="DIR", help="LoRA adapter (PEFT) that was trained for the model")
    group.add_argument("--load-in", choices=["4bit", "8bit"], help="quantize the language model (bitsandbytes)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    group.add_argument("--device-map", help="as in from_pretrained, for example auto")
    group.add_argument("--dtype", default="auto", choices=DTYPES, help="default: as stored")
    group.add_argument("--attn-implementation", help="eager, sdpa, ... (default: Transformers' choice)")
    group.add_argument("--compile", action="store_true", help="compile the vision tower (slower start, faster images)")
    group.add_argument("--revision", help="branch, tag or commit of a hub id")
    group.add_argument("--trust-remote-code", action="store_true", help="allow code from the model directory to run")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('alpha-clip-mllm')}")


def check_model_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for files and folders of `add_model_arguments` that are not found."""
    if args.model is not None:
        check_model(args.model)
    check_found("alpha weights", *([args.alpha_weights] if args.alpha_weights is not None else []))
    check_found("adapter", *([args.adapter] if args.adapter is not None else []))


def check_strength(strength: float | None) -> None:
    """Raise ValueError unless --strength is omitted or from 0 to 1."""
    if strength is not None and not 0 <= strength <= 1:  # also NaN
        raise ValueError(f"expected a --strength from 0 to 1, got {strength}")
