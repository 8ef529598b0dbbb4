"""`alpha-clip publish`: the folder to upload, its model card, and the calls to the Hub (mocked)."""

import re
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModel, CLIPVisionModel

import mllm
from alpha_clip_commands import alpha_clip
from mllm import publish
from mllm.convert.export import export
from tests.files import read_json, write_json
from tests.tiny import build_tiny_blip2, build_tiny_tower, noise_image, save_model, tiny_clip_config, tiny_tokenizer
from vision_tower import (
    AlphaCLIPConfig,
    AlphaCLIPImageProcessor,
    AlphaCLIPModel,
    AlphaCLIPProcessor,
    AlphaCLIPVisionModel,
)

ADDRESS = "http://127.0.0.1:9"  # nothing listens on this port


def push(*arguments):
    return alpha_clip.main(["publish", *map(str, arguments)])


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tower")
    return save_model(folder, build_tiny_tower(), AlphaCLIPImageProcessor.for_size(32, "crop"))


@pytest.fixture
def run_example(monkeypatch):
    """Run the code in a card with local folders instead of Hub IDs, and return its variables."""

    def run(card, folders):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # otherwise PEFT looks up the base model
        monkeypatch.setattr(huggingface_hub, "snapshot_download", str)  # the folder exists
        (code,) = re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)
        for hub_id, folder in folders.items():
            assert f'"{hub_id}"' in code
            code = code.replace(f'"{hub_id}"', repr(str(folder)))
        scope = {"image": noise_image(300, 260)}
        exec(code, scope)
        fed = scope["inputs"]["pixel_values"]
        assert fed.shape[1] == 4 and fed[:, 3].unique().numel() > 1  # a region, not the whole image
        return scope

    return run


@pytest.fixture
def hub(monkeypatch):
    """A mock of `HfApi` that records its calls; `hub.private` is the visibility of the repository afterwards."""
    stand_in = SimpleNamespace(calls=[], private=True)

    def upload_folder(**given):
        files = {
            str(file.relative_to(given["folder_path"])): file.read_bytes() for file in given["folder_path"].iterdir()
        }
        stand_in.calls.append(("upload_folder", given["repo_id"], files))

    stand_in.create_repo = lambda name, **given: stand_in.calls.append(("create_repo", name, given))
    stand_in.model_info = lambda name: SimpleNamespace(private=stand_in.private)
    stand_in.upload_folder = upload_folder
    monkeypatch.setattr(publish, "HfApi", lambda: stand_in)
    monkeypatch.setattr(publish, "hub_is_available", lambda: True)
    monkeypatch.setattr(publish, "get_token", lambda: "token")
    return stand_in


def test_a_tower_with_its_sources(tower, tmp_path, run_example):
    assert push(tower, "lab/tower", "--to", tmp_path / "out", "--built-from", "alpha-clip", "--language", "en") == 0
    published = {file.name for file in (tmp_path / "out").iterdir()}
    assert published == {file.name for file in tower.iterdir()} | {"README.md"}
    assert {"config.json", "model.safetensors", "modeling_alpha_clip.py", "regions.py"} <= published
    for name in published - {"README.md"}:
        assert (tmp_path / "out" / name).read_bytes() == (tower / name).read_bytes()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license_name == "alpha-clip-research-only" and card.data.language == ["en"]
    assert card.data.pipeline_tag == "image-feature-extraction"
    features = run_example(card, {"lab/tower": tmp_path / "out"})["features"]
    assert features.shape == (1, 17, 32)
    assert type(AutoModel.from_pretrained(tmp_path / "out")) is AlphaCLIPVisionModel


def test_a_llava_without_what_only_its_machine_can_use(tiny_llava_dir, tmp_path, run_example):
    shutil.copytree(tiny_llava_dir, tmp_path / "in")
    record = {"run_config": {"data": ["/home/somebody/vg"], "output_dir": "/home/somebody/out"}, "log": []}
    write_json(tmp_path / "in" / "training_record.json", record)
    for folder in ("checkpoint-3", ".git"):
        (tmp_path / "in" / folder).mkdir()
        (tmp_path / "in" / folder / "trace").write_text("/home/somebody")
    for name in ("training_args.bin", "optimizer.pt", "trainer_state.json"):
        (tmp_path / "in" / name).write_text("/home/somebody")
    flags = ["--built-from", "llava-1.5", "alpha-clip", "--base-model", "llava-hf/llava-1.5-7b-hf"]
    assert push(tmp_path / "in", "lab/llava", "--to", tmp_path / "new" / "out", *flags) == 0
    out = tmp_path / "new" / "out"
    assert {file.name for file in out.iterdir()} == {file.name for file in tiny_llava_dir.iterdir()} | {"README.md"}
    assert [file.name for file in out.parent.iterdir()] == ["out"]
    assert not [file for file in out.iterdir() if b"somebody" in file.read_bytes()]
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "llava-hf/llava-1.5-7b-hf" and card.data.library_name == "transformers"
    assert "| data | vg |" in card.text
    run_example(card, {"lab/llava": out})


