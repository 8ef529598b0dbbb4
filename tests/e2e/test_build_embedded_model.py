"""`make embedded-model` with short stages, from random weights to a model that begins to learn."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import mllm
from mllm.data.samples import load_image
from mllm.data.shapes import scenes
from mllm.inference import RegionChat
from scripts.shapes.build_clip import is_built
from tests.files import ROOT, read_json, write_json
from vision_tower import AlphaCLIPVisionModel, Region


def test_a_stage_of_another_seed_or_other_scenes_is_not_taken(tmp_path):
    assert not is_built(tmp_path, 2, [Path("W/grit_1")])
    write_json(tmp_path / "training_record.json", {"run": {"seed": 2, "data": ["V/grit_1"]}})
    assert is_built(tmp_path, 2, [Path("W/grit_1")])
    for seed, name in ((1, "grit_1"), (2, "grit_2")):
        with pytest.raises(ValueError, match="pass another --work"):
            is_built(tmp_path, seed, [Path("W") / name])


@pytest.mark.slow
def test_build_from_nothing(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "scripts" / "shapes" / "build_embedded_model.py"),
        "--scenes",
        "300",
        "--max_steps",
        "100",
    ]
    command += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "assets" / "model"), "--logging_steps", "10"]
    subprocess.run(command, check=True, cwd=tmp_path)
    out = tmp_path / "assets" / "model"
    log = [entry["loss"] for entry in read_json(out / "training_record.json")["log"] if "loss" in entry]
    assert float(log[-1]) < 2 < math.log(640)  # a guess among the vocabulary's words; from a random tower: 1.1
    assert len(scenes.training_scenes(out)) == 3 * 300  # both kinds of the CLIP, and the other stages
    with Image.open(tmp_path / "work" / "training.png") as charts:
        assert charts.height == 240 * 4
    model, processor = mllm.load(out)
    # the tower is that of the Alpha-CLIP, frozen at first and then trained
    trained = AlphaCLIPVisionModel.from_pretrained(tmp_path / "work" / "alpha_clip").state_dict()
    pretrained = mllm.load(tmp_path / "work" / "llava_pretrained", device="cpu")[0].model.vision_tower.state_dict()
    assert all(torch.equal(pretrained[name], trained[name]) for name in trained)
    tower = model.model.vision_tower.state_dict()
    assert trained.keys() == tower.keys()
    alpha = "embeddings.patch_embedding.alpha.weight"
    assert trained[alpha].any() and not torch.equal(tower[alpha], trained[alpha].bfloat16().float())
    name = "encoder.layers.0.self_attn.q_proj.weight"
    assert (tower[name] - trained[name]).norm() < 0.5 * trained[name].norm()
    scene = tmp_path / "assets" / "scenes" / "scene_1.png"
    (first, *_) = read_json(scene.with_suffix(".json"))
    answer = RegionChat(model, processor).describe(load_image(str(scene)), Region.from_json({"box": first["box"]}))
    assert answer.startswith("a ")
