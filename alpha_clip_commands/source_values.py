"""Constants of modules that import torch, read from their source, so that `--help` takes half a second."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGES = Path(__file__).resolve().parents[1]  # site-packages, or a clone


def constant(file: str, name: str) -> Any:
    """The literal that a module assigns to a name; the keys of a dictionary whose values are not literals.

    Args:
        file: Relative to the folder of the packages, such as "mllm/data/shapes/scenes.py".
        name: A name assigned at module level.

    Raises:
        LookupError: If the module does not assign it.
    """
    for target, value in _assignments(parsed(PACKAGES / file)):
        if target == name:
            try:
                return ast.literal_eval(value)
            except ValueError:
                if not isinstance(value, ast.Dict):
                    raise
                return tuple(ast.literal_eval(key) for key in value.keys if key is not None)
    raise LookupError(f"{file} does not assign {name}")


@functools.cache
def parsed(file: Path) -> ast.Module:
    """The syntax tree of a source file, cached."""
    return ast.parse(file.read_bytes())


def _assignments(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            target, value = statement.targets[0], statement.value
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=True))
            yield from ((target.id, value) for target, value in pairs if isinstance(target, ast.Name))
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            yield statement.target.id, statement.value
