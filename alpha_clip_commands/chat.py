"""The command `region-chat`: point at a part of an image and ask about it.

region-chat --image FILE --box 40,60,220,200 --ask "What is this?"
region-chat --image FILE --box 40,60,220,200            (a conversation; /help lists its commands)
region-chat --batch requests.jsonl --output answers.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from alpha_clip_commands.command_line import (
    ArgumentParser,
    add_max_errors,
    check_found,
    check_model,
    exit_code,
    leave_current_folder,
)
from alpha_clip_commands.flag_values import positive_number
from alpha_clip_commands.progress import STARTING, step
from alpha_clip_commands.region_syntax import check_region

PROGRAM = "region-chat"
DTYPES = ("auto", "float32", "bfloat16", "float16")
# option -> (form of Region.parse, how its value is written, what it is)
REGION_OPTIONS = {
    "box": ("box", "X0,Y0,X1,Y1", "box in pixels, half-open"),
    "box-xywh": ("xywh", "X,Y,WIDTH,HEIGHT", "box in pixels, as COCO writes it"),
    "nbox": ("nbox", "X0,Y0,X1,Y1", "box as fractions of width and height, 0 to 1"),
    "polygon": ("polygon", "X,Y,X,Y,X,Y[;...]", "polygon or polygons"),
    "mask": ("mask", "FILE.png", "mask image of the image's size"),
    "rle": ("rle", "FILE.json", "COCO annotation, or its segmentation (run lengths or polygons)"),
    "points": ("points", "X,Y[;X,Y]@RADIUS", "discs around points"),
    "stroke": ("stroke", "X,Y;X,Y@WIDTH", "a line, as drawn with a brush"),
}
FORMER_OPTIONS = {"point": "points"}  # still understood


def add_region_options(
    container: argparse._ActionsContainer, settings: Callable[[str], dict[str, Any]] = lambda form: {}
) -> None:
    """Add an option for each form of a region; `settings` are further arguments of `add_argument` for a form."""
    for option, (form, written, text) in REGION_OPTIONS.items():
        names = {option: text} | {old: argparse.SUPPRESS for old, new in FORMER_OPTIONS.items() if new == option}
        for name, shown in names.items():
            arguments = {"metavar": written, "help": shown, "dest": option.replace("-", "_"), **settings(form)}
            action = container.add_argument(f"--{name}", **arguments)
            # `ArgumentParser` then reads "24 3 60 39" as one value
            action.takes_numbers = form not in ("mask", "rle")  # type: ignore[attr-defined]


def region_in(args: argparse.Namespace) -> tuple[str, str] | None:
    """The option that gives the region, and its value; None without one (`--whole` has no value)."""
    for option in REGION_OPTIONS:
        if (value := getattr(args, option.replace("-", "_"))) is not None:
            return option, value
    return None


def build_parser() -> argparse.ArgumentParser:
    """All flags of the command."""
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--image", metavar="FILE", help="the image")
    region = parser.add_argument_group("region", "one of these; between numbers stand commas, spaces or both")
    region = region.add_mutually_exclusive_group()
    add_region_options(region)
    region.add_argument("--whole", action="store_true", help="the whole image")
    parser.add_argument("--strength", type=float, help="1: the region alone, 0: the whole image (default 1)")
    parser.add_argument("--ask", metavar="TEXT", help="one question; without it, a conversation")
    parser.add_argument("--save-overlay", metavar="PNG", help="write the image with its region and answer drawn on it")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object; without --ask the region is described"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive_number, default=128, help="longest answer, in tokens (default 128)"
    )
    batch = parser.add_argument_group("batch file")
    batch.add_argument(
        "--batch",
        metavar="JSONL",
        help='requests {"id", "image", "region", "question"?}, one a line; paths are relative to this file',
    )
    batch.add_argument(
        "--output",
        metavar="JSONL",
        help='answers {"id", "answer"} or {"id", "error"}, written at the end. Rerun the same command to resume: '
        "answers are kept in OUTPUT.journal.jsonl, and only new, changed and interrupted requests are answered",
    )
    batch.add_argument("--batch-size", type=positive_number, help="answers made at once (default 16)")
    batch.add_argument("--retry-failed", action="store_true", help="answer requests again that failed earlier")
    add_max_errors(batch, "requests")
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every command of this project shares."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", help="directory or hub id of a LLaVA or BLIP-2 (default: the embedded model, drawn scenes only)"
    )
    group.add_argument(
        "--alpha-weights",
        metavar="CKPT|DIR",
        help="Alpha-CLIP weights for the tower, loaded after the model's own; released LLaVAs carry plain CLIP",
    )
    group.add_argument("--adapter", metavar="DIR", help="LoRA adapter (PEFT) that was trained for the model")
    group.add_argument("--load-in", choices=["4bit", "8bit"], help="quantise the language model (bitsandbytes)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    group.add_argument("--device-map", help="as in from_pretrained, for example auto")
    group.add_argument("--dtype", default="auto", choices=DTYPES, help="default: as stored")
    group.add_argument("--attn-implementation", help="eager, sdpa, ... (default: Transformers' choice)")
    group.add_argument("--compile", action="store_true", help="compile the vision tower: slower start, faster images")
    group.add_argument("--seed", type=int, default=0, help="answers are greedy; this seeds whatever else draws numbers")
    group.add_argument("--revision", help="branch, tag or commit of a hub id")
    group.add_argument("--trust-remote-code", action="store_true", help="allow code from the model directory to run")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('alpha-clip-mllm')}")


def check_model_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for files and folders of `add_model_arguments` that are not there."""
    if args.model is not None:
        check_model(args.model)
    check_found("alpha weights", *([args.alpha_weights] if args.alpha_weights is not None else []))
    check_found("adapter", *([args.adapter] if args.adapter is not None else []))


