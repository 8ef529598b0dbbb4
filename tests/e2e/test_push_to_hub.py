"""scripts/push_to_hub.py: the folder that would be uploaded, its card, and the calls to the hub (a stand-in here)."""

import json
import re
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

import mllm
from mllm.loading import EMBEDDED_MODEL
from scripts import push_to_hub
from tests.tiny import build_tiny_blip2, noise_picture, tiny_clip_config, tiny_vision_config
from vision_tower import AlphaCLIPImageProcessor, AlphaCLIPModel, AlphaCLIPVisionConfig, AlphaCLIPVisionModel
from vision_tower.configuration_alpha_clip import AlphaCLIPConfig

RECORD = {
    "data": {"data": "/home/somebody/secret/vg_train", "region_input": "box"},
    "training": {"learning_rate": 0.001, "seed": 7, "max_steps": -1, "output_dir": "/home/somebody/out"},
    "log": [{"loss": 1.5}, {"loss": 0.25}, {"train_runtime": 3}],
}


def push(*arguments):
    return push_to_hub.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tower")
    AlphaCLIPVisionModel(AlphaCLIPVisionConfig(**tiny_vision_config())).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    AlphaCLIPImageProcessor(geometry="crop", **size).save_pretrained(folder)
    return folder


def run_example(card, names):
    """The card's own code, with a local folder in place of the hub id."""
    (code,) = re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)
    for hub_id, folder in names.items():
        code = code.replace(f'"{hub_id}"', repr(str(folder)))
    scope = {"image": noise_picture(300, 260)}
    exec(code, scope)
    return scope


def test_a_tower_with_its_sources(tower, tmp_path):
    assert push(tower, "lab/tower", "--to", tmp_path / "out", "--built-from", "alpha-clip") == 0
    published = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "modeling_alpha_clip.py", "regions.py"} <= published
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "cc-by-nc-4.0" and card.data.pipeline_tag == "image-feature-extraction"
    assert "3 blocks, 32 wide" in card.text and "4 x 4 patches of 8" in card.text
    assert "research only" in card.text
    scope = run_example(card, {"lab/tower": tmp_path / "out"})
    assert scope["features"].shape == (1, 17, 32)
    assert scope["inputs"]["pixel_values"][:, 3].unique().numel() > 1  # a region, not the whole image
    assert type(AutoModel.from_pretrained(tmp_path / "out")) is AlphaCLIPVisionModel


def test_a_llava_with_record_and_scores(tiny_llava, tmp_path):
    model, processor = tiny_llava
    for part in (model, processor):
        part.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "training_record.json").write_text(json.dumps(RECORD))
    (tmp_path / "in" / "scores.json").write_text((EMBEDDED_MODEL / "scores.json").read_text())
    (tmp_path / "in" / "checkpoint-3").mkdir()
    flags = ["--built-from", "llava-1.5", "alpha-clip", "--base-model", "llava-hf/llava-1.5-7b-hf"]
    assert push(tmp_path / "in", "lab/llava", "--to", tmp_path / "out", *flags) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "other" and card.data.license_name == "cc-by-nc-4.0 and llama2"
    assert card.data.base_model == "llava-hf/llava-1.5-7b-hf" and card.data.library_name == "transformers"
    assert "| data | vg_train |" in card.text and "| last loss | 0.25 |" in card.text and "| seed | 7 |" in card.text
    assert not (tmp_path / "out" / "checkpoint-3").exists()
    for file in (tmp_path / "out").glob("*.*"):
        assert file.suffix == ".safetensors" or "somebody" not in file.read_text(encoding="utf-8")
    assert "description, box" in card.text
    stored = json.loads((EMBEDDED_MODEL / "scores.json").read_text())["seed 2"]
    for result in card.data.eval_results:
        assert result.metric_value == round(stored[result.dataset_config]["score"], 4)
    assert "description, mask" in {result.dataset_config for result in card.data.eval_results}
    scope = run_example(card, {"lab/llava": tmp_path / "out"})
    assert scope["inputs"]["pixel_values"].shape[1] == 4


def test_blip2_text_model_and_adapter(tiny_llava, tiny_llava_dir, tmp_path):
    model, processor = build_tiny_blip2("opt")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "blip2")
    assert push(tmp_path / "blip2", "lab/blip2", "--to", tmp_path / "b") == 0
    card = ModelCard.load(tmp_path / "b" / "README.md")
    assert card.data.license == "unknown" and "has not said" in card.text and "from a Q-Former" in card.text
    assert run_example(card, {"lab/blip2": tmp_path / "b"})["inputs"]["pixel_values"].shape[1] == 4
    AlphaCLIPModel(AlphaCLIPConfig(**tiny_clip_config().to_dict())).save_pretrained(tmp_path / "clip")
    assert push(tmp_path / "clip", "lab/clip", "--to", tmp_path / "c") == 0
    assert ModelCard.load(tmp_path / "c" / "README.md").data.pipeline_tag == "zero-shot-image-classification"
    tuned = get_peft_model(mllm.load(tiny_llava_dir, device="cpu")[0], LoraConfig(target_modules=["q_proj"], r=3))
    tuned.save_pretrained(tmp_path / "lora")
    (tmp_path / "lora" / "README.md").unlink()  # PEFT's own
    assert push(tmp_path / "lora", "lab/lora", "--to", tmp_path / "l", "--base-model", "lab/base") == 0
    card = ModelCard.load(tmp_path / "l" / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model == "lab/base" and "| rank | 3 |" in card.text
    assert run_example(card, {"lab/lora": tmp_path / "l", "lab/base": tiny_llava_dir})["model"] is not None


def test_mistakes_are_one_line_and_leave_nothing(tower, tmp_path, capsys):
    def refused(*arguments):
        assert push(*arguments, "--to", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert error.startswith("push_to_hub.py: error:") and error.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return error

    assert "no owner//x" in refused(tower, "no owner//x")
    assert "OWNER/NAME" in refused(tower, "name")
    assert "with weights" in refused(tmp_path, "lab/x")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "without config.json" in refused(tmp_path, "lab/x")
    (tmp_path / "README.md").write_text("mine")
    assert "README.md of its own" in refused(tmp_path, "lab/x")
    assert (tmp_path / "README.md").read_text() == "mine"
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "README.md").unlink()
    assert "hub id of the model" in refused(tmp_path, "lab/x")
    assert "has no README.md" in refused(tower, "lab/x", "--keep-card")


def test_the_calls_to_the_hub(tower, tmp_path, monkeypatch, capsys):
    calls = []

    def upload_folder(**given):
        calls.append((given["repo_id"], sorted(file.name for file in given["folder_path"].iterdir())))

    api = SimpleNamespace(create_repo=lambda name, **given: calls.append((name, given)), upload_folder=upload_folder)
    monkeypatch.setattr(push_to_hub, "HfApi", lambda: api)
    monkeypatch.setattr(push_to_hub, "hub_answers", lambda: False)
    assert push(tower, "lab/tower") == 2 and not calls
    assert "does not answer" in capsys.readouterr().err
    monkeypatch.setattr(push_to_hub, "hub_answers", lambda: True)
    assert push(tower, "lab/tower", "--private") == 0
    (created, uploaded) = calls
    assert created == ("lab/tower", {"private": True, "exist_ok": True})
    assert uploaded[0] == "lab/tower" and {"README.md", "model.safetensors"} <= set(uploaded[1])
    assert not (tower / "README.md").exists()
