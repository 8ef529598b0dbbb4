"""The options that specify a region, and their validation before torch is imported."""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

from alpha_clip_commands.source_values import PACKAGES

# option -> (kind in Region.parse, metavar, help)
REGION_OPTIONS = {
    "box": ("box", "X0,Y0,X1,Y1", "box in pixels, half-open"),
    "box-xywh": ("xywh", "X,Y,WIDTH,HEIGHT", "box in pixels, as COCO writes it"),
    "nbox": ("nbox", "X0,Y0,X1,Y1", "box as fractions of width and height, 0 to 1"),
    "polygon": ("polygon", "X,Y,X,Y,X,Y[;...]", "polygon or polygons"),
    "mask": ("mask", "FILE.png", "mask image of the image's size"),
    "rle": ("rle", "FILE.json", "COCO annotation, or its segmentation (RLE or polygons)"),
    "points": ("points", "X,Y[;X,Y]@RADIUS", "discs around points"),
    "stroke": ("stroke", "X,Y;X,Y@WIDTH", "a line, as drawn with a brush"),
}

FORMER_OPTIONS = {"point": "points"}  # still accepted

_ALONE = "_vision_tower_regions"


def add_region_options(
    container: argparse._ActionsContainer, settings: Callable[[str], dict[str, Any]] = lambda form: {}
) -> None:
    """Add an option per kind of region; `settings` maps a kind to further arguments of `add_argument`."""
    for option, (form, written, text) in REGION_OPTIONS.items():
        names = {option: text} | {old: argparse.SUPPRESS for old, new in FORMER_OPTIONS.items() if new == option}
        for name, shown in names.items():
            arguments = {"metavar": written, "help": shown, "dest": option.replace("-", "_"), **settings(form)}
            action = container.add_argument(f"--{name}", **arguments)
            # makes `ArgumentParser` read "24 3 60 39" as one value
            action.takes_numbers = form not in ("mask", "rle")  # type: ignore[attr-defined]


def region_in(args: argparse.Namespace) -> tuple[str, str] | None:
    """The region option that was given, and its value; None without one (`--whole` has no value)."""
    for option in REGION_OPTIONS:
        if (value := getattr(args, option.replace("-", "_"))) is not None:
            return option, value
    return None


def check_region(text: str) -> None:
    """Validate a region, including its file.

    Raises:
        ValueError: As `Region.parse`.
    """
    _regions().Region.parse(text)


def _regions() -> types.ModuleType:
    """`vision_tower.regions`, which needs only numpy and PIL, without `vision_tower`, which needs Transformers: the
    module is imported under another package name, as from the flat folder of an exported model.
    """
    if _ALONE not in sys.modules:
        package = types.ModuleType(_ALONE)
        package.__path__ = [str(PACKAGES / "vision_tower")]
        sys.modules[_ALONE] = package
    return importlib.import_module(f"{_ALONE}.regions")
