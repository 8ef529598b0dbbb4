"""LAVIS' BLIP-2 checkpoints: what is dropped is dropped by name, and nothing doubtful is taken."""

import json
import logging
import re

import pytest
import torch
from safetensors import safe_open
from transformers import Blip2QFormerConfig, T5Config

from mllm.blip2 import AlphaBlip2Config, AlphaBlip2ForConditionalGeneration
from mllm.convert import lavis_keys as conversion
from tests.tensors import FIXTURES, fixture_tensors, same_tensors
from vision_tower import AlphaCLIPVisionConfig, AlphaCLIPVisionModel
from vision_tower.conversion import read_tower

LAYER = "Qformer.bert.encoder.layer"


@pytest.fixture
def lavis():
    """A stage-2 checkpoint of LAVIS without a tower: 3 Q-Former layers 64 wide, 5 queries, a tower 128 wide."""
    return fixture_tensors("lavis_blip2.safetensors")


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """An Alpha-CLIP tower of two blocks, 128 wide."""
    file = tmp_path_factory.mktemp("alpha") / "a.pth"
    torch.save(fixture_tensors("alpha_clip_original.safetensors"), file)
    return read_tower(file)


def own_tower():
    """The tensors of a CLIP tower as LAVIS names them."""
    content = fixture_tensors("alpha_clip_original.safetensors")
    kept = {k: t for k, t in content.items() if not k.startswith(("conv1_alpha.", "ln_post.", "proj"))}
    return {f"visual_encoder.{k}".replace("in_proj.", "in_proj_"): t for k, t in kept.items()}


def stage_1_names():
    with safe_open(FIXTURES / "lavis_blip2.safetensors", "pt") as file:
        return json.loads(file.metadata()["stage_1_only"])


def test_every_size_is_read_off_the_tensors(lavis, tower):
    fields, weights = conversion.from_lavis(lavis, tower, blocks=1)
    vision, qformer = fields["vision_config"], fields["qformer_config"]
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size) == (128, 1, 32, 8)
    assert vision.hidden_act == "quick_gelu" and vision.layer_norm_eps == 1e-5
    assert fields["num_query_tokens"] == 5
    assert (qformer.hidden_size, qformer.num_hidden_layers, qformer.num_attention_heads) == (64, 3, 1)
    assert (qformer.intermediate_size, qformer.encoder_hidden_size, qformer.cross_attention_frequency) == (96, 128, 2)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert not any("encoder.layers.1." in key for key in weights if key.startswith("vision_model."))
    assert torch.equal(weights["vision_model.post_layernorm.weight"], lavis["ln_vision.weight"].float())


def test_heads_of_a_wider_qformer(lavis):
    wide = {key: torch.zeros([128 if size == 64 else size for size in t.shape]) for key, t in lavis.items()}
    assert conversion.qformer_config_from_lavis(wide).num_attention_heads == 2


def test_where_cross_attention_stands_is_read_off(lavis, tower):
    rarer = {key: tensor for key, tensor in lavis.items() if ".2.crossattention." not in key}
    fields, weights = conversion.from_lavis(rarer, tower, blocks=1)
    assert fields["qformer_config"].cross_attention_frequency == 3
    assert any(key.startswith("qformer.encoder.layer.0.crossattention.") for key in weights)


def test_real_sizes_are_those_of_transformers(lavis):
    """ViT-L and BERT-base by shape alone: every tensor that the model wants comes out, 23 blocks of CLIP's 24."""
    real, sizes = {}, {64: 768, 96: 3072, 128: 1024, 5: 32, 16: 512}
    for key, tensor in lavis.items():
        shape = [2048 if key.startswith("t5_proj.") and not i else sizes.get(n, n) for i, n in enumerate(tensor.shape)]
        first = re.search(r"layer\.([01])\.", key)
        for index in range(int(first[1]), 12, 2) if first else [2]:
            real[re.sub(r"layer\.\d", f"layer.{index}", key)] = torch.zeros(1).expand(shape)
    vit_l = AlphaCLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    with torch.device("meta"):
        whole = AlphaCLIPVisionModel(vit_l).state_dict()
    tower = {key: torch.zeros(1).expand(tensor.shape) for key, tensor in whole.items()}
    fields, weights = conversion.from_lavis(real, (vit_l, tower))
    assert fields["qformer_config"].to_dict() == Blip2QFormerConfig(encoder_hidden_size=1024).to_dict()
    assert (fields["vision_config"].num_hidden_layers, fields["num_query_tokens"]) == (23, 32)
    text_config = T5Config(d_model=2048, num_layers=1)
    with torch.device("meta"):
        model = AlphaBlip2ForConditionalGeneration(AlphaBlip2Config(**fields, text_config=text_config))
    wanted = {key: t.shape for key, t in model.state_dict().items() if not key.startswith("language_model.")}
    assert {key: tensor.shape for key, tensor in weights.items()} == wanted


def test_the_text_side_of_stage_1_is_dropped(lavis, tower):
    names = stage_1_names()  # out of LAVIS' own model
    assert len(names) > 30 and "temp" in names and f"{LAYER}.2.output.LayerNorm.bias" in names
    both = lavis | {name: torch.zeros(1) for name in names}
    assert same_tensors(conversion.from_lavis(both, tower, 1)[1], conversion.from_lavis(lavis, tower, 1)[1])


