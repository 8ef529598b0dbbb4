"""LLaVA-NeXT with our tower at zero alpha = stock LLaVA-NeXT: tiles, ids, logits, generation. The judges are
Transformers' own LLaVA-NeXT classes.
"""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
)

import mllm
from mllm.loading import load_processor
from mllm.processing_llava_next import AlphaLlavaNextProcessor
from tests.alpha_maps import alpha_map, iou
from tests.tiny import noise_image, prompt, tiny_llava_next_config, tiny_tokenizer, tiny_vision_config
from vision_tower import AlphaCLIPVisionModel, AlphaLlavaNextImageProcessor, Region
from vision_tower.alpha_embedding import WHOLE_IMAGE

ALPHA = "model.vision_tower.embeddings.patch_embedding.alpha.weight"
SIZE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
# As in the hub's repository llava-v1.6-mistral-7b-hf: BOS is left to the tokenizer
MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}"
)
CHAT = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
# one to four tiles besides the first, padded in both directions and not at all
PICTURES = [(60, 40), (40, 60), (100, 30), (20, 90), (32, 32), (64, 64), (7, 61), (300, 200)]


@pytest.fixture(scope="module")
def stock_dir(tmp_path_factory):
    """A stock LLaVA-NeXT directory that knows nothing of regions."""
    folder = tmp_path_factory.mktemp("stock")
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.add_bos_token, tokenizer.padding_side = True, "left"
    config = tiny_llava_next_config(tokenizer, CLIPVisionConfig(**tiny_vision_config()))
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    LlavaNextProcessor(
        LlavaNextImageProcessorPil(**SIZE, image_grid_pinpoints=config.image_grid_pinpoints),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=MISTRAL,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def both(stock_dir):
    """The stock model and processor, then ours."""
    stock = LlavaNextForConditionalGeneration.from_pretrained(stock_dir).eval()
    return stock, AutoProcessor.from_pretrained(stock_dir, backend="pil"), *mllm.load(stock_dir, device="cpu")


def without_alpha(inputs):
    return {**inputs, "pixel_values": inputs["pixel_values"][:, :, :3]}


def question(*images, text="What is this?"):
    return [
        {"role": "user", "content": [*({"type": "image", **image} for image in images), {"type": "text", "text": text}]}
    ]


@pytest.mark.compatibility("transformers LLaVA-NeXT", "logits, greedy and 3-beam ids at zero alpha", "equal")
@pytest.mark.parametrize("size", PICTURES[1:3])
def test_zero_alpha_gives_stock_logits_and_ids(both, size):
    stock, _, ours, processor = both
    assert torch.count_nonzero(ours.get_parameter(ALPHA)) == 0
    inputs = processor(noise_image(*size), prompt("What?"), Region.from_box(5, 5, 20, 20), return_tensors="pt")
    rgb = without_alpha(inputs)
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, stock(**rgb).logits)
        settings = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(ours.generate(**inputs, **settings), stock.generate(**rgb, **settings))
        assert torch.equal(
            ours.generate(**inputs, num_beams=3, **settings), stock.generate(**rgb, num_beams=3, **settings)
        )


def assert_equal_inputs(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in without_alpha(got).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.compatibility(
    "transformers LlavaNextProcessor", "ids, tiles and image sizes of a prompt and image", "equal"
)
@pytest.mark.parametrize("size", PICTURES)
def test_a_call_equals_the_stock_processor(both, size):
    _, stock, _, processor = both
    image = noise_image(*size)
    got = processor(image, "<image>\nWhat?", return_tensors="pt")
    assert_equal_inputs(got, stock(image, "<image>\nWhat?", return_tensors="pt"))
    assert torch.equal(got["pixel_values"][:, :, 3], torch.full_like(got["pixel_values"][:, :, 3], WHOLE_IMAGE))


@pytest.mark.compatibility(
    "transformers LlavaNextProcessor", "a padded batch of images with different tile counts", "equal"
)
def test_a_batch_equals_the_stock_processor(both):
    _, stock, _, processor = both
    images, texts = [noise_image(*size) for size in PICTURES[:4]], ["<image> a", "<image> bcd", "<image>", "<image>e"]
    settings = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    assert_equal_inputs(processor(images, texts, **settings), stock(images, texts, **settings))


@pytest.mark.compatibility("transformers LlavaNextProcessor", "the model's own chat template, tokenized", "equal")
def test_the_chat_template_is_that_of_the_model(both):
    _, stock, _, processor = both
    turns = question({"image": noise_image(60, 40)})
    turns += [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}, *question(text="Where?")]
    got = processor.apply_chat_template(turns, **CHAT)
    assert_equal_inputs(got, stock.apply_chat_template(turns, **CHAT))
    assert got["input_ids"][0, 0] == 1 != got["input_ids"][0, 1]  # one BOS
    text = {"type": "text", "text": "</s> ?"}
    with pytest.raises(ValueError, match="expected texts without control tokens, got </s>"):
        processor.apply_chat_template([{"role": "user", "content": [text]}], **CHAT)


