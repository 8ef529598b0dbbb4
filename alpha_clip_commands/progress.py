"""Says on stderr what a command is doing, where no progress bar does: nothing is silent for more than five seconds."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

PATIENCE = 4  # seconds; for the first line half of it, since the step before may have been silent as long
STARTING = "importing PyTorch and Transformers"
_running: list[str] = []  # steps within each other; the innermost is named


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Name a step on stderr when it has taken two seconds, and again while it lasts: on a terminal in one line that is
    removed at the end, else line by line. Of several processes that share a run, the first does so. Also a decorator.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    done = threading.Event()
    _running.append(what)
    teller = threading.Thread(target=_tell, args=(what, len(_running), done), daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()
        _running.pop()


def _tell(what: str, depth: int, done: threading.Event) -> None:
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
    except (OSError, ValueError):  # closed, or a full disk; the command's own end says so
        return False
    return True
