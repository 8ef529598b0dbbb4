"""`alpha-clip score` compared with one forward pass per region and text."""

import re

import pytest
import torch
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from alpha_clip_commands import alpha_clip
from mllm.data.readers.grit import read_grit
from mllm.data.shapes import grit_layout
from tests.tiny import build_tiny_clip, save_model, tiny_clip_config, tiny_clip_tokenizer


def build():
    """A model with weights so large that the region changes the class token."""
    model, processor = build_tiny_clip(alpha_std=1)
    for parameter in model.vision_model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model, processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    grit_layout.write(folder / "data", 5, 3, "test", progress=False)
    save_model(folder / "model", *build())
    return folder


def score(folder, *flags):
    arguments = ["--model", folder / "model", "--data", folder / "data", "--device", "cpu", *flags]
    return alpha_clip.main(["score", *map(str, arguments)])


@pytest.mark.parametrize("form", ["mask", pytest.param("box", marks=pytest.mark.slow)])
def test_shares_are_those_of_one_pass_for_each_region(folder, capsys, form):
    assert score(folder, "--region-input", form) == 0
    printed = capsys.readouterr().out
    model, processor = build()
    samples = [s for s in read_grit(folder / "data") if s.regions[0].kind == form]
    texts = sorted({sample.references[0] for sample in samples})
    right = 0
    for sample in samples:
        inputs = processor(
            text=texts, images=sample.open_image(), regions=sample.regions[0], return_tensors="pt", padding=True
        )
        with torch.no_grad():
            right += texts[model(**inputs).logits_per_image.argmax()] == sample.references[0]
    assert right
    assert f"5 images, {len(samples)} regions, alpha\ntop1: {right / len(samples):.1%}\n" in printed


def test_the_region_reaches_the_model(folder, capsys):
    cosines = []
    for view in ("alpha", "whole"):
        assert score(folder, "--view", view) == 0
        cosines.append(float(re.search(r"cosine_same_image: (.*)", capsys.readouterr().out)[1]))
    assert cosines[0] < cosines[1] == 1


def test_a_split_that_the_data_has_not_is_one_line(folder, capsys):
    assert score(folder, "--split", "val") == 2
    assert (
        "expected images in the split 'val' for evaluation, got data with the splits test"
        in capsys.readouterr().err.strip().splitlines()[-1]
    )


def test_a_plain_clip_is_scored_by_other_views(folder, capsys):
    tokenizer = tiny_clip_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = tiny_clip_config(vocab_size=len(tokenizer), max_position_embeddings=77, **ids)
    CLIPModel(config).save_pretrained(folder / "clip")
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder / "clip")
    flags = "--model", folder / "clip"
    assert score(folder, *flags, "--view", "masked", "--images", 3) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("3 images, ") and "cpu, float32, sdpa, pad" in printed.err
    assert score(folder, *flags) == 2
    assert "ignores regions; use another --view" in capsys.readouterr().err