def test_an_export_needs_no_package(tiny_llava, tmp_path, run_example):
    export(*tiny_llava, tmp_path / "in")
    assert push(tmp_path / "in", "lab/export", "--to", tmp_path / "out", "--built-from", "llava-1.5") == 0
    assert {file.name for file in (tmp_path / "in").iterdir()} < {file.name for file in (tmp_path / "out").iterdir()}
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "import mllm" not in card.text and "trust_remote_code=True" in card.text
    model = run_example(card, {"lab/export": tmp_path / "out"})["model"]
    assert type(model.model.vision_tower) is CLIPVisionModel


def test_a_blip2_and_a_model_with_text_tower(tmp_path, run_example):
    for part in build_tiny_blip2("opt"):
        part.save_pretrained(tmp_path / "blip2")
    assert push(tmp_path / "blip2", "lab/blip2", "--to", tmp_path / "b", "--license", "mit") == 0
    card = ModelCard.load(tmp_path / "b" / "README.md")
    assert card.data.license == "mit" and "4, from a Q-Former" in card.text
    run_example(card, {"lab/blip2": tmp_path / "b"})
    tokenizer = tiny_tokenizer()
    config = tiny_clip_config().to_dict()
    config["text_config"] |= {"vocab_size": len(tokenizer), "max_position_embeddings": 32}
    AlphaCLIPModel(AlphaCLIPConfig(**config)).save_pretrained(tmp_path / "clip")
    AlphaCLIPProcessor(AlphaCLIPImageProcessor.for_size(32, "crop"), tokenizer).save_pretrained(tmp_path / "clip")
    assert push(tmp_path / "clip", "lab/clip", "--to", tmp_path / "c") == 0
    card = ModelCard.load(tmp_path / "c" / "README.md")
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert run_example(card, {"lab/clip": tmp_path / "c"})["probabilities"].shape == (1, 2)


def test_an_adapter_names_its_model_and_no_folder(tiny_llava_dir, tmp_path, run_example, hub, capsys):
    config = LoraConfig(target_modules=["q_proj"], r=3)
    get_peft_model(mllm.load(tiny_llava_dir, device="cpu")[0], config).save_pretrained(tmp_path / "lora")
    saved = {file.name: file.read_text(errors="replace") for file in (tmp_path / "lora").iterdir()}
    assert push(tmp_path / "lora", "lab/lora", "--to", tmp_path / "out") == 2  # trained from a folder
    assert "hub id of the model" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert push(tmp_path / "lora", "lab/lora", "--to", tmp_path / "out", "--base-model", "lab/base") == 0
    assert read_json(tmp_path / "out" / "adapter_config.json")["base_model_name_or_path"] == "lab/base"
    assert not [file for file in (tmp_path / "out").iterdir() if str(tiny_llava_dir).encode() in file.read_bytes()]
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model == "lab/base" and "| rank | `3` |" in card.text
    model = run_example(card, {"lab/lora": tmp_path / "out", "lab/base": tiny_llava_dir})["model"]
    assert any(isinstance(module, LoraLayer) for module in model.modules())
    # with links: the folder does not change
    assert push(tmp_path / "lora", "lab/lora", "--base-model", "lab/base") == 0
    assert hub.calls[-1][2] == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert {file.name: file.read_text(errors="replace") for file in (tmp_path / "lora").iterdir()} == saved
    form = saved["README.md"]  # the empty template of PEFT
    (tmp_path / "lora" / "README.md").write_text(form.replace("## Uses", "## Uses\n\nCats.", 1))
    assert push(tmp_path / "lora", "lab/lora", "--to", tmp_path / "mine", "--base-model", "lab/base") == 2
    assert "has a README.md" in capsys.readouterr().err  # edited by the user


