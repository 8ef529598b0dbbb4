"""The rules of CONTRIBUTING.md that ruff does not know."""

import ast
from pathlib import Path

import pytest

from tests.files import ROOT

PACKAGES = ("alpha_clip_commands", "vision_tower", "mllm", "eval", "train", "scripts")
NO_SUCH_NAMES = ("utils", "util", "common", "helpers", "helper", "misc")
MOST_LINES = 500


def python_files(*folders):
    """The Python files of these folders; code saved beside shipped weights is a copy and is left out."""
    assets = ROOT / "mllm" / "assets"
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if assets not in path.parents]


def named_after_no_job(path):
    """Whether a file or one of its folders is a drawer for leftovers."""
    names = [part.lower() for part in path.with_suffix("").parts]
    return any(name in NO_SUCH_NAMES or name.endswith(tuple("_" + no for no in NO_SUCH_NAMES)) for name in names)


def swallowed_errors_and_asserts(source):
    """Lines with an `assert`, or an `except` that takes everything."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert):
            found.append(f"{node.lineno}: assert; raise ValueError, saying what was expected, what came, what to do")
        elif isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(
                one is None or (isinstance(one, ast.Name) and one.id in ("Exception", "BaseException"))
                for one in caught
            ):
                found.append(f"{node.lineno}: catches everything; name the errors")
    return found


def test_files_are_named_after_their_job():
    found = [path.relative_to(ROOT) for path in python_files(*PACKAGES, "tests")]
    assert not [str(path) for path in found if named_after_no_job(path)]


def test_no_file_is_too_long():
    sizes = {
        path.relative_to(ROOT): len(path.read_text("utf-8").splitlines()) for path in python_files(*PACKAGES, "tests")
    }
    too_long = [f"{path}: {lines} lines, split it by job" for path, lines in sizes.items() if lines > MOST_LINES]
    assert not too_long, "\n".join(too_long)


def test_errors_are_raised_and_not_swallowed():
    found = [
        f"{path.relative_to(ROOT)}:{text}"
        for path in python_files(*PACKAGES)
        for text in swallowed_errors_and_asserts(path.read_text("utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", ["mllm/utils.py", "train/common/masks.py", "eval/text_helpers.py"])
def test_a_drawer_is_found(path):
    assert named_after_no_job(Path(path))


@pytest.mark.parametrize(
    "source", ["assert 1", "try: f()\nexcept: pass", "try: f()\nexcept (OSError, Exception): pass"]
)
def test_a_swallowed_error_is_found(source):
    assert swallowed_errors_and_asserts(source)
