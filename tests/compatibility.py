"""Writes docs/compatibility.md (`make compatibility`), one row per test marked `compatibility`, and checks it (`make
test`).

The mark states the other system, what was run, and the tolerance that the test asserts. The test reports the largest
difference with the fixture `measured`. Differences depend on the processor, so only rows and tolerances are compared
with the page.
"""

from pathlib import Path

import pytest
import torch
import transformers

PAGE = Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"
ROWS = pytest.StashKey[dict]()
HEAD = """# Compatibility

```bash
make compatibility     # runs these tests and writes this page
```

This page lists comparisons with other implementations and the largest measured differences. `make test` fails if a row
has no passing test, or if the page does not match the tests. "equal" means bit-identical. All models are small and
randomly initialized, in the original file layouts. Differences are in float32 unless a row says otherwise, and
depend on the processor; these were measured on one CPU with torch {torch} and transformers {transformers}.

| system | what was run | tolerance | worst difference | test |
|---|---|---|---|---|
"""


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=2, help="interruptions of each command in the fault tests")
    parser.addoption("--fuzz-cases", type=int, default=20, help="inputs per format in the fuzz tests")
    parser.addoption("--write-compatibility", action="store_true", help="write docs/compatibility.md")


def pytest_configure(config):
    config.addinivalue_line("markers", "compatibility(system, run, tolerance): a row of docs/compatibility.md")
    config.stash[ROWS] = {}


@pytest.fixture
def measured(record_property):
    """A function that records a difference; the page lists the largest."""
    return lambda value: record_property("worst difference", float(value))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    mark = item.get_closest_marker("compatibility")
    if mark and (call.when == "call" or report.failed or report.skipped):
        test = item.nodeid.partition("[")[0]
        row = item.config.stash[ROWS].setdefault((*mark.args, test), {"outcomes": set(), "worst": []})
        row["outcomes"].add(report.outcome)
        row["worst"] += [value for name, value in item.user_properties if name == "worst difference"]
    return report


def pytest_sessionfinish(session, exitstatus):
    config = session.config
    rows = config.stash[ROWS]
    if config.getoption("write_compatibility"):
        if not exitstatus:
            PAGE.write_text(page(rows), encoding="utf-8")
    elif whole_run(config) and (wrong := differences(rows, PAGE.read_text(encoding="utf-8"))):
        config.get_terminal_writer().line("\n" + "\n".join(wrong) + "\nrun: make compatibility", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def whole_run(config):
    """Whether all tests are selected, as in `make test`."""
    asked = config.getoption("file_or_dir") or config.getoption("keyword") or config.getoption("lf", False)
    return not asked and "not slow" in config.getoption("markexpr") and not config.getoption("collectonly")


def page(rows):
    """The text of the page, with rows in the order of the tests."""
    lines = [f"| {' | '.join(key[:3])} | {worst(row)} | `{key[3]}` |" for key, row in rows.items()]
    return HEAD.format(torch=torch.__version__.split("+")[0], transformers=transformers.__version__) + "".join(
        f"{line}\n" for line in lines
    )


def worst(row):
    """The largest measured difference; 0 if there is none, because the test then asserts equality."""
    return f"{max(row['worst']):.1e}" if any(row["worst"]) else "0"


def differences(rows, text):
    """Rows of the page without a passing test, and passing tests without a row."""
    cells = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines()]
    written = {(*row[:3], row[4].strip("`")) for row in cells if len(row) == 5 and row[4].strip().startswith("`")}
    passed = {key for key, row in rows.items() if "passed" in row["outcomes"] and "failed" not in row["outcomes"]}
    skipped = {key for key, row in rows.items() if row["outcomes"] == {"skipped"}}  # the library is not installed
    return [f"docs/compatibility.md: no passing test for {row}" for row in sorted(written - passed - skipped)] + [
        f"docs/compatibility.md: the page has no row for {row}" for row in sorted(passed - written)
    ]