def check_strength(strength: float | None) -> None:
    """Raise ValueError unless --strength is left out or from 0 to 1."""
    if strength is not None and not 0 <= strength <= 1:  # also NaN
        raise ValueError(f"expected a --strength from 0 to 1, got {strength}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 1 when batch requests failed, 2 for bad input."""
    return exit_code(PROGRAM, lambda: _run(build_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    _check_arguments(args)
    for what, path in (("image", args.image), ("batch file", args.batch)):
        if path and "://" not in path and not path.startswith("data:"):
            check_found(what, path)
    check_model_arguments(args)
    if (given := region_in(args)) is not None:
        option, value = given
        check_region(f"{REGION_OPTIONS[option][0]}:{value}")
    leave_current_folder()
    with step(STARTING):
        from mllm.chat import run

    return run(args)


def _check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together."""
    options = ", ".join(f"--{option}" for option in (*REGION_OPTIONS, "whole"))
    has_region = args.whole or region_in(args) is not None
    check_strength(args.strength)
    if args.batch:
        if not args.output:
            raise ValueError("--batch needs --output FILE for the answers")
        if (
            args.image
            or has_region
            or args.strength is not None
            or args.ask is not None
            or args.json
            or args.save_overlay is not None
        ):
            raise ValueError("--batch takes images, regions and questions from its file; leave the other flags out")
    elif args.output or args.batch_size is not None or args.retry_failed:
        raise ValueError("--output, --batch-size and --retry-failed belong to --batch FILE")
    elif not args.image:
        raise ValueError("expected --image FILE, or --batch FILE")
    elif args.ask is not None and not args.ask.strip():
        raise ValueError("--ask is empty; leave it out to have the region described (with --json), or ask something")
    elif not has_region and args.strength is not None:
        raise ValueError(f"--strength belongs to a region; expected one of {options}")
    elif not has_region and (args.ask is not None or args.json):
        raise ValueError(f"expected a region, one of {options}; --whole is the whole image")
