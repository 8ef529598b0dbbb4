"""`from_pretrained` of our classes means what it means in Transformers, and no weight is lost or random. The judges are
CLIP's own classes, and the tensors in the files.
"""

import logging
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BitsAndBytesConfig,
    CLIPModel,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.files import read_json, write_json
from tests.tiny import alpha_of, tiny_clip_config
from vision_tower import (
    AlphaCLIPImageProcessor,
    AlphaCLIPModel,
    AlphaCLIPVisionConfig,
    AlphaCLIPVisionModel,
    AlphaCLIPVisionModelWithProjection,
    add_alpha_channel,
    load_with_alpha,
)
from vision_tower.alpha_embedding import WHOLE_IMAGE
from vision_tower.llava_tower import AlphaCLIPVisionTower
from vision_tower.modeling_alpha_clip import ALPHA_WEIGHT

CLASSES = (AlphaCLIPVisionModel, AlphaCLIPVisionModelWithProjection, AlphaCLIPModel)


@pytest.fixture(autouse=True)
def default_verbosity(caplog):
    """Commands that ran earlier in this process have changed it."""
    caplog.set_level(logging.WARNING, "transformers")


def features(model):
    """Pooled features of two regions of one image."""
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    alpha = torch.full((2, 1, 32, 32), WHOLE_IMAGE)
    alpha[0, :, :, 16:] = alpha[1, :, :, :16] = -WHOLE_IMAGE
    with torch.no_grad():
        return model(torch.cat([image.expand(2, -1, -1, -1), alpha], 1)).pooler_output


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A directory of a whole CLIP."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(tiny_clip_config()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tower(clip):
    model = AlphaCLIPVisionModel.from_pretrained(clip)
    torch.nn.init.normal_(alpha_of(model), std=0.3)
    expected = features(model)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    return model


@pytest.fixture
def ours(tower, tmp_path):
    tower.save_pretrained(tmp_path / "ours")
    return tmp_path / "ours"


def change(folder, edit):
    """Rewrite the weights in a directory; `edit` takes a file's tensors and returns others."""
    for file in folder.glob("*.safetensors"):
        save_file(edit(load_file(file)), file, {"format": "pt"})


def without_alpha(tensors):
    return {key: tensor for key, tensor in tensors.items() if ".alpha." not in key}


QUANTIZED = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
OPTIONS = [
    {},
    {"dtype": torch.float16},
    {"torch_dtype": "bfloat16"},
    {"device_map": "cpu"},
    {"device_map": "auto"},
    {"low_cpu_mem_usage": True},
    {"attn_implementation": "eager"},
    {"use_safetensors": True},
    QUANTIZED,
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: str(next(iter(options.items()), ""))[:30])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_clip_loads_with_zero_alpha_and_without_a_report(clip, cls, options, caplog):
    if options is QUANTIZED:
        pytest.importorskip("bitsandbytes", reason="an optional dependency; make setup installs it on Linux")
    model = cls.from_pretrained(clip, **options)
    assert torch.count_nonzero(alpha_of(model)) == 0
    assert alpha_of(model).dtype == model.dtype and not alpha_of(model).is_meta
    assert "REPORT" not in caplog.text and "MISSING" not in caplog.text


def test_a_new_process_prints_nothing_when_it_loads_a_clip(processes, clip):
    """At the default verbosity, on either stream; a progress bar is no message."""
    code = f"""
import vision_tower
for name in {[cls.__name__ for cls in CLASSES]}:
    getattr(vision_tower, name).from_pretrained({str(clip)!r})
"""
    printed = processes.run(code).output().replace("\r", "\n").split("\n")
    assert [line for line in printed if line and not line.startswith("Loading weights:")] == []


def test_other_reports_are_logged(clip, tmp_path, caplog):
    """Transformers' own classes keep their report, before and after ours were loaded."""
    AlphaCLIPVisionModel.from_pretrained(clip)
    caplog.clear()
    CLIPVisionModel.from_pretrained(clip)
    assert "LOAD REPORT" in caplog.text
    shutil.copytree(clip, tmp_path / "x")
    change(tmp_path / "x", lambda tensors: {key: t for key, t in tensors.items() if "layers.1.mlp" not in key})
    caplog.clear()
    with pytest.raises(ValueError, match="missing"):
        AlphaCLIPModel.from_pretrained(tmp_path / "x")
    assert "LOAD REPORT" in caplog.text and not logging.getLogger("transformers.modeling_utils").filters


def test_loading_info(clip, ours):
    model, info = AlphaCLIPVisionModel.from_pretrained(clip, output_loading_info=True)
    assert info["missing_keys"] == {ALPHA_WEIGHT} and type(model) is AlphaCLIPVisionModel
    stored = load_file(clip / "model.safetensors")
    assert info["unexpected_keys"] == {key for key in stored if not key.startswith("vision_model.")}
    for cls in (AlphaCLIPVisionModel, AutoModel):
        _, info = cls.from_pretrained(ours, output_loading_info=True)
        assert not any(info.values())