def test_a_card_of_ones_own_is_kept_letter_for_letter(tower, tmp_path, capsys):
    shutil.copytree(tower, tmp_path / "in")
    mine = "---\nlicense: mit\n---\n\nMine.\r\n"
    (tmp_path / "in" / "README.md").write_bytes(mine.encode())
    assert push(tmp_path / "in", "lab/x", "--to", tmp_path / "out") == 2
    assert "--keep-card" in capsys.readouterr().err
    assert push(tmp_path / "in", "lab/x", "--to", tmp_path / "out", "--keep-card") == 0
    assert (
        (tmp_path / "out" / "README.md").read_bytes() == (tmp_path / "in" / "README.md").read_bytes() == mine.encode()
    )
    (tmp_path / "in" / "README.md").write_text("---\nlicense: [mit\n---\n")
    assert push(tmp_path / "in", "lab/x", "--to", tmp_path / "other", "--keep-card") == 2
    assert "not YAML" in capsys.readouterr().err


def test_mistakes_are_one_line_and_leave_nothing(tower, tmp_path, capsys):
    def refused(*arguments):
        there = set(tmp_path.iterdir())
        assert push(*arguments, "--to", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert error.startswith("alpha-clip publish: error:") and error.count("\n") == 1
        assert set(tmp_path.iterdir()) == there
        return error

    assert "no owner//x" in refused(tower, "no owner//x")
    assert "OWNER/NAME" in refused(tower, "name")
    assert "folder not found" in refused(tmp_path / "absent", "lab/x")
    assert "has no README.md" in refused(tower, "lab/x", "--keep-card")
    folder = tmp_path / "in"
    shutil.copytree(tower, folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    assert "model.safetensors is missing or damaged" in refused(folder, "lab/x")
    (folder / "model.safetensors").unlink()
    assert "expected weights" in refused(folder, "lab/x")
    (folder / "model-1.safetensors").write_bytes(weights)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    write_json(folder / "model.safetensors.index.json", index)
    assert "model-2.safetensors is missing" in refused(folder, "lab/x")
    (folder / "config.json").unlink()
    assert "without config.json" in refused(folder, "lab/x")
    (tmp_path / "out").mkdir()
    assert "exists; choose a new name" in refused(tower, "lab/x")


def test_the_calls_to_the_hub(tower, tmp_path, hub):
    before = {file.name: file.read_bytes() for file in tower.iterdir()}
    assert push(tower, "lab/tower", "--private", "--built-from", "clip") == 0
    assert push(tower, "lab/tower", "--to", tmp_path / "out", "--built-from", "clip") == 0
    written = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert hub.calls == [
        ("create_repo", "lab/tower", {"private": True, "exist_ok": True}),
        ("upload_folder", "lab/tower", written),
    ]
    assert {file.name: file.read_bytes() for file in tower.iterdir()} == before


def test_nothing_is_uploaded_to_a_public_repository_that_should_be_private(tower, hub, capsys):
    hub.private = False
    assert push(tower, "lab/tower", "--private") == 2
    assert "public" in capsys.readouterr().err
    assert [call[0] for call in hub.calls] == ["create_repo"]
    assert push(tower, "lab/tower") == 0


def test_the_hub_cannot_be_reached_or_says_no(tower, hub, monkeypatch, capsys):
    def refused():
        assert push(tower, "lab/tower") == 2
        error = capsys.readouterr().err
        assert error.startswith("alpha-clip publish: error:") and error.count("\n") == 1
        return error

    with monkeypatch.context() as patch:
        patch.setattr(publish, "get_token", lambda: None)
        assert "hf auth login" in refused()
        patch.setattr(publish, "hub_is_available", lambda: False)
        assert "--to FOLDER" in refused()
    assert not hub.calls
    api = huggingface_hub.HfApi(endpoint=ADDRESS, token="token")  # the real API, as behind a proxy that is down
    with monkeypatch.context() as patch:
        patch.setattr(publish, "HfApi", lambda: api)
        assert "refused" in refused()
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert refused()

    def forbidden(*_, **__):
        raise HfHubHTTPError("403 Forbidden:\nno rights to lab", response=SimpleNamespace(headers={}, request=None))

    hub.create_repo = forbidden
    assert "403 Forbidden: no rights to lab" in refused()
