"""Reports long steps on stderr when there is no progress bar: no command is silent for more than five seconds."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

PATIENCE = 4  # seconds between lines; half of it before the first, since the previous step may have been silent as long
STARTING = "importing PyTorch and Transformers"
_running: list[str] = []  # nested steps; the innermost is reported


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Report a step on stderr after two seconds, and again while it lasts. Also usable as a decorator.

    On a terminal this is one line, removed at the end. In distributed runs only rank 0 reports.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    done = threading.Event()
    _running.append(what)
    reporter = threading.Thread(target=_report, args=(what, len(_running), done), daemon=True)
    reporter.start()
    try:
        yield
    finally:
        done.set()
        reporter.join()
        _running.pop()


def _report(what: str, depth: int, done: threading.Event) -> None:
    start, in_place = time.monotonic(), sys.stderr.isatty()
    shown, wait = False, PATIENCE / 2
    while not done.wait(wait):
        wait = 1 if in_place and shown else PATIENCE
        if len(_running) == depth:
            text = f"{what} ... {time.monotonic() - start:.0f} s"
            shown = _write(f"\r\033[K{text}" if in_place else f"{text}\n")
    if shown and in_place:
        _write("\r\033[K")


def _write(text: str) -> bool:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):  # closed, or a full disk, which the exit code of the command reports
        return False
    return True
