"""The lines of the packages that each test executes, measured once, and the tests to run for a mutation.

As a pytest plugin (`-p tests.mutations.coverage`), this module writes the coverage map. Lines that a fixture executes
are attributed to every test that uses the fixture.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sys
import threading
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.mutations.operators import Mutation, python_files

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("alpha_clip_commands", "vision_tower", "mllm", "eval", "train")
MAP = "ALPHA_MUTATIONS_MAP"  # the file that the plugin writes


def sources_digest() -> str:
    """Digest of all sources and tests; the coverage is measured again if it changes."""
    digest = hashlib.sha256()
    for file in python_files(str(ROOT), (*PACKAGES, "scripts", "tests")):
        digest.update(file.encode() + (ROOT / file).read_bytes())
    return digest.hexdigest()


class Tracer:
    """Records the executed lines of the packages for each context (test or fixture)."""

    def __init__(self) -> None:
        self.prefixes = tuple(f"{ROOT}{os.sep}{package}{os.sep}" for package in PACKAGES)
        self.lines_of: dict[Any, frozenset | None] = {}  # of a code object; None outside the packages
        self.contexts: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        self.stack: list[str] = []
        self.current: dict[str, set[int]] = {}

    def enter(self, context: str) -> None:
        self.stack.append(context)
        self.current = self.contexts[context]
        sys.settrace(self.call)
        threading.settrace(self.call)

    def leave(self) -> None:
        self.stack.pop()
        if self.stack:
            self.current = self.contexts[self.stack[-1]]
        else:
            sys.settrace(None)
            threading.settrace(None)

    def call(self, frame: Any, event: str, argument: Any) -> Any:
        code = frame.f_code
        lines = self.lines_of.get(code, False)
        if lines is False:
            ours = code.co_filename.startswith(self.prefixes)
            lines = frozenset(line for _, _, line in code.co_lines() if line) if ours else None
            self.lines_of[code] = lines
        if lines is None or lines <= self.current[code.co_filename]:  # nothing new to see
            return None
        return self.line

    def line(self, frame: Any, event: str, argument: Any) -> Any:
        self.current[frame.f_code.co_filename].add(frame.f_lineno)
        return self.line


class Plugin:
    """Writes the coverage map at the end of the test run."""

    def __init__(self) -> None:
        self.tracer = Tracer()
        self.tests: dict[str, dict[str, Any]] = {}
        self.failed: list[str] = []

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        definitions = [d for found in item._fixtureinfo.name2fixturedefs.values() for d in found]
        fixtures = [_key(definition) for definition in definitions]
        self.tests[item.nodeid] = {"seconds": 0.0, "fixtures": fixtures, "passed": 0}
        self.tracer.enter(item.nodeid)
        try:
            return (yield)
        finally:
            self.tracer.leave()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Any:
        self.tracer.enter(_key(fixturedef))
        try:
            return (yield)
        finally:
            self.tracer.leave()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.tests[report.nodeid]["seconds"] += report.duration
        self.tests[report.nodeid]["passed"] += report.passed
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        root = f"{ROOT}{os.sep}"
        contexts = {
            context: {file.removeprefix(root): sorted(lines) for file, lines in files.items() if lines}
            for context, files in self.tracer.contexts.items()
        }
        passed = {name: test for name, test in self.tests.items() if test.pop("passed") == 3}  # setup, call, teardown
        content = {
            "digest": sources_digest(),
            "modules": [name for name in sys.modules if name.partition(".")[0] in _installed()],
            "failed": sorted(set(self.failed)),
            "tests": passed,
            "contexts": contexts,
        }
        partial = Path(f"{os.environ[MAP]}.partial")
        partial.write_text(json.dumps(content), "utf-8")
        partial.replace(os.environ[MAP])


def _key(definition: Any) -> str:
    return f"fixture {definition.baseid}::{definition.argname}@{definition.func.__code__.co_firstlineno}"


def _installed() -> set[str]:
    """Top-level names of the imported modules that are installed, without the packages of this project."""
    found = set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if "." not in name and ("site-packages" in file or f"python{sys.version_info[0]}." in file):
            found.add(name)
    return found - {*PACKAGES, "scripts", "tests", "conftest", "__main__"}


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin if a coverage map is requested."""
    if os.environ.get(MAP):
        config.pluginmanager.register(Plugin())


