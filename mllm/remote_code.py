"""Saving source files next to a processor, so that `trust_remote_code=True` loads it without these packages.

Transformers copies such files into one flat folder and follows `from .x import y` there, and nothing else. Its
`save_pretrained` copies modules unchanged, which suffices for relative imports within one folder, as in
`vision_tower`; `mllm` imports from both packages.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

_PACKAGES = ("mllm", "vision_tower")


class SavedWithSources:
    """Mixin for processors: saves their source files, and an `auto_map` that refers to them.

    With `auto_map`, `AutoProcessor` raises an error if remote code is not trusted; without, it would silently return a
    tokenizer.
    """

    def to_dict(self) -> dict[str, Any]:
        """As in `ProcessorMixin`, with `auto_map`."""
        module = type(self).__module__.rpartition(".")[2]
        return {**super().to_dict(), "auto_map": {"AutoProcessor": f"{module}.{type(self).__name__}"}}

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """As in `ProcessorMixin`, with the source files in the same folder.

        Not in `save_pretrained`: with `push_to_hub`, it uploads only files written during its call.

        Raises:
            ValueError: If two source files have the same name.
        """
        write_sources(type(self), Path(json_file_path).parent)
        super().to_json_file(json_file_path)


def write_sources(cls: type, folder: str | os.PathLike) -> None:
    """Write the module of a class, and all modules of our packages that it imports, into one flat folder.

    Raises:
        ValueError: If two modules have the same file name, or an import cannot be made relative.
    """
    for file, text in flat_sources(sys.modules[cls.__module__]).items():
        Path(folder, file).write_text(text, encoding="utf-8")


def flat_sources(root: ModuleType) -> dict[str, str]:
    """File name -> source text, for a module and all modules of our packages that it imports.

    Raises:
        ValueError: As `write_sources`.
    """
    sources: dict[str, str] = {}
    modules = [root]
    for module in modules:  # grows
        sources[_file(module)], imported = _flattened(module)
        modules += [other for other in imported if other not in modules]
    if len(sources) < len(modules):
        raise ValueError(f"source files in one folder need different names: {sorted(map(_file, modules))}")
    return sources


def _file(module: ModuleType) -> str:
    return f"{module.__name__.rpartition('.')[2]}.py"


def _flattened(module: ModuleType) -> tuple[str, list[ModuleType]]:
    """The text of a module with imports from our packages made relative, and the imported modules."""
    text = Path(inspect.getfile(module)).read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    imported: list[ModuleType] = []
    for node in sorted(_our_imports(ast.parse(text), module), key=lambda node: -node.lineno):
        names_of: dict[str, list[str]] = {}
        for alias, source in ((alias, _defining_module(node, alias.name, module)) for alias in node.names):
            renamed = f" as {alias.asname}" if alias.asname else ""
            names_of.setdefault(source.__name__, []).append(alias.name + renamed)
            imported.append(source)
        indent = " " * node.col_offset
        lines[node.lineno - 1 : node.end_lineno] = [
            f"{indent}from .{name.rpartition('.')[2]} import {', '.join(names)}\n" for name, names in names_of.items()
        ]
    return "".join(lines), sorted(set(imported), key=lambda other: other.__name__)


def _our_imports(tree: ast.Module, module: ModuleType) -> Iterator[ast.ImportFrom]:
    """All `from ... import ...` statements of our packages, including nested ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] in _PACKAGES for alias in node.names):
            raise ValueError(f"{module.__name__}, line {node.lineno}: expected `from module import name`")
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] in _PACKAGES):
            yield node


def _defining_module(node: ast.ImportFrom, name: str, module: ModuleType) -> ModuleType:
    """The module to import `name` from: if a package re-exports it, the module that defines it."""
    source = importlib.import_module("." * node.level + (node.module or ""), module.__package__)
    if not hasattr(source, "__path__"):
        return source
    defined = getattr(source, name)
    if not isinstance(getattr(defined, "__module__", None), str):
        raise ValueError(f"{module.__name__}, line {node.lineno}: import {name} from the module that defines it")
    return sys.modules[defined.__module__]
