"""The mutation testing tool: mutations, coverage, and whether the known mutations still apply."""

import pytest

from tests.mutations.coverage import place
from tests.mutations.known import Row, read_known
from tests.mutations.operators import mutations_of

SOURCE = '''"""Text with 1 and True."""
import os

LIMIT: int = 3
NAMES = ("a", "b")


def f(x: int = 2, *, deep: bool = True) -> bool:
    """Docstring: 1 < 2."""
    logger.info("says %d", x + 1)
    items.append(x)
    total = x
    total -= 4
    if not x or deep:
        raise ValueError(f"{x + 5} is not in {6}")
    return min(x, total) < len(items[1:x]) and g(x, deep, é=x)


class A:
    def __str__(self) -> str:
        return "%d" % (7 + 8)
'''


def test_every_kind_of_change_is_made_and_no_text_is_changed():
    found = {(m.operator, m.old, m.new) for m in mutations_of("a.py", SOURCE)}
    assert found == {
        ("number + 1", "3", "(3 + 1)"),
        ("number - 1", "3", "(3 - 1)"),
        ("number + 1", "2", "(2 + 1)"),
        ("number - 1", "2", "(2 - 1)"),
        ("number + 1", "4", "(4 + 1)"),
        ("number - 1", "4", "(4 - 1)"),
        ("number + 1", "1", "(1 + 1)"),
        ("number - 1", "1", "(1 - 1)"),
        ("constant changed", "True", "False"),
        ("statement deleted", "items.append(x)", "pass"),
        ("statement deleted", "total -= 4", "pass"),
        ("condition negated", "not x or deep", "(not (not x or deep))"),
        ("not removed", "not x", "(x)"),
        ("and/or swapped", "or", "and"),
        ("and/or swapped", "and", "or"),
        ("comparison swapped", "<", "<="),
        ("min/max swapped", "min", "max"),
        ("arguments swapped", "x, total", "total, x"),
        ("arguments swapped", "x, deep", "deep, x"),
        ("keyword argument dropped", ", é=x", ""),
        ("slice off by one", "1", "(1) + 1"),
        ("slice off by one", "x", "(x) - 1"),
        (
            "return of a neutral value",
            "min(x, total) < len(items[1:x]) and g(x, deep, é=x)",
            "not (min(x, total) < len(items[1:x]) and g(x, deep, é=x))",
        ),
    }


def test_a_mutation_is_one_change_with_a_name_of_its_own():
    mutations = mutations_of("a.py", SOURCE)
    assert len({m.name for m in mutations}) == len(mutations)
    for m in mutations:
        changed = m.applied(SOURCE)
        assert changed[: m.start] == SOURCE[: m.start] and changed.endswith(SOURCE[m.end :])
        assert SOURCE[m.start : m.end] == m.old and SOURCE.splitlines()[m.line - 1].strip() == m.source
    moved = mutations_of("a.py", SOURCE.replace("import os", "import os\nimport sys"))
    assert [m.name for m in moved] == [m.name for m in mutations]  # independent of the line number


def test_the_tests_of_a_mutation_are_those_of_its_statement():
    line = SOURCE.splitlines().index("    items.append(x)") + 1
    assert place(SOURCE, line) == ({line}, None)
    header = SOURCE.splitlines().index("    if not x or deep:") + 1
    assert place(SOURCE, header) == ({header}, None)
    lines, names = place(SOURCE, SOURCE.splitlines().index("LIMIT: int = 3") + 1)
    assert not lines and names.search("x < LIMIT") and not names.search("UNLIMITED")
    default = next(n for n, text in enumerate(SOURCE.splitlines(), 1) if text.startswith("def f"))
    assert line in place(SOURCE, default)[0] and default not in place(SOURCE, default)[0]


@pytest.mark.parametrize("row", read_known(), ids=lambda row: row.name)
def test_a_known_mutation_still_changes_the_source(row):
    assert row.problem() is None


def test_a_row_whose_text_has_changed_is_a_problem():
    row = read_known()[0]
    assert "got 0 times" in row._replace(old="no such text").problem()
    assert "times" in row._replace(old="self").problem()
    assert "expected a change" in row._replace(new=row.old).problem()
    assert "test not found" in Row(*row[:4], ["tests/unit/test_mutations.py::test_none"]).problem()
