"""Imports point one way: vision_tower <- mllm <- eval <- train <- scripts, and no two modules import each other.

`alpha_clip_commands` comes before all of them: it imports only the standard library and PyYAML until a command runs,
and only its entry modules import the packages.
"""

import ast
import functools
import re
import sys
import tomllib

import pytest

from tests.files import ROOT

# A folder may import itself and those to its left.
LAYERS = ("alpha_clip_commands", "vision_tower", "mllm", "eval", "train", "scripts", "tests")
COMMANDS_MAY_IMPORT = {"alpha_clip_commands", "yaml"}
# The modules behind the installed commands. They import the packages; only `scripts` imports them.
ENTRY_MODULES = {f"alpha_clip_commands.{name}" for name in ("alpha_clip", "region_chat", "region_eval", "region_tune")}
TOWER_MAY_IMPORT = {"torch", "transformers", "numpy", "PIL", "safetensors"}  # the last comes with transformers
TOWER_MAY_TRY = {"pycocotools"}
PACKAGE_OF_IMPORT = {"PIL": "pillow", "yaml": "pyyaml", "google": "protobuf"}
# Besides its own extra, a folder needs nothing that is not a core dependency.
EXTRA_OF_LAYER = {
    "alpha_clip_commands": (),
    "vision_tower": (),
    "mllm": (),
    "eval": ("eval", "similarity"),
    "train": ("train",),
}


def source_files(layer):
    """The Python files of a folder, without the copies saved with the embedded model."""
    assets = ROOT / "mllm" / "assets"
    return [path for path in sorted((ROOT / layer).rglob("*.py")) if assets not in path.parents]


@functools.cache
def imports(source):
    """Every import as (line, number of leading dots, module, whether it is in the body of a `try`)."""
    tree, tried, found = ast.parse(source), set(), []
    for node in ast.walk(tree):  # a parent comes before its children
        if isinstance(node, ast.Try):
            tried.update(id(child) for part in node.body for child in ast.walk(part))
        elif isinstance(node, ast.Import):
            found += [(node.lineno, 0, alias.name, id(node) in tried) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.lineno, node.level, node.module or "", id(node) in tried))
    return found


def problems(layer, source):
    """The forbidden imports of a file, one line each."""
    if layer == "alpha_clip_commands":
        return command_problems(source)
    later = LAYERS[LAYERS.index(layer) + 1 :]
    found = []
    for line, dots, module, tried in imports(source):
        top = module.split(".")[0]
        if layer != "vision_tower":
            if dots:
                found.append(f"{line}: relative import; outside of vision_tower/ imports are absolute")
            elif top in later:
                found.append(f"{line}: {layer} imports {module}; imports point the other way")
        elif dots > 1:
            found.append(f"{line}: relative import that leaves vision_tower/, which must export whole")
        elif not dots and (top in LAYERS or not _tower_may_import(top, tried)):
            found.append(f"{line}: vision_tower imports {module}")
    return found


