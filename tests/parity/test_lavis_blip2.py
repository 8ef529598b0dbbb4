"""A converted BLIP-2 gives what LAVIS gives, from the picture to the language model's input. The judges: outputs of
LAVIS' own tower, `ln_vision`, Q-Former and projection, and of Alpha-CLIP's own tower, kept in fixtures.
"""

import pytest
import torch

from mllm.blip2 import AlphaBlip2Config, AlphaBlip2ForConditionalGeneration
from mllm.convert.lavis_keys import from_lavis
from tests.tensors import fixture_tensors, tensors_under
from tests.tiny import tiny_text_config, tiny_tokenizer
from vision_tower.conversion import read_tower

# Relative error (largest difference over largest value) in float32. Measured worst case over the tower, its norm, every
# Q-Former hidden state and the language model's input: 3.1e-7.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def lavis():
    """LAVIS' checkpoint without a tower, and the outputs of its modules."""
    return [fixture_tensors("lavis_blip2.safetensors", prefix) for prefix in ("checkpoint.", "output.")]


@pytest.fixture(scope="module")
def alpha_clip(tmp_path_factory):
    """An original Alpha-CLIP of two blocks: its tensors, a picture and an alpha map, and its file."""
    checkpoint, inputs = (fixture_tensors("alpha_clip_original.safetensors", p) for p in ("checkpoint.", "input."))
    file = tmp_path_factory.mktemp("alpha") / "alpha.pth"
    torch.save(checkpoint, file)
    return checkpoint, inputs, file


def with_own_tower(checkpoint, alpha_clip):
    """As LAVIS saves a tower that was trained: OpenAI's names, no alpha, nothing after the blocks."""
    left_out = ("conv1_alpha.", "ln_post.", "proj")
    own = {key: tensor for key, tensor in alpha_clip.items() if not key.startswith(left_out)}
    return checkpoint | {f"visual_encoder.{k.replace('attn.in_proj.', 'attn.in_proj_')}": t for k, t in own.items()}


def built(fields, weights):
    tokenizer = tiny_tokenizer()
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    text_config = tiny_text_config("t5", tokenizer)
    config = AlphaBlip2Config(**fields, text_config=text_config, image_token_index=image_token)
    model = AlphaBlip2ForConditionalGeneration(config).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(key.startswith("language_model.") for key in missing)
    return model


def run(model, pixels):
    """Every output under the fixture's names, caught on the way through the model's own forward."""
    outputs, handles = {}, []

    def catch(module, name, pick):
        hook = lambda _module, _args, output: outputs.update({name: pick(output)})  # noqa: E731
        handles.append(module.register_forward_hook(hook))

    catch(model.vision_model.encoder.layers[-1], "tower", lambda output: output)
    catch(model.vision_model, "ln_vision", lambda output: output.last_hidden_state)
    catch(model.qformer.layernorm, "qformer.0", lambda output: output)
    for number, layer in enumerate(model.qformer.encoder.layer, 1):
        catch(layer, f"qformer.{number}", lambda output: output)
    catch(model.language_projection, "projected", lambda output: output)
    ids = torch.full((len(pixels), model.config.num_query_tokens), model.config.image_token_index)
    with torch.no_grad():
        model(pixel_values=pixels, input_ids=ids, decoder_input_ids=ids[:, :1])
    for handle in handles:
        handle.remove()
    return outputs


def worst(ours, theirs, name):
    expected = tensors_under(f"{name}.", theirs)
    assert len(expected) >= 6 and expected.keys() <= ours.keys()
    return {k: ((ours[k] - t).abs().max() / t.abs().max()).item() for k, t in expected.items()}


@pytest.mark.compatibility(
    "salesforce/LAVIS BLIP-2 ViT-L", "converted: tower, ln_vision, Q-Former states, projection", "1e-5 relative"
)
def test_a_complete_lavis_checkpoint_equals_lavis(lavis, alpha_clip, measured):
    checkpoint, outputs = lavis
    model = built(*from_lavis(with_own_tower(checkpoint, alpha_clip[0]), blocks=2))
    pixels = alpha_clip[1]["image"][:2]
    errors = worst(run(model, pixels), outputs, "plain")
    measured(max(errors.values()))
    assert max(errors.values()) < TOLERANCE, errors
    whole = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1)
    assert torch.equal(run(model, whole)["projected"], run(model, pixels)["projected"])  # alpha is zero


@pytest.mark.compatibility(
    "salesforce/LAVIS BLIP-2 ViT-L with the tower of SunzeY/AlphaCLIP",
    "an Alpha-CLIP tower with a region, followed by LAVIS' ln_vision, Q-Former, projection",
    "1e-5 relative",
)
def test_alpha_clip_behind_lavis_qformer_equals_both(lavis, alpha_clip, measured):
    """Alpha-CLIP's first block (the last one is dropped), then LAVIS' norm, Q-Former and projection."""
    checkpoint, outputs = lavis
    _, inputs, file = alpha_clip
    model = built(*from_lavis(checkpoint, read_tower(file), blocks=1))
    image, alpha = inputs["image"][:2], inputs["alpha01"][:2]
    ours = run(model, torch.cat([image, (alpha - 0.5) / 0.26], dim=1))
    errors = worst(ours, outputs, "alpha")
    measured(max(errors.values()))
    assert max(errors.values()) < TOLERANCE, errors
    inverted = run(model, torch.cat([image, (0.5 - alpha) / 0.26], dim=1))
    assert (inverted["projected"] - ours["projected"]).abs().max() > 1e-2


def test_the_other_number_of_blocks_is_not_lavis(lavis, alpha_clip):
    checkpoint, outputs = lavis
    _, inputs, file = alpha_clip
    model = built(*from_lavis(checkpoint, read_tower(file), blocks=2))
    pixels = torch.cat([inputs["image"], (inputs["alpha01"] - 0.5) / 0.26], dim=1)[:2]
    assert worst(run(model, pixels), outputs, "alpha")["projected"] > 1e-2
