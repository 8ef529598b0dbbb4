"""What the command `region-eval` does, once its arguments are read (`alpha_clip_commands.region_eval`)."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from alpha_clip_commands.command_line import say
from alpha_clip_commands.progress import step

if TYPE_CHECKING:
    from eval.tasks import Task


def run(args: argparse.Namespace) -> int:
    """Do what the arguments ask for; returns the exit code."""
    commands = {"run": _run, "score": _score, "compare": _compare, "export": _export, "tasks": _tasks}
    return commands[args.command](args)


def _run(args: argparse.Namespace) -> int:
    from eval import tasks
    from eval.evaluate import Plan, evaluate
    from eval.generate import Settings
    from mllm.region_chat.cli import load_chat

    task = tasks.find(args.task)
    settings = Settings(
        _region_input(task, args.region_input),
        task.prompt if args.prompt is None else args.prompt,
        args.batch_size,
        task.max_new_tokens if args.max_new_tokens is None else args.max_new_tokens,
    )
    plan = Plan(
        task,
        args.data,
        args.out,
        settings,
        controls=args.controls,
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
    metrics = evaluate(plan, lambda: load_chat(args), args.model or "embedded")
    if metrics is not None:
        print_metrics(metrics, args.out)
    return 0


def _region_input(task: Task, asked: str | None) -> str:
    """The input that is asked for, or the only one that the protocol allows."""
    if task.region_input is None:
        return asked or "box"
    if asked not in (None, task.region_input):
        raise ValueError(f"{task.name} shows the region as {task.region_input}; leave --region-input out")
    return task.region_input


def _device_of_rank(local_rank: int) -> str:
    """With several processes on a machine, each has a GPU of its own."""
    from mllm.loading import pick_device

    device = pick_device()
    return f"{device}:{local_rank}" if device == "cuda" else device


def _score(args: argparse.Namespace) -> int:
    from eval import tasks
    from eval.evaluate import SCORES, is_scores
    from eval.predictions import read_predictions
    from eval.score import check_metrics
    from mllm.folders import claim_folder
    from mllm.locks import locked

    records, notes = read_predictions(
        args.predictions, args.references, allow_missing=args.allow_missing, max_errors=args.max_errors
    )
    task = tasks.find(args.task) if args.task else None
    if task and task.items not in (None, len(records)) and not args.allow_missing:
        raise ValueError(f"{task.name} has {task.items:,} items, {args.predictions} has {len(records):,}")
    questions = [record.get("question") for record in records]
    metrics = tasks.metrics_for(questions, task, args.metrics or (), args.sentence_model)
    check_metrics(metrics, args.sentence_model)
    if (args.out / "run.json").exists():
        raise ValueError(f"{args.out} is a run, whose own metrics would be lost; choose another --out")
    reads = [path for path in (args.predictions, args.references, args.data, args.sentence_model) if path]
    claim_folder(args.out, SCORES, reads=reads, known=is_scores)
    with locked(args.out, inside=True):
        found = _write_scores(args, task, records, notes, metrics)
    print_metrics(found, args.out)
    return 0


@step("scoring and writing the report")
def _write_scores(
    args: argparse.Namespace, task: Task | None, records: list[dict], notes: list[str], names: Sequence[str]
) -> dict:
    """Score predictions and write them, with metrics and report; the content of metrics.json."""
    from eval.evaluate import write_results
    from eval.predictions import write_predictions
    from eval.report import Results
    from eval.score import measure, score

    measured = measure(records, names, args.sentence_model)
    metrics = score(records, names, with_intervals=not args.no_intervals, seed=args.seed, measured=measured)
    metrics["notes"] = notes + metrics["notes"]
    about = {"item": task.item, "references": task.references} if task else {}
    protocol = {**about, "items": len(records), "predictions": str(args.predictions)}
    metrics = {"task": args.task, "protocol": protocol, **metrics, "inputs": {}}
    write_predictions(args.out / "predictions.jsonl", records)  # joined with their references, to compare with
    record = {"task": args.task, "protocol": protocol, "model": str(args.predictions)}
    results = Results(metrics, record, records, measured)
    return write_results(args.out, task, results, args.command_line, args.seed, args.data)


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


def print_metrics(metrics: dict, out: Path) -> None:
    """The numbers as people know them, times 100, with their intervals; then the inputs side by side."""
    say(f"{metrics['task'] or 'predictions'}: {metrics['items']:,} items")
    for name, entry in metrics["metrics"].items():
        interval = "" if entry["low"] is None else f"  [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"
        say(f"  {name:<12}{100 * entry['value']:7.1f}{interval}")
    if len(metrics["inputs"]) > 1:
        first = next(iter(metrics["metrics"]))
        say(f"does it look where it is told? {first} under each input:")
        for name, entry in metrics["inputs"].items():
            shown = f"; of the region shown {100 * entry['shown'][first]['value']:.1f}" if "shown" in entry else ""
            say(f"  {name:<12}{100 * entry['metrics'][first]['value']:7.1f}  ({entry['items']:,} items{shown})")
    for row in metrics["published"]:
        say(f"  beside it: {row['system']}: METEOR {row['METEOR']}, CIDEr {row['CIDEr']} ({row['source']})")
    for note in metrics["notes"]:
        say(f"note: {note}")
    say(f"report: {out / 'report.html'}")
