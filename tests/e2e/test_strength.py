"""A strength between 0 and 1 reaches the tower's alpha channel: in every geometry, through every entry point.

Expected values are worked out by hand for one box of an image of 64 x 32 pixels before a tower of 32 x 32: inside it
alpha is 1, outside, padding included, 1 - strength; one pixel at its edge may lie between.
"""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from alpha_clip_commands.region_chat import main as region_chat
from alpha_clip_commands.region_eval import main as region_eval
from eval.region_matching import DescribedImage, embed_regions
from mllm.convert.export import export
from mllm.inference import RegionChat
from tests.alpha_maps import alpha_map
from tests.files import write_json_lines
from tests.tiny import build_tiny_blip2, build_tiny_clip, build_tiny_llava, noise_image
from train.contrastive.data import RegionTextCollator, RegionTexts
from train.tuning.collators import ConversationCollator
from vision_tower import AlphaPatchEmbedding, Region

IMAGE = noise_image(64, 32)
BOX = Region.from_box(24, 8, 40, 24)
SOFT = dataclasses.replace(BOX, strength=0.3)
# the box in the input of the tower: x0, y0, x1, y1
PLACES = {"crop": (8, 8, 24, 24), "pad": (12, 12, 20, 20), "stretch": (12, 8, 20, 24)}
FORMS = {
    "box": BOX,
    "nbox": Region.from_box(24 / 64, 8 / 32, 40 / 64, 24 / 32, normalized=True),
    "polygon": Region.from_polygon([24, 8, 40, 8, 40, 24, 24, 24]),
    "mask": Region.from_mask(BOX.mask(32, 64) > 0),
}


def alpha_of(pixel_values):
    return alpha_map(pixel_values).detach().numpy()


@pytest.fixture
def fed(monkeypatch):
    """The alpha maps (32, 32) that reach a tower."""
    maps, forward = [], AlphaPatchEmbedding.forward

    def noting(self, pixel_values):
        maps.extend(alpha_of(pixel_values))
        return forward(self, pixel_values)

    monkeypatch.setattr(AlphaPatchEmbedding, "forward", noting)
    return maps


def check(maps, geometry, strength=0.3):
    assert len(maps)
    x0, y0, x1, y1 = PLACES[geometry]
    for alpha in maps:
        assert np.allclose(alpha[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1], 1, atol=1e-5)
        outside = np.ones_like(alpha, bool)
        outside[y0 - 1 : y1 + 1, x0 - 1 : x1 + 1] = False
        assert np.allclose(alpha[outside], 1 - strength, atol=1e-5)


@pytest.mark.parametrize("geometry", PLACES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strength", [0.3, 0.75, 1])
def test_the_image_processor(geometry, form, strength):
    _, processor = build_tiny_clip(geometry)
    region = dataclasses.replace(FORMS[form], strength=strength)
    found = processor.image_processor(IMAGE, [region, region], return_tensors="pt")["pixel_values"]
    check(alpha_of(found), geometry, strength)
    assert len(found) == 2


@pytest.mark.parametrize("geometry", PLACES)
@pytest.mark.parametrize("region", [SOFT, "box:24,8,40,24*0.3"], ids=["Region", "text"])
def test_clip(fed, geometry, region):
    model, processor = build_tiny_clip(geometry)
    model.get_image_features(**processor(images=IMAGE, regions=region, return_tensors="pt"))
    check(fed, geometry)
    if region is SOFT:
        embed_regions(model, processor, [DescribedImage(IMAGE, (SOFT,), ("a",), None)])
        assert len(fed) == 2
        check(fed, geometry)


AS_WRITTEN = {"Region": SOFT, "JSON": SOFT.to_json(), "text": "box:24,8,40,24*0.3", "fields": dataclasses.asdict(SOFT)}


@pytest.mark.parametrize("written", AS_WRITTEN)
@pytest.mark.parametrize("family", ["llava", "opt"])
def test_the_chat_template(fed, family, written):
    model, processor = build_tiny_llava() if family == "llava" else build_tiny_blip2(family)
    item = {"type": "image", "image": IMAGE, "region": AS_WRITTEN[written]}
    message = {"role": "user", "content": [item, {"type": "text", "text": "What?"}]}
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    model.generate(**processor.apply_chat_template([message], **settings), max_new_tokens=1)
    check(fed, "pad" if family == "llava" else "stretch")


@pytest.mark.parametrize("geometry", PLACES)
def test_llava_and_its_export(fed, tmp_path, geometry):
    model, processor = build_tiny_llava(geometry, alpha_std=0.3)
    chat_ = RegionChat(model, processor)
    chat_.ask(IMAGE, SOFT, "What?", max_new_tokens=1)
    chat_.answers([(IMAGE, SOFT, "What?"), (IMAGE, SOFT, None)], max_new_tokens=1)
    conversation = chat_.conversation(IMAGE, SOFT, "What?")
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}
    batch = ConversationCollator(processor)([[[*conversation, answer]]])
    with torch.no_grad():
        expected = model(**batch).logits
        assert len(fed) == 4
        check(fed, geometry)
        export(model, processor, tmp_path / "stock")
        stock, maps = LlavaForConditionalGeneration.from_pretrained(tmp_path / "stock"), []
        convolution = stock.model.vision_tower.embeddings.patch_embedding
        convolution.register_forward_pre_hook(lambda module, inputs: maps.extend(alpha_of(inputs[0])))
        torch.testing.assert_close(stock(**batch).logits, expected, atol=1e-4, rtol=1e-4)
    check(maps, geometry)


