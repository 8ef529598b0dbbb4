"""Known mutations (known.json): a text of a source file, its replacement, and the tests that must then fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from tests.files import ROOT


class Row(NamedTuple):
    """A known mutation."""

    name: str
    file: str
    old: str
    new: str
    tests: list[str]

    def problem(self) -> str | None:
        """Why the row is outdated; None if it is valid."""
        path = ROOT / self.file
        found = path.read_text("utf-8").count(self.old) if path.is_file() else 0
        if found != 1:
            return f"expected its text once in {self.file}, got {found} times; update the row: {self.old!r}"
        if self.old == self.new or not self.tests:
            return "expected a change and tests that detect it"
        for test in self.tests:
            file, _, function = test.partition("::")
            if not (ROOT / file).is_file() or f"def {function}(" not in (ROOT / file).read_text("utf-8"):
                return f"test not found: {test}"
        compile(self.applied(), self.file, "exec", dont_inherit=True)
        return None

    def applied(self) -> str:
        """The mutated file."""
        return (ROOT / self.file).read_text("utf-8").replace(self.old, self.new)


def read_known() -> list[Row]:
    """The rows of known.json."""
    rows = json.loads((Path(__file__).parent / "known.json").read_text("utf-8"))
    return [Row(**row) for row in rows]
