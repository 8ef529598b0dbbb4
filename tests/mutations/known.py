"""Mutations that the tests must notice, in known.json: each a text of a file, what it becomes, and the tests that must
then fail.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Row(NamedTuple):
    """A known mutation."""

    name: str
    file: str
    old: str
    new: str
    tests: list[str]

    def problem(self) -> str | None:
        """Why the row no longer says anything; None where it does."""
        path = ROOT / self.file
        found = path.read_text("utf-8").count(self.old) if path.is_file() else 0
        if found != 1:
            return f"expected its text once in {self.file}, got {found} times; give the row today's text: {self.old!r}"
        if self.old == self.new or not self.tests:
            return "expected a change and tests that notice it"
        for test in self.tests:
            file, _, function = test.partition("::")
            if not (ROOT / file).is_file() or f"def {function}(" not in (ROOT / file).read_text("utf-8"):
                return f"there is no test {test}"
        compile(self.applied(), self.file, "exec", dont_inherit=True)
        return None

    def applied(self) -> str:
        """The changed file."""
        return (ROOT / self.file).read_text("utf-8").replace(self.old, self.new)


def read_known() -> list[Row]:
    """The rows of known.json."""
    rows = json.loads((Path(__file__).parent / "known.json").read_text("utf-8"))
    return [Row(**row) for row in rows]
