"""Converted towers give what the original Alpha-CLIP code gives. The judges: outputs of SunzeY/AlphaCLIP's own
model.py, kept in fixtures.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vision_tower import AlphaCLIPVisionModelWithProjection
from vision_tower.conversion import from_original, to_original

OURS = Path(__file__).parent / "data" / "alpha_clip_original.safetensors"  # make_alpha_clip_fixture.py
# Relative error (largest difference over largest value) in float32. Measured worst case over features and every block:
# 3.6e-7 (fixture), 5.2e-7 (golden).
TOLERANCE = 1e-5


def parts_of(file):
    content = load_file(file)
    checkpoint = {key.removeprefix("checkpoint."): t for key, t in content.items() if key.startswith("checkpoint.")}
    return content, checkpoint


@pytest.fixture(params=["fixture", "golden"])
def original(request):
    if request.param == "fixture":
        return parts_of(OURS)
    return parts_of(request.getfixturevalue("shared_data") / "golden" / "official_alpha_clip_a.safetensors")


def converted(checkpoint):
    config, weights = from_original({key: tensor.float() for key, tensor in checkpoint.items()})
    model = AlphaCLIPVisionModelWithProjection(config).eval()
    model.load_state_dict(weights)
    return model


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def run(model, content):
    alpha = (content["input.alpha01"] - 0.5) / 0.26
    pixels = torch.cat([content["input.image"], alpha], dim=1)
    with torch.no_grad():
        return model(pixel_values=pixels, output_hidden_states=True)


@pytest.mark.compatibility(
    "SunzeY/AlphaCLIP model.py", "converted checkpoint: features and every block's hidden states", "1e-5 relative"
)
def test_features_and_every_block_equal_the_original(original, measured):
    content, checkpoint = original
    output = run(converted(checkpoint), content)
    blocks = sorted(key for key in content if key.startswith("output.hidden_states."))
    assert len(blocks) == len(output.hidden_states) - 1
    errors = {key: relative_error(output.hidden_states[int(key.rsplit(".", 1)[1])], content[key]) for key in blocks}
    errors["features"] = relative_error(output.image_embeds, content["output.features"])
    measured(max(errors.values()))
    assert max(errors.values()) < TOLERANCE, errors


def test_a_different_alpha_gives_different_features(original):
    content, checkpoint = original
    model = converted(checkpoint)
    inverted = {**content, "input.alpha01": 1 - content["input.alpha01"]}
    assert relative_error(run(model, inverted).image_embeds, content["output.features"]) > 1e-2


@pytest.mark.compatibility("SunzeY/AlphaCLIP checkpoints", "converted to ours and back", "equal")
def test_back_to_the_original_layout_is_equal(original):
    _, checkpoint = original
    config, weights = from_original(checkpoint)
    back = to_original(weights)
    assert back.keys() == checkpoint.keys()
    for key, tensor in checkpoint.items():
        assert back[key].dtype == tensor.dtype and torch.equal(back[key], tensor), key
