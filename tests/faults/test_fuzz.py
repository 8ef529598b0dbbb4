"""Every reader, given hostile records and damaged bytes: it returns or raises ValueError, within 2 seconds and 1 GB.

`make test` runs a few cases of each format; `make test-fuzz` runs 1,000 and writes what failed, minimized, to
build/fuzz/<format>/. Once the reader is fixed, that file goes to tests/faults/inputs/<format>/ and is run ever after.
"""

import json
import logging
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.faults.fuzz_formats import FORMATS
from tests.fuzzing import limited

INPUTS = Path(__file__).parent / "inputs"
FAILED = Path(__file__).parents[2] / "build" / "fuzz"
SHORT = 20  # cases of a short run


@pytest.fixture
def folder(tmp_path, request):
    """A folder with the other files that a format needs; logging is disabled."""
    FORMATS[request.node.callspec.params["name"]].prepare(tmp_path)
    logging.disable()
    yield tmp_path
    logging.disable(logging.NOTSET)


def read(name, folder, content):
    """Read a case; a ValueError is a valid result."""
    with limited():
        try:
            FORMATS[name].read(folder, content)
        except json.JSONDecodeError:
            if FORMATS[name].read.__name__ == "read_case":
                raise AssertionError("an error of the JSON parser, which names no file") from None
        except ValueError as error:
            assert str(error)


@pytest.mark.parametrize("name", FORMATS)
def test_fuzz(name, folder, request):
    asked = request.config.getoption("fuzz_cases")
    short = asked <= SHORT
    cases = max(int(asked * FORMATS[name].share), 1) if short else asked

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=short,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(FORMATS[name].cases)
    def check(content):
        try:
            read(name, folder, content)
        except (Exception, SystemExit) as error:  # the last one is the smallest
            (FAILED / name).mkdir(parents=True, exist_ok=True)
            (FAILED / name / type(error).__name__).write_bytes(content)
            raise

    check()


KEPT = sorted(path.relative_to(INPUTS) for path in INPUTS.glob("*/*"))


@pytest.mark.parametrize(("name", "file"), [(path.parts[0], path.parts[1]) for path in KEPT])
def test_inputs_that_once_failed(name, file, folder):
    read(name, folder, (INPUTS / name / file).read_bytes())


def test_each_input_belongs_to_a_format():
    assert {path.parts[0] for path in KEPT} <= FORMATS.keys()