def test_mismatched_sizes(ours, caplog):
    key = "encoder.layers.1.mlp.fc1.weight"
    change(ours, lambda tensors: {**tensors, key: torch.zeros(8, 8)})
    with pytest.raises(ValueError, match=f"model.safetensors do not match .*1 of another shape .*{key}"):
        AlphaCLIPVisionModel.from_pretrained(ours)
    caplog.clear()
    model, info = AlphaCLIPVisionModel.from_pretrained(ours, ignore_mismatched_sizes=True, output_loading_info=True)
    assert [name for name, *_ in info["mismatched_keys"]] == [key]
    assert "MISMATCH" in caplog.text and model.get_parameter(key).shape == (64, 32)
    assert torch.count_nonzero(alpha_of(model))


def test_settings_given_to_from_pretrained_change_the_configuration(clip, tower, ours):
    assert AlphaCLIPVisionModel.from_pretrained(clip, attention_dropout=0.25).config.attention_dropout == 0.25
    assert CLIPVisionModel.from_pretrained(clip, attention_dropout=0.25).config.attention_dropout == 0.25
    for config in (ours, str(ours), AlphaCLIPVisionConfig.from_pretrained(ours), tower.config):
        assert torch.equal(features(AlphaCLIPVisionModel.from_pretrained(ours, config=config)), features(tower))
    with pytest.raises(ValueError, match="expected an AlphaCLIPVisionConfig, got a CLIPVisionConfig"):
        AlphaCLIPVisionModel.from_pretrained(clip, config=CLIPVisionModel.from_pretrained(clip).config)


def test_a_state_dict(clip, tower):
    weights = tower.state_dict()
    again = AlphaCLIPVisionModel.from_pretrained(None, config=tower.config, state_dict=weights)
    assert torch.equal(features(again), features(tower))
    clips = CLIPVisionModel.from_pretrained(clip).state_dict()
    zero = AlphaCLIPVisionModel.from_pretrained(None, config=tower.config, state_dict=clips)
    assert torch.count_nonzero(alpha_of(zero)) == 0
    del clips["embeddings.class_embedding"]
    with pytest.raises(ValueError, match="the given state_dict do not match .*1 missing"):
        AlphaCLIPVisionModel.from_pretrained(None, config=tower.config, state_dict=clips)


def in_a_subfolder(model, folder):
    model.save_pretrained(folder / "a" / "b")
    return {"subfolder": "a/b"}, "a/b/model.safetensors"


def as_a_variant(model, folder):
    model.save_pretrained(folder, variant="fp16")
    return {"variant": "fp16"}, "model.fp16.safetensors"


def as_a_sharded_variant(model, folder):
    model.save_pretrained(folder, variant="fp16", max_shard_size="40KB")
    return {"variant": "fp16"}, "model.safetensors.index.fp16.json"


def in_shards(model, folder):
    model.save_pretrained(folder, max_shard_size="40KB")
    return {}, "model.safetensors.index.json"


def as_a_pickle(model, folder):
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return {}, "pytorch_model.bin"


