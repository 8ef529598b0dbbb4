"""The command `region-eval`: evaluate a model on image regions, score predictions of any system, compare runs.

region-eval run --task shapes-caption --data DIR --out RUN --all-views
region-eval score predictions.jsonl --out RUN
region-eval compare RUN_A RUN_B
region-eval tasks [NAME]
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from alpha_clip_commands.command_line import ArgumentParser, add_command, check_found, exit_code, leave_current_folder
from alpha_clip_commands.error_limit import add_max_errors
from alpha_clip_commands.flag_values import positive_number
from alpha_clip_commands.model_options import add_model_arguments, check_model_arguments, check_strength
from alpha_clip_commands.progress import STARTING, step
from alpha_clip_commands.task_names import VIEWS, check_metric_names, check_task

PROGRAM = "region-eval"


def build_parser() -> argparse.ArgumentParser:
    """All flags of the command."""
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="run|score|compare|export|tasks")
    _add_run(commands)
    _add_score(commands)
    compare = add_command(
        commands,
        "compare",
        "print the differences between runs with their intervals",
        "  region-eval compare RUN_A RUN_B --html differences.html",
    )
    compare.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folders or prediction files; the first is the baseline"
    )
    compare.add_argument("--html", metavar="FILE", help="also write the comparison with images")
    compare.add_argument("--data", metavar="DIR", help="folder of the images (default: that of the first run)")
    compare.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default 0)")
    export = add_command(
        commands,
        "export",
        "write predictions and references as COCO caption files",
        "  region-eval export RUN --out COCO",
    )
    export.add_argument("predictions", metavar="FILE", help="a run, or JSONL of id, prediction, references")
    export.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder for results.json and annotations.json"
    )
    listed = add_command(
        commands,
        "tasks",
        "list the tasks, or show one with published results",
        "  region-eval tasks\n  region-eval tasks vg-test/full",
    )
    listed.add_argument("name", nargs="?", metavar="NAME", help="the task to show in full")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('alpha-clip-mllm')}")
    return parser


def _add_run(commands) -> None:
    parser = add_command(
        commands,
        "run",
        "evaluate a model on a task and write a report",
        """  region-eval run --task shapes-caption --data DIR --out RUN --all-views
  region-eval run --task vg-test/full --data VG --model DIR_OR_HUB_ID --out RUN
  region-eval run --task jsonl --data mine.jsonl --out RUN          rerun the same command to resume""",
    )
    add_model_arguments(parser)
    parser.add_argument("--task", required=True, help="see `region-eval tasks`")
    parser.add_argument(
        "--data", required=True, type=Path, metavar="DIR", help="folder of the task's files (for jsonl: a file)"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder of the run; rerun the same command to resume"
    )
    parser.add_argument("--view", choices=VIEWS, default=None, help="what the model receives (default box)")
    parser.add_argument(
        "--all-views", action="store_true", help="also evaluate the other views, to measure the effect of the region"
    )
    parser.add_argument(
        "--strength", type=float, default=1.0, help="1: the region alone, 0: the whole image (default 1)"
    )
    parser.add_argument(
        "--limit", type=positive_number, help="maximum number of samples; the result is then not comparable"
    )
    parser.add_argument("--batch-size", type=positive_number, default=32, help="samples per batch (default 32)")
    parser.add_argument("--prompt", help='prompt instead of the task\'s; "{question}" is replaced with the question')
    parser.add_argument(
        "--max-new-tokens", type=positive_number, help="maximum length of an answer, in tokens (default: the task's)"
    )
    _add_scoring(parser)


def _add_score(commands) -> None:
    parser = add_command(
        commands,
        "score",
        "score the predictions of any system",
        """  region-eval score predictions.jsonl --out SCORES
  region-eval score results.json --references annotations.json --out SCORES""",
    )
    parser.add_argument("predictions", metavar="FILE", help="JSONL of id, prediction, references; COCO results; a run")
    parser.add_argument(
        "--references", metavar="FILE", help="references, if FILE has none: JSONL, COCO or MDETR annotations"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder for metrics.json and report.html"
    )
    parser.add_argument("--task", help="protocol of the predictions: checks their number, adds published results")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the images, for the report")
    _add_scoring(parser)


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--metrics", nargs="+", metavar="ID", help="such as cider (default: the task's); meteor requires Java"
    )
    parser.add_argument(
        "--sentence-model",
        metavar="DIR",
        help="adds S-IoU and semantic similarity with this sentence-transformers model",
    )
    parser.add_argument("--no-intervals", action="store_true", help="skip the bootstrap, which is slow on large files")
    parser.add_argument("--allow-missing", action="store_true", help="score even if samples have no prediction")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default 0)")
    add_max_errors(parser, "samples")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, or 2 for bad input."""
    return exit_code(PROGRAM, lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    args = build_parser().parse_args(argv)
    _check_arguments(args)
    args.command_line = shlex.join([PROGRAM, *argv])
    leave_current_folder()
    with step(STARTING):
        import mllm  # noqa: F401, slow to import
        from eval.cli import run

    return run(args)


def _check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for an unknown task and for files that are not found."""
    for name in ("task", "name"):
        if getattr(args, name, None) is not None:
            check_task(getattr(args, name))
    for name in ("data", "predictions", "references", "sentence_model"):
        if getattr(args, name, None) is not None:
            check_found(name.replace("_", " "), getattr(args, name))
    check_found("run", *getattr(args, "runs", ()))
    if args.command == "run":
        if args.task != "jsonl" and not args.data.is_dir():
            raise ValueError(f"expected --data with the folder of the task's files, got the file {args.data}")
        check_model_arguments(args)
        check_strength(args.strength)
        if args.prompt is not None and not args.prompt.strip():
            raise ValueError("--prompt is empty; omit it to use the task's prompt")
    if getattr(args, "metrics", None):
        check_metric_names(args.metrics, args.sentence_model)
