"""`make embedded-model`, shortened: all three stages from nothing to a model that loads and has begun to learn."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import mllm
from mllm.answering import RegionChat
from mllm.data import shapes
from mllm.data.samples import load_image
from vision_tower import Region

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_build_from_nothing(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "scripts" / "build_embedded_model.py"),
        "--scenes",
        "300",
        "--max_steps",
        "100",
    ]
    command += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "assets" / "model"), "--logging_steps", "10"]
    subprocess.run(command, check=True, cwd=tmp_path)
    out = tmp_path / "assets" / "model"
    log = [entry["loss"] for entry in json.loads((out / "training_record.json").read_text())["log"] if "loss" in entry]
    # measured: 1.1; the loss of a guess among the vocabulary's words is log(640) = 6.5
    assert float(log[-1]) < 2 < math.log(640)
    assert len(shapes.training_scenes(out)) == 900  # the CLIP's of both kinds, and the others'
    with Image.open(tmp_path / "work" / "training.png") as charts:
        assert charts.height == 3 * 240  # a row a stage
    model, processor = mllm.load(out)
    scene = tmp_path / "assets" / "scenes" / "scene_1.png"
    (first, *_) = json.loads((scene.with_suffix(".json")).read_text())
    answer = RegionChat(model, processor).answer(load_image(str(scene)), Region.from_json({"box": first["box"]}))
    assert answer.startswith("a ")
