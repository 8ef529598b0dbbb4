"""`alpha-clip convert` and --alpha-weights: the result loads, gives the same answers, and uses the region."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    LlavaForConditionalGeneration,
)

import mllm
from alpha_clip_commands import alpha_clip
from alpha_clip_commands.region_chat import main as region_chat
from mllm.llava import build_llava_processor
from tests.files import ROOT
from tests.tensors import fixture_tensors, same_tensors
from tests.tiny import noise_image, prompt, save_model, tiny_clip_config, tiny_llava_config, tiny_tokenizer
from vision_tower import (
    AlphaCLIPImageProcessor,
    AlphaCLIPModel,
    AlphaCLIPVisionModel,
    AlphaCLIPVisionModelWithProjection,
    Region,
)
from vision_tower.conversion import RELEASED_CHECKPOINTS, from_original

LEFT, RIGHT = Region.from_box(0, 0, 30, 40), Region.from_box(30, 0, 60, 40)


@pytest.fixture(scope="module")
def original():
    return {key: tensor.float() for key, tensor in fixture_tensors("alpha_clip_original.safetensors").items()}


@pytest.fixture(scope="module")
def checkpoint(original, tmp_path_factory):
    file = tmp_path_factory.mktemp("original") / "alpha.pth"
    torch.save(original, file)
    return file


@pytest.fixture(scope="module")
def with_projection(original):
    config, weights = from_original(original)
    model = AlphaCLIPVisionModelWithProjection(config).eval()
    model.load_state_dict(weights)
    return model


@pytest.fixture(scope="module")
def clip_llava(original, tmp_path_factory):
    """A stock LLaVA with a plain CLIP tower of the size of the checkpoint, and our processor."""
    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(0)
    fields = from_original(original)[0].to_dict()
    tokenizer = tiny_tokenizer()
    config = tiny_llava_config(tokenizer, CLIPVisionConfig(**{**fields, "model_type": "clip_vision_model"}))
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    image_processor = AlphaCLIPImageProcessor.for_size(32, "pad")
    build_llava_processor(image_processor, tokenizer, config).save_pretrained(folder)
    return folder


def convert(*args):
    return alpha_clip.main(["convert", *map(str, args)])


def pixels_of(processor, region):
    return processor(images=noise_image(60, 40), regions=region, return_tensors="pt")["pixel_values"]


def test_tower_directory(checkpoint, with_projection, tmp_path):
    assert convert(checkpoint, tmp_path / "tower") == 0
    processor = AutoImageProcessor.from_pretrained(tmp_path / "tower")
    assert (processor.size["shortest_edge"], processor.geometry) == (32, "crop")
    left, right = (pixels_of(processor, region) for region in (LEFT, RIGHT))
    with torch.no_grad():
        expected = with_projection(left)
        ours = AlphaCLIPVisionModelWithProjection.from_pretrained(tmp_path / "tower")(left)
        tower = AutoModel.from_pretrained(tmp_path / "tower")
        assert isinstance(tower, AlphaCLIPVisionModel)
        torch.testing.assert_close(ours.image_embeds, expected.image_embeds)
        torch.testing.assert_close(tower(left).last_hidden_state, expected.last_hidden_state)
        assert not torch.allclose(tower(left).last_hidden_state, tower(right).last_hidden_state, atol=1e-3)


def test_tower_directory_needs_no_package(checkpoint, with_projection, tmp_path, processes):
    assert convert(checkpoint, tmp_path / "tower") == 0
    torch.save({"pixels": torch.randn(1, 4, 32, 32)}, tmp_path / "in.pt")
    code = (
        "import torch; from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained('tower', trust_remote_code=True)\n"
        "pixels = torch.load('in.pt')['pixels']\n"
        "torch.save(model(pixels).last_hidden_state.detach(), 'out.pt')\n"
    )
    processes.run(f"import sys; sys.modules['vision_tower'] = None\n{code}", cwd=tmp_path, checkout=False)
    with torch.no_grad():
        expected = with_projection(torch.load(tmp_path / "in.pt")["pixels"]).last_hidden_state
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected)


def test_and_back(checkpoint, original, tmp_path):
    assert convert(checkpoint, tmp_path / "tower") == 0
    for name in ("back.pth", "back.safetensors"):
        assert convert(tmp_path / "tower", tmp_path / name, "--original") == 0
        back = torch.load(tmp_path / name) if name.endswith("pth") else load_file(tmp_path / name)
        assert same_tensors(back, original)


def tiny_clip_dir(folder, projection_dim):
    config = tiny_clip_config()
    config.projection_dim = config.text_config.projection_dim = config.vision_config.projection_dim = projection_dim
    torch.manual_seed(1)
    CLIPModel(config).save_pretrained(folder)
    letters = [chr(code) + end for code in range(97, 110) for end in ("", "</w>")]
    vocabulary = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    return folder


@pytest.mark.compatibility(
    "transformers CLIPModel", "--text-from: text features with the converted tower", "1.3e-6 relative"
)
def test_text_tower_completes_the_model(checkpoint, with_projection, tmp_path, measured):
    clip = tiny_clip_dir(tmp_path / "clip", 48)
    assert convert(checkpoint, tmp_path / "full", "--text-from", clip) == 0
    model, processor = (
        AlphaCLIPModel.from_pretrained(tmp_path / "full"),
        AutoProcessor.from_pretrained(tmp_path / "full"),
    )
    inputs = processor(text=["a b", "c"], images=noise_image(60, 40), regions=LEFT, return_tensors="pt", padding=True)
    stock = CLIPModel.from_pretrained(clip)
    with torch.no_grad():
        output = model(**inputs)
        texts = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        text = stock.get_text_features(**texts).pooler_output
        image = with_projection(inputs["pixel_values"]).image_embeds
    measured((output.text_embeds - text / text.norm(dim=-1, keepdim=True)).abs().max())
    torch.testing.assert_close(output.text_embeds, text / text.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(output.image_embeds, image / image.norm(dim=-1, keepdim=True))
    assert torch.equal(model.logit_scale, stock.logit_scale)


@pytest.mark.compatibility(
    "transformers CLIPVisionModel, num_channels=4", "fused tower: hidden state and embeddings", "1e-5"
)
def test_fused_tower_is_stock_clip(checkpoint, with_projection, tmp_path, measured):
    assert convert(checkpoint, tmp_path / "fused", "--fused") == 0
    assert all(".alpha." not in key for key in load_file(tmp_path / "fused" / "model.safetensors"))
    pixels = torch.randn(2, 4, 32, 32)
    tower = CLIPVisionModel.from_pretrained(tmp_path / "fused")
    projected, report = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "fused", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        expected = with_projection(pixels)
        measured((tower(pixels).last_hidden_state - expected.last_hidden_state).abs().max())
        torch.testing.assert_close(tower(pixels).last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(projected(pixels).image_embeds, expected.image_embeds, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="channels"):
        tower(pixels[:, :3])
    with pytest.raises(ValueError, match="an exported tower is for use without this package"):
        AlphaCLIPVisionModel.from_pretrained(tmp_path / "fused")


def test_alpha_weights_replace_the_llava_tower(checkpoint, original, clip_llava, tmp_path, capsys):
    assert convert(checkpoint, tmp_path / "tower") == 0
    prefix = "vision_model."
    expected = {k.removeprefix(prefix): t for k, t in from_original(original)[1].items() if k.startswith(prefix)}
    for weights in (checkpoint, tmp_path / "tower"):
        model, processor = mllm.load(clip_llava, device="cpu", alpha_weights=weights)
        assert all(torch.equal(t, expected[key]) for key, t in model.model.vision_tower.state_dict().items())
        inputs = [
            processor(noise_image(60, 40), prompt("What?"), region, return_tensors="pt") for region in (LEFT, RIGHT)
        ]
        with torch.no_grad():
            left, right = (model(**one).logits[:, -1] for one in inputs)
        assert (left - right).abs().max() > 1e-3
    noise_image(60, 40).save(tmp_path / "a.png")
    asked = ["--model", clip_llava, "--image", tmp_path / "a.png", "--box", "0,0,30,40", "--ask", "What?"]
    asked = [str(part) for part in [*asked, "--max-new-tokens", 8, "--json"]]
    assert region_chat([*asked, "--alpha-weights", str(checkpoint)]) == 0
    assert region_chat([*asked, "--alpha-weights", str(tmp_path / "nowhere.pth")]) == 2
    assert "alpha weights not found" in capsys.readouterr().err


def test_alpha_weights_of_another_size_are_refused(checkpoint, tiny_llava_dir):
    with pytest.raises(ValueError, match="another tower: hidden_size 128, this model's is 32"):
        mllm.load(tiny_llava_dir, device="cpu", alpha_weights=checkpoint)


@pytest.mark.compatibility(
    "transformers LLaVA-1.5, without this package",
    "fused LLaVA in a fresh process: logits, and equal generated ids",
    "1e-4",
)
def test_fused_llava_is_stock_llava(checkpoint, clip_llava, tmp_path, measured, processes):
    model, processor = mllm.load(clip_llava, device="cpu", alpha_weights=checkpoint)
    save_model(tmp_path / "ours", model, processor)
    assert convert(tmp_path / "ours", tmp_path / "fused", "--fused") == 0
    # with other names Transformers 4.37 only warns and leaves the tower random
    names = load_file(tmp_path / "fused" / "model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"vision_tower", "multi_modal_projector", "language_model"}
    assert all(name.split(".")[1] == "vision_model" for name in names if name.startswith("vision_tower."))
    code = "import sys; sys.modules['vision_tower'] = sys.modules['mllm'] = None\n" + (
        "import torch; from transformers import LlavaForConditionalGeneration\n"
        "model = LlavaForConditionalGeneration.from_pretrained('fused')\n"
        "inputs = torch.load('in.pt')\n"
        "torch.save((model(**inputs).logits.detach(), model.generate(**inputs, max_new_tokens=8)), 'out.pt')\n"
    )
    for region in (LEFT, RIGHT):
        inputs = processor(noise_image(60, 40), prompt("What is this?"), region, return_tensors="pt")
        torch.save(dict(inputs), tmp_path / "in.pt")
        processes.run(code, cwd=tmp_path, checkout=False)
        logits, generated = torch.load(tmp_path / "out.pt")
        with torch.no_grad():
            measured((logits - model(**inputs).logits).abs().max())
            torch.testing.assert_close(logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)
            assert torch.equal(generated, model.generate(**inputs, max_new_tokens=8))
    with torch.no_grad():
        again = mllm.load(tmp_path / "fused", device="cpu")[0](**inputs).logits
        assert torch.equal(again, model(**inputs).logits)


@pytest.mark.parametrize("width, height", [(64, 40), (45, 64), (65, 40)], ids=["wide", "tall", "odd"])
def test_the_input_built_by_hand_is_the_processors(checkpoint, tmp_path, width, height):
    """The code in docs/export.md compared with our image processor in the geometry of LLaVA."""
    assert convert(checkpoint, tmp_path / "OUT", "--fused") == 0
    lines = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(encoding="utf-8"), re.DOTALL)[-1]
    image, region = noise_image(width, height), Region.from_box(8, 5, 30, 33)
    mask = Image.fromarray(region.mask(height, width).astype(np.uint8) * 255)
    names = {"image": image, "mask": mask}
    exec(lines.replace('"OUT"', repr(str(tmp_path / "OUT"))), names)
    ours = AlphaCLIPImageProcessor.for_size(32, "pad")(images=image, regions=region, return_tensors="pt")[
        "pixel_values"
    ]
    torch.testing.assert_close(names["pixel_values"][:, :3], ours[:, :3], atol=0.02, rtol=0)
    assert ((names["pixel_values"] - ours)[:, 3].abs() > 0.2).float().mean() < 0.01


def test_errors_leave_nothing_behind(checkpoint, original, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    assert convert(checkpoint, tmp_path / "there") == 2
    assert "exists" in capsys.readouterr().err
    torch.save({k: t for k, t in original.items() if k != "ln_post.bias"}, tmp_path / "cut.pth")
    assert convert(tmp_path / "cut.pth", tmp_path / "out") == 2
    assert "lacks ln_post.bias" in capsys.readouterr().err
    assert convert(checkpoint, tmp_path / "out", "--text-from", tiny_clip_dir(tmp_path / "clip", 16)) == 2
    error = capsys.readouterr().err
    assert "16 dimensions" in error and error.count("\n") == 1
    assert convert(checkpoint, tmp_path / "out", "--text-from", tmp_path / "nowhere") == 2
    assert "directory not found" in capsys.readouterr().err
    assert convert(checkpoint, tmp_path / "back.pth") == 2
    assert "--original" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "cut.pth", "there"]


def test_the_table_of_released_files_is_printed(capsys):
    with pytest.raises(SystemExit):
        convert("--help")
    assert RELEASED_CHECKPOINTS in capsys.readouterr().out


def test_safetensors_input(original, tmp_path):
    save_file(original, tmp_path / "a.safetensors")
    assert convert(tmp_path / "a.safetensors", tmp_path / "tower") == 0
