"""Language models around an alpha tower: alpha starts at exactly zero under every root class that can load one, without
a report; and a checkpoint that lost it raises.
"""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2VisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import mllm
from mllm import blip2, llava
from mllm.blip2 import AlphaBlip2ForConditionalGeneration, AlphaBlip2VisionConfig, AlphaBlip2VisionModel
from mllm.convert.export import export
from mllm.loading import quantization
from tests.tiny import alpha_of, build_stock_llava, build_tiny_blip2, save_model, tiny_blip2_parts

EVA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
EVA = {**EVA, "image_size": 32, "patch_size": 8}


@pytest.fixture(autouse=True)
def default_verbosity(caplog):
    """Commands that ran earlier in this process have changed it."""
    caplog.set_level(logging.WARNING, "transformers")


def without_alpha(folder):
    for file in folder.glob("*.safetensors"):
        kept = {key: tensor for key, tensor in load_file(file).items() if ".alpha." not in key}
        save_file(kept, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def stock_llava(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llava"), build_stock_llava())


@pytest.fixture(scope="module")
def stock_blip2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip2")
    _, parts = tiny_blip2_parts("opt")
    Blip2ForConditionalGeneration(Blip2Config(vision_config=Blip2VisionConfig(**EVA), **parts)).save_pretrained(folder)
    return folder


QUANTIZED = ["4bit", "8bit"]
OPTIONS = [{"dtype": torch.float16}, {"dtype": "bfloat16"}, {"device_map": "cpu"}, {"device_map": "auto"}, *QUANTIZED]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("family", [llava, blip2], ids=["llava", "blip2"])
def test_alpha_starts_at_zero_without_a_report(stock_llava, stock_blip2, family, options, caplog):
    if options in QUANTIZED:
        pytest.importorskip("bitsandbytes", reason="an optional dependency; make setup installs it on Linux")
        options = {"quantization_config": quantization(options, family.NEVER_QUANTIZED)}
    folder, kind = (stock_llava, LlavaConfig) if family is llava else (stock_blip2, Blip2Config)
    model = family.load_model(folder, kind.from_pretrained(folder), **options)
    assert torch.count_nonzero(alpha_of(model)) == 0
    assert not alpha_of(model).is_meta and alpha_of(model).dtype.is_floating_point
    assert "REPORT" not in caplog.text


def test_from_pretrained_of_the_stock_llava_class_starts_at_zero_too(stock_llava):
    config = llava.with_alpha_tower(LlavaConfig.from_pretrained(stock_llava))
    for dtype in (torch.float32, torch.float16):
        model = LlavaForConditionalGeneration.from_pretrained(stock_llava, config=config, dtype=dtype)
        assert torch.count_nonzero(alpha_of(model)) == 0


def test_a_device_map_is_passed_on(tiny_llava_dir, monkeypatch):
    given = []
    monkeypatch.setattr(
        llava,
        "load_model",
        lambda *args, original=llava.load_model, **kwargs: given.append(kwargs) or original(*args, **kwargs),
    )
    mllm.load(tiny_llava_dir, device_map="cpu")
    assert given[0]["device_map"] == "cpu"


@pytest.mark.parametrize("size", ["1GB", "40KB"])
def test_a_lost_alpha_raises_for_llava(tiny_llava, tmp_path, size, caplog):
    model, processor = tiny_llava
    model.save_pretrained(tmp_path, max_shard_size=size)
    processor.save_pretrained(tmp_path)
    assert torch.equal(alpha_of(mllm.load(tmp_path, device="cpu")[0]), alpha_of(model))
    without_alpha(tmp_path)
    message = r"model.safetensors\S* lacks the alpha weight model.vision_tower.embeddings.patch_embedding.alpha.weight"
    with pytest.raises(ValueError, match=message) as raised:
        mllm.load(tmp_path, device="cpu")
    assert "\n" not in str(raised.value)
    caplog.clear()
    AutoModelForImageTextToText.from_pretrained(tmp_path)  # the stock class only reports it (docs/python.md)
    assert "alpha.weight" in caplog.text and "MISSING" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["llava", "export", "blip2"])
def test_an_alpha_weight_of_nan_raises(tiny_llava, tmp_path, kind, value):
    model, processor = build_tiny_blip2("opt") if kind == "blip2" else tiny_llava
    if kind == "export":
        export(model, processor, tmp_path / "model")
    else:
        save_model(tmp_path / "model", model, processor)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = "patch_embedding.weight" if kind == "export" else ".alpha.weight"
    next(tensor for key, tensor in tensors.items() if key.endswith(name))[0, -1, 0, 0] = value
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="the alpha weight .* contains NaN or Inf"):
        mllm.load(tmp_path / "model", device="cpu")


def eva_tower(folder):
    torch.manual_seed(0)
    AlphaBlip2VisionModel(AlphaBlip2VisionConfig(**EVA)).save_pretrained(folder)
    return AutoModel, AlphaBlip2VisionModel


def clip_tower(folder):
    build_tiny_blip2("opt")[0].vision_model.save_pretrained(folder)
    return AutoModel, blip2.AlphaCLIPBlip2VisionModel


def whole(folder):
    save_model(folder, *build_tiny_blip2("opt"))
    return AutoModelForImageTextToText, AlphaBlip2ForConditionalGeneration


@pytest.mark.parametrize("write", [eva_tower, clip_tower, whole])
def test_a_lost_alpha_raises_for_blip2_and_its_towers(tmp_path, write):
    classes = write(tmp_path)
    for cls in classes:
        assert type(cls.from_pretrained(tmp_path)) is classes[1]
    without_alpha(tmp_path)
    for cls in classes:
        with pytest.raises(ValueError, match="model.safetensors lacks the alpha weight .*although its config.json"):
            cls.from_pretrained(tmp_path)
    if write is whole:
        with pytest.raises(ValueError, match="model.safetensors lacks the alpha weight"):
            mllm.load(tmp_path, device="cpu")


def test_blip2_keeps_the_arguments_of_from_pretrained(stock_blip2, tmp_path, caplog):
    cls = AlphaBlip2ForConditionalGeneration
    model, info = cls.from_pretrained(stock_blip2, output_loading_info=True, initializer_factor=0.5)
    assert info["missing_keys"] == {"vision_model.embeddings.patch_embedding.alpha.weight"}
    assert model.config.initializer_factor == 0.5
    key = "language_projection.weight"
    model.save_pretrained(tmp_path / "a" / "b")
    tensors = load_file(tmp_path / "a" / "b" / "model.safetensors")
    save_file({**tensors, key: torch.zeros(3)}, tmp_path / "a" / "b" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"b/model.safetensors do not match .*1 of another shape .*{key}"):
        cls.from_pretrained(tmp_path / "a", subfolder="b")
    caplog.clear()
    options = {"ignore_mismatched_sizes": True, "output_loading_info": True}
    _, info = cls.from_pretrained(tmp_path / "a", subfolder="b", **options)
    assert [name for name, *_ in info["mismatched_keys"]] == [key] and "MISMATCH" in caplog.text
