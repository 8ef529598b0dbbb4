"""Zero alpha = CLIP, bit for bit. The judge is Transformers' own `CLIPVisionModel`."""

import copy

import pytest
import torch
from transformers import CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

from tests.tiny import tiny_clip_config
from vision_tower import AlphaCLIPModel, AlphaCLIPVisionModel, AlphaCLIPVisionModelWithProjection
from vision_tower.alpha_embedding import WHOLE_IMAGE

ALPHA = "patch_embedding.alpha.weight"


@pytest.fixture(scope="module")
def pixels():
    generator = torch.Generator().manual_seed(0)
    rgb = torch.randn(2, 3, 32, 32, generator=generator)
    alpha = torch.randn(2, 1, 32, 32, generator=generator)
    return rgb, torch.cat([rgb, alpha], 1)


def rename_keys(source, target, rename):
    """Copy a checkpoint with its tensors under other names."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    save_file({rename(key): value for key, value in tensors.items()}, target / "model.safetensors", {"format": "pt"})


def loaded(report):
    return {key for key in report["missing_keys"]}


@pytest.mark.compatibility(
    "transformers CLIPVisionModel",
    "tower at zero alpha; float32, bfloat16, float16; eager and sdpa; every hidden state",
    "equal",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_zero_alpha_equals_clip_in_every_dtype(clip_dir, pixels, dtype, attention):
    clip = CLIPVisionModel.from_pretrained(clip_dir, dtype=dtype, attn_implementation=attention).eval()
    ours = AlphaCLIPVisionModel.from_pretrained(clip_dir, dtype=dtype, attn_implementation=attention).eval()
    rgb, rgba = (tensor.to(dtype) for tensor in pixels)
    with torch.no_grad():
        expected = clip(rgb, output_hidden_states=True)
        for values in (rgb, rgba):
            got = ours(values, output_hidden_states=True)
            assert torch.equal(got.last_hidden_state, expected.last_hidden_state)
            assert torch.equal(got.pooler_output, expected.pooler_output)
            assert all(torch.equal(a, b) for a, b in zip(got.hidden_states, expected.hidden_states, strict=True))


def layouts(clip_dir, tmp_path):
    """The three key layouts of CLIP checkpoints: flattened, with `vision_model.`, and a full CLIP."""
    old = tmp_path / "old"
    rename_keys(clip_dir, old, lambda key: f"vision_model.{key}" if not key.startswith("vision_model.") else key)
    new = tmp_path / "new"
    rename_keys(clip_dir, new, lambda key: key.removeprefix("vision_model."))
    torch.manual_seed(0)
    full_model = CLIPModel(tiny_clip_config())
    plain = CLIPVisionModel.from_pretrained(clip_dir)
    full_model.vision_model.load_state_dict(plain.state_dict())
    full_model.save_pretrained(tmp_path / "full")
    return {"old": old, "new": new, "full": tmp_path / "full"}


@pytest.mark.compatibility(
    "transformers CLIP checkpoints", "old, new and full-CLIP key layouts loaded into our tower", "equal"
)
def test_three_layouts_load_with_exactly_the_alpha_missing(clip_dir, tmp_path, pixels):
    expected = CLIPVisionModel.from_pretrained(clip_dir).eval()(pixels[0]).pooler_output
    for name, folder in layouts(clip_dir, tmp_path).items():
        model, report = AlphaCLIPVisionModel.from_pretrained(folder, output_loading_info=True)
        assert loaded(report) == {f"embeddings.{ALPHA}"}, name
        assert torch.equal(model.eval()(pixels[1]).pooler_output, expected), name
        assert model.config.model_type == "alpha_clip_vision_model"


def test_alpha_is_exactly_zero_through_each_root(clip_dir, tmp_path):
    full = layouts(clip_dir, tmp_path)["full"]
    towers = [
        AlphaCLIPVisionModel.from_pretrained(clip_dir),
        AlphaCLIPVisionModelWithProjection.from_pretrained(full).vision_model,
        AlphaCLIPModel.from_pretrained(full).vision_model,
        AlphaCLIPVisionModel(AlphaCLIPVisionModel.from_pretrained(clip_dir).config),
        AlphaCLIPModel(AlphaCLIPModel.from_pretrained(full).config).vision_model,
    ]
    for tower in towers:
        assert torch.count_nonzero(tower.embeddings.patch_embedding.alpha.weight) == 0
        assert torch.count_nonzero(tower.embeddings.patch_embedding.weight) > 0


def test_trained_alpha_survives_each_root(clip_dir, tmp_path):
    full = layouts(clip_dir, tmp_path)["full"]
    for index, cls in enumerate((AlphaCLIPVisionModel, AlphaCLIPVisionModelWithProjection, AlphaCLIPModel)):
        model = cls.from_pretrained(full)
        tower = getattr(model, "vision_model", model)
        torch.nn.init.normal_(tower.embeddings.patch_embedding.alpha.weight)
        trained = copy.deepcopy(tower.embeddings.patch_embedding.alpha.weight)
        model.save_pretrained(tmp_path / str(index))
        again, report = cls.from_pretrained(tmp_path / str(index), output_loading_info=True)
        assert not report["missing_keys"]
        again = getattr(again, "vision_model", again)
        assert torch.equal(again.embeddings.patch_embedding.alpha.weight, trained)


@pytest.mark.compatibility(
    "transformers CLIPModel", "AlphaCLIPModel and AlphaCLIPVisionModelWithProjection at zero alpha", "equal"
)
def test_full_model_and_projection_equal_clip(clip_dir, tmp_path, pixels):
    full = layouts(clip_dir, tmp_path)["full"]
    text = {"input_ids": torch.tensor([[1, 5, 9, 2]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(full).eval()(pixel_values=pixels[0], **text).logits_per_image
        got = AlphaCLIPModel.from_pretrained(full).eval()(pixel_values=pixels[1], **text).logits_per_image
        assert torch.equal(got, expected)
        expected = CLIPVisionModelWithProjection.from_pretrained(full).eval()(pixels[0]).image_embeds
        got = AlphaCLIPVisionModelWithProjection.from_pretrained(full).eval()(pixels[1]).image_embeds
        assert torch.equal(got, expected)


def test_three_channels_equal_alpha_of_ones(clip_dir, pixels):
    model = AlphaCLIPVisionModel.from_pretrained(clip_dir).eval()
    torch.nn.init.normal_(model.embeddings.patch_embedding.alpha.weight, std=0.1)
    ones = torch.cat([pixels[0], torch.full_like(pixels[0][:, :1], WHOLE_IMAGE)], 1)
    with torch.no_grad():
        assert torch.equal(model(pixels[0]).last_hidden_state, model(ones).last_hidden_state)
        assert not torch.equal(model(pixels[1]).last_hidden_state, model(ones).last_hidden_state)
