"""Values whose home is a module that imports torch, read from its source: half a second is enough for `--help`."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGES = Path(__file__).resolve().parents[1]  # the folder that holds them: site-packages, or a clone


def constant(file: str, name: str) -> Any:
    """What a module assigns to a name, a literal; of a dictionary with other values, its keys.

    Args:
        file: Below the folder of the packages: "mllm/data/shapes/scenes.py".
        name: As it is assigned at the top of the module.

    Raises:
        LookupError: If nothing is assigned to it.
    """
    for target, value in _assignments(parsed(PACKAGES / file)):
        if target == name:
            try:
                return ast.literal_eval(value)
            except ValueError:
                if not isinstance(value, ast.Dict):
                    raise
                return tuple(ast.literal_eval(key) for key in value.keys if key is not None)
    raise LookupError(f"{file} assigns nothing to {name}")


@functools.cache
def parsed(file: Path) -> ast.Module:
    """A source file as a syntax tree."""
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