def test_blip2(fed):
    model, processor = build_tiny_blip2("t5")
    model.generate(**processor(images=IMAGE, text="", regions=SOFT, return_tensors="pt"), max_new_tokens=1)
    RegionChat(model, processor).ask(IMAGE, SOFT, "What?", max_new_tokens=1)
    assert len(fed) == 2
    check(fed, "stretch")


@pytest.fixture
def files(tmp_path):
    IMAGE.save(tmp_path / "p.png")
    request = {"id": "a", "image": "p.png", "region": SOFT.to_json()}
    write_json_lines(tmp_path / "requests.jsonl", [request])
    question = {"image": "p.png", "region": BOX.to_json(), "question": "What?", "answer": "a cat"}
    write_json_lines(tmp_path / "own.jsonl", [question])
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        (["--image", "p.png", "--box", "24,8,40,24*0.3", "--ask", "What?"], ""),
        (["--image", "p.png", "--box", "24,8,40,24", "--strength", "0.3", "--ask", "What?"], ""),
        (["--image", "p.png", "--box", "24,8,40,24"], "/strength 0.3\nWhat?\n"),
        (["--image", "p.png"], "/box 24,8,40,24*0.3\nWhat?\nAnd what is it like?\n"),
        (["--batch", "requests.jsonl", "--output", "answers.jsonl"], ""),
    ],
    ids=["text", "--strength", "/strength", "/box", "batch"],
)
def test_region_chat(fed, tiny_llava_dir, files, monkeypatch, flags, lines):
    monkeypatch.chdir(files)
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert region_chat(["--model", str(tiny_llava_dir), "--max-new-tokens", "1", "--device", "cpu", *flags]) == 0
    check(fed, "pad")


@pytest.mark.parametrize("region_input", ["box", "mask"])
def test_region_eval(fed, tiny_llava_dir, files, region_input):
    flags = ["--model", tiny_llava_dir, "--data", files / "own.jsonl", "--out", files / "out", "--strength", 0.3]
    flags += ["--view", region_input, "--device", "cpu", "--metrics", "exact_match", "--max-new-tokens", 1]
    assert region_eval(["run", "--task", "jsonl", *map(str, flags)]) == 0
    check(fed, "pad")
    (record,) = (files / "out" / "predictions.jsonl").read_text().splitlines()
    assert json.loads(record)["region"]["strength"] == 0.3


@pytest.mark.parametrize("geometry", PLACES)
def test_the_contrastive_collator(fed, geometry):
    model, processor = build_tiny_clip(geometry)
    batch = RegionTextCollator(processor, 16)([RegionTexts("1", IMAGE, (SOFT, SOFT), ("a", "b"))])
    model.get_image_features(pixel_values=batch["pixel_values"])
    assert len(fed) == 2
    check(fed, geometry)