@pytest.mark.compatibility("transformers LLaVA-NeXT", "three channels and the whole image, alpha not zero", "equal")
def test_three_channels_mean_the_whole_image(tiny_llava_next):
    model, processor = tiny_llava_next
    inputs = processor(noise_image(60, 40), prompt("What?"), Region.whole(), return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**without_alpha(inputs)).logits)


def seen_by_tiles(mask, grid):
    """What of a mask (H, W) each tile shows, in the image's own pixels: all of it, then a part of the padded image."""
    height, width = mask.shape
    scale = max(height / grid[0], width / grid[1])
    top, left = (round((side * scale - length) / 2) for side, length in zip(grid, mask.shape, strict=True))
    padded = np.pad(mask, [(top, top), (left, left)])
    yield mask
    for rows in np.split(padded, grid[0] // 32, axis=0):
        yield from np.split(rows, grid[1] // 32, axis=1)


@pytest.mark.parametrize(
    ("size", "grid", "box"),
    [
        ((240, 120), (32, 64), (60, 30, 180, 90)),  # over both tiles
        ((120, 240), (64, 32), (15, 30, 75, 120)),  # in one of two
        ((192, 144), (64, 64), (24, 18, 168, 108)),  # over all four, padded above and below
        ((144, 192), (64, 64), (18, 96, 90, 180)),  # padded at the sides
    ],
)
def test_the_alpha_of_every_tile_is_the_region(fed, tiny_llava_next, size, grid, box):
    model, processor = tiny_llava_next
    region, image = Region.from_box(*box), noise_image(*size)
    inputs = processor(image, prompt("What?"), region, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
        other = model(**processor(image, prompt("What?"), Region.from_box(0, 0, 12, 12), return_tensors="pt")).logits
    assert (logits - other).abs().max() > 1e-3
    tiles = torch.stack(fed[: len(fed) // 2])
    assert torch.equal(tiles, inputs["pixel_values"][0])
    parts = list(seen_by_tiles(region.mask(size[1], size[0]) >= 0.5, grid))
    for tile, wanted in zip(tiles, parts, strict=True):
        alpha = Image.fromarray(alpha_map(tile).numpy())
        drawn = np.asarray(alpha.resize(wanted.shape[::-1], Image.Resampling.BILINEAR)) >= 0.5
        assert drawn.any() == wanted.any()
        assert not wanted.any() or iou(drawn, wanted) >= 0.95


@pytest.mark.compatibility("llava-hf LLaVA-NeXT checkpoints", "hub-legacy key layout loaded with our tower", "equal")
def test_the_hubs_key_layout_loads(stock_dir, both, tmp_path):
    stock = both[0]
    folder = shutil.copytree(stock_dir, tmp_path / "legacy")
    tensors = {key: value.contiguous() for key, value in stock.state_dict().items()}
    renamed = {
        key.replace("model.language_model.", "language_model.model.")
        .replace("lm_head.", "language_model.lm_head.")
        .replace("model.vision_tower.", "vision_tower.vision_model.")
        .removeprefix("model."): value
        for key, value in tensors.items()
    }
    assert "image_newline" in renamed
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    loaded = mllm.load(folder, device="cpu")[0].state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in tensors.items())
    assert loaded.keys() - tensors.keys() == {ALPHA}


@pytest.mark.compatibility("transformers Auto classes", "our LLaVA-NeXT saved and loaded by the Auto classes", "equal")
def test_a_saved_model_is_bit_identical_when_loaded_by_auto_classes(tiny_llava_next, tiny_llava_next_dir):
    model, processor = tiny_llava_next
    again = AutoModelForImageTextToText.from_pretrained(tiny_llava_next_dir).eval()
    processors = [AutoProcessor.from_pretrained(tiny_llava_next_dir), load_processor(tiny_llava_next_dir)]
    assert type(again) is LlavaNextForConditionalGeneration
    assert type(again.model.vision_tower) is AlphaCLIPVisionModel
    assert all(type(loaded) is AlphaLlavaNextProcessor for loaded in processors)
    assert type(AutoImageProcessor.from_pretrained(tiny_llava_next_dir)) is AlphaLlavaNextImageProcessor
    image, region = noise_image(50, 70), Region.from_box(2, 2, 30, 30)
    first, *others = [p(image, prompt("What?"), region, return_tensors="pt") for p in (processor, *processors)]
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)
    with torch.no_grad():
        assert torch.equal(model(**first).logits, again(**first).logits)