def as_a_pickle_beside_other_weights(model, folder):
    options, file = as_a_pickle(model, folder)
    save_file({"other": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    return {"use_safetensors": False}, file


def under_other_names(model, folder):
    model.config.save_pretrained(folder)
    tensors = {f"tower.{key}": tensor for key, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return {"key_mapping": {r"^tower\.": ""}}, "model.safetensors"


def in_a_hub_cache(model, folder):
    cache = folder / "models--somebody--tower"
    model.save_pretrained(cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    return {"cache_dir": folder, "local_files_only": True}, "somebody/tower"


def under_old_names(model, folder):
    """As CLIP's tower was saved before Transformers flattened it."""
    model.config.save_pretrained(folder)
    tensors = {f"vision_model.{key}": tensor for key, tensor in model.state_dict().items()}
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return {}, "model.safetensors"


LAYOUTS = [
    in_a_subfolder,
    as_a_variant,
    as_a_sharded_variant,
    in_shards,
    as_a_pickle,
    as_a_pickle_beside_other_weights,
    under_other_names,
    in_a_hub_cache,
]


@pytest.fixture
def offline(monkeypatch):
    """The hub's client retries for a minute, also for what `local_files_only` finds in the cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("cls", [AlphaCLIPVisionModel, AutoModel])
@pytest.mark.parametrize("write", [*LAYOUTS, under_old_names])
def test_every_layout_gives_the_same_features_and_raises_without_alpha(tower, tmp_path, cls, write, caplog):
    options, file = write(tower, tmp_path)
    name = "somebody/tower" if write is in_a_hub_cache else tmp_path
    caplog.clear()
    assert torch.equal(features(cls.from_pretrained(name, **options)), features(tower))
    assert "REPORT" not in caplog.text
    for folder in {file.parent for file in tmp_path.rglob("*.safetensors")}:
        change(folder, without_alpha)
    for pickled in tmp_path.rglob("pytorch_model.bin"):
        torch.save(without_alpha(torch.load(pickled)), pickled)
    with pytest.raises(ValueError, match=f"{file} lacks the alpha weight {ALPHA_WEIGHT}, although") as raised:
        cls.from_pretrained(name, **options)
    assert "\n" not in str(raised.value) and "REPORT" not in caplog.text


@pytest.mark.parametrize("cls", CLASSES)
def test_a_missing_alpha_raises_in_every_class(clip, tmp_path, cls):
    cls.from_pretrained(clip).save_pretrained(tmp_path)
    change(tmp_path, without_alpha)
    for loader in (cls, AutoModel):
        if loader is AutoModel and cls is AlphaCLIPVisionModelWithProjection:
            continue  # AutoModel loads the tower alone from its directory
        with pytest.raises(ValueError, match="model.safetensors lacks the alpha weight .*although its config.json"):
            loader.from_pretrained(tmp_path)
    # a configuration given by hand does not hide it
    with pytest.raises(ValueError, match="lacks the alpha weight"):
        cls.from_pretrained(tmp_path, config=cls.config_class.from_pretrained(clip))


def test_a_missing_alpha_raises_in_the_tower_of_the_original_llava(ours):
    AlphaCLIPImageProcessor.for_size(32, "pad").save_pretrained(ours)
    args = SimpleNamespace(mm_vision_select_layer=-2)
    AlphaCLIPVisionTower(str(ours), args)
    change(ours, without_alpha)
    with pytest.raises(ValueError, match="lacks the alpha weight"):
        AlphaCLIPVisionTower(str(ours), args)


def test_a_directory_without_configuration_may_lack_alpha(tower, tmp_path):
    save_file(without_alpha(tower.state_dict()), tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.count_nonzero(alpha_of(AlphaCLIPVisionModel.from_pretrained(tmp_path, config=tower.config))) == 0


@pytest.fixture
def siglip():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    model = add_alpha_channel(SiglipVisionModel(SiglipVisionConfig(intermediate_size=64, **sizes)).eval())
    torch.nn.init.normal_(alpha_of(model), std=0.3)
    return model


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("write", LAYOUTS)
def test_load_with_alpha_from_every_layout(siglip, tmp_path, write):
    options, _ = write(siglip, tmp_path)
    name = "somebody/tower" if write is in_a_hub_cache else tmp_path
    again = load_with_alpha(name, SiglipVisionModel, **options)
    assert type(again) is SiglipVisionModel and torch.equal(features(again), features(siglip))
    expected = features(again)
    assert (expected[0] - expected[1]).abs().max() > 1e-3


def test_load_with_alpha_keeps_the_arguments_of_from_pretrained(siglip, tmp_path):
    siglip.save_pretrained(tmp_path)
    half = load_with_alpha(tmp_path, dtype=torch.float16, device_map="cpu")
    assert alpha_of(half).dtype == torch.float16 and torch.equal(alpha_of(half), alpha_of(siglip).half())
    model, info = load_with_alpha(tmp_path, output_loading_info=True)
    assert type(model) is SiglipVisionModel and not any(info.values())
    change(tmp_path, lambda tensors: {**tensors, "post_layernorm.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="1 of another shape"):
        load_with_alpha(tmp_path)
    _, info = load_with_alpha(tmp_path, output_loading_info=True, ignore_mismatched_sizes=True)
    assert [name for name, *_ in info["mismatched_keys"]] == ["post_layernorm.weight"]
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", {**config, "architectures": ["NoSuchModel"]})
    with pytest.raises(ValueError, match="NoSuchModel"):
        load_with_alpha(tmp_path)


def test_a_configuration_created_from_the_fields_of_clip(clip, tmp_path):
    """Its fields may name CLIP's type; its class is what counts, and what is saved."""
    fields = CLIPModel.from_pretrained(clip).config.vision_config.to_dict()
    AlphaCLIPVisionModel(AlphaCLIPVisionConfig(**fields)).save_pretrained(tmp_path)
    assert read_json(tmp_path / "config.json")["model_type"] == "alpha_clip_vision_model"
    assert type(AutoModel.from_pretrained(tmp_path)) is AlphaCLIPVisionModel


def test_an_adapter_of_a_tower_with_missing_weights_raises(ours, tower, tmp_path):
    """The loading info is the adapter's then, and omits the tower below it."""
    config = LoraConfig(target_modules=["q_proj"])
    tuned = get_peft_model(AlphaCLIPVisionModel.from_pretrained(ours), config)
    tuned.save_pretrained(tmp_path / "adapter")
    assert torch.equal(features(AlphaCLIPVisionModel.from_pretrained(tmp_path / "adapter")), features(tower))
    change(ours, lambda tensors: {key: t for key, t in tensors.items() if "layers.1.mlp" not in key})
    with pytest.raises(ValueError, match="ours/model.safetensors do not match AlphaCLIPVisionModel: 4 missing"):
        AlphaCLIPVisionModel.from_pretrained(tmp_path / "adapter")
