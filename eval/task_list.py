"""What `region-eval tasks` prints: all tasks on one screen, or one of them in full."""

from __future__ import annotations

import textwrap

from alpha_clip_commands.task_names import VG_SAMPLE
from eval import published
from eval.tasks import TASKS, Task

_WIDTH = 80  # columns of a terminal; 24 lines hold all tasks, and the prompt after them
_NAME, _ITEMS, _LABEL = 31, 8, 16  # columns
_OWN_SAMPLE = f"{VG_SAMPLE:<{_NAME}}{'N':>{_ITEMS}}   Visual Genome, N test regions"

_READERS = {
    True: "has read records that the data's authors published",
    False: "UNVERIFIED: follows documentation and code, no published record was read",
    None: "",  # a format of this project
}


def all_tasks() -> str:
    """A line for each task, or family of tasks."""
    rows: dict[str, str] = {}
    for task in TASKS.values():
        name = task.family or task.name
        items = f"{task.items:,}" if task.items else "-"
        mark = "*" if published.rows(task.name) else " "
        rows[name] = f"{name:<{_NAME}}{items:>{_ITEMS}} {mark} {task.about}"
        if task.name == "vg-test/full":
            rows[VG_SAMPLE] = _OWN_SAMPLE
    head = f"{'task':<{_NAME}}{'items':>{_ITEMS}}   what is scored"
    tail = [
        "* published numbers may stand beside it.  - as many items as the data has.",
        "Numbers of different tasks are never comparable. One task in full:",
        "  region-eval tasks NAME",
    ]
    return "\n".join([head, *rows.values(), *tail])


def one_task(task: Task) -> str:
    """Everything about a task: its data, what is asked, how it is scored, and the published numbers."""
    asked = "the question as it is" if task.kind == "question" else "the model's own wording for a description"
    if task.kind == "either":
        asked = "the line's question as it is; without one, the model's own wording for a description"
    by_kind = "those of questions or of descriptions, as the lines are; of both, name the --metrics"
    data = "FILE" if task.name == "jsonl" else "DIR"
    indexed = {
        "what is scored": task.about,
        "items": f"{task.items:,} {task.item}s" if task.items else f"as many {task.item}s as the data has",
        "references": task.references,
        "data": task.files,
        "reader": _READERS[task.verified],
        "region": f"shown as {task.region_input}" if task.region_input else "box or mask (--region-input)",
        "prompt": asked if task.prompt is None else repr(task.prompt),
        "longest answer": f"{task.max_new_tokens} tokens",
        "metrics": ", ".join(task.metrics) or by_kind,
    }
    lines = [task.name, *(_fact(name, value) for name, value in indexed.items() if value)]
    return "\n".join([*lines, *_published(task), f"\nregion-eval run --task {task.name} --data {data} --out RUN"])


def _fact(name: str, value: str) -> str:
    return _wrapped(value, f"  {name:<{_LABEL}}", " " * (_LABEL + 2))


def _wrapped(text: str, first: str, rest: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _published(task: Task) -> list[str]:
    """The published numbers, times 100 as papers print them, and those that may not be compared, with the reason."""
    comparable, others = published.rows(task.name), published.not_comparable(task.name)
    if not comparable and not others:
        return ["\nThere is no published number to compare it with."]
    lines = []
    if comparable:
        lines.append("\nPublished numbers that may stand beside it (times 100):")
        lines.append(f"  {'METEOR':>6} {'CIDEr':>6}  system")
    for row in comparable:
        trained = f", {row['trained']}" if row["trained"] else ""
        numbers = f"  {row['METEOR'] or '-':>6} {row['CIDEr'] or '-':>6}  "
        lines.append(_wrapped(f"{row['system']}{trained} ({row['source']})", numbers, " " * len(numbers)))
    by_reason: dict[str, dict[str, None]] = {}
    for row in others:
        by_reason.setdefault(row["reason"], {})[row["system"]] = None
    if others:
        lines.append("\nPublished numbers that may not, and why:")
    lines += [_wrapped(f"{reason}: {', '.join(systems)}", "  ", "    ") for reason, systems in by_reason.items()]
    return lines
