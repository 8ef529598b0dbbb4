"""The subcommands of `region-eval`. Its arguments are defined in `alpha_clip_commands.region_eval`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from alpha_clip_commands.command_line import say
from alpha_clip_commands.progress import step

if TYPE_CHECKING:
    from eval.predictions import Prediction
    from eval.results import Result
    from eval.tasks import Task


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    commands = {"run": _run, "score": _score, "compare": _compare, "export": _export, "tasks": _tasks}
    return commands[args.command](args)


def _run(args: argparse.Namespace) -> int:
    from eval import tasks
    from eval.evaluate import EvalConfig, evaluate
    from eval.generate import GenerationSettings
    from mllm.region_chat.cli import load_chat

    task = tasks.find(args.task)
    settings = GenerationSettings(
        _view(task, args.view),
        task.prompt if args.prompt is None else args.prompt,
        args.batch_size,
        task.max_new_tokens if args.max_new_tokens is None else args.max_new_tokens,
    )
    config = EvalConfig(
        task,
        args.data,
        args.out,
        settings,
        all_views=args.all_views,
        strength=args.strength,
        limit=args.limit,
        metrics=tuple(args.metrics or ()),
        sentence_model=args.sentence_model,
        intervals=not args.no_intervals,
        allow_missing=args.allow_missing,
        max_errors=args.max_errors,
        reads=tuple(path for path in (args.model, args.alpha_weights, args.adapter, args.sentence_model) if path),
        seed=args.seed,
        command=args.command_line,
    )
    if (rank := os.environ.get("LOCAL_RANK")) is not None and args.device == "auto":
        args.device = _device_of_rank(int(rank))
    result = evaluate(config, lambda: load_chat(args), args.model or "embedded")
    if result is not None:
        print_result(result, args.out)
    return 0


def _view(task: Task, requested: str | None) -> str:
    """The requested view, or the only one that the protocol allows."""
    if task.view is None:
        return requested or "box"
    if requested not in (None, task.view):
        raise ValueError(f"{task.name} requires the view {task.view}, got --view {requested}; omit --view")
    return task.view


def _device_of_rank(local_rank: int) -> str:
    """With several processes on a machine, each uses its own GPU."""
    from mllm.loading import pick_device

    device = pick_device()
    return f"{device}:{local_rank}" if device == "cuda" else device


def _score(args: argparse.Namespace) -> int:
    from eval import tasks
    from eval.evaluate import SCORES, is_scores
    from eval.predictions import read_predictions
    from eval.results import RUN_FILE
    from eval.score import check_metrics
    from mllm.folders import claim_folder
    from mllm.locks import locked

    predictions, notes = read_predictions(
        args.predictions, args.references, allow_missing=args.allow_missing, max_errors=args.max_errors
    )
    task = tasks.find(args.task) if args.task else None
    if task and task.items not in (None, len(predictions)) and not args.allow_missing:
        raise ValueError(f"{task.name} has {task.items:,} items, {args.predictions} has {len(predictions):,}")
    questions = [prediction.question for prediction in predictions]
    metrics = tasks.metrics_for(questions, task, args.metrics or (), args.sentence_model)
    check_metrics(metrics, args.sentence_model)
    if (args.out / RUN_FILE).exists():
        raise ValueError(f"{args.out} is a run, whose metrics would be overwritten; choose another --out")
    reads = [path for path in (args.predictions, args.references, args.data, args.sentence_model) if path]
    claim_folder(args.out, SCORES, reads=reads, known=is_scores)
    with locked(args.out, inside=True):
        result = _write_scores(args, task, predictions, notes, metrics)
    print_result(result, args.out)
    return 0


@step("scoring and writing the report")
def _write_scores(
    args: argparse.Namespace,
    task: Task | None,
    predictions: list[Prediction],
    notes: list[str],
    metrics: Sequence[str],
) -> Result:
    """Score predictions and write them together with metrics and report."""
    from msgspec import structs

    from eval.evaluate import write_results
    from eval.predictions import PREDICTIONS_FILE, write_predictions
    from eval.report import ReportData
    from eval.results import Protocol, Result, RunConfig
    from eval.score import measure, score

    measured = measure(predictions, metrics, args.sentence_model)
    scores = score(predictions, measured, metrics, with_intervals=not args.no_intervals, seed=args.seed)
    protocol = Protocol(
        item=task.item if task else None,
        references=task.references if task else None,
        items=len(predictions),
        predictions=str(args.predictions),
    )
    fields = structs.asdict(scores) | {"notes": notes + scores.notes}
    result = Result(**fields, task=args.task, protocol=protocol)
    write_predictions(args.out / PREDICTIONS_FILE, predictions)  # with their references, for `region-eval compare`
    config = RunConfig(task=args.task, protocol=protocol, model=str(args.predictions))
    report = ReportData(result, config, predictions, measured)
    return write_results(args.out, task, report, args.command_line, args.seed, args.data)


@step("comparing")
def _compare(args: argparse.Namespace) -> int:
    from eval.compare import check_html, compare

    if args.html is not None:
        check_html(args.html, reads=args.runs)
    comparison = compare([Path(run) for run in args.runs], seed=args.seed)
    say(comparison.to_text())
    if args.html is not None:
        comparison.write_html(Path(args.html), args.data)
    return 0


def _export(args: argparse.Namespace) -> int:
    from eval.coco_format import check_coco, write_coco
    from eval.predictions import read_predictions

    check_coco(args.out, reads=[args.predictions])
    write_coco(args.out, read_predictions(args.predictions)[0])
    say(f"wrote {args.out / 'results.json'} and {args.out / 'annotations.json'}")
    return 0


def _tasks(args: argparse.Namespace) -> int:
    from eval import task_list, tasks

    say(task_list.all_tasks() if args.name is None else task_list.one_task(tasks.find(args.name)))
    return 0


def print_result(result: Result, out: Path) -> None:
    """Print the values times 100 with their intervals, the main metric of each view, and notes."""
    from eval.results import label

    say(f"{result.task or 'predictions'}: {result.items:,} items")
    for name, value in result.metrics.items():
        interval = "" if value.low is None else f"  [{100 * value.low:.1f}, {100 * value.high:.1f}]"
        say(f"  {label(name):<12}{100 * value.value:7.1f}{interval}")
    if len(result.views) > 1:
        first = next(iter(result.metrics))
        say(f"{label(first)} by view:")
        for name, view in result.views.items():
            shown = view.shown_region_metrics
            of_shown = f"; references of the shown region: {100 * shown[first].value:.1f}" if shown else ""
            say(f"  {name:<12}{100 * view.metrics[first].value:7.1f}  ({view.items:,} items{of_shown})")
    for row in result.published:
        say(f"  published: {row.system}: METEOR {row.meteor}, CIDEr {row.cider} ({row.source})")
    for note in result.notes:
        say(f"note: {note}")
    say(f"report: {out / 'report.html'}")
