"""The script of the small BLIP-2 on Shapes, stopped when the model has begun to use the region."""

import subprocess
import sys

import pytest

from tests.files import ROOT, read_json


@pytest.mark.slow
def test_blip2_begins_to_learn_by_region(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "shapes" / "build_blip2.py"), "--work", str(tmp_path)]
    command += ["--scenes", "2500", "--test-scenes", "20", "--max_steps", "400", "--logging_steps", "20"]
    subprocess.run(command, check=True, cwd=tmp_path)
    record = read_json(tmp_path / "model" / "training_record.json")
    losses = [float(entry["loss"]) for entry in record["log"] if "loss" in entry]
    assert losses[-1] < 0.4  # a guess among the vocabulary's words: 6.5; words without the region: about 1
    scores = read_json(tmp_path / "scores.json")
    # measured: see docs/blip2.md for the whole run
    assert scores["description, box"] > 0.3 > scores["description, whole image"]