class Coverage:
    """A measured coverage map."""

    def __init__(self, path: Path) -> None:
        content = json.loads(path.read_text("utf-8"))
        self.digest, self.modules, self.failed = content["digest"], content["modules"], content["failed"]
        self.seconds = {name: test["seconds"] for name, test in content["tests"].items()}
        self.order = {name: number for number, name in enumerate(content["tests"])}
        self.tests_of: dict[tuple[str, int], set[str]] = defaultdict(set)
        self.users: dict[str, list[str]] = defaultdict(list)  # of a fixture
        for name, test in content["tests"].items():
            for fixture in test["fixtures"]:
                self.users[fixture].append(name)
        for context, files in content["contexts"].items():
            users = self.users.get(context, [context] if context in self.seconds else [])
            for file, lines in files.items():
                for line in lines:
                    self.tests_of[file, line].update(users)
        self.texts = {file: (ROOT / file).read_text("utf-8") for file in python_files(str(ROOT), PACKAGES)}

    def exclude(self, tests: Iterable[str]) -> None:
        """Never select these tests."""
        for found in self.tests_of.values():
            found.difference_update(tests)

    def tests(self, mutation: Mutation) -> set[str]:
        """The tests that execute the mutated statement or, at module level, use a name that it assigns."""
        lines, names = place(self.texts[mutation.file], mutation.line)
        if lines:
            return self._covering(mutation.file, lines)
        found: set[str] = set()
        for file, text in self.texts.items():
            used = {number for number, line in enumerate(text.splitlines(), 1) if names and names.search(line)}
            found |= self._covering(file, used)
        every = range(1, self.texts[mutation.file].count("\n") + 2)
        return found or self._covering(mutation.file, set(every))

    def _covering(self, file: str, lines: set[int]) -> set[str]:
        return set().union(*(self.tests_of.get((file, line), ()) for line in lines))

    def selected(self, mutation: Mutation, budget: float) -> list[str]:
        """Tests of at most `budget` seconds: first the test file of the module, then the fastest files."""
        files: dict[str, list[str]] = defaultdict(list)
        for test in self.tests(mutation):
            files[test.partition("::")[0]].append(test)
        own = f"test_{Path(mutation.file).stem}.py"
        cost = {file: (not file.endswith(own), sum(map(self.seconds.get, tests))) for file, tests in files.items()}
        chosen, spent = [], 0.0
        for file in sorted(files, key=lambda file: (*cost[file], file)):
            for test in sorted(files[file], key=self.order.get):
                if chosen and spent + self.seconds[test] > budget:
                    continue
                chosen.append(test)
                spent += self.seconds[test]
        return chosen


def place(text: str, line: int) -> tuple[set[int], re.Pattern | None]:
    """The lines of a statement in a function; at module level no lines, and a pattern of the names it assigns."""
    inside, innermost, statement = False, None, None
    for node in ast.walk(ast.parse(text)):  # outer nodes first
        if not isinstance(node, ast.stmt) or not node.lineno <= line <= node.end_lineno:
            continue
        if isinstance(node, ast.FunctionDef):
            innermost, inside = node, line >= node.body[0].lineno
        statement = node
    if innermost is not None and not inside:  # a default value
        return set(range(innermost.body[0].lineno, innermost.end_lineno + 1)), None
    if inside:
        body = getattr(statement, "body", None)
        last = body[0].lineno - 1 if isinstance(body, list) and body[0].lineno > line else statement.end_lineno
        return set(range(statement.lineno, max(last, statement.lineno) + 1)), None
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    names = {node.id for target in targets if target for node in ast.walk(target) if isinstance(node, ast.Name)}
    return set(), re.compile(rf"\b({'|'.join(sorted(names))})\b") if names else None
