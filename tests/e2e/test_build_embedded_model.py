"""`make embedded-model`, shortened, and as the paper in three stages: from nothing to a model that begins to learn."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import mllm
from mllm.answering import RegionChat
from mllm.data import shapes
from mllm.data.samples import load_image
from vision_tower import AlphaCLIPVisionModel, Region

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("stages", "steps", "loss"), [(1, 100, 2), (3, 40, 5)])  # measured: 1.1 and 4.2
def test_build_from_nothing(tmp_path, stages, steps, loss):
    command = [
        sys.executable,
        str(ROOT / "scripts" / "build_embedded_model.py"),
        "--scenes",
        "300",
        "--max_steps",
        str(steps),
    ]
    command += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "assets" / "model"), "--logging_steps", "10"]
    command += ["--as-the-paper"] if stages == 3 else []
    subprocess.run(command, check=True, cwd=tmp_path)
    out = tmp_path / "assets" / "model"
    log = [entry["loss"] for entry in json.loads((out / "training_record.json").read_text())["log"] if "loss" in entry]
    assert float(log[-1]) < loss < math.log(640)  # a guess among the vocabulary's words
    assert len(shapes.training_scenes(out)) == 300 * stages  # the CLIP's of both kinds, and the others'
    with Image.open(tmp_path / "work" / "training.png") as charts:
        assert charts.height == 240 * stages
    model, processor = mllm.load(out)
    if stages == 3:  # the tower is the Alpha-CLIP's, frozen; rounded as the embedded model is stored
        trained = AlphaCLIPVisionModel.from_pretrained(tmp_path / "work" / "alpha_clip").state_dict()
        tower = model.model.vision_tower.state_dict()
        assert trained.keys() == tower.keys()
        assert all(torch.equal(tower[name], trained[name].bfloat16().float()) for name in trained)
        assert tower["embeddings.patch_embedding.alpha.weight"].any()
    scene = tmp_path / "assets" / "scenes" / "scene_1.png"
    (first, *_) = json.loads((scene.with_suffix(".json")).read_text())
    answer = RegionChat(model, processor).answer(load_image(str(scene)), Region.from_json({"box": first["box"]}))
    assert answer.startswith("a ") or stages == 3  # after 40 steps it says nothing yet
