"""docs/files.md lists every limit on input files, with its value."""

import importlib
import re

import pytest

from alpha_clip_commands.training.shared_arguments import RegionArguments
from tests.files import ROOT
from tests.unit.test_style import PACKAGES
from vision_tower import AlphaCLIPImageProcessor

DOCUMENTED = {  # limit -> value, and its text on the page
    "LARGEST_FILE": (2 * 2**30, "2 GiB"),
    "LARGEST_RECORD": (16 * 2**20, "16 MiB"),
    "DEEPEST": (100, "100 levels"),
    "MOST_SENTENCES": (10_000, "10,000"),
    "LARGEST_PICKLE": (256 * 2**20, "256 MiB"),
    "LONGEST_NAME": (1024, "1,024 characters"),
    "MAX_RECIPE_BYTES": (64 * 2**10, "64 KiB"),
    "MAX_BRACKETS": (1000, "1,000"),
    "MAX_VALUES": (10_000, "10,000"),
    "MAX_PIXELS": (100_000_000, "100 million"),
    "MAX_MASK_PIXELS": (200_000_000, "200 million"),
    "MAX_DRAWN": (10**9, "10^9 pixels"),
    "MAX_TENSORS": (5_000, "5,000"),
    "MAX_HEADER": (4_000_000, "4,000,000 bytes"),
    "MAX_OPCODES": (250_000, "250,000"),
    "MAX_EXPANSION": (2, "2 times"),
    "MAX_BLOCKS": (300, "300"),
    "MAX_RANK": (4096, "4,096"),
    "MAX_ERRORS": (0.5, "half"),
    "MIN_ERRORS": (20, "20"),
}
LIMIT = re.compile(r"^((?:MAX|LARGEST|LONGEST|MOST)_[A-Z_]+|MIN_ERRORS|DEEPEST) = ", re.MULTILINE)


def limits():
    """(name, module) of every public limit in the sources."""
    for package in PACKAGES[:-1]:
        for file in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            yield from ((name, module) for name in LIMIT.findall(file.read_text(encoding="utf-8")))


def test_every_limit_is_on_the_page():
    assert sorted(name for name, _ in limits()) == sorted(DOCUMENTED)


@pytest.mark.parametrize(("name", "module"), list(limits()))
def test_a_limit_has_the_value_that_the_page_states(name, module):
    value, words = DOCUMENTED[name]
    assert getattr(importlib.import_module(module), name) == value
    rows = [line for line in (ROOT / "docs" / "files.md").read_text("utf-8").splitlines() if f"`{name}`" in line]
    assert rows and all(words in row for row in rows)


def test_settings_have_the_defaults_that_the_page_states():
    page = (ROOT / "docs" / "files.md").read_text("utf-8")
    assert AlphaCLIPImageProcessor.max_side == 20_000 and "20,000 pixels" in page
    assert RegionArguments().max_missing == 0.001 and "0.1%" in page
