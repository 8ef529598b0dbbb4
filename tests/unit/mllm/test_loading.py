"""Quantised loading and adapters: what must stay exact stays exact, and an adapter for another model is refused."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mllm
from alpha_clip_commands import alpha_clip
from alpha_clip_commands.region_chat import main as region_chat
from mllm.inference import RegionChat
from mllm.loading import EMBEDDED_MODEL
from tests.files import read_json
from tests.tiny import noise_image, prompt, random_adapter
from vision_tower import Region

LEFT, RIGHT = Region.from_box(0, 0, 30, 40), Region.from_box(30, 0, 60, 40)
SCENES = EMBEDDED_MODEL.parent / "scenes"
TARGETS = r".*language_model.*\.(q_proj|v_proj)"


def logits(model, processor, region):
    inputs = processor(images=noise_image(60, 40), regions=region, text=prompt("What is this?"), return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits[0, -1]


@pytest.fixture(scope="module")
def adapter(tiny_llava_dir, tmp_path_factory):
    """An adapter of random LoRA matrices and another alpha weight, and the logits it was saved with."""
    folder = tmp_path_factory.mktemp("adapter")
    model, processor = mllm.load(tiny_llava_dir, device="cpu")
    tuned = random_adapter(model, TARGETS)
    tuned.save_pretrained(folder)
    return folder, [logits(tuned, processor, region) for region in (LEFT, RIGHT)]


@pytest.mark.compatibility(
    "peft LoRA", "a loaded adapter with an alpha weight: logits from before saving", "1.3e-6 relative"
)
def test_adapter_gives_the_logits_it_was_saved_with(tiny_llava, tiny_llava_dir, adapter, measured):
    folder, expected = adapter
    model, processor = mllm.load(tiny_llava_dir, device="cpu", adapter=folder)
    for region, saved in zip((LEFT, RIGHT), expected, strict=True):
        measured(((logits(model, processor, region) - saved).abs() / saved.abs().clamp(min=1)).max())
        torch.testing.assert_close(logits(model, processor, region), saved)
        assert (logits(*tiny_llava, region) - saved).abs().max() > 1e-2
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    assert RegionChat(model, processor).ask(noise_image(60, 40), LEFT, "What?", max_new_tokens=2) is not None


def test_merged_adapter_needs_no_peft(tiny_llava_dir, adapter, tmp_path, capsys):
    folder, expected = adapter
    flags = [str(folder), str(tmp_path / "merged"), "--model", str(tiny_llava_dir)]
    assert alpha_clip.main(["merge", *flags]) == 0
    assert not any("lora" in key for key in load_file(tmp_path / "merged" / "model.safetensors"))
    model, processor = mllm.load(tmp_path / "merged", device="cpu")
    for region, saved in zip((LEFT, RIGHT), expected, strict=True):
        torch.testing.assert_close(logits(model, processor, region), saved, rtol=1e-4, atol=1e-4)
    assert alpha_clip.main(["merge", *flags]) == 2
    assert "exists" in capsys.readouterr().err


def test_adapter_for_another_model_is_refused(tiny_llava_dir, adapter, tmp_path):
    folder, _ = adapter
    with pytest.raises(ValueError, match="another model.*size mismatch"):
        mllm.load(device="cpu", adapter=folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    weights = load_file(folder / "adapter_model.safetensors")
    dropped = next(key for key in weights if "lora_B" in key)
    save_file({key: t for key, t in weights.items() if key != dropped}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="another model: 1 tensors"):
        mllm.load(tiny_llava_dir, device="cpu", adapter=tmp_path)
    save_file(
        {**weights, "base_model.model.extra.lora_A.weight": torch.ones(4)}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match="another model: 1 tensors"):
        mllm.load(tiny_llava_dir, device="cpu", adapter=tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="damaged"):
        mllm.load(tiny_llava_dir, device="cpu", adapter=tmp_path)
    with pytest.raises(ValueError, match="expected a LoRA adapter"):
        mllm.load(tiny_llava_dir, device="cpu", adapter=tiny_llava_dir)


@pytest.mark.compatibility(
    "bitsandbytes nf4 and int8 on a CPU", "embedded model: tower equal, same descriptions", "equal"
)
@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_only_the_language_model_is_quantized(embedded, load_in):
    pytest.importorskip("bitsandbytes", reason="an optional dependency; make setup installs it on Linux")
    whole, processor = embedded
    model, _ = mllm.load(device="cpu", load_in=load_in)
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if "Linear" in type(module).__name__}
    quantized = {name for name, kind in kinds.items() if kind != "Linear"}
    assert quantized == {name for name in kinds if ".language_model." in name}
    tower = whole.model.vision_tower.state_dict()
    assert all(torch.equal(tensor.float(), tower[key]) for key, tensor in model.model.vision_tower.state_dict().items())
    image = Image.open(SCENES / "scene_2.png")
    for region in read_json(SCENES / "scene_2.json"):
        asked = image, Region.from_json({"box": region["box"]}), "Describe this region."
        assert RegionChat(model, processor).ask(*asked) == RegionChat(whole, processor).ask(*asked)


def test_load_in_and_adapter_on_the_command_line(tiny_llava_dir, adapter, tmp_path, capsys):
    noise_image(60, 40).save(tmp_path / "a.png")
    flags = ["--model", tiny_llava_dir, "--image", tmp_path / "a.png", "--box", "0,0,30,40", "--ask", "What?"]
    flags = [str(flag) for flag in [*flags, "--max-new-tokens", 4]]
    assert region_chat([*flags, "--adapter", str(adapter[0])]) == 0
    capsys.readouterr()
    assert region_chat([*flags, "--adapter", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "expected a LoRA adapter" in error and error.count("\n") == 1
    scene = ["--image", str(SCENES / "scene_2.png"), "--box", "22,8,48,42", "--ask", "What is this?"]
    assert region_chat([*scene, "--load-in", "8bit"]) == 0
    assert capsys.readouterr().out


def test_load_in_refuses_other_names():
    with pytest.raises(ValueError, match="'4bit' or '8bit'"):
        mllm.load(load_in="2bit")
