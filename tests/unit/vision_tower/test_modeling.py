"""The tower behaves as CLIP's does (the judge is CLIPVisionModel), and refuses what would leave it silently wrong."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, SiglipVisionConfig, SiglipVisionModel

import vision_tower
from vision_tower import AlphaCLIPVisionConfig, AlphaCLIPVisionModel, AlphaPatchEmbedding


@pytest.fixture
def tower(clip_dir):
    model = AlphaCLIPVisionModel.from_pretrained(clip_dir).eval()
    torch.nn.init.normal_(model.embeddings.patch_embedding.alpha.weight, std=0.1)
    return model


def pixels(side=32):
    return torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(2, 2, 32, 32), (2, 5, 32, 32), (2, 1, 32, 32)])
def test_other_channel_counts_raise(tower, shape):
    with pytest.raises(ValueError, match="pixel_values"):
        tower(torch.zeros(shape))


def test_an_image_without_batch_dimension_raises():
    with pytest.raises(ValueError, match="expected pixel_values"):
        AlphaPatchEmbedding(6, 4)(torch.zeros(4, 16, 16))


def test_alpha_changes_the_output_and_only_the_alpha_channel_is_alpha(tower):
    inside, outside = pixels(), pixels()
    outside[:, 3] = -outside[:, 3]
    assert not torch.equal(tower(inside).pooler_output, tower(outside).pooler_output)


def test_patch_embedding_is_the_sum_of_two_convolutions():
    torch.manual_seed(0)
    layer = AlphaPatchEmbedding(6, 4)
    torch.nn.init.normal_(layer.alpha.weight)
    values = torch.randn(2, 4, 16, 16)
    # the other way to write it: one convolution over four channels (equal up to rounding; worst seen 7e-6, on values up
    # to 20)
    fused = torch.nn.functional.conv2d(values, torch.cat([layer.weight, layer.alpha.weight], 1), stride=4)
    torch.testing.assert_close(layer(values), fused, atol=3e-5, rtol=0)


def test_hidden_states_as_bool_and_as_int(tower, clip_dir):
    everything = tower(pixels(), output_hidden_states=True).hidden_states
    assert len(everything) == 4
    one = tower(pixels(), output_hidden_states=-2).hidden_states
    assert torch.equal(one[-2], everything[-2])
    assert tower(pixels(), return_dict=False)[0].shape == (2, 17, 32)


def test_interpolated_positions(tower):
    with pytest.raises(ValueError):
        tower(pixels(48))
    assert tower(pixels(48), interpolate_pos_encoding=True).last_hidden_state.shape == (2, 37, 32)


def test_attention_backends_agree(clip_dir, tower):
    tower.set_attn_implementation("eager")
    eager = tower(pixels(), output_attentions=True)
    assert len(eager.attentions) == 3
    tower.set_attn_implementation("sdpa")
    # worst seen 1e-6
    torch.testing.assert_close(tower(pixels()).last_hidden_state, eager.last_hidden_state, atol=1e-5, rtol=0)


def test_gradients_reach_both_convolutions_also_with_checkpointing(tower):
    tower.train()
    tower(pixels()).pooler_output[:, 0].sum().backward()  # the sum of a layer norm would be constant
    plain = tower.embeddings.patch_embedding.alpha.weight.grad.clone()
    assert plain.abs().sum() > 0 and tower.embeddings.patch_embedding.weight.grad.abs().sum() > 0
    tower.zero_grad()
    tower.gradient_checkpointing_enable({"use_reentrant": False})
    tower(pixels()).pooler_output[:, 0].sum().backward()  # the sum of a layer norm would be constant
    torch.testing.assert_close(tower.embeddings.patch_embedding.alpha.weight.grad, plain)


def test_compiles_without_graph_breaks(tower):
    compiled = torch.compile(tower, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixels()).last_hidden_state, tower(pixels()).last_hidden_state)


def test_auto_classes_load_the_tower(tmp_path, tower):
    tower.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is AlphaCLIPVisionConfig
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert type(again) is AlphaCLIPVisionModel
    assert torch.equal(again(pixels()).pooler_output, tower(pixels()).pooler_output)


def test_importing_again_is_safe(processes):
    code = (
        "import importlib, sys, vision_tower, transformers\n"
        "for name in [n for n in sys.modules if n.startswith('vision_tower')]: del sys.modules[name]\n"
        "import vision_tower as again\n"
        "assert transformers.CONFIG_MAPPING['alpha_clip_vision_model'] is again.AlphaCLIPVisionConfig\n"
    )
    processes.run(code)
    assert vision_tower.AlphaCLIPVisionModel is AlphaCLIPVisionModel


def damaged(clip_dir, target, change):
    shutil.copytree(clip_dir, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def drop(tensors):
    tensors.pop(next(key for key in tensors if "layers.1.mlp.fc1.weight" in key))


def add(tensors):
    tensors["encoder.layers.7.mlp.fc1.weight"] = torch.zeros(2, 2)


def reshape(tensors):
    key = next(key for key in tensors if "layers.1.mlp.fc1.weight" in key)
    tensors[key] = torch.zeros(8, 8)


@pytest.mark.parametrize(("change", "message"), [(drop, "1 missing"), (add, "1 unexpected")])
def test_a_checkpoint_that_does_not_fit_raises(clip_dir, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        AlphaCLIPVisionModel.from_pretrained(damaged(clip_dir, tmp_path / "x", change))


def test_a_tensor_of_another_shape_raises(clip_dir, tmp_path):
    folder = damaged(clip_dir, tmp_path / "x", reshape)
    with pytest.raises(ValueError, match="1 of another shape .*fc1"):
        AlphaCLIPVisionModel.from_pretrained(folder)


def test_another_model_type_raises(tmp_path):
    SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="siglip_vision_model"):
        AlphaCLIPVisionModel.from_pretrained(tmp_path)
