"""The command `region-chat`: point at a part of an image and ask about it.

region-chat --image FILE --box 40,60,220,200 --ask "What is this?"
region-chat --image FILE --box 40,60,220,200            (a conversation; /help lists its commands)
region-chat --batch requests.jsonl --output answers.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from alpha_clip_commands.command_line import ArgumentParser, check_found, exit_code, leave_current_folder
from alpha_clip_commands.error_limit import add_max_errors
from alpha_clip_commands.flag_values import positive_number
from alpha_clip_commands.model_options import add_model_arguments, check_model_arguments, check_strength
from alpha_clip_commands.progress import STARTING, step
from alpha_clip_commands.region_options import REGION_OPTIONS, add_region_options, check_region, region_in

PROGRAM = "region-chat"


def build_parser() -> argparse.ArgumentParser:
    """All flags of the command."""
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--image", metavar="FILE", help="the image")
    region = parser.add_argument_group("region", "one of these; separate numbers by commas, spaces or both")
    region = region.add_mutually_exclusive_group()
    add_region_options(region)
    region.add_argument("--whole", action="store_true", help="the whole image")
    parser.add_argument("--strength", type=float, help="1: the region alone, 0: the whole image (default 1)")
    parser.add_argument("--ask", metavar="TEXT", help="one question; without it, a conversation")
    parser.add_argument("--save-overlay", metavar="PNG", help="write the image with its region and answer")
    parser.add_argument("--json", action="store_true", help="print one JSON object; without --ask, describe the region")
    parser.add_argument(
        "--max-new-tokens",
        type=positive_number,
        default=128,
        help="maximum length of an answer, in tokens (default 128)",
    )
    batch = parser.add_argument_group("batch file")
    batch.add_argument(
        "--batch",
        metavar="JSONL",
        help='requests {"id", "image", "region", "question"?}, one per line; paths are relative to this file',
    )
    batch.add_argument(
        "--output",
        metavar="JSONL",
        help='answers {"id", "answer"} or {"id", "error"}, written at the end. Rerun the same command to resume: '
        "answers are kept in OUTPUT.journal.jsonl, and only new, changed and interrupted requests are answered",
    )
    batch.add_argument("--batch-size", type=positive_number, help="requests per batch (default 16)")
    batch.add_argument("--retry-failed", action="store_true", help="answer failed requests of earlier runs again")
    add_max_errors(batch, "requests")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 1 if batch requests failed, 2 for invalid input."""
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
        from mllm.region_chat.cli import run

    return run(args)


def _check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that exclude or require each other."""
    check_strength(args.strength)
    if args.batch:
        _check_batch_arguments(args)
    elif args.output or args.batch_size is not None or args.retry_failed:
        raise ValueError("--output, --batch-size and --retry-failed require --batch FILE")
    elif not args.image:
        raise ValueError("expected --image FILE, or --batch FILE")
    elif args.ask is not None and not args.ask.strip():
        raise ValueError("--ask is empty; ask a question, or use --json without --ask to describe the region")
    elif not _has_region(args):
        options = ", ".join(f"--{option}" for option in (*REGION_OPTIONS, "whole"))
        if args.strength is not None:
            raise ValueError(f"--strength requires a region; expected one of {options}")
        if args.ask is not None or args.json:
            raise ValueError(f"expected a region, one of {options}; --whole is the whole image")


def _check_batch_arguments(args: argparse.Namespace) -> None:
    if not args.output:
        raise ValueError("--batch requires --output FILE for the answers")
    single = (args.image, args.strength, args.ask, args.save_overlay)
    if any(value is not None for value in single) or args.json or _has_region(args):
        raise ValueError("--batch reads images, regions and questions from its file; omit the other flags")


def _has_region(args: argparse.Namespace) -> bool:
    return args.whole or region_in(args) is not None
