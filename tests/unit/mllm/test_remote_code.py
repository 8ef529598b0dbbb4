"""The source files beside a saved processor: flat, few, and in need of nothing but what Transformers itself needs."""

import ast
import sys
from types import ModuleType

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from mllm.remote_code import flat_sources
from tests.files import read_json
from tests.tiny import build_tiny_blip2, build_tiny_llava

PROCESSORS = {"llava": build_tiny_llava, "blip2": lambda: build_tiny_blip2("opt")}
NEEDED = {"torch", "transformers", "numpy", "PIL", "safetensors"}


@pytest.fixture(params=PROCESSORS)
def folder(request, tmp_path):
    PROCESSORS[request.param]()[1].save_pretrained(tmp_path)
    return tmp_path


def test_sources_are_flat_and_need_little(folder):
    files = sorted(folder.glob("*.py"))
    assert len(files) < 20
    for file in files:
        imported = set(get_imports(file)) - sys.stdlib_module_names
        assert imported <= NEEDED, f"{file.name} imports {imported - NEEDED}"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and (folder / f"{node.module}.py").is_file()


def test_transformers_finds_all_of_them(folder):
    saved = read_json(folder / "processor_config.json")
    found = set()
    for auto, record in (("AutoProcessor", saved), ("AutoImageProcessor", saved["image_processor"])):
        root = folder / f"{record['auto_map'][auto].partition('.')[0]}.py"
        found |= {root.name, *(path.rpartition("/")[2] for path in get_relative_import_files(root))}
    assert found == {file.name for file in folder.glob("*.py")}


@pytest.mark.parametrize(
    "source, message",
    [
        ("import vision_tower", "expected `from module import name`"),
        ("from vision_tower.alpha_embedding import ALPHA_MEAN\nfrom vision_tower import __doc__", "that defines it"),
        ("from vision_tower.regions import Region\nfrom tests_regions import x", None),
    ],
)
def test_imports_that_cannot_be_made_relative_are_errors(tmp_path, source, message):
    module = ModuleType("written_here")
    module.__file__ = str(tmp_path / "written_here.py")
    (tmp_path / "written_here.py").write_text(source)
    if message is None:
        assert flat_sources(module)["written_here.py"].startswith("from .regions import Region\nfrom tests_regions")
    else:
        with pytest.raises(ValueError, match=message):
            flat_sources(module)
