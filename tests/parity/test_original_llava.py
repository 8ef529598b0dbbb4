"""The original LLaVA code base with our tower in it gives what Transformers' LLaVA with our tower gives. The judge:
logits of the original code, kept in a fixture (make_original_llava_fixture.py).
"""

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.tensors import FIXTURES
from tests.tiny import tiny_vision_config
from vision_tower import AlphaCLIPVisionConfig

IMAGE_TOKEN, PATCHES = 39, 16
# Relative error (largest difference over largest value) in float32. Measured worst case: 7e-7.
TOLERANCE = 1e-5


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture(scope="module")
def content():
    return load_file(FIXTURES / "original_llava.safetensors")


@pytest.fixture(scope="module")
def model(content):
    """Transformers' LLaVA with the weights of the original one."""
    text = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    vision = AlphaCLIPVisionConfig(**tiny_vision_config())
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=PATCHES
    )
    prefixes = {
        "model.vision_tower.vision_tower.": "model.vision_tower.",
        "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
        "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
        "model.": "model.language_model.",
        "lm_head.": "lm_head.",
    }
    weights = {}
    for key, tensor in content.items():
        if key.startswith("weights."):
            name = key.removeprefix("weights.")
            prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
            weights[prefixes[prefix] + name.removeprefix(prefix)] = tensor
    model = LlavaForConditionalGeneration(config).eval()
    model.load_state_dict(weights)
    return model


def run(model, content, images):
    """Logits of the rows, the image token spread over its patches."""
    rows = []
    for ids in content["input.ids"].tolist():
        rows.append([token for i in ids for token in ([IMAGE_TOKEN] * PATCHES if i < 0 else [i])])
    with torch.no_grad():
        features = model.get_image_features(images, return_dict=True).pooler_output
        return torch.stack(list(features)), model(input_ids=torch.tensor(rows), pixel_values=images).logits


@pytest.mark.compatibility(
    "haotian-liu/LLaVA model code",
    "our tower in its builder: image features and logits for two regions",
    "1e-5 relative",
)
def test_logits_equal_the_original_code(model, content, measured):
    features, logits = run(model, content, content["input.images"])
    errors = [relative_error(features, content["output.features"]), relative_error(logits, content["output.logits"])]
    measured(max(errors))
    assert max(errors) < TOLERANCE, errors


def test_regions_change_the_logits(model, content):
    images = content["input.images"]
    assert torch.equal(images[0, :3], images[1, :3]) and not torch.equal(images[0, 3], images[1, 3])
    _, swapped = run(model, content, images.flip(0))
    assert relative_error(swapped, content["output.logits"]) > 1e-2
