"""LLaVA with our tower at zero alpha = stock LLaVA: ids, logits, generation. The judges are Transformers' own LLaVA
classes.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
)

import mllm
from mllm.processing_llava import VICUNA_V1_SYSTEM, AlphaLlavaProcessor
from tests.tiny import build_stock_llava, noise_image, prompt, save_model, tiny_tokenizer
from vision_tower import AlphaCLIPVisionModel, Region

# The template of llava-hf/llava-1.5-7b-hf, in the part that a first turn uses.
STOCK_PROMPT = "USER: <image>\n{} ASSISTANT:"
ALPHA = "vision_tower.embeddings.patch_embedding.alpha.weight"


@pytest.fixture(scope="module")
def stock_dir(tmp_path_factory):
    """A stock LLaVA-1.5 directory that knows nothing of regions."""
    folder = tmp_path_factory.mktemp("stock")
    settings = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = LlavaProcessor(
        CLIPImageProcessor(**settings),
        tiny_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{{ 'stock' }}",
    )
    return save_model(folder, build_stock_llava(), processor)


@pytest.fixture(scope="module")
def both(stock_dir):
    stock = LlavaForConditionalGeneration.from_pretrained(stock_dir).eval()
    return stock, *mllm.load(stock_dir, device="cpu")


@pytest.mark.compatibility("transformers LLaVA-1.5", "logits, greedy and 3-beam ids at zero alpha", "equal")
def test_zero_alpha_gives_stock_logits_and_ids(both):
    stock, ours, processor = both
    assert torch.count_nonzero(dict(ours.model.named_parameters())[ALPHA]) == 0
    image = noise_image(60, 40)
    inputs = processor(image, prompt("What is this?"), Region.from_box(5, 5, 30, 30), return_tensors="pt")
    rgb = {**inputs, "pixel_values": inputs["pixel_values"][:, :3]}
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, stock(**rgb).logits)
        settings = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(ours.generate(**inputs, **settings), stock.generate(**rgb, **settings))
        assert torch.equal(
            ours.generate(**inputs, num_beams=3, **settings), stock.generate(**rgb, num_beams=3, **settings)
        )


@pytest.mark.compatibility("transformers LlavaProcessor", "token ids of questions", "equal")
@pytest.mark.parametrize("question", ["What is this?", "  two  spaces", "a\nb", "é 漢 🦙", "ends with a space "])
def test_inputs_equal_the_stock_processor(both, question):
    _, _, processor = both
    image = noise_image(60, 40)
    stock = LlavaProcessor(
        LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tiny_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    expected = stock(images=image, text="<s>" + STOCK_PROMPT.format(question), return_tensors="pt")
    got = processor(image, prompt(question), None, return_tensors="pt")
    assert torch.equal(got["input_ids"], expected["input_ids"])
    assert torch.equal(got["attention_mask"], expected["attention_mask"])
    assert torch.equal(got["pixel_values"][:, :3], expected["pixel_values"])


def test_original_llava_conversation_format(both):
    """Two turns with the system sentence, as `conv_vicuna_v1.get_prompt()` of haotian-liu/LLaVA (c121f04) writes
    them.
    """
    _, _, processor = both
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Which colour?"},
    ]
    with_system = AlphaLlavaProcessor(
        processor.image_processor,
        processor.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        system=VICUNA_V1_SYSTEM,
    )
    text = with_system.apply_chat_template(turns, add_generation_prompt=True)
    assert text == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat is this? "
        "ASSISTANT: A cat.</s>USER: Which colour? ASSISTANT:"
    )


def test_576_image_tokens_at_336(both):
    _, _, processor = both
    real = AlphaLlavaProcessor(
        type(processor.image_processor)(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, geometry="pad"
        ),
        processor.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    inputs = real(noise_image(64, 48), prompt("What?"), Region.from_box(1, 1, 20, 20), return_tensors="pt")
    assert (inputs["input_ids"] == real.image_token_id).sum() == real.num_image_tokens == 576
    assert inputs["pixel_values"].shape == (1, 4, 336, 336)


@pytest.mark.compatibility(
    "llava-hf checkpoints", "hub-legacy, 4.52 and flat key layouts loaded with our tower", "equal"
)
@pytest.mark.parametrize("layout", ["hub-legacy", "4.52", "flat"])
def test_every_key_layout_loads(stock_dir, both, tmp_path, layout):
    """hub-legacy is llava-hf's own: `language_model.model.*`, `vision_tower.vision_model.*`."""
    stock, _, _ = both
    rename = {
        "hub-legacy": lambda k: (
            k.replace("model.language_model.", "language_model.model.")
            .replace("lm_head.", "language_model.lm_head.")
            .replace("model.vision_tower.", "vision_tower.vision_model.")
            .replace("model.multi_modal_projector.", "multi_modal_projector.")
        ),
        "4.52": lambda k: k.replace("model.vision_tower.", "model.vision_tower.vision_model."),
        "flat": lambda k: k,
    }[layout]
    folder = tmp_path / layout
    shutil.copytree(stock_dir, folder)
    tensors = {key: value.contiguous() for key, value in stock.state_dict().items()}
    save_file({rename(key): value for key, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    model, _ = mllm.load(folder, device="cpu")
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in tensors.items())
    assert loaded.keys() - tensors.keys() == {f"model.{ALPHA}"}
    assert torch.count_nonzero(loaded[f"model.{ALPHA}"]) == 0


def test_a_missing_tower_tensor_raises(stock_dir, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(stock_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(key for key in tensors if "vision_tower" in key and "layers.0.mlp.fc1.weight" in key))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 missing .*fc1"):
        mllm.load(folder, device="cpu")


@pytest.mark.compatibility(
    "transformers Auto classes", "our LLaVA saved and loaded by AutoModelForImageTextToText and AutoProcessor", "equal"
)
def test_a_saved_model_is_bit_identical_when_loaded_by_auto_classes(tiny_llava, tmp_path):
    model, processor = tiny_llava
    save_model(tmp_path, model, processor)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    again_processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is LlavaForConditionalGeneration
    assert type(again.model.vision_tower) is AlphaCLIPVisionModel
    assert type(again_processor) is AlphaLlavaProcessor
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    inputs = [
        p(noise_image(50, 70), prompt("What?"), Region.from_box(2, 2, 30, 30), return_tensors="pt")
        for p in (processor, again_processor)
    ]
    assert all(torch.equal(inputs[0][key], inputs[1][key]) for key in inputs[0])
    with torch.no_grad():
        assert torch.equal(model(**inputs[0]).logits, again(**inputs[1]).logits)


def test_padded_batches_of_different_regions_equal_single_calls(tiny_llava):
    model, processor = tiny_llava
    image = noise_image(60, 40)
    regions = [Region.from_box(2, 2, 20, 20), Region.from_box(30, 10, 58, 38)]
    questions = ["What?", "What is the colour of this?"]
    batch = processor([image, image], [prompt(question) for question in questions], regions, return_tensors="pt")
    with torch.no_grad():
        together = model(**batch).logits[:, -1]
        for row, (region, question) in enumerate(zip(regions, questions, strict=True)):
            single = model(**processor(image, prompt(question), region, return_tensors="pt")).logits[0, -1]
            # worst seen 2e-7
            torch.testing.assert_close(together[row], single, atol=1e-5, rtol=0)
    assert not torch.allclose(together[0], together[1])
