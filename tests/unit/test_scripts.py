"""The names that scripts import exist. Scripts run rarely, so no other test would notice."""

import ast
import importlib
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
OURS = ("alpha_clip_commands", "vision_tower", "mllm", "eval", "train")


def names_of(module, folder):
    """The names that can be imported from a module of this project or from a script in the same folder."""
    if (script := folder / f"{module}.py").exists():
        body = ast.parse(script.read_text("utf-8")).body
        bound = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        targets = (target for node in body if isinstance(node, ast.Assign) for target in node.targets)
        bound |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        imports = (node for node in body if isinstance(node, ast.Import | ast.ImportFrom))
        return bound | {alias.asname or alias.name for node in imports for alias in node.names}
    return dir(importlib.import_module(module))


@pytest.mark.parametrize("script", sorted(SCRIPTS.rglob("*.py")), ids=lambda script: script.stem)
def test_what_a_script_imports_is_there(script):
    for node in ast.walk(ast.parse(script.read_text("utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        if node.module.split(".")[0] in OURS or (script.parent / f"{node.module}.py").exists():
            missing = {alias.name for alias in node.names} - {*names_of(node.module, script.parent)}
            for name in missing:  # a module of a package
                importlib.import_module(f"{node.module}.{name}")


@pytest.mark.parametrize("script", sorted(SCRIPTS.rglob("*.py")), ids=lambda script: script.stem)
def test_no_variable_has_the_name_of_an_imported_module(script):
    """In its function, the module could not be used."""
    tree = ast.parse(script.read_text("utf-8"))
    imports = (node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module)
    imported = {
        alias.name
        for node in imports
        for alias in node.names
        if (SCRIPTS.parent / node.module.replace(".", "/") / f"{alias.name}.py").exists()
    }
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        arguments = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
        stored = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        assert not imported & (arguments | stored), function.name
