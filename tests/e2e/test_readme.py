"""What the README shows is what happens: its first lines, its commands, its numbers, its picture's answers."""

import ast
import io
import json
import re
import shlex
from pathlib import Path

import pytest

from alpha_clip_commands.region_chat import main as region_chat
from mllm.loading import EMBEDDED_MODEL
from tests.tiny import noise_picture, tiny_clip_config, tiny_clip_tokenizer
from vision_tower import (
    AlphaCLIPConfig,
    AlphaCLIPImageProcessor,
    AlphaCLIPModel,
    AlphaCLIPProcessor,
    AlphaCLIPVisionConfig,
    AlphaCLIPVisionModel,
)

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("way", ["RegionChat.from_pretrained()", "mllm.load()"])
def test_the_first_lines_run_as_written_and_follow_the_region(way, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = [body for language, body in BLOCKS if language == "python" and way in body]
    assert len(ast.parse(code).body) <= 6
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip().endswith("a large striped orange diamond")
    other = code.replace("22, 8, 48, 42", "62, 59, 92, 86").replace("22,8,48,42", "62,59,92,86")
    exec(compile(other, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip().endswith("a large plain pink star")


def test_tower_and_model_run_as_written(tmp_path, monkeypatch):
    """The two examples of the tower alone, on tiny directories under the names that they use."""
    monkeypatch.chdir(tmp_path)
    config = tiny_clip_config()
    processor = AlphaCLIPImageProcessor.for_size(config.vision_config.image_size, "crop")
    AlphaCLIPVisionModel(AlphaCLIPVisionConfig(**config.vision_config.to_dict())).save_pretrained("TOWER")
    processor.save_pretrained("TOWER")
    AlphaCLIPModel(AlphaCLIPConfig(**config.to_dict())).save_pretrained("MODEL")
    AlphaCLIPProcessor(processor, tiny_clip_tokenizer()).save_pretrained("MODEL")
    code = "".join(body for language, body in BLOCKS if language == "python" and "AlphaCLIP" in body)
    names = {"image": noise_picture(96, 96)}
    exec(compile(code.replace("DIR_OR_HUB_ID", "TOWER"), "README.md", "exec"), names)
    assert names["features"].shape[0] == 1 and names["probabilities"].shape == (1, 2)


def commands():
    lines = [line for language, body in BLOCKS if language == "bash" for line in body.splitlines()]
    return [line.split("  #")[0] for line in lines if line.startswith("region-chat --image mllm/assets")]


@pytest.mark.parametrize("command", commands())
def test_commands_run_as_written(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.stdin", io.StringIO("What is this?\n"))
    assert region_chat(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out.strip()


def test_the_demo_says_what_the_readme_says(monkeypatch, capsys):
    """`make demo` runs these two commands; the README prints their answers."""
    monkeypatch.chdir(ROOT)
    makefile = dict(re.findall(r"^(SCENE|BOX_1|BOX_2) := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in ("BOX_1", "BOX_2"):
        assert region_chat(["--image", makefile["SCENE"], "--box", makefile[name], "--ask", "What is this?"]) == 0
        assert f"--- box {makefile[name]}\n{capsys.readouterr().out.strip()}\n" in README


@pytest.mark.parametrize("document", [ROOT / "README.md", EMBEDDED_MODEL / "README.md"], ids=["README", "model card"])
def test_the_scores_are_those_that_were_measured(document):
    text = document.read_text(encoding="utf-8")
    scores = json.loads((EMBEDDED_MODEL / "scores.json").read_text())
    for name, entry in scores["shipped"].items():
        columns = rf"{entry['score']:.1%} \| {scores['without the CLIP'][name]['score']:.1%}"
        assert re.search(rf"^\| {re.escape(name)} \| {columns} \|", text, re.MULTILINE), name


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
