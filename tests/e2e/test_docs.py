"""The first examples and commands of the documentation run as written."""

import ast
import io
import re
import shlex

import numpy as np
import pytest
from PIL import Image

from alpha_clip_commands.region_chat import main as region_chat
from mllm import Region
from tests.doc_pages import README, ROOT, blocks, commands
from tests.tiny import noise_image, tiny_clip_config, tiny_clip_tokenizer
from vision_tower import (
    AlphaCLIPConfig,
    AlphaCLIPImageProcessor,
    AlphaCLIPModel,
    AlphaCLIPProcessor,
    AlphaCLIPVisionConfig,
    AlphaCLIPVisionModel,
)

# The blocks that print an answer of the embedded model
ANSWERS = list(dict.fromkeys(block.text for block in blocks("python") if "scene_2.png" in block.text))
PYTHON_PAGE = [block.text for block in blocks("python") if block.page == "docs/python.md"]


@pytest.mark.parametrize("code", ANSWERS, ids=["RegionChat", "Auto classes", "mllm.load"])
def test_the_first_examples_run_as_written_and_follow_the_region(code, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert len(ast.parse(code).body) <= 9
    exec(compile(code, "docs", "exec"), {})
    assert capsys.readouterr().out.strip().endswith("a large striped orange diamond")
    other = code.replace("22, 8, 48, 42", "62, 59, 92, 86").replace("22,8,48,42", "62,59,92,86")
    exec(compile(other, "docs", "exec"), {})
    assert capsys.readouterr().out.strip().endswith("a large plain pink star")


def test_the_other_examples_of_the_python_page_run_as_written(tmp_path, monkeypatch):
    """Regions, tower and text tower, on tiny directories with the names that the page uses."""
    monkeypatch.chdir(tmp_path)
    config = tiny_clip_config()
    processor = AlphaCLIPImageProcessor.for_size(config.vision_config.image_size, "crop")
    AlphaCLIPVisionModel(AlphaCLIPVisionConfig(**config.vision_config.to_dict())).save_pretrained("TOWER")
    processor.save_pretrained("TOWER")
    AlphaCLIPModel(AlphaCLIPConfig(**config.to_dict())).save_pretrained("MODEL")
    AlphaCLIPProcessor(processor, tiny_clip_tokenizer()).save_pretrained("MODEL")
    Image.fromarray(np.full((96, 96), 255, np.uint8)).save("mask.png")
    names = {"image": noise_image(96, 96), "annotation": {"segmentation": [[10, 10, 60, 10, 35, 50]]}}
    for code in (text for text in PYTHON_PAGE if text not in ANSWERS):
        exec(compile(code.replace("DIR_OR_HUB_ID", "TOWER"), "docs/python.md", "exec"), names)
    assert names["features"].shape[0] == 1 and names["probabilities"].shape == (1, 2)


def test_the_region_forms_are_those_of_the_class():
    (code,) = [text for text in PYTHON_PAGE if "from_stroke" in text]
    constructors = {name for name in vars(Region) if name.startswith("from_") or name in ("whole", "parse")}
    assert set(re.findall(r"^Region\.(\w+)\(", code, re.MULTILINE)) == constructors - {"from_json", "from_dict"}


@pytest.mark.parametrize(
    "words",
    sorted(
        {tuple(words) for _, words in commands() if words[:3:2] == ["region-chat", "mllm/assets/scenes/scene_1.png"]}
    ),
    ids=shlex.join,
)
def test_commands_run_as_written(words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.stdin", io.StringIO("What is this?\n"))
    assert region_chat(words[1:]) == 0
    assert capsys.readouterr().out.strip()


def test_the_demo_says_what_the_readme_says(monkeypatch, capsys):
    """`make demo` runs these two commands; the README prints their answers."""
    monkeypatch.chdir(ROOT)
    makefile = dict(re.findall(r"^(SCENE|BOX_1|BOX_2) := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in ("BOX_1", "BOX_2"):
        assert region_chat(["--image", makefile["SCENE"], "--box", makefile[name], "--ask", "What is this?"]) == 0
        assert f"--- box {makefile[name]}\n{capsys.readouterr().out.strip()}\n" in README
