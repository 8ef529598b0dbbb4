"""Recipes: YAML files with settings, given by path or by the name of a shipped recipe."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from alpha_clip_commands.command_line import LAUNCHER_FLAGS, one_line
from alpha_clip_commands.source_values import PACKAGES

RECIPES = PACKAGES / "train" / "recipes"
_DEEPSPEED = PACKAGES / "train" / "deepspeed"
_SUFFIXES = (".yaml", ".yml")
MAX_RECIPE_BYTES = 64 * 2**10
MAX_BRACKETS = 1000  # PyYAML takes seconds for more, if they are nested
MAX_VALUES = 10_000  # with anchors expanded
# Raised by PyYAML, in addition to YAMLError, for invalid values such as a date, `!!int x` or `!!bool x`.
_DAMAGE = (ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError)


def read_recipe(path: str) -> dict[str, Any]:
    """The settings of a recipe by key.

    Raises:
        ValueError: If it cannot be read, is too large, is not a mapping with text keys, or has a repeated key.
    """
    try:
        if not Path(path).is_file():
            raise ValueError(f"recipe not found, or not a file: {path}")
        with open(path, "rb") as file:
            content = file.read(MAX_RECIPE_BYTES + 1)
        if len(content) > MAX_RECIPE_BYTES:
            raise ValueError(f"{path} has more than {MAX_RECIPE_BYTES:,} bytes; expected a recipe, 'key: value' lines")
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}") from error
    if (brackets := text.count("[") + text.count("{")) > MAX_BRACKETS:
        raise ValueError(f"{path} has {brackets:,} opening brackets; expected a recipe, 'key: value' lines")
    try:
        recipe = yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f", line {place.line + 1}, column {place.column + 1}," if place else ""
        reason = getattr(error, "problem", None) or one_line(error)
        raise ValueError(f"{path}{where} is not YAML: {reason}") from error
    except _DAMAGE as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else f"a value cannot be read: {error}"
        raise ValueError(f"{path} is not YAML: {reason}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: expected 'key: value' lines, got {type(recipe).__name__}")
    _check_size(path, recipe)
    return recipe


class _RecipeLoader(yaml.SafeLoader):
    """Rejects what plain YAML accepts: repeated keys (the last would win), keys that are not text, and numbers that
    look like others (010 is 8, 1:30 is 90). Merge keys (<<) are not supported, because they can grow exponentially.
    """

    def construct_decimal(self, node: yaml.ScalarNode) -> int | float:
        digits = node.value.lstrip("+-").replace("_", "")
        if ":" in digits or node.tag.endswith(":int") and not (digits == "0" or digits[:1] in "123456789"):
            problem = f"expected a decimal number, got {node.value!r:.80}; put text in quotes"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return self.construct_yaml_int(node) if node.tag.endswith(":int") else self.construct_yaml_float(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = set()
        for key, _ in node.value:
            is_text = key.tag == "tag:yaml.org,2002:str"
            if not is_text or key.value in keys:
                problem = "a repeated key" if is_text else "expected text as the key"
                raise yaml.constructor.ConstructorError(None, None, f"{problem}: {key.value!r:.80}", key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep=deep)


_RecipeLoader.add_constructor("tag:yaml.org,2002:int", _RecipeLoader.construct_decimal)
_RecipeLoader.add_constructor("tag:yaml.org,2002:float", _RecipeLoader.construct_decimal)


def _check_size(path: str, recipe: dict) -> None:
    """Raise ValueError if a recipe has more than `MAX_VALUES` values with anchors expanded."""
    waiting, count = [recipe], 0
    while waiting and count <= MAX_VALUES:
        value = waiting.pop()
        if isinstance(value, dict | list | tuple | set):
            inner = list(value.values() if isinstance(value, dict) else value)
            count += len(inner) + 1
            waiting += inner
    if count > MAX_VALUES:
        raise ValueError(f"{path} has more than {MAX_VALUES:,} values with anchors expanded; expected a recipe")


def recipe_names(known: Collection[str] | None = None) -> list[str]:
    """The names of the shipped recipes; with `known`, only of those without other keys."""
    files = sorted(RECIPES.glob("*.yaml"))
    if known is not None:
        files = [file for file in files if set(re.findall(r"^(\w+):", file.read_text("utf-8"), re.M)) <= set(known)]
    return [file.stem for file in files]


def split_recipe(argv: Sequence[str], known: Collection[str] | None = None) -> tuple[str | None, list[str]]:
    """The path of the recipe, or None, and the other arguments. A recipe is given by its path anywhere, or by the name
    of a shipped recipe before all flags.

    Raises:
        ValueError: If there is no shipped recipe with this name and, if given, only `known` keys.
    """
    argv = list(argv)
    path = next((arg for arg in argv if arg.endswith(_SUFFIXES)), None)
    if path is not None:
        argv.remove(path)
        return path, argv
    first = next((n for n, arg in enumerate(argv) if not arg.startswith(LAUNCHER_FLAGS)), None)
    if first is None or argv[first].startswith("-"):
        return None, argv
    name = argv.pop(first)
    shipped = recipe_names(known)
    if name not in shipped:
        near = difflib.get_close_matches(name, shipped, 1)
        meant = f"did you mean {near[0]!r}? Expected" if near else "expected"
        raise ValueError(f"unknown recipe {name!r:.80}; {meant} a .yaml file, or one of {', '.join(shipped)}")
    return str(RECIPES / f"{name}.yaml"), argv


def deepspeed_file(name: str) -> str:
    """The path of a DeepSpeed JSON file, given by path or by the name of a shipped file.

    Raises:
        argparse.ArgumentTypeError: If it is not found.
    """
    shipped = _DEEPSPEED / f"{name}.json"
    path = shipped if "\0" not in name and shipped.exists() else Path(name)
    if "\0" in name or not path.is_file():
        names = ", ".join(sorted(file.stem for file in _DEEPSPEED.glob("*.json")))
        raise argparse.ArgumentTypeError(f"deepspeed: expected one of {names}, or a JSON file, got {name!r}")
    return str(path)
