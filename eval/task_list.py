"""The output of `region-eval tasks`: all tasks on one screen, or one task in full."""

from __future__ import annotations

import textwrap

from alpha_clip_commands.task_names import METRICS, VG_SAMPLE
from eval import published
from eval.tasks import TASKS, Task

_WIDTH = 80  # columns of a terminal; the list and the prompt fit in 24 lines
_NAME, _ITEMS, _LABEL = 31, 8, 16  # columns
_SAMPLE_ROW = f"{VG_SAMPLE:<{_NAME}}{'N':>{_ITEMS}}   Visual Genome, N test regions"

_READERS = {
    True: "tested on records published by the authors of the data",
    False: "UNVERIFIED: follows documentation and code, not tested on published records",
    None: "",  # a format of this project
}


def all_tasks() -> str:
    """A line for each task or family of tasks."""
    rows: dict[str, str] = {}
    for task in TASKS.values():
        name = task.family or task.name
        items = f"{task.items:,}" if task.items else "-"
        mark = "*" if published.comparable(task.name) else " "
        rows[name] = f"{name:<{_NAME}}{items:>{_ITEMS}} {mark} {task.about}"
        if task.name == "vg-test/full":
            rows[VG_SAMPLE] = _SAMPLE_ROW
    head = f"{'task':<{_NAME}}{'items':>{_ITEMS}}   what is scored"
    tail = [
        "* has comparable published results.  - the number of items depends on the data.",
        "Results of different tasks are not comparable. For the details of a task:",
        "  region-eval tasks NAME",
    ]
    return "\n".join([head, *rows.values(), *tail])


def one_task(task: Task) -> str:
    """All properties of a task, and published results."""
    asked = "the question itself" if task.kind == "question" else "the model's default for a description"
    if task.kind == "either":
        asked = "the line's question; without one, the model's default for a description"
    by_kind = "those for questions or for descriptions; if a file has both, specify --metrics"
    data = "FILE" if task.name == "jsonl" else "DIR"
    indexed = {
        "what is scored": task.about,
        "items": f"{task.items:,} {task.item}s" if task.items else f"all {task.item}s of the data",
        "references": task.references,
        "data": task.files,
        "reader": _READERS[task.verified],
        "region": f"view {task.view}" if task.view else "box or mask (--view)",
        "prompt": asked if task.prompt is None else repr(task.prompt),
        "max. answer": f"{task.max_new_tokens} tokens",
        "metrics": ", ".join(METRICS[name] for name in task.metrics) or by_kind,
    }
    lines = [task.name, *(_fact(name, value) for name, value in indexed.items() if value)]
    return "\n".join([*lines, *_published(task), f"\nregion-eval run --task {task.name} --data {data} --out RUN"])


def _fact(name: str, value: str) -> str:
    return _wrapped(value, f"  {name:<{_LABEL}}", " " * (_LABEL + 2))


def _wrapped(text: str, first: str, rest: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _published(task: Task) -> list[str]:
    """Published results, times 100 as papers print them, and those that are not comparable, with the reason."""
    comparable, others = published.comparable(task.name), published.not_comparable(task.name)
    if not comparable and not others:
        return ["\nThere are no published results on this data."]
    lines = []
    if comparable:
        lines.append("\nComparable published results (times 100):")
        lines.append(f"  {'METEOR':>6} {'CIDEr':>6}  system")
    for row in comparable:
        trained = f", {row.trained}" if row.trained else ""
        numbers = f"  {row.meteor or '-':>6} {row.cider or '-':>6}  "
        lines.append(_wrapped(f"{row.system}{trained} ({row.source})", numbers, " " * len(numbers)))
    by_reason: dict[str, dict[str, None]] = {}
    for row, reason in others:
        by_reason.setdefault(reason, {})[row.system] = None
    if others:
        lines.append("\nPublished results that are not comparable, and why:")
    lines += [_wrapped(f"{reason}: {', '.join(systems)}", "  ", "    ") for reason, systems in by_reason.items()]
    return lines
