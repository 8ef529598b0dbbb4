"""The rules of CONTRIBUTING.md that ruff does not know."""

import ast
from pathlib import Path

import pytest

from tests.files import ROOT

PACKAGES = ("alpha_clip_commands", "vision_tower", "mllm", "eval", "train", "scripts")
NO_SUCH_NAMES = ("utils", "util", "common", "helpers", "helper", "misc")
MAX_FUNCTION_LINES, MAX_FILE_LINES, MAX_TEST_LINES = 60, 400, 500


def python_files(*folders):
    """The Python files of these folders, without the copies saved with the embedded model."""
    assets = ROOT / "mllm" / "assets"
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if assets not in path.parents]


def named_after_no_job(path):
    """Whether the name of a file or of one of its folders states no job."""
    names = [part.lower() for part in path.with_suffix("").parts]
    return any(name in NO_SUCH_NAMES or name.endswith(tuple("_" + no for no in NO_SUCH_NAMES)) for name in names)


def swallowed_errors_and_asserts(source):
    """Lines with an `assert` or an `except` for all errors."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert):
            found.append(
                f"{node.lineno}: assert; raise ValueError with what was expected, what was received and what to do"
            )
        elif isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(
                one is None or (isinstance(one, ast.Name) and one.id in ("Exception", "BaseException"))
                for one in caught
            ):
                found.append(f"{node.lineno}: catches all errors; list them")
    return found


def long_functions(source):
    """Name and number of lines of each function over the limit, its decorators not counted."""
    body = ast.parse(source).body
    for node in body + [member for one in body if isinstance(one, ast.ClassDef) for member in one.body]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield node.name, lines


def test_files_are_named_after_their_job():
    paths = [path.relative_to(ROOT) for path in python_files(*PACKAGES, "tests")]
    assert not [str(path) for path in paths if named_after_no_job(path)]


def test_files_are_short():
    found = []
    for path in python_files(*PACKAGES, "tests"):
        name, lines = path.relative_to(ROOT).as_posix(), len(path.read_text("utf-8").splitlines())
        limit = MAX_TEST_LINES if name.startswith("tests/") else MAX_FILE_LINES
        if lines > limit:
            found.append(f"{name}: {lines} lines, at most {limit}; split it by job")
    assert not found, "\n".join(found)


def test_functions_are_short():
    found = []
    for path in python_files(*PACKAGES, "tests"):
        name, source = path.relative_to(ROOT).as_posix(), path.read_text("utf-8")
        for function, lines in long_functions(source) if source.count("\n") > MAX_FUNCTION_LINES else ():
            found.append(f"{name}: {function} has {lines} lines, at most {MAX_FUNCTION_LINES}")
    assert not found, "\n".join(found)


def test_errors_are_raised_and_not_swallowed():
    found = [
        f"{path.relative_to(ROOT)}:{text}"
        for path in python_files(*PACKAGES)
        for text in swallowed_errors_and_asserts(path.read_text("utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", ["mllm/utils.py", "train/common/masks.py", "eval/text_helpers.py"])
def test_a_name_without_a_job_is_found(path):
    assert named_after_no_job(Path(path))


@pytest.mark.parametrize(
    "source", ["assert 1", "try: f()\nexcept: pass", "try: f()\nexcept (OSError, Exception): pass"]
)
def test_a_swallowed_error_is_found(source):
    assert swallowed_errors_and_asserts(source)


def test_a_long_function_is_found():
    body = "    pass\n" * MAX_FUNCTION_LINES
    assert list(long_functions(f"class A:\n  def f(self):\n{body}")) == [("f", MAX_FUNCTION_LINES + 1)]
    assert not list(long_functions(f"async def f():\n{body[:-9]}"))