def test_opt_projection(lavis, tower):
    opt = {key.replace("t5_proj.", "opt_proj."): tensor for key, tensor in lavis.items()}
    assert (conversion.projection_of(lavis), conversion.projection_of(opt)) == ("t5_proj", "opt_proj")
    assert same_tensors(conversion.from_lavis(opt, tower, 1)[1], conversion.from_lavis(lavis, tower, 1)[1])


def test_own_tower_has_zero_alpha_and_says_so(lavis, tower, caplog):
    whole = lavis | own_tower()
    with caplog.at_level(logging.WARNING):
        fields, weights = conversion.from_lavis(whole, blocks=2)
    assert "every region gets the same answer" in caplog.text
    assert fields["vision_config"].num_hidden_layers == 2
    alpha = "vision_model.embeddings.patch_embedding.alpha.weight"
    assert weights[alpha].shape == (128, 1, 8, 8) and not weights[alpha].any()
    given = conversion.from_lavis(whole, tower, blocks=2)[1]
    assert given[alpha].any()
    assert same_tensors({**weights, alpha: given[alpha]}, given)  # the fixture's towers differ in alpha only


def test_the_tower_in_the_file_says_how_many_blocks(lavis, tower):
    with pytest.raises(ValueError, match="2 blocks of the tower in its own file, not 1"):
        conversion.from_lavis(lavis | own_tower(), tower, blocks=1)


@pytest.mark.parametrize(
    "name",
    [
        "query_tokens",
        "ln_vision.bias",
        "t5_proj.bias",
        "Qformer.bert.embeddings.LayerNorm.weight",
        f"{LAYER}.0.crossattention.self.key.weight",
        f"{LAYER}.2.crossattention.self.value.bias",
        f"{LAYER}.1.attention.self.query.weight",
        f"{LAYER}.2.output_query.LayerNorm.weight",
    ],
)
def test_each_missing_or_misshapen_tensor_is_named(lavis, tower, name):
    whole = lavis[name]
    del lavis[name]
    with pytest.raises(ValueError, match=f"{name}.*(such tensors|got nothing)"):
        conversion.from_lavis(lavis, tower, 1)
    lavis[name] = whole[..., :-1]
    with pytest.raises(ValueError, match="expected .* got|contains more|wide"):
        conversion.from_lavis(lavis, tower, 1)
    lavis[name] = torch.full_like(whole, torch.nan)
    with pytest.raises(ValueError, match=f"{name} contains NaN"):
        conversion.from_lavis(lavis, tower, 1)


@pytest.mark.parametrize("name", ["t5_model.shared.weight", f"{LAYER}.1.crossattention.self.key.bias", "temperature"])
def test_each_tensor_too_many_is_named(lavis, tower, name):
    lavis[name] = torch.zeros(64)
    with pytest.raises(ValueError, match=f"contains more.*{name}"):
        conversion.from_lavis(lavis, tower, 1)


def test_stage_1_is_refused(lavis, tower):
    stage_1 = {key: tensor for key, tensor in lavis.items() if not key.startswith("t5_proj.")}
    with pytest.raises(ValueError, match="stage-1 checkpoint.*no projection into a language model"):
        conversion.from_lavis(stage_1, tower, 1)


def test_towers_that_do_not_fit_are_refused(lavis, tower):
    vit_g = dict(lavis)
    for key in lavis:
        if key.startswith("ln_vision.") or "crossattention.self.key.w" in key or "crossattention.self.value.w" in key:
            vit_g[key] = torch.zeros(*lavis[key].shape[:-1], 1408)
    with pytest.raises(ValueError, match=r"1408 wide .*the tower given is 128 wide.*vitL checkpoints"):
        conversion.from_lavis(vit_g, tower, 1)
    with pytest.raises(ValueError, match="EVA ViT-g tower"):
        conversion.from_lavis({**vit_g, "visual_encoder.blocks.0.norm1.weight": torch.zeros(1408)}, tower, 1)
    with pytest.raises(ValueError, match="at least 23 blocks .*got 2"):
        conversion.from_lavis(lavis, tower)
    with pytest.raises(ValueError, match="holds no tower.*--vision-tower"):
        conversion.from_lavis(lavis)
    cut = {key: t for key, t in own_tower().items() if not key.endswith("1.ln_2.bias")}
    with pytest.raises(ValueError, match=r"visual_encoder.*lacks transformer.resblocks.1.ln_2.bias"):
        conversion.from_lavis(lavis | cut, blocks=2)


def test_files(lavis, tmp_path):
    torch.save({"model": lavis, "epoch": 9}, tmp_path / "lavis.pth")
    assert same_tensors(conversion.read_lavis(tmp_path / "lavis.pth"), lavis)
    with pytest.raises(ValueError, match="checkpoint not found"):
        conversion.read_lavis(tmp_path / "absent.pth")
    torch.save(lavis, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="expected named tensors under 'model'"):
        conversion.read_lavis(tmp_path / "bare.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "lavis.pth").read_bytes()[:5000])
    with pytest.raises(ValueError, match="damaged"):
        conversion.read_lavis(tmp_path / "cut.pth")


class RunsCode:
    def __reduce__(self):
        return print, ("this must not be printed",)


def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys):
    torch.save({"model": RunsCode()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="would run code"):
        conversion.read_lavis(tmp_path / "evil.pth")
    assert not capsys.readouterr().out