def command_problems(source):
    """Imports outside functions that are not in the standard library, and those of scripts and tests."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {line for node in functions for line in range(node.lineno, node.end_lineno + 1)}
    found = []
    for line, dots, module, _ in imports(source):
        top = module.split(".")[0]
        if dots or top in ("scripts", "tests"):
            found.append(f"{line}: alpha_clip_commands imports {module or 'relatively'}")
        elif line not in inside and top not in sys.stdlib_module_names and top not in COMMANDS_MAY_IMPORT:
            found.append(f"{line}: alpha_clip_commands imports {module} before a command runs")
    return found


def _tower_may_import(top, tried):
    return top in sys.stdlib_module_names or top in TOWER_MAY_IMPORT or (tried and top in TOWER_MAY_TRY)


@pytest.mark.parametrize("layer", LAYERS[:-1])
def test_imports_point_one_way(layer):
    files = source_files(layer)
    assert files, f"no sources in {layer}/"
    found = [f"{path.relative_to(ROOT)}:{text}" for path in files for text in problems(layer, path.read_text("utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("alpha_clip_commands", "import numpy"),
        ("alpha_clip_commands", "from mllm.files import locked"),
        ("alpha_clip_commands", "def f():\n    from scripts.bench import tower"),
        ("vision_tower", "import mllm"),
        ("vision_tower", "from vision_tower.regions import Region"),
        ("vision_tower", "from ..mllm import load"),
        ("vision_tower", "import huggingface_hub"),
        ("vision_tower", "from pycocotools import mask"),
        ("vision_tower", "try:\n    pass\nexcept ImportError:\n    from pycocotools import mask"),
        ("mllm", "def f():\n    from eval.generate import generate"),
        ("mllm", "from . import llava"),
        ("eval", "import os, train.finetune"),
        ("train", "from scripts.shapes import build_embedded_model"),
        ("scripts", "from tests.tiny import build_tiny_llava"),
    ],
)
def test_a_wrong_import_is_found(layer, source):
    assert problems(layer, source)


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("alpha_clip_commands", "import os\ndef f():\n    from mllm.region_chat.cli import run"),
        ("vision_tower", "import os.path\nfrom .regions import Region\nfrom . import regions"),
        (
            "vision_tower",
            "def f():\n    try:\n        from pycocotools import mask\n    except ImportError:\n        mask = None",
        ),
        ("mllm", "import evaluate\nfrom vision_tower import Region"),
        ("train", "from eval.metrics.literal_match import exactly_right"),
    ],
)
def test_a_right_import_is_not(layer, source):
    assert not problems(layer, source)


def module_graph(sources, strings=("alpha_clip_commands",)):
    """The modules that each module imports: {module: {module}}, from {path of a file: source}.

    Lazy imports and those under TYPE_CHECKING count. In the packages in `strings`, so do strings that are the name of a
    module, because `importlib` imports it.
    """
    modules = {path.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): path for path in sources}
    graph = {module: set() for module in modules}
    for module, path in modules.items():
        package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(sources[path])):
            if isinstance(node, ast.Import):
                graph[module].update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                start = ".".join([*parents, *filter(None, [node.module])])
                names = {f"{start}.{alias.name}" for alias in node.names}
                graph[module] |= (names & modules.keys()) or {start}
            elif isinstance(node, ast.Constant) and module.startswith(strings) and "." in str(node.value):
                graph[module].add(node.value)
        graph[module] = (graph[module] & modules.keys()) - {module}
    return graph


def cycles(graph):
    """The pairs of modules that import each other, directly or through others."""
    reached = {module: set(targets) for module, targets in graph.items()}
    for middle in graph:
        for targets in reached.values():
            if middle in targets:
                targets |= reached[middle]
    return {(a, b) for a in graph for b in reached[a] if a < b and a in reached[b]}


@pytest.fixture(scope="module")
def graph():
    files = [path for layer in LAYERS[:-1] for path in source_files(layer)]
    return module_graph({path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in files})


def test_modules_do_not_import_each_other(graph):
    assert not cycles(graph)


def test_only_scripts_import_the_entry_modules(graph):
    found = {(a, b) for a, targets in graph.items() for b in targets & ENTRY_MODULES}
    packages = {(a, b) for a, b in found if not a.startswith("scripts.") and a not in ENTRY_MODULES}
    assert not packages


def test_only_entry_modules_import_the_packages(graph):
    found = [
        f"{module} imports {target}"
        for module, targets in graph.items()
        if module.startswith("alpha_clip_commands") and module not in ENTRY_MODULES
        for target in targets
        if not target.startswith("alpha_clip_commands")
    ]
    assert not found, "\n".join(found)


def test_a_cycle_is_found_through_lazy_imports_types_and_names():
    sources = {
        "p/__init__.py": "from .a import x",
        "p/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import y",
        "p/b.py": "def f():\n    from p import c",
        "p/c.py": "import p.a",
        "alpha_clip_commands/d.py": "MODULE = 'q.e'",
        "q/e.py": "from alpha_clip_commands import d",
    }
    found = cycles(module_graph(sources))
    assert found == {("alpha_clip_commands.d", "q.e"), ("p.a", "p.b"), ("p.a", "p.c"), ("p.b", "p.c")}


def test_each_training_program_imports_only_its_own_package():
    """`train.tuning` is used by train/finetune.py only, `train.contrastive` by train/alpha_clip.py only."""
    owners = {"train.tuning": ("finetune.py", "tuning"), "train.contrastive": ("alpha_clip.py", "contrastive")}
    for path in source_files("train"):
        for line, _, module, _ in imports(path.read_text("utf-8")):
            package = ".".join(module.split(".")[:2])
            owned = package not in owners or path.relative_to(ROOT / "train").parts[0] in owners[package]
            assert owned, f"{path.relative_to(ROOT)}:{line} imports {module}"
            assert module not in ("train.finetune", "train.alpha_clip"), f"{path.relative_to(ROOT)}:{line}: entry point"


@pytest.mark.parametrize("layer", EXTRA_OF_LAYER)
def test_what_is_imported_is_declared(layer):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [project["optional-dependencies"][name] for name in EXTRA_OF_LAYER[layer]]
    declared = {re.match(r"[\w.-]+", entry)[0].lower() for entry in sum(extras, project["dependencies"])}
    missing = set()
    for path in source_files(layer):
        for line, dots, module, tried in imports(path.read_text("utf-8")):
            top = module.split(".")[0]
            package = PACKAGE_OF_IMPORT.get(top, top).lower().replace("_", "-")
            if not (dots or tried or top in LAYERS or top in sys.stdlib_module_names or package in declared):
                missing.add(f"{path.relative_to(ROOT)}:{line}: {package} is not in pyproject.toml's dependencies")
    assert not missing, "\n".join(sorted(missing))


IMPORT_EVERYTHING = """
import importlib, pkgutil, sys

def loaded():
    return {name.split(".")[0] for name in sys.modules} & {"vision_tower", "mllm", "eval", "train", "scripts"}

import vision_tower
assert loaded() == {"vision_tower"}, loaded()
import mllm
for package in (vision_tower, mllm):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
assert loaded() == {"vision_tower", "mllm"}, loaded()
"""


def test_tower_and_mllm_are_used_without_eval_and_train(processes):
    processes.run(IMPORT_EVERYTHING)
