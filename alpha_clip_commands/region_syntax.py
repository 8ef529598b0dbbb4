"""What is wrong with the region of a command line, found before torch is imported: that takes seconds, this 0.1."""

from __future__ import annotations

import importlib
import sys
import types

from alpha_clip_commands.source_values import PACKAGES

_ALONE = "_vision_tower_regions"


def check_region(text: str) -> None:
    """Read a region as `Region.parse` does, its file too, and forget it.

    Raises:
        ValueError: As `Region.parse`.
    """
    _regions().Region.parse(text)


def _regions() -> types.ModuleType:
    """`vision_tower.regions`, which needs numpy and PIL only, without `vision_tower` itself, which needs Transformers:
    imported under another name, as where Transformers copies the flat folder of an exported model.
    """
    if _ALONE not in sys.modules:
        package = types.ModuleType(_ALONE)
        package.__path__ = [str(PACKAGES / "vision_tower")]
        sys.modules[_ALONE] = package
    return importlib.import_module(f"{_ALONE}.regions")
