"""Every processor gives every kind of image source the pixels that the one decoder gives it."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from tests.serving import serve
from tests.tiny import build_tiny_blip2, build_tiny_clip, build_tiny_llava, prompt
from vision_tower import AlphaCLIPImageProcessor, Region
from vision_tower.image_decoding import decode_image
from vision_tower.region_arguments import as_region

KINDS = ["str", "path", "bytes", "pil", "array", "tensor", "url"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def address(folder):
    """Of a server on this machine."""
    with serve(folder) as url:
        yield url


@pytest.fixture(scope="module")
def processors():
    llava, blip2, clip = build_tiny_llava()[1], build_tiny_blip2("opt")[1], build_tiny_clip()[1]

    def message(image):
        items = [{"type": "image", "image": image, "region": "box:1,1,5,5"}, {"type": "text", "text": "What?"}]
        return [{"role": "user", "content": items}]

    chat = {"tokenize": True, "return_tensors": "pt"}
    return {
        "llava": lambda image: llava(images=image, text=prompt("What?"), return_tensors="pt"),
        "llava batch": lambda image: llava(images=[image], text=[prompt("What?")], return_tensors="pt"),
        "llava chat": lambda image: llava.apply_chat_template(message(image), return_dict=True, **chat),
        "blip2": lambda image: blip2(images=image, text="", return_tensors="pt"),
        "blip2 chat": lambda image: blip2.apply_chat_template(message(image), **chat),
        "clip": lambda image: clip(images=image, text="a", return_tensors="pt"),
    }


@pytest.mark.parametrize("depth", ["16 bits", "transparent"])
def test_all_sources_give_the_same_pixels(folder, address, processors, depth):
    random = np.random.default_rng(0)
    deep = depth == "16 bits"
    array = random.integers(0, 65536, (8, 10), np.uint16) if deep else random.integers(0, 256, (8, 10, 4), np.uint8)
    file = folder / f"{'deep' if deep else 'clear'}.png"
    Image.fromarray(array).save(file)
    tensor = torch.from_numpy(array if deep else np.moveaxis(array, -1, 0).copy())
    sources = [str(file), file, file.read_bytes(), Image.open(file), array, tensor, f"{address}/{file.name}"]
    decoded = decode_image(file)
    for name, process in processors.items():
        expected = process(decoded)["pixel_values"]
        for kind, source in zip(KINDS, sources, strict=True):
            assert torch.equal(process(source)["pixel_values"], expected), (name, kind)


def test_a_question_without_an_image_stands_beside_one_with_an_image(processors):
    llava = build_tiny_llava()[1]
    image = Image.new("RGB", (8, 8))
    text = [prompt("What?"), "USER: Why? ASSISTANT:"]
    assert len(llava(images=[[image], []], text=text, return_tensors="pt")["pixel_values"]) == 1


def test_a_url_that_cannot_be_fetched_is_one_line(address):
    processor = AlphaCLIPImageProcessor.for_size(16, "pad")
    for url in (f"{address}/no.png", "http://127.0.0.1:9/x.png", "http://[bad"):
        with pytest.raises(ValueError, match="cannot download the image") as caught:
            processor(url)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields", [("foo", []), ("box", ["a", 2, 3, 4]), ("box", [1]), (["x"], None), ("mask", [8, 10, "binary", "zz"])]
)
def test_fields_that_are_no_regions_are_refused(fields):
    with pytest.raises(ValueError):
        as_region({"kind": fields[0], "data": fields[1], "strength": 1.0})


@pytest.mark.parametrize(
    "text", ["box:1,2,5,6*0.5", "nbox:0,0,.5,1", "polygon:1,2,5,2,5,6", "points:1,2@3", "stroke:1,2;3,4@2", "whole"]
)
def test_fields_of_a_region_give_it_back(text):
    region = Region.parse(text)
    assert as_region(dataclasses.asdict(region)) == region


def test_the_fields_of_a_mask_give_it_back():
    region = Region.from_mask(np.eye(4, dtype=bool), strength=0.5)
    assert as_region(dataclasses.asdict(region)) == region
