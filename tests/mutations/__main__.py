"""Apply random or known mutations to the packages and report those that the tests do not detect.

    python -m tests.mutations --seed 1 --count 200 [--shard 1/2]     a random sample; rerun the command to resume
    python -m tests.mutations --known                                the rows of known.json; each must be detected

Results are kept in build/mutations. A mutation is not repeated while the sources are unchanged.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from tests.mutations.coverage import MAP, PACKAGES, ROOT, Coverage, sources_digest
from tests.mutations.known import Row, read_known
from tests.mutations.operators import Mutation, mutations_of, python_files
from tests.mutations.server import Outcome, Server

OUT = ROOT / "build" / "mutations"
_SETTING_UP = 30  # seconds that a child may take in addition to its tests
_SLOWER = 4  # slowdown factor from which a mutation counts as detected; times were measured with a tracer


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 1 if a known mutation is not detected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--shard", default="1/1", help="K/N: the K-th of N processes that share the work")
    parser.add_argument("--known", action="store_true", help="the rows of known.json")
    parser.add_argument("--files", default="*", help="only files matching this pattern, for example 'eval/*'")
    parser.add_argument("--budget", type=float, default=60, help="seconds of tests per mutation (default 60)")
    parser.add_argument("--tests", nargs="*", default=[], help="measure only these tests (for debugging)")
    args = parser.parse_args(argv)
    OUT.mkdir(parents=True, exist_ok=True)
    shard, shards = map(int, args.shard.split("/"))
    folder = OUT / f"shard-{shard}-of-{shards}"
    if args.known:
        collected = read_coverage(OUT / "collected.json", ["--collect-only"])  # only for the modules that tests import
        return check_known(Server(folder, collected.modules), read_known()[shard - 1 :: shards])
    coverage = read_coverage(OUT / "coverage.json", args.tests)
    return draw(args, coverage, Server(folder, coverage.modules), shard, shards)


def read_coverage(path: Path, flags: Sequence[str]) -> Coverage:
    """The coverage of the current sources. Measuring it takes about twice as long as the tests."""
    with FileLock(f"{path}.lock"):
        if not path.exists() or json.loads(path.read_text("utf-8"))["digest"] != sources_digest():
            print("measuring which tests execute which lines")
            environment = {**os.environ, MAP: str(path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.mutations.coverage"]
            subprocess.run([*command, *flags], cwd=ROOT, env=environment, check=False)
        coverage = Coverage(path)
    if coverage.failed:
        print(f"{len(coverage.failed)} tests fail without a mutation and are skipped: {', '.join(coverage.failed)}")
    return coverage


def drawn(seed: int, count: int, pattern: str) -> list[Mutation]:
    """A random sample of mutations, at most one per line."""
    files = [file for file in python_files(str(ROOT), PACKAGES) if fnmatch.fnmatch(file, pattern)]
    found = [m for file in files for m in mutations_of(file, (ROOT / file).read_text("utf-8"))]
    random.Random(seed).shuffle(found)
    by_line = {(m.file, m.line): m for m in reversed(found)}  # the first of each line
    return [m for m in found if by_line[m.file, m.line] is m][:count]


def draw(args: argparse.Namespace, coverage: Coverage, server: Server, shard: int, shards: int) -> int:
    """Run this shard's part of the sample and report the results of all shards so far."""
    sample = drawn(args.seed, args.count, args.files)
    folder = OUT / f"seed-{args.seed}"
    folder.mkdir(exist_ok=True)
    done = results_of(folder, coverage.digest)
    own = folder / f"{shard}-of-{shards}.jsonl"
    server.run(["--collect-only", *args.tests], 600, keep=True)  # compiles sources and tests once
    coverage.exclude(failing_anyway(server, coverage))
    for mutation in tqdm(sample[shard - 1 :: shards], unit="mutation"):
        if mutation.name in done:
            continue
        result = {"name": mutation.name, "digest": coverage.digest, **tried(mutation, coverage, server, args.budget)}
        with open(own, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(result) + "\n")
    report(folder, sample, results_of(folder, coverage.digest))
    return 0


