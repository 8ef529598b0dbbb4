"""An export is read back bit for bit, and what cannot be exported is refused before anything is written."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, CLIPVisionModel, LlavaForConditionalGeneration

import mllm
from alpha_clip_commands import alpha_clip
from alpha_clip_commands.region_chat import main as region_chat
from mllm.convert.export import export
from mllm.loading import load_adapter
from tests.files import ROOT
from tests.tiny import build_tiny_blip2, build_tiny_llava, noise_image, random_adapter, save_model
from vision_tower import AlphaCLIPVisionModel, Region

LEFT, RIGHT = Region.from_box(0, 0, 30, 40), Region.from_box(30, 0, 60, 40)


@pytest.fixture(scope="module")
def exported(tiny_llava, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(*tiny_llava, folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_llava_dir, tmp_path_factory):
    """An adapter of random LoRA matrices and another alpha weight."""
    folder = tmp_path_factory.mktemp("adapter")
    return save_model(folder, random_adapter(mllm.load(tiny_llava_dir, device="cpu")[0]))


def logits(model, processor, region):
    message = {
        "role": "user",
        "content": [{"type": "image", "image": noise_image(60, 40), "region": region}, {"type": "text", "text": "?"}],
    }
    inputs = processor.apply_chat_template([message], tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits[0, -1]


def test_an_export_is_stock_classes_in_the_oldest_layout(exported):
    model, report = LlavaForConditionalGeneration.from_pretrained(exported, output_loading_info=True)
    assert not any(report.values())
    assert type(model.model.vision_tower) is CLIPVisionModel
    assert type(AutoModelForImageTextToText.from_pretrained(exported)) is LlavaForConditionalGeneration
    # with other names Transformers 4.37 leaves the tower random, and says no more than a warning
    names = load_file(exported / "model.safetensors")
    assert {name.split(".")[0] for name in names} == {"vision_tower", "multi_modal_projector", "language_model"}
    assert all(name.split(".")[1] == "vision_model" for name in names if name.startswith("vision_tower."))


def test_an_export_is_read_back_bit_for_bit(exported, tiny_llava, tmp_path, capfd):
    model, processor = mllm.load(exported, device="cpu")
    assert "MISMATCH" not in "".join(capfd.readouterr())
    assert type(model.model.vision_tower) is AlphaCLIPVisionModel
    ours = tiny_llava[0].state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == ours.keys()
    for region in (LEFT, RIGHT):
        assert torch.equal(logits(model, processor, region), logits(*tiny_llava, region))
    save_model(tmp_path, model, processor)
    again = mllm.load(tmp_path, device="cpu")
    assert torch.equal(logits(*again, LEFT), logits(*tiny_llava, LEFT))


def test_the_lines_of_the_docs(exported, tiny_llava):
    lines = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    names = {"image": noise_image(300, 260)}
    exec(lines.replace('"OUT"', repr(str(exported))), names)
    values = names["inputs"]["pixel_values"]
    expected = tiny_llava[1].image_processor(names["image"], Region.from_box(40, 60, 220, 200), return_tensors="pt")
    assert torch.equal(values, expected["pixel_values"])
    assert type(names["model"].model.vision_tower) is CLIPVisionModel


def test_region_chat_takes_an_export(exported, tiny_llava_dir, tmp_path, capsys):
    noise_image(60, 40).save(tmp_path / "a.png")
    asked = ["--image", tmp_path / "a.png", "--box", "0,0,30,40", "--ask", "What?", "--max-new-tokens", 8, "--json"]
    answers = []
    for folder in (exported, tiny_llava_dir):
        assert region_chat([str(part) for part in ["--model", folder, "--device", "cpu", *asked]]) == 0
        answers.append(json.loads(capsys.readouterr().out)["answer"])
    assert answers[0] == answers[1]


def test_sharded_weights_are_read_back(tiny_llava, exported, tmp_path):
    from huggingface_hub import save_torch_state_dict

    for file in exported.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_torch_state_dict(load_file(exported / "model.safetensors"), tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, processor = mllm.load(tmp_path, device="cpu")
    assert torch.equal(logits(model, processor, LEFT), logits(*tiny_llava, LEFT))


@pytest.mark.parametrize("damage", ["no alpha", "missing"])
def test_an_export_without_its_alpha_channel_is_refused(exported, tmp_path, damage):
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(exported / "model.safetensors")
    name = "vision_tower.vision_model.embeddings.patch_embedding.weight"
    weights[name] = weights[name][:, :3].contiguous()
    if damage == "missing":
        del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lack the alpha channel"):
        mllm.load(tmp_path, device="cpu")


def test_an_adapter_fits_an_export_and_is_merged_into_one(exported, tiny_llava_dir, adapter, tmp_path, capsys):
    expected = [logits(*mllm.load(tiny_llava_dir, device="cpu", adapter=adapter), region) for region in (LEFT, RIGHT)]
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    tuned = mllm.load(exported, device="cpu", adapter=adapter)
    for region, wanted in zip((LEFT, RIGHT), expected, strict=True):
        assert torch.equal(logits(*tuned, region), wanted)
    flags = [str(tiny_llava_dir), str(tmp_path / "merged"), "--adapter", str(adapter)]
    assert alpha_clip.main(["export", *flags]) == 0
    assert "trust_remote_code=True" in capsys.readouterr().out
    assert not any("lora" in name for name in load_file(tmp_path / "merged" / "model.safetensors"))
    merged = mllm.load(tmp_path / "merged", device="cpu")
    for region, wanted in zip((LEFT, RIGHT), expected, strict=True):
        torch.testing.assert_close(logits(*merged, region), wanted, rtol=1e-5, atol=1e-5)
    assert alpha_clip.main(["export", *flags]) == 2
    assert "exists" in capsys.readouterr().err


def test_an_adapter_is_never_left_out(tiny_llava_dir, adapter, tmp_path):
    model, processor = mllm.load(tiny_llava_dir, device="cpu")
    handle = load_adapter(model, adapter)
    for tuned in (model, handle):
        with pytest.raises(ValueError, match="has an unmerged adapter"):
            export(tuned, processor, tmp_path / "out")
    export(handle.merge_and_unload(), processor, tmp_path / "out")


def test_tied_weights_stay_tied(tmp_path):
    model, processor = build_tiny_llava()
    model.config.text_config.tie_word_embeddings = model.config.tie_word_embeddings = True
    model.tie_weights()
    nn.init.normal_(model.model.vision_tower.embeddings.patch_embedding.alpha.weight, std=0.3)
    export(model, processor, tmp_path / "out")
    stock, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(logits(stock, processor, LEFT), logits(model.eval(), processor, LEFT))
    assert torch.equal(logits(*mllm.load(tmp_path / "out", device="cpu"), LEFT), logits(model, processor, LEFT))


def test_half_precision_is_kept(tiny_llava_dir, tmp_path):
    assert alpha_clip.main(["export", str(tiny_llava_dir), str(tmp_path / "out"), "--dtype", "float16"]) == 0
    assert LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").dtype == torch.float16
    assert mllm.load(tmp_path / "out", device="cpu")[0].dtype == torch.float16


def test_an_exported_blip2_is_read_back(tmp_path):
    model, processor = build_tiny_blip2("opt")
    export(model, processor, tmp_path / "out")
    again = mllm.load(tmp_path / "out", device="cpu")
    assert torch.equal(logits(*again, LEFT), logits(model, processor, LEFT))
    assert type(again[0]) is type(model)


def test_what_cannot_be_exported_is_refused(tiny_llava, tiny_llava_dir, exported, tmp_path):
    model, processor = tiny_llava
    stock = LlavaForConditionalGeneration.from_pretrained(exported)
    with pytest.raises(ValueError, match="expected a LLaVA-1.5 or BLIP-2 with our tower"):
        export(stock, processor, tmp_path / "out")
    with pytest.raises(ValueError, match="expected the model's processor"):
        export(model, processor.tokenizer, tmp_path / "out")
    with pytest.raises(ValueError, match="is quantized"):
        export(mllm.load(tiny_llava_dir, device="cpu", load_in="4bit")[0], processor, tmp_path / "out")
    with pytest.raises(ValueError, match="expected a LoRA adapter"):
        export(model, processor, tmp_path / "out", adapter=tmp_path)
    with pytest.raises(ValueError, match="exists"):
        export(model, processor, tmp_path)
    assert not list(tmp_path.iterdir())
