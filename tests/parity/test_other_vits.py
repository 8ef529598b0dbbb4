"""An alpha channel for other ViTs: at zero the stock model bit for bit, trained it sees the region, saved it comes
back. The judges are Transformers' own classes.
"""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    BertConfig,
    BertModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlavaForConditionalGeneration,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.tiny import tiny_clip_config, tiny_llava_config, tiny_tokenizer
from vision_tower import AlphaPatchEmbedding, add_alpha_channel, load_with_alpha
from vision_tower.alpha_embedding import WHOLE_IMAGE, AlphaConv2d

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
MODELS = {
    "clip": (CLIPVisionModel, CLIPVisionConfig(intermediate_size=64, **SIZES)),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(intermediate_size=64, **SIZES)),
    "eva": (Blip2VisionModel, Blip2VisionConfig(intermediate_size=64, initializer_range=0.02, **SIZES)),
    "dinov2": (Dinov2Model, Dinov2Config(mlp_ratio=2, **SIZES)),
}


@pytest.fixture(params=MODELS)
def stock(request):
    model_class, config = MODELS[request.param]
    torch.manual_seed(0)
    return model_class(config).eval()


def pixels(channels=4):
    return torch.randn(2, channels, 32, 32, generator=torch.Generator().manual_seed(1))


def states(model, values):
    with torch.no_grad():
        return model(values).last_hidden_state


def alpha_of(model):
    return next(module for module in model.modules() if isinstance(module, AlphaConv2d)).weight


@pytest.mark.compatibility(
    "transformers CLIP, SigLIP, BLIP-2's EVA, DINOv2 towers",
    "add_alpha_channel at zero; float32, bfloat16, float16; 3 and 4 channels",
    "equal",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_alpha_is_the_stock_model(stock, dtype):
    stock = stock.to(dtype)
    ours = add_alpha_channel(copy.deepcopy(stock))
    assert alpha_of(ours).dtype == dtype and torch.count_nonzero(alpha_of(ours)) == 0
    values = pixels().to(dtype)
    expected = states(stock, values[:, :3])
    assert torch.equal(states(ours, values), expected)
    assert torch.equal(states(ours, values[:, :3]), expected)
    for channels in (2, 5):
        with pytest.raises(ValueError, match="RGB \\+ alpha"):
            ours(pixels(channels))


def test_trained_alpha_uses_the_region(stock):
    ours = add_alpha_channel(stock)
    nn.init.normal_(alpha_of(ours), std=0.1)
    whole = torch.cat([pixels(3), torch.full((2, 1, 32, 32), WHOLE_IMAGE)], 1)
    assert torch.equal(states(ours, whole), states(ours, pixels(3)))
    left, right = whole.clone(), whole.clone()
    left[:, 3, :, 16:] = right[:, 3, :, :16] = -WHOLE_IMAGE
    assert (states(ours, left) - states(ours, right)).abs().max() > 1e-3


def test_weights_are_the_same_tensors_and_alpha_is_trained(stock):
    before = dict(stock.named_parameters())
    for parameter in before.values():
        parameter.requires_grad_(False)
    ours = add_alpha_channel(stock)
    after = dict(ours.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    (new,) = after.keys() - before.keys()
    assert new.endswith(".alpha.weight") and after[new].requires_grad
    if ours.supports_gradient_checkpointing:
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    ours.train()(pixels()).last_hidden_state.square().mean().backward()
    assert after[new].grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in before.values())


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_saved_alpha_is_loaded_only_by_load_with_alpha(stock, tmp_path, shard):
    ours = add_alpha_channel(stock)
    nn.init.normal_(alpha_of(ours), std=0.1)
    ours.save_pretrained(tmp_path, max_shard_size=shard)
    again = load_with_alpha(tmp_path)
    assert type(again) is type(stock)
    expected = ours.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in again.state_dict().items())
    assert torch.equal(states(again, pixels()), states(ours, pixels()))
    plain, report = type(stock).from_pretrained(tmp_path, output_loading_info=True)
    assert [key.endswith(".alpha.weight") for key in report["unexpected_keys"]] == [True]
    assert not any(isinstance(module, AlphaPatchEmbedding) for module in plain.modules())


def test_a_stock_directory_is_an_error(stock, tmp_path):
    """Its alpha would be zero, and every region ignored without a word."""
    stock.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no alpha weight.*add_alpha_channel"):
        load_with_alpha(tmp_path)
    ours = add_alpha_channel(type(stock).from_pretrained(tmp_path))
    assert torch.count_nonzero(alpha_of(ours)) == 0
    assert torch.equal(states(ours, pixels()), states(stock, pixels(4)[:, :3]))


def test_a_complete_load_logs_no_report(stock, tmp_path, caplog):
    ours = add_alpha_channel(stock)
    ours.save_pretrained(tmp_path)
    caplog.clear()
    load_with_alpha(tmp_path)
    assert "UNEXPECTED" not in caplog.text


def test_other_weights_are_an_error(stock, tmp_path):
    add_alpha_channel(stock).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    first = sorted(key for key in weights if "layer" in key)[0]
    for changed in (
        {key: tensor for key, tensor in weights.items() if key != first},
        {**weights, "extra.alpha.weight": torch.ones(2)},
    ):
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match="do not match"):
            load_with_alpha(tmp_path)


def test_models_that_contain_a_tower(tmp_path):
    torch.manual_seed(0)
    clip = add_alpha_channel(CLIPModel(tiny_clip_config()))
    assert torch.count_nonzero(alpha_of(clip)) == 0
    tokenizer = tiny_tokenizer()
    llava = LlavaForConditionalGeneration(
        tiny_llava_config(tokenizer, SiglipVisionConfig(intermediate_size=64, vision_use_head=False, **SIZES))
    )
    nn.init.normal_(alpha_of(add_alpha_channel(llava)))
    llava.save_pretrained(tmp_path)
    for model_class in (None, AutoModelForImageTextToText):
        assert torch.equal(alpha_of(load_with_alpha(tmp_path, model_class)), alpha_of(llava))


def test_peft_trains_and_saves_the_alpha_weight(stock, tmp_path):
    ours = add_alpha_channel(stock)
    path = next(name for name, module in ours.named_modules() if isinstance(module, AlphaConv2d))
    config = LoraConfig(target_modules=r".*(q_proj|query|qkv)", modules_to_save=[path.split(".", 1)[1]])
    tuned = get_peft_model(ours, config)
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or ".alpha." in name for name in trained) and any(".alpha." in n for n in trained)
    tuned.save_pretrained(tmp_path)
    assert any(key.endswith("alpha.weight") for key in load_file(tmp_path / "adapter_model.safetensors"))


def test_unsupported_models_are_an_error(stock):
    naflex = Siglip2VisionModel(
        Siglip2VisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_patches=16
        )
    )
    with pytest.raises(ValueError, match="NaFlex"):
        add_alpha_channel(naflex)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with pytest.raises(ValueError, match="got BertModel with 0"):
        add_alpha_channel(BertModel(BertConfig(vocab_size=20, **small)))
    with pytest.raises(ValueError, match="already"):
        add_alpha_channel(add_alpha_channel(stock))
