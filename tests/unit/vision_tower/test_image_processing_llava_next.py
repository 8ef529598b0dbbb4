"""Alpha in LLaVA-NeXT's tiles: padding, strength, small regions, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from tests.alpha_maps import alpha_map
from tests.tiny import noise_image
from vision_tower import AlphaLlavaNextImageProcessor, Region
from vision_tower.alpha_embedding import WHOLE_IMAGE

GRID = [[32, 64], [64, 32], [64, 64]]
SIZE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
PROCESSOR = AlphaLlavaNextImageProcessor(**SIZE, image_grid_pinpoints=GRID)


def alpha(region, width, height):
    """(tiles, 32, 32) in 0..1."""
    pixels = PROCESSOR(Image.new("RGB", (width, height)), region, return_tensors="np")["pixel_values"]
    return alpha_map(pixels[0])


def test_the_whole_image_is_alpha_one_in_the_padding_too():
    pixels = PROCESSOR(noise_image(128, 96), Region.whole(), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 5, 4, 32, 32)
    assert torch.equal(pixels[:, :, 3], torch.full((1, 5, 32, 32), WHOLE_IMAGE))


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_a_region_is_in_its_tiles_and_not_in_the_padding(strength):
    """128 x 96 becomes 64 x 48, padded by 8 above and below; the box, its right half, is in two tiles of four."""
    region = dataclasses.replace(Region.from_box(64, 0, 128, 96), strength=strength)
    tiles = alpha(region, 128, 96)
    expected = np.full((5, 32, 32), 1 - strength, np.float32)
    expected[0, :, 16:] = expected[2, 8:] = expected[4, :24] = 1
    soft = np.zeros((5, 32, 32), bool)
    soft[0, :, 15:17] = soft[[1, 3], :, 31] = soft[[2, 4], :, 0] = True  # antialiasing at the box's edge
    assert np.abs(tiles - expected)[~soft].max() < 1e-6


@pytest.mark.parametrize("box", [(201, 101, 202, 102), (199, 149, 201, 151)])  # in one tile; over all four
def test_a_region_smaller_than_a_pixel_keeps_its_peak(box):
    tiles = alpha(Region.from_box(*box), 400, 300)
    assert tiles[0].max() == pytest.approx(1) and tiles[1:].max() == pytest.approx(1)


def test_several_regions_of_one_image_and_fewer_tiles_than_the_next():
    one, two = noise_image(64, 32), noise_image(64, 64)
    left, right = Region.from_box(0, 0, 20, 20), Region.from_box(30, 10, 60, 30)
    inputs = PROCESSOR([one, two], [[left, right], None], return_tensors="pt")
    assert inputs["image_sizes"].tolist() == [[32, 64], [32, 64], [64, 64]]
    pixels = inputs["pixel_values"]
    assert pixels.shape == (3, 5, 4, 32, 32) and not pixels[:2, 3:].any()
    for row, region in enumerate([left, right]):
        assert torch.equal(pixels[row, :3], PROCESSOR(one, region, return_tensors="pt")["pixel_values"][0])
    kept = PROCESSOR([one, two], [left, None], do_pad=False)["pixel_values"]
    assert [len(tiles) for tiles in kept] == [3, 5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PROCESSOR(noise_image(64, 32), Region.from_box(70, 0, 90, 20)), "outside"),
        (lambda: PROCESSOR(noise_image(64, 32), geometry="pad"), "expected geometry tiles, got 'pad'"),
        (
            lambda: PROCESSOR(noise_image(64, 32), image_grid_pinpoints=[[32, 32]]),
            "image_grid_pinpoints: pass them to the constructor",
        ),
        (lambda: PROCESSOR(noise_image(64, 32), max_side=60), "too long"),
        (lambda: AlphaLlavaNextImageProcessor(**SIZE, image_grid_pinpoints=[[30, 64]]), "multiples of 32 pixels"),
        (lambda: AlphaLlavaNextImageProcessor(**SIZE, image_grid_pinpoints=[]), "multiples of 32 pixels"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
