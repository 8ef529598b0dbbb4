"""Timing shared by the benchmarks: interleaved runs in one process, and medians of ratios as Markdown rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

TABLE_HEADER = "| what | ratio (median) | range | pairs |\n|---|---|---|---|"


def seconds(run: Callable[[], Any], timer: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, by default wall time."""
    start = timer()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return timer() - start


def interleaved(ours: Callable[[], Any], theirs: Callable[[], Any], count: int) -> list[tuple[float, float]]:
    """Seconds of both sides, run alternately after a warmup."""
    ours(), theirs()
    return [(seconds(ours), seconds(theirs)) for _ in range(count)]


def print_ratio(name: str, ratios: Sequence[float], digits: int = 3) -> None:
    """Print a row of `TABLE_HEADER`."""
    median, low, high = (f"{value:.{digits}f}" for value in (statistics.median(ratios), min(ratios), max(ratios)))
    print(f"| {name} | {median} | {low} to {high} | {len(ratios)} |", flush=True)


def matrix_rate(rows: int, device: str = "cpu") -> float:
    """Floating point operations per second of a (rows, 1024) x (1024, 4096) product in bf16."""
    a, b = (torch.randn(shape, dtype=torch.bfloat16, device=device) for shape in ((rows, 1024), (1024, 4096)))
    best = min(seconds(lambda: [a @ b for _ in range(20)]) for _ in range(10))
    return 20 * 2 * rows * 1024 * 4096 / best


class Clock:
    """Seconds by part of a step.

    Args:
        parts: Names of the parts.
        timer: Wall time by default.
    """

    def __init__(self, parts: Sequence[str], timer: Callable[[], float] = time.perf_counter) -> None:
        self.timer = timer
        self.seconds = dict.fromkeys(parts, 0.0)

    def time(self, part: str, call: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call a function and add its time to a part."""
        start = self.timer()
        result = call(*args, **kwargs)
        self.seconds[part] += self.timer() - start
        return result

    def total(self, parts: Sequence[str] | None = None) -> float:
        """Seconds of some parts, by default all."""
        return sum(self.seconds[part] for part in parts or self.seconds)
