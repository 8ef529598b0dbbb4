"""Forks a child for each mutation from a process that has imported all dependencies, so that no child imports torch."""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.mutations.coverage import PACKAGES, ROOT

_MEMORY = 32 << 30  # address space of a child in bytes: a mutated size could allocate all memory
_OURS = (*PACKAGES, "scripts", "tests", "conftest")


class Outcome(NamedTuple):
    """The result of the tests in a child."""

    code: int  # exit code of pytest; negative if killed by a signal
    failed: list[str]  # tests, or files that could not be collected
    late: bool
    seconds: float


class Server:
    """A copy of the source tree, in which one file at a time is mutated and tests are run.

    Args:
        folder: Folder for the copy; its content is deleted.
        modules: The modules that a child will import, in order.
    """

    def __init__(self, folder: Path, modules: Iterable[str]) -> None:
        self.folder, self.tree = folder, folder / "tree"
        shutil.rmtree(folder, ignore_errors=True)
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        )  # fmt: skip
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.tree / name)
        self._set_environment()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in modules:
                # a module that a test created or patched during the measurement
                with contextlib.suppress(ImportError, AttributeError, RuntimeError, OSError):
                    importlib.import_module(name)
        self.changed = 0

    def _set_environment(self) -> None:
        shared = Path(os.environ.get("ALPHA_SHARED_DATA", ROOT.parent / "shared" / "data"))
        os.environ.update(PYTHONPATH=str(self.tree), ALPHA_SHARED_DATA=str(shared))
        os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

    @contextlib.contextmanager
    def changed_file(self, file: str, text: str) -> Iterator[None]:
        """Replace the text of a file while the context is active."""
        path = self.tree / file
        before, times = path.read_bytes(), (path.stat().st_atime, path.stat().st_mtime)
        self.changed += 1
        path.write_text(text, "utf-8")
        os.utime(path, (times[0], times[1] + self.changed))  # so that no stale bytecode is used
        try:
            yield
        finally:
            path.write_bytes(before)
            os.utime(path, times)

    def run(self, tests: Sequence[str], limit: float, *, first_only: bool = True, keep: bool = False) -> Outcome:
        """Run tests in a child, which is killed after `limit` seconds.

        Args:
            tests: Node IDs, or flags of pytest.
            limit: Seconds.
            first_only: Whether to stop at the first failure.
            keep: Whether to write bytecode: only for the tree without mutations.
        """
        report, began = self.folder / "failed.txt", time.monotonic()
        report.write_text("", "utf-8")
        sys.stdout.flush()
        child = os.fork()
        if not child:
            self._exit_with(lambda: self._test(tests, report, first_only, keep))
        late = False
        while not (done := os.waitpid(child, os.WNOHANG))[0]:
            late = time.monotonic() - began > limit
            if late:
                os.killpg(child, signal.SIGKILL)
                done = os.waitpid(child, 0)
                break
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):  # METEOR, and processes that the mutation left running
            os.killpg(child, signal.SIGKILL)
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)
        failed = list(dict.fromkeys(report.read_text("utf-8").splitlines()))
        return Outcome(os.waitstatus_to_exitcode(done[1]), failed, late, time.monotonic() - began)

    def _exit_with(self, work: Callable[[], int]) -> None:
        """Exit the child without running exit handlers of the parent."""
        code = 3
        try:
            code = work()
        finally:
            os._exit(code)

    def _test(self, tests: Sequence[str], report: Path, first_only: bool, keep: bool) -> int:
        os.setsid()
        log = os.open(self.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for number in (1, 2):
            os.dup2(log, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        os.chdir(self.tree)
        sys.dont_write_bytecode = not keep
        for name in [name for name in sys.modules if name.partition(".")[0] in _OURS]:
            del sys.modules[name]
        sys.path[:] = [str(self.tree), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
        import pytest

        flags = ["-q", "-p", "no:cacheprovider", "--basetemp", str(self.folder / "tmp"), "--hypothesis-seed=0"]
        return int(pytest.main([*flags, *(["-x"] if first_only else []), *tests], plugins=[_Recorder(report)]))


class _Recorder:
    """Records each failure immediately, because a child may be killed."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.failed: set[str] = set()

    def pytest_runtest_protocol(self, item) -> bool | None:
        """Skip the remaining parameters of a test that failed."""
        return True if item.nodeid.partition("[")[0] in self.failed else None

    def pytest_runtest_logreport(self, report) -> None:
        self._note(report)

    def pytest_collectreport(self, report) -> None:
        self._note(report)

    def _note(self, report) -> None:
        if report.failed:
            self.failed.add(report.nodeid.partition("[")[0])
            with open(self.file, "a", encoding="utf-8") as lines:
                lines.write(f"{report.nodeid}\n")
