"""A mask image with transparency could mean its colors or its transparency: it is refused, whatever its colors."""

import numpy as np
import pytest
from PIL import Image

from vision_tower import Region


def transparent(mode, colors):
    """8 x 6 pixels, one half white or all of one gray, the right half transparent."""
    pixels = np.zeros((6, 8, len(mode)), np.uint8)
    pixels[..., :-1] = 255 if colors == "equal" else (np.arange(6) < 3)[:, None, None] * 255
    pixels[:, :4, -1] = 255
    return Image.fromarray(pixels, mode)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize("colors", ["equal", "two"])
def test_a_transparent_mask_is_refused(mode, colors, tmp_path):
    image = transparent(mode, colors)
    image.save(tmp_path / "mask.png")
    for mask in (image, tmp_path / "mask.png"):
        with pytest.raises(ValueError):
            Region.from_mask(mask)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_an_opaque_one_is_read_by_its_color(mode):
    image = transparent(mode, "two")
    image.putalpha(255)
    assert np.array_equal(Region.from_mask(image).mask(6, 8), np.repeat(np.arange(6)[:, None] < 3, 8, 1))