def failing_anyway(server: Server, coverage: Coverage) -> list[str]:
    """The tests that fail in a forked child without a mutation, and would seem to detect every mutation."""
    path = OUT / "failing_anyway.json"
    with FileLock(f"{path}.lock"):
        if not path.exists() or (found := json.loads(path.read_text("utf-8")))["digest"] != coverage.digest:
            print(f"running {len(coverage.seconds)} tests without a mutation")
            outcome = server.run(list(coverage.seconds), 3600, first_only=False, keep=True)
            if outcome.late or outcome.code not in (0, 1):
                raise ValueError(f"the tests do not run without a mutation: see {server.folder / 'log.txt'}")
            found = {"digest": coverage.digest, "failed": outcome.failed}
            path.write_text(json.dumps(found), "utf-8")
    if found["failed"]:
        print(f"skipped because they fail without a mutation: {', '.join(found['failed'])}")
    return found["failed"]


def tried(mutation: Mutation, coverage: Coverage, server: Server, budget: float) -> dict[str, Any]:
    """Test one mutation; its result."""
    tests = coverage.selected(mutation, budget)
    if not tests:
        return {"state": "not covered", "tests": 0}
    limit = _SETTING_UP + _SLOWER * sum(coverage.seconds[test] for test in tests)
    with server.changed_file(mutation.file, mutation.applied(coverage.texts[mutation.file])):
        outcome = server.run(tests, limit)
    state = "survived" if outcome.code == 0 else "timeout" if outcome.late else "killed"
    if not outcome.late and outcome.code in (4, 5) and not outcome.failed:
        state = "tool error"  # for example tests that do not exist
    return {"state": state, "tests": len(tests), "by": outcome.failed[:1], "seconds": round(outcome.seconds, 1)}


def results_of(folder: Path, digest: str) -> dict[str, dict[str, Any]]:
    """The results by name of all shards with these sources, without truncated lines."""
    found = {}
    for file in folder.glob("*-of-*.jsonl"):
        for line in file.read_text("utf-8").splitlines(keepends=True):
            if line.endswith("\n") and (row := json.loads(line))["digest"] == digest:
                found[row["name"]] = row
    return found


def report(folder: Path, sample: Sequence[Mutation], results: dict[str, dict[str, Any]]) -> None:
    """Print and write the results."""
    rows = [{**m._asdict(), **results[m.name]} for m in sample if m.name in results]
    lines = []
    for state in ("survived", "not covered", "tool error", "timeout", "killed"):
        of_state = [row for row in rows if row["state"] == state]
        lines.append(f"{state}: {len(of_state)}")
        if state in ("survived", "not covered", "tool error"):
            lines += [
                f"  {row['file']}:{row['line']} [{row['operator']}] {row['source'][:100]}\n"
                f"      {row['old']!r} -> {row['new']!r} ({row['tests']} tests)"
                for row in of_state
            ]
    lines.append(f"{len(rows)} of {len(sample)} done")
    (folder / "report.json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    (folder / "report.txt").write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


def check_known(server: Server, rows: Sequence[Row]) -> int:
    """Run the tests of each row on its mutation; 1 if one passes or the text of a row is outdated."""
    every = sorted({test for row in rows for test in row.tests})
    before = server.run(every, 600, first_only=False, keep=True)
    if before.code:
        print(f"pytest ends with {before.code} without a mutation; failed: {', '.join(before.failed) or 'none'}")
        return 1
    missed = 0
    for row in tqdm(rows, unit="mutation"):
        problem = row.problem() or _not_detected(row, server)
        if problem:
            missed += 1
            tqdm.write(f"{row.name}: {problem}")
    print(f"{len(rows) - missed} of {len(rows)} known mutations are detected by each of their tests")
    return int(missed > 0)


def _not_detected(row: Row, server: Server) -> str | None:
    """The tests of a row that pass on its mutation; None if all fail."""
    with server.changed_file(row.file, row.applied()):
        outcome: Outcome = server.run(row.tests, 300, first_only=False)
    passed = [test for test in row.tests if not any(_is_of(name, test) for name in outcome.failed)]
    return f"not detected by {', '.join(passed)}" if passed and not outcome.late else None


def _is_of(failed: str, test: str) -> bool:
    return failed == test or failed.startswith((f"{test}[", f"{test}::"))


if __name__ == "__main__":
    raise SystemExit(main())
