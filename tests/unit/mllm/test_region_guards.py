"""Ways in which a region, or the user's picture, was once lost without a word: now each is an error or a warning."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor

import mllm
from alpha_clip_commands.region_chat import build_parser
from alpha_clip_commands.region_chat import main as region_chat
from alpha_clip_commands.training.tuning_arguments import DataArguments
from mllm.data.index import RegionIndex
from mllm.data.prepare import make_index
from mllm.data.shapes import visual_genome_layout
from mllm.llava import build_llava_processor
from mllm.loading import EMBEDDED_MODEL
from mllm.region_chat import cli
from tests.files import read_json, read_json_lines, write_json
from tests.tiny import build_stock_llava, build_tiny_llava, noise_image, prompt, save_model
from train.tuning.conversations import ConversationDataset
from vision_tower import AlphaCLIPImageProcessor, Region

BOX = Region.from_box(2, 2, 30, 30)


@pytest.mark.parametrize("name", ["region", "mask", "masks", "alpha_values"])
def test_a_misspelt_region_is_an_error(tiny_llava, name):
    with pytest.raises(ValueError, match="pass regions as regions="):
        tiny_llava[1](images=noise_image(60, 40), text=prompt("What?"), **{name: BOX})


def test_a_stock_image_processor_is_refused():
    model, processor = build_tiny_llava()
    stock = build_llava_processor(CLIPImageProcessor(), processor.tokenizer, model.config)
    with pytest.raises(ValueError, match="does not support regions"):
        stock(images=noise_image(60, 40), text=prompt("What?"), regions=BOX)


def clip_llava(folder):
    return save_model(folder, build_stock_llava(), build_tiny_llava()[1])


def test_a_tower_that_ignores_regions_says_so(tiny_llava_dir, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        mllm.load(tiny_llava_dir, device="cpu")
        assert not caplog.records
        mllm.load(clip_llava(tmp_path), device="cpu")
    assert "alpha weight" in caplog.text and "is zero" in caplog.text


def test_a_lost_alpha_weight_of_ours_is_an_error(tiny_llava_dir, tmp_path):
    for file in tiny_llava_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    kept = {key: tensor for key, tensor in weights.items() if ".alpha." not in key}
    assert len(kept) == len(weights) - 1
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks the alpha weight"):
        mllm.load(tmp_path, device="cpu")


def test_training_refuses_pictures_of_another_size(tmp_path):
    visual_genome_layout.write(tmp_path / "s", 1, 5, "train", progress=False)
    make_index(tmp_path / "s")
    index, args = RegionIndex(tmp_path / "s"), DataArguments(data=["s"])
    samples = ConversationDataset([index], args, "train", ["What?"], 0, tmp_path / "skipped.jsonl")
    assert samples[0]
    picture = tmp_path / "s" / "VG_100K" / "1.png"
    Image.open(picture).resize((192, 192)).save(picture)
    with pytest.raises(ValueError, match="1 of 1 images cannot be read"):
        samples[0]
    assert "regions would be shifted" in (tmp_path / "skipped.jsonl").read_text()


@pytest.mark.parametrize("palette", [(0, 0, 0, 255, 255, 255), (255, 255, 255, 0, 0, 0), (0, 0, 0, 128, 0, 0)])
def test_palette_masks_are_read_by_colour(palette):
    black = palette[3:] == (0, 0, 0)
    inside = np.zeros((20, 30), bool)
    inside[5:12, 3:9] = True
    mask = Image.fromarray((inside != black).astype(np.uint8), mode="P")
    mask.putpalette(palette)
    assert np.array_equal(Region.from_mask(mask).mask(20, 30) > 0, inside)


def test_a_palette_mask_without_black_is_refused():
    mask = Image.fromarray(np.eye(8, dtype=np.uint8), mode="P")
    mask.putpalette((10, 20, 30, 200, 0, 0))
    with pytest.raises(ValueError, match="no black"):
        Region.from_mask(mask)


def test_a_mask_file_is_turned_as_its_picture_is(tmp_path):
    mask = Image.new("L", (30, 20))
    mask.paste(255, (0, 0, 10, 5))
    exif = Image.Exif()
    exif[0x0112] = 3  # by 180 degrees
    mask.save(tmp_path / "mask.png", exif=exif)
    assert Region.from_mask(tmp_path / "mask.png").bounding_box(20, 30) == (20, 15, 30, 20)


def test_numbers_too_large_fail_alone_in_a_batch(tiny_llava_dir, tmp_path):
    noise_image(60, 40).save(tmp_path / "a.png")
    regions = [{"box": [0, 0, 10, 10]}, {"box": [0, 0, 10, 10**400]}]
    regions.append({"rle": {"size": [10**6, 10**6], "counts": [0, 10**12]}})
    lines = [json.dumps({"id": i, "image": "a.png", "region": region}) for i, region in enumerate(regions)]
    (tmp_path / "r.jsonl").write_text("\n".join(lines) + "\n")
    flags = ["--model", tiny_llava_dir, "--batch", tmp_path / "r.jsonl", "--output", tmp_path / "o.jsonl"]
    assert region_chat([str(flag) for flag in [*flags, "--max-new-tokens", 2]]) == 1
    answers = read_json_lines(tmp_path / "o.jsonl")
    assert ["answer" in answer for answer in answers] == [True, False, False]


def test_strength_on_the_command_line():
    def region(*flags):
        return cli.region_from_arguments(build_parser().parse_args(["--image", "a.png", *flags]))

    assert region("--box", "1,1,20,20*0.3").strength == 0.3
    assert region("--box", "1,1,20,20", "--strength", "0.3").strength == 0.3
    assert region("--box", "1,1,20,20").strength == 1
    with pytest.raises(ValueError, match="two strengths"):
        region("--box", "1,1,20,20*0.3", "--strength", "0.5")


def test_the_picture_is_never_overwritten(tmp_path, capsys):
    picture = tmp_path / "own.png"
    noise_image(60, 40).save(picture)
    before = picture.read_bytes()
    flags = ["--image", str(picture), "--box", "1,1,20,20"]
    assert region_chat([*flags, "--ask", "x", "--save-overlay", str(picture)]) == 2
    assert "would be overwritten" in capsys.readouterr().err and picture.read_bytes() == before


def test_a_broken_config_is_one_line(tmp_path, capsys):
    noise_image(60, 40).save(tmp_path / "a.png")
    config = read_json(EMBEDDED_MODEL / "config.json")
    config["vision_config"]["hidden_size"] = "abc"
    write_json(tmp_path / "config.json", config)
    flags = ["--model", str(tmp_path), "--image", str(tmp_path / "a.png"), "--box", "1,1,9,9", "--ask", "x"]
    assert region_chat(flags) == 2
    error = capsys.readouterr().err
    assert "cannot load the model" in error and error.count("\n") == 1


def test_alpha_is_zero_where_clip_was_loaded(tmp_path):
    model, _ = mllm.load(clip_llava(tmp_path), device="cpu")
    assert not torch.any(model.model.vision_tower.embeddings.patch_embedding.alpha.weight)


def test_stock_image_settings_beside_our_tokenizer(tiny_llava_dir, tmp_path):
    """The tokenizer names our processor, the image settings are CLIP's: regions must not be lost, nor refused."""
    shutil.copytree(tiny_llava_dir, tmp_path / "mixed")
    (tmp_path / "mixed" / "processor_config.json").unlink()
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}}
    write_json(tmp_path / "mixed" / "preprocessor_config.json", settings)
    _, processor = mllm.load(tmp_path / "mixed", device="cpu")
    assert isinstance(processor.image_processor, AlphaCLIPImageProcessor)
    assert processor.image_processor.geometry == "pad"
