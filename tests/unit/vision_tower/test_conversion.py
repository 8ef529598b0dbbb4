"""Original checkpoints: every spelling converts to the same weights, and nothing doubtful is taken."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from tests.tensors import fixture_tensors, same_tensors
from tests.tiny import tiny_clip_config
from vision_tower import AlphaCLIPVisionConfig, AlphaCLIPVisionModel, conversion


@pytest.fixture
def original():
    """An original checkpoint: 2 blocks, width 128, patch 8, 32 pixels, float16."""
    return fixture_tensors("alpha_clip_original.safetensors")


def test_sizes_are_inferred_from_the_tensors(original):
    config, weights = conversion.from_original(original)
    sizes = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.patch_size)
    assert sizes == (128, 2, 2, 8)
    assert (config.image_size, config.projection_dim, config.intermediate_size) == (32, 48, 512)
    assert config.hidden_act == "quick_gelu" and config.layer_norm_eps == 1e-5
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


def test_other_settings_are_those_of_clip(original):
    """No dropout above all: the tower that was trained has none, and Transformers would apply it in training."""
    config = conversion.from_original(original)[0]
    assert (config.attention_dropout, config.hidden_act, config.layer_norm_eps) == (0.0, "quick_gelu", 1e-5)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    sizes += ("image_size", "projection_dim")
    rest = {key: value for key, value in config.to_dict().items() if key not in sizes}
    assert rest == {key: value for key, value in AlphaCLIPVisionConfig().to_dict().items() if key not in sizes}


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "visual.", "module.visual.", "visual.module."])
def test_files_and_prefixes(original, tmp_path, ending, prefix):
    file = tmp_path / f"weights{ending}"
    named = {prefix + key: tensor for key, tensor in original.items()}
    save_file(named, file) if ending == ".safetensors" else torch.save(named, file)
    assert same_tensors(conversion.read_checkpoint(file), original)


def test_openai_spelling_of_the_attention_input(original):
    openai = {key.replace("attn.in_proj.", "attn.in_proj_"): tensor for key, tensor in original.items()}
    assert openai.keys() != original.keys()
    assert same_tensors(conversion.from_original(openai)[1], conversion.from_original(original)[1])


def test_mixed_dtypes_become_float32(original):
    original["ln_pre.weight"] = original["ln_pre.weight"].float()
    assert {tensor.dtype for tensor in conversion.from_original(original)[1].values()} == {torch.float32}


def drop(key):
    return lambda weights: weights.pop(key)


def put(key, tensor):
    return lambda weights: weights.update({key: tensor})


def poison(weights):
    weights["transformer.resblocks.1.mlp.c_fc.bias"][3] = float("nan")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("transformer.resblocks.1.ln_2.bias"), r"lacks transformer\.resblocks\.1\.ln_2\.bias"),
        (drop("ln_post.weight"), r"lacks ln_post\.weight"),
        (drop("conv1_alpha.weight"), "no alpha weight"),
        (drop("proj"), "proj"),
        (put("logit_scale", torch.ones(())), "more than .* logit_scale"),
        (put("ln_pre.bias", torch.zeros(64)), r"ln_pre\.bias of shape \(128,\), got \(64,\)"),
        (put("conv1_alpha.weight", torch.zeros(128, 3, 8, 8)), "conv1_alpha"),
        (put("positional_embedding", torch.zeros(16, 128)), "positional_embedding"),
        (put("transformer.resblocks.4.ln_1.weight", torch.zeros(128)), r"lacks transformer\.resblocks\.2"),
        (poison, "c_fc.bias contains NaN"),
    ],
)
def test_damaged_state_dicts_are_errors(original, damage, message):
    damage(original)
    with pytest.raises(ValueError, match=message):
        conversion.from_original(original)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"conv1.weight": torch.zeros(8, 3, 3, 3), "layer1.0.conv1.weight": torch.zeros(1)}, "ResNet"),
        ({"token_embedding.weight": torch.zeros(5, 4)}, "text tower"),
        ({"model.embed_tokens.weight": torch.zeros(5, 4)}, "expected an original Alpha-CLIP"),
        ({}, "expected an original Alpha-CLIP"),
    ],
)
def test_checkpoints_of_other_models_are_errors(weights, message):
    with pytest.raises(ValueError, match=message):
        conversion.from_original(weights)


def test_mixed_prefixes_are_an_error(original, tmp_path):
    half = {(f"visual.{key}" if "ln_" in key else key): tensor for key, tensor in original.items()}
    torch.save(half, tmp_path / "half.pth")
    with pytest.raises(ValueError, match="with and without 'visual.'"):
        conversion.read_checkpoint(tmp_path / "half.pth")


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_a_pickle_that_runs_code_is_an_error(original, tmp_path):
    torch.save({**original, "conv1.weight": Malicious(tmp_path / "ran")}, tmp_path / "bad.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    for name, reason in (("bad.pth", "would run code"), ("plain.pth", "expected an archive written by torch.save")):
        with pytest.raises(ValueError, match=reason):
            conversion.read_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_truncated_files_are_an_error(original, tmp_path, ending):
    whole = tmp_path / f"whole{ending}"
    save_file(original, whole) if ending == ".safetensors" else torch.save(original, whole)
    for size in (0, 10, whole.stat().st_size // 2):
        (tmp_path / f"cut{ending}").write_bytes(whole.read_bytes()[:size])
        with pytest.raises(ValueError, match="damaged"):
            conversion.read_checkpoint(tmp_path / f"cut{ending}")


def test_files_without_a_state_dict_are_an_error(tmp_path):
    torch.save({"epoch": 3, "state_dict": {}}, tmp_path / "trainer.pth")
    with pytest.raises(ValueError, match="state_dict"):
        conversion.read_checkpoint(tmp_path / "trainer.pth")
    with pytest.raises(ValueError, match="checkpoint not found"):
        conversion.read_checkpoint(tmp_path / "absent.pth")


def test_fused_convolution_equals_both(original):
    config, weights = conversion.from_original({key: tensor.float() for key, tensor in original.items()})
    fused = conversion.fuse(weights)["vision_model.embeddings.patch_embedding.weight"]
    tower = AlphaCLIPVisionModel(config)
    tower.load_state_dict({key.removeprefix("vision_model."): t for key, t in weights.items() if "visual_p" not in key})
    pixels = torch.randn(2, 4, 32, 32)
    with torch.no_grad():
        ours = tower.embeddings.patch_embedding(pixels)
        torch.testing.assert_close(torch.nn.functional.conv2d(pixels, fused, stride=8), ours)
    with pytest.raises(ValueError, match="expected one"):
        conversion.fuse({"embeddings.patch_embedding.weight": fused})


def test_read_tower_raises_without_alpha_weight(tmp_path):
    from transformers import CLIPModel

    CLIPModel(tiny_clip_config()).save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="without an alpha weight"):
        conversion.read_tower(tmp_path / "clip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected a directory"):
        conversion.read_tower(tmp_path / "empty")


def test_read_tower_accepts_file_and_directory(original, tmp_path):
    save_file(original, tmp_path / "a.safetensors")
    config, weights = conversion.read_tower(tmp_path / "a.safetensors")
    assert isinstance(config, AlphaCLIPVisionConfig)
    tower = AlphaCLIPVisionModel(config).half()
    tower.load_state_dict(weights)
    tower.save_pretrained(tmp_path / "tower")
    assert same_tensors(conversion.read_tower(tmp_path / "tower")[1], weights)


def test_read_tower_raises_for_damaged_weights(tmp_path):
    AlphaCLIPVisionModel(AlphaCLIPVisionConfig(**tiny_clip_config().vision_config.to_dict())).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        conversion.read_tower(tmp_path)
