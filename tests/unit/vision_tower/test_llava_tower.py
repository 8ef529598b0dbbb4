"""The tower behind LLaVA's interface: the judge of the features is our tower itself, called directly."""

from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from tests.tiny import build_tiny_tower, noise_image, save_model, tiny_vision_config
from vision_tower import AlphaCLIPImageProcessor, AlphaCLIPVisionModel, Region
from vision_tower.llava_tower import AlphaCLIPVisionTower

SIZE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tower")
    return str(save_model(out, build_tiny_tower(), AlphaCLIPImageProcessor(**SIZE)))


def args(**changes):
    return SimpleNamespace(**{"mm_vision_select_layer": -2, "image_aspect_ratio": "pad", **changes})


def test_features_equal_those_of_the_tower(folder):
    tower = AlphaCLIPVisionTower(folder, args())
    images = tower.image_processor.preprocess(
        noise_image(60, 40), [Region.from_box(0, 0, 30, 40), Region.from_box(30, 0, 60, 40)], return_tensors="pt"
    )["pixel_values"]
    expected = AlphaCLIPVisionModel.from_pretrained(folder)(images, output_hidden_states=True).hidden_states[-2]
    features = tower(images)
    assert torch.equal(features, expected[:, 1:]) and not features.requires_grad
    assert (features[0] - features[1]).abs().max() > 1e-3
    assert torch.equal(AlphaCLIPVisionTower(folder, args(mm_vision_select_feature="cls_patch"))(images), expected)
    for one, row in zip(tower(list(images)), features, strict=True):
        assert one.shape == (1, 16, 32)
        torch.testing.assert_close(one[0], row, rtol=1e-5, atol=1e-5)
    assert tower(images.to(torch.bfloat16)).dtype == torch.bfloat16
    whole = torch.cat([images[:, :3], torch.full_like(images[:, :1], (1 - 0.5) / 0.26)], 1)
    assert torch.equal(tower(images[:, :3]), tower(whole))


def test_the_interface_of_the_original(folder):
    tower = AlphaCLIPVisionTower(folder, args(), delay_load=True)
    assert not tower.is_loaded and tower.hidden_size == 32 and tower.num_patches == 16
    tower.load_model()
    again = tower.vision_tower
    tower.load_model()
    assert tower.is_loaded and tower.vision_tower is again
    assert tower.image_processor.geometry == "pad" and tower.num_patches_per_side == 4
    assert tower.image_processor.crop_size["height"] == 32 and len(tower.image_processor.image_mean) == 3
    assert tower.dummy_feature.shape == (1, 32) and tower.dtype == torch.float32 and tower.device.type == "cpu"
    assert AlphaCLIPVisionTower(folder, args(image_aspect_ratio="square")).image_processor.geometry == "crop"
    with pytest.raises(ValueError, match="patch or cls_patch"):
        AlphaCLIPVisionTower(folder, args(mm_vision_select_feature="all"))


def test_the_alpha_weight_is_trained_if_unfrozen(folder):
    tower = AlphaCLIPVisionTower(folder, args(unfreeze_mm_vision_tower=True), delay_load=True)
    tower(torch.randn(1, 4, 32, 32)).square().mean().backward()
    assert tower.vision_tower.embeddings.patch_embedding.alpha.weight.grad.abs().max() > 0


def test_a_clip_directory_has_zero_alpha_and_logs_a_warning(tmp_path, caplog):
    CLIPVisionModel(CLIPVisionConfig(**tiny_vision_config())).save_pretrained(tmp_path)
    CLIPImageProcessor(**SIZE).save_pretrained(tmp_path)
    tower = AlphaCLIPVisionTower(str(tmp_path), args())
    assert "regions have no effect" in caplog.text
    assert torch.count_nonzero(tower.vision_tower.embeddings.patch_embedding.alpha.weight) == 0
