"""Conversions keep settings and alpha weights, and a plain CLIP is not accepted as an Alpha-CLIP."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Blip2QFormerConfig, CLIPConfig, CLIPModel, CLIPVisionModelWithProjection, LlavaConfig

import mllm
from alpha_clip_commands import alpha_clip
from mllm.convert.lavis_keys import _shorten, qformer_config_from_lavis
from mllm.fused import fused_config
from mllm.llava import with_alpha_tower
from tests.tiny import (
    build_tiny_llava,
    build_tiny_tower,
    tiny_clip_config,
    tiny_llava_config,
    tiny_tokenizer,
    tiny_vision_config,
)
from vision_tower import AlphaCLIPVisionConfig, conversion

ALPHA = "model.vision_tower.embeddings.patch_embedding.alpha.weight"


def changed(config, defaults):
    """The fields of a configuration that differ from the defaults of its class."""
    return {name: value for name, value in config.to_dict().items() if defaults.to_dict().get(name) != value}


def original_tower(width=64, blocks=2):
    """A visual tower in the original layout: patch size 8, image size 16."""
    shapes = conversion._original_shapes(
        AlphaCLIPVisionConfig(
            hidden_size=width,
            intermediate_size=96,
            num_hidden_layers=blocks,
            num_attention_heads=1,
            image_size=16,
            patch_size=8,
            projection_dim=24,
        )
    )
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_a_converted_tower_has_the_settings_of_the_original_and_no_other():
    config = conversion.config_from_original(original_tower())
    assert config.attention_dropout == 0  # the original drops nothing
    assert changed(config, AlphaCLIPVisionConfig()) == {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "image_size": 16,
        "patch_size": 8,
        "projection_dim": 24,
    }
    shorter, _ = _shorten(config, {}, 1)
    own = {"model_type", "projection_dim", "num_hidden_layers"}
    assert {key: value for key, value in shorter.to_dict().items() if key not in own} == {
        key: value for key, value in config.to_dict().items() if key not in own
    }


def test_a_converted_qformer_has_the_settings_of_the_original_and_no_other():
    layer = "Qformer.bert.encoder.layer"
    lavis = {"query_tokens": torch.zeros(1, 4, 128), "t5_proj.weight": torch.zeros(32, 128)}
    for index in range(4):
        lavis[f"{layer}.{index}.intermediate_query.dense.weight"] = torch.zeros(96, 128)
    for index in (0, 2):
        lavis[f"{layer}.{index}.crossattention.self.key.weight"] = torch.zeros(128, 80)
    config = qformer_config_from_lavis(lavis)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.1, 0.1)  # bert-base-uncased's
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 96}
    assert changed(config, Blip2QFormerConfig()) == {**sizes, "encoder_hidden_size": 80}
    assert config.cross_attention_frequency == 2


def test_a_llava_keeps_the_settings_of_its_tower():
    fields = tiny_vision_config(attention_dropout=0.125, layer_norm_eps=1e-4, initializer_range=0.03)
    stock = LlavaConfig(**tiny_llava_config(tiny_tokenizer(), CLIPConfig(vision_config=fields).vision_config).to_dict())
    before = stock.vision_config.to_dict()
    after = with_alpha_tower(stock).vision_config
    assert isinstance(after, AlphaCLIPVisionConfig)
    assert {key: value for key, value in after.to_dict().items() if before.get(key) != value} == {
        "model_type": after.model_type
    }
    fused = fused_config(build_tiny_llava()[0].config).vision_config
    assert fused.attention_dropout == 0 and fused.num_channels == 4


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A CLIP vision tower without an alpha weight, as a directory and in the original layout."""
    folder = tmp_path_factory.mktemp("plain")
    config = tiny_clip_config()
    CLIPVisionModelWithProjection(config.vision_config).save_pretrained(folder / "tower")
    CLIPModel(config).save_pretrained(folder / "clip")
    original = original_tower()
    del original["conv1_alpha.weight"]
    torch.save(original, folder / "clip.pth")
    return folder


@pytest.mark.parametrize("source", ["tower", "clip", "clip.pth"])
@pytest.mark.parametrize("kind", ["", "--fused", "--original", "--text-from"])
def test_a_plain_clip_is_not_converted(plain, tmp_path, capsys, source, kind):
    out = tmp_path / ("out.pth" if kind == "--original" else "out")
    flags = [kind, plain / "clip"] if kind == "--text-from" else [kind] if kind else []
    assert alpha_clip.main(list(map(str, ["convert", plain / source, out, *flags]))) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "plain CLIP" in error and str(plain / source) in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["tower", "clip", "clip.pth"])
def test_a_plain_clip_gives_no_alpha_weights(plain, tiny_llava_dir, source):
    with pytest.raises(ValueError, match="plain CLIP"):
        mllm.load(tiny_llava_dir, device="cpu", alpha_weights=plain / source)


def test_a_merged_adapter_keeps_the_alpha_weights_that_it_was_trained_with(tiny_llava_dir, tmp_path):
    tower = build_tiny_tower(alpha_std=1)
    tower.save_pretrained(tmp_path / "tower")
    model, _ = mllm.load(tiny_llava_dir, device="cpu", alpha_weights=tmp_path / "tower")
    targets = r"model\.language_model\..*q_proj"
    get_peft_model(model, LoraConfig(r=2, target_modules=targets)).save_pretrained(tmp_path / "adapter")
    flags = ["--model", tiny_llava_dir, "--alpha-weights", tmp_path / "tower"]
    assert alpha_clip.main(list(map(str, ["merge", tmp_path / "adapter", tmp_path / "merged", *flags]))) == 0
    merged = mllm.load(tmp_path / "merged", device="cpu")[0].state_dict()
    for name, weight in tower.state_dict().items():
        assert torch.equal(merged[f"model.vision_tower.{name}"], weight), name
    assert not torch.equal(merged[ALPHA], mllm.load(tiny_llava_dir, device="cpu")[0].state_dict()[ALPHA])
    assert any(key.endswith("alpha.weight") for key in load_file(tmp_path / "merged" / "model.safetensors"))
