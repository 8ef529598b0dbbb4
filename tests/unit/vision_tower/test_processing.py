"""`AlphaCLIPProcessor`: texts as in CLIP, images with regions; zero-shot use end to end."""

import gzip
import os

import pytest
import torch
from transformers import AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, CLIPProcessor, CLIPTokenizer

from tests.files import read_json
from tests.tiny import noise_image, tiny_clip_config, tiny_clip_tokenizer
from vision_tower import AlphaCLIPConfig, AlphaCLIPImageProcessor, AlphaCLIPModel, AlphaCLIPProcessor, Region


def build():
    image_processor = AlphaCLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return AlphaCLIPProcessor(image_processor=image_processor, tokenizer=tiny_clip_tokenizer())


def test_regions_and_texts_in_one_call(tmp_path):
    processor = build()
    image = noise_image(50, 40)
    regions = [Region.from_box(8, 4, 20, 20), Region.from_box(25, 10, 40, 38)]
    inputs = processor(images=image, regions=regions, text=["a cat", "a red dog"], return_tensors="pt", padding=True)
    assert inputs["pixel_values"].shape == (2, 4, 32, 32) and inputs["input_ids"].shape[0] == 2
    assert torch.equal(
        inputs["pixel_values"], processor.image_processor(image, regions, return_tensors="pt")["pixel_values"]
    )
    texts = CLIPProcessor(processor.image_processor, processor.tokenizer)(
        text=["a cat", "a red dog"], return_tensors="pt", padding=True
    )
    assert torch.equal(inputs["input_ids"], texts["input_ids"])
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is AlphaCLIPProcessor
    assert torch.equal(
        again(images=image, regions=regions, return_tensors="pt")["pixel_values"], inputs["pixel_values"]
    )
    with pytest.raises(ValueError, match="regions without images"):
        processor(text="a cat", regions=regions)
    # alone, beside a tower, it must not name the processor's file, which is not saved with it
    for number, images in enumerate((processor.image_processor, again.image_processor)):
        images.save_pretrained(tmp_path / f"{number}")
        stated = read_json(tmp_path / f"{number}" / "preprocessor_config.json")["auto_map"]
        assert {value.partition(".")[0] + ".py" for value in stated.values()} <= set(os.listdir(tmp_path / f"{number}"))


def test_zero_shot_scores_depend_on_the_region(tmp_path):
    torch.manual_seed(0)
    config = AlphaCLIPConfig(**{**tiny_clip_config().to_dict(), "model_type": "alpha_clip"})
    config.text_config.vocab_size = 60
    model = AlphaCLIPModel(config).eval()
    torch.nn.init.normal_(model.vision_model.embeddings.patch_embedding.alpha.weight, std=0.3)
    model.save_pretrained(tmp_path)
    for auto in (AutoModel, AutoModelForZeroShotImageClassification):
        assert type(auto.from_pretrained(tmp_path)) is AlphaCLIPModel
    processor = build()
    regions = [Region.from_box(8, 4, 20, 20), Region.from_box(25, 10, 40, 38), None]
    inputs = processor(
        images=noise_image(50, 40), regions=regions, text=["a cat", "a dog"], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        logits = AutoModel.from_pretrained(tmp_path).eval()(**inputs).logits_per_image
        assert torch.equal(logits, model(**inputs).logits_per_image)
    assert logits.shape == (3, 2)
    assert len({tuple(row.tolist()) for row in logits}) == 3


def test_the_released_clip_vocabulary(shared_data):
    """Text goes through CLIP's tokenizer unchanged, judged on the released vocabulary."""
    with gzip.open(shared_data / "tokenizers" / "clip_bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        merges = [tuple(line.split()) for line in file.read().split("\n")[1 : 49152 - 256 - 2 + 1]]
    codes = [*range(33, 127), *range(161, 173), *range(174, 256)]
    codes += [256 + n for n in range(256 - len(codes))]
    alphabet = [chr(code) for code in codes]
    tokens = [
        *alphabet,
        *[c + "</w>" for c in alphabet],
        *["".join(m) for m in merges],
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    tokenizer = CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
    processor = AlphaCLIPProcessor(image_processor=AlphaCLIPImageProcessor(), tokenizer=tokenizer)
    # Source: clip.tokenize("a diagram") in openai/CLIP's README
    assert processor(text="a diagram")["input_ids"][:4] in ([49406, 320, 22697, 49407], [[49406, 320, 22697, 49407]])
