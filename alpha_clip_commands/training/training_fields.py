"""The fields of `transformers.TrainingArguments`, read from its source: importing Transformers takes seconds."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path
from typing import NamedTuple

from alpha_clip_commands.source_values import parsed


class TrainingField(NamedTuple):
    """What the flag of a field needs.

    Attributes:
        name: Name of the field.
        kind: "int", "float", "bool", "str", or another type, whose values are not checked here.
        nargs: As in argparse.
        choices: The values of an enumeration, or None.
        is_required: Whether it has no default.
        is_nullable: Whether its default is None.
        has_opposite: Whether it has a flag `--no_NAME`.
    """

    name: str
    kind: str
    nargs: str | None
    choices: tuple[str, ...] | None
    is_required: bool
    is_nullable: bool
    has_opposite: bool


@functools.cache
def training_fields() -> dict[str, TrainingField]:
    """The fields by name, as `HfArgumentParser` turns them into flags."""
    classes = _classes()
    assigned = [
        statement
        for statement in classes["TrainingArguments"].body
        if isinstance(statement, ast.AnnAssign) and not _is_excluded(statement.value)
    ]
    return {statement.target.id: _field(statement, classes) for statement in assigned}


@functools.cache
def dictionary_fields() -> tuple[str, ...]:
    """The fields that accept a mapping."""
    for statement in _classes()["TrainingArguments"].body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", None) == "_VALID_DICT_FIELDS":
            return tuple(ast.literal_eval(statement.value))
    return ()


@functools.cache
def accelerator_fields() -> tuple[str, ...]:
    """The keys of `accelerator_config`."""
    body = _classes()["AcceleratorConfig"].body
    return tuple(statement.target.id for statement in body if isinstance(statement, ast.AnnAssign))


def _classes() -> dict[str, ast.ClassDef]:
    folder = Path(importlib.util.find_spec("transformers").origin).parent
    files = ("training_args.py", "trainer_utils.py", "trainer_pt_utils.py")
    statements = [statement for file in files for statement in parsed(folder / file).body]
    return {statement.name: statement for statement in statements if isinstance(statement, ast.ClassDef)}


def _field(statement: ast.AnnAssign, classes: dict[str, ast.ClassDef]) -> TrainingField:
    parts = [part.strip() for part in ast.unparse(statement.annotation).split("|")]
    default = _default(statement.value)
    # like HfArgumentParser, which uses X for `X | str` and `X | None`
    kind = next((part for part in parts if part not in ("None", "str")), "str")
    nargs, choices = None, None
    if kind == "bool" and ("None" not in parts or default is not None):
        nargs = "?"
    elif kind.startswith("list[") and len(parts) < 3:
        nargs = "+"
    elif kind in classes and "None" not in parts:
        choices = _enumerated(classes[kind])
    if len(parts) > 2:  # the text cannot be checked against such a union
        kind = "str"
    nargs = _of_metadata(statement.value, "nargs") or nargs
    has_opposite = default is True and nargs == "?"
    return TrainingField(
        statement.target.id, kind, nargs, choices, statement.value is None, _is_nullable(statement.value), has_opposite
    )


def _enumerated(kind: ast.ClassDef) -> tuple[str, ...]:
    """The values of an enumeration."""
    return tuple(ast.literal_eval(statement.value) for statement in kind.body if isinstance(statement, ast.Assign))


def _keyword(value: ast.expr | None, name: str) -> ast.expr | None:
    keywords = value.keywords if isinstance(value, ast.Call) else []
    return next((keyword.value for keyword in keywords if keyword.arg == name), None)


def _of_metadata(value: ast.expr | None, key: str) -> object:
    metadata = _keyword(value, "metadata")
    pairs = zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ()
    return next((ast.literal_eval(found) for name, found in pairs if ast.literal_eval(name) == key), None)


def _default(value: ast.expr | None) -> object:
    found = _keyword(value, "default") if isinstance(value, ast.Call) else value
    return found.value if isinstance(found, ast.Constant) else None


def _is_nullable(value: ast.expr | None) -> bool:
    default = _keyword(value, "default") if isinstance(value, ast.Call) else value
    return isinstance(default, ast.Constant) and default.value is None


def _is_excluded(value: ast.expr | None) -> bool:
    """Whether a field is not an argument: `field(init=False)`."""
    init = _keyword(value, "init")
    return isinstance(init, ast.Constant) and init.value is False
