"""Model directories and adapters with damaged files, or files of another kind: an error of one line, and never a model
made of something else.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import mllm
from alpha_clip_commands import alpha_clip
from mllm import adapter_files, hub, loading
from tests.files import read_json, write_json
from tests.tiny import build_tiny_llava, random_adapter, save_model
from vision_tower.modeling_alpha_clip import ALPHA_WEIGHT

DEEP = b"[" * 100_000


@pytest.fixture
def model_dir(tiny_llava_dir, tmp_path):
    """A copy of the folder of the tiny LLaVA."""
    return shutil.copytree(tiny_llava_dir, tmp_path / "model")


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory):
    """An adapter for the tiny LLaVA with an alpha weight."""
    folder = tmp_path_factory.mktemp("adapter")
    model, _ = build_tiny_llava()
    return save_model(folder, random_adapter(model, r".*language_model.*\.(q_proj|v_proj)"))


@pytest.fixture
def adapter(adapter_dir, tmp_path):
    """A copy of the adapter."""
    return shutil.copytree(adapter_dir, tmp_path / "adapter")


def refusal(read, *args, **kwargs):
    with pytest.raises(ValueError) as caught:
        read(*args, **kwargs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


def edited(file, *keys, value):
    record = read_json(file)
    inner = record
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    write_json(file, record)


CONFIGS = [
    (["dtype"], True),
    (["dtype"], "x"),
    (["dtype"], 1.5),
    (["model_type"], []),
    (["model_type"], None),
    (["projector_hidden_act"], ""),
    (["image_token_index"], "x"),
    (["vision_config"], None),
    (["vision_config"], {}),
    (["vision_config"], 3),
    (["text_config"], None),
    (["text_config"], []),
    (["vision_config", "hidden_size"], 0),
    (["vision_config", "hidden_size"], 10**6),
    (["vision_config", "hidden_act"], "none"),
    (["vision_config", "num_hidden_layers"], 10**9),
    (["vision_config", "image_size"], 10**6),
    (["vision_config", "patch_size"], 0),
    (["vision_config", "num_attention_heads"], 0),
    (["vision_config", "num_channels"], 4),
    (["text_config", "num_hidden_layers"], 10**30),
    (["text_config", "vocab_size"], 0),
    (["text_config", "vocab_size"], 10**10),
    (["text_config", "hidden_size"], -1),
    (["text_config", "head_dim"], 10**9),
    (["text_config", "rope_parameters"], "x"),
]


@pytest.mark.parametrize(("keys", "value"), CONFIGS, ids=lambda value: str(value)[:50])
def test_values_of_a_configuration(model_dir, keys, value):
    edited(model_dir / "config.json", *keys, value=value)
    assert str(model_dir) in refusal(mllm.load, model_dir, device="cpu")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", DEEP, b"null", b"[]", b"3", b'"x"', b"{}"], ids=repr)
@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_files_that_are_something_else(model_dir, name, content):
    (model_dir / name).write_bytes(content)
    if content == b"{}" and name == "tokenizer_config.json":
        return  # all of its keys are optional
    assert str(model_dir) in refusal(loading.load_processor, model_dir)


@pytest.mark.parametrize(
    ("name", "keys", "value"),
    [
        ("tokenizer.json", ["version"], None),  # raises a plain Exception
        ("tokenizer.json", ["added_tokens"], 3),
        ("tokenizer.json", ["model"], {"type": "x"}),
        ("tokenizer_config.json", ["bos_token"], True),
        ("processor_config.json", ["image_processor"], 3),
        ("processor_config.json", ["image_processor", "size"], "x"),
        ("processor_config.json", ["image_processor", "crop_size"], -1),
        ("processor_config.json", ["image_processor", "geometry"], []),
        ("processor_config.json", ["image_token"], None),
    ],
)
def test_values_of_a_processor(model_dir, name, keys, value):
    edited(model_dir / name, *keys, value=value)
    assert str(model_dir) in refusal(loading.load_processor, model_dir)


def test_damaged_weights(model_dir):
    file = model_dir / "model.safetensors"
    whole = file.read_bytes()
    for content in (b"", whole[:1000], whole[:-10], b"\xff" * 1000):
        file.write_bytes(content)
        assert str(model_dir) in refusal(mllm.load, model_dir, device="cpu")
    file.unlink()
    (model_dir / "pytorch_model.bin").write_bytes(whole[:100_000])
    assert str(model_dir) in refusal(mllm.load, model_dir, device="cpu")


def test_a_mistake_of_our_own_is_not_taken_for_damage(model_dir, monkeypatch):
    def mistaken(*_, **__):
        raise TypeError("a mistake")

    mistaken.__code__ = mistaken.__code__.replace(co_filename=loading.__file__)
    monkeypatch.setattr(loading.AlphaLlavaProcessor, "__init__", mistaken)
    with pytest.raises(TypeError, match="a mistake"):
        loading.load_processor(model_dir)
    with pytest.raises(TypeError), loading.reading("DIR", "cannot load"):
        hub.offline_options(None)  # raised in os.path, called by this project


ADAPTERS = [
    ("peft_type", "IA3"),
    ("peft_type", None),
    ("peft_type", []),
    ("r", 0),
    ("r", -4),
    ("r", 8),
    ("r", 10**9),
    ("r", "4"),
    ("r", 4.5),
    ("rank_pattern", {"q_proj": 4096}),
    ("rank_pattern", {"q_proj": -1}),
    ("rank_pattern", [1]),
    ("alpha_pattern", {"q_proj": "x"}),
    ("lora_alpha", None),
    ("lora_alpha", "8"),
    ("lora_dropout", 2),
    ("target_modules", None),
    ("target_modules", "(("),
    ("target_modules", []),
    ("target_modules", ["no_such_layer"]),
    ("target_modules", 3),
    ("modules_to_save", "alpha"),
    ("modules_to_save", ["no_such_part"]),
    ("modules_to_save", None),
    ("exclude_modules", "*"),
    ("layers_to_transform", ["x"]),
    ("layers_to_transform", [0]),
    ("bias", "some"),
    ("use_dora", "x"),
    ("use_dora", True),
    ("init_lora_weights", "pissa"),
    ("megatron_config", {"a": 1}),
    ("trainable_token_indices", [1]),
    ("new_setting", 3),
    ("\ud800", "\ud800"),
]


@pytest.fixture(scope="module")
def wrapped():
    """A new tiny LLaVA for each adapter, because loading an adapter changes the model."""
    return lambda: build_tiny_llava()[0]


@pytest.mark.filterwarnings("ignore::UserWarning")  # from PEFT, before the error
@pytest.mark.parametrize(("key", "value"), ADAPTERS, ids=lambda value: ascii(value)[:40])
def test_values_of_an_adapter(wrapped, adapter, key, value):
    edited(adapter / "adapter_config.json", key, value=value)
    assert str(adapter) in refusal(loading.load_adapter, wrapped(), adapter)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", DEEP, b"null", b"[]", b"3", b"{}"], ids=repr)
def test_configurations_of_an_adapter_that_are_something_else(adapter, content):
    (adapter / "adapter_config.json").write_bytes(content)
    assert str(adapter) in refusal(adapter_files.read_adapter_config, adapter)


def alpha_of(tensors):
    return next(name for name in tensors if "alpha" in name)


@pytest.mark.filterwarnings("ignore::UserWarning")  # from PEFT, before the error
@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda tensors: tensors.pop(alpha_of(tensors)), "another model.*alpha"),
        (lambda tensors: tensors.update({alpha_of(tensors): torch.full((32, 1, 8, 8), torch.nan)}), "alpha.*holds NaN"),
        (lambda tensors: tensors.update({alpha_of(tensors): torch.zeros(32, 1, 4, 4)}), "another model"),
        (lambda tensors: tensors.update({alpha_of(tensors): torch.zeros(32, dtype=torch.int8)}), "alpha.*int8"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "1 tensors do not match.*extra"),
        (lambda tensors: tensors.clear(), "holds matrices of rank"),
    ],
)
def test_weights_of_an_adapter(wrapped, adapter, damage, named):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=named):
        loading.load_adapter(wrapped(), adapter)


def test_the_adapter_itself_is_good(wrapped, adapter):
    assert loading.load_adapter(wrapped(), adapter).peft_config["default"].r == 4


def test_merging_puts_the_adapters_alpha_weight_into_the_model(tiny_llava_dir, adapter, tmp_path):
    """Fully trained weights are merged too: the tower of the merged model has the alpha weight of the adapter."""
    out = tmp_path / "merged"
    assert alpha_clip.main(["merge", str(adapter), str(out), "--model", str(tiny_llava_dir)]) == 0
    tensors = load_file(adapter / "adapter_model.safetensors")
    merged, base = load_file(out / "model.safetensors"), load_file(tiny_llava_dir / "model.safetensors")
    (name,) = (key for key in merged if key.endswith(ALPHA_WEIGHT))
    assert torch.equal(merged[name], tensors[alpha_of(tensors)])
    assert not torch.equal(merged[name], base[name])
