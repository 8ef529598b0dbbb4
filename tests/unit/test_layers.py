"""Imports point one way: vision_tower <- mllm <- eval <- train <- scripts. The commands' arguments come before all of
them, and import nothing but Python until a command runs.
"""

import ast
import re
import sys
import tomllib

import pytest

from tests.files import ROOT

# A folder may import itself and those to its left.
LAYERS = ("alpha_clip_commands", "vision_tower", "mllm", "eval", "train", "scripts", "tests")
COMMANDS_MAY_IMPORT = {"alpha_clip_commands", "yaml"}
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
    """The Python files of a folder; code saved beside shipped weights is a copy and is left out."""
    assets = ROOT / "mllm" / "assets"
    return [path for path in sorted((ROOT / layer).rglob("*.py")) if assets not in path.parents]


def imports(source):
    """Every import as (line, number of leading dots, module, whether it stands in the body of a `try`)."""
    tree = ast.parse(source)
    tried = {
        id(node)
        for try_ in ast.walk(tree)
        if isinstance(try_, ast.Try)
        for part in try_.body
        for node in ast.walk(part)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, 0, alias.name, id(node) in tried
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.level, node.module or "", id(node) in tried


def problems(layer, source):
    """What is wrong with the imports of one file, a line each."""
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
    """Imports outside of functions that cost more than Python's own modules, and those of scripts and tests."""
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
