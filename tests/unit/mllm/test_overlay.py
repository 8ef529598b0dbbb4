"""The overlay shows the region where it is."""

import numpy as np
import pytest
from PIL import Image

from mllm.overlay import check_overlay, draw_overlay, save_overlay
from vision_tower import Region

GREY = Image.new("RGB", (100, 60), (200, 200, 200))


def test_inside_stays_outside_is_dimmed_and_an_outline_is_drawn():
    region = Region.from_box(20, 10, 60, 40)
    overlay = np.asarray(draw_overlay(GREY, region))
    scale = overlay.shape[1] // 100
    assert scale == 4  # small pictures are enlarged
    inside = overlay[10 * scale : 40 * scale, 20 * scale : 60 * scale]
    assert (inside == 200).all()
    assert (overlay[5, 5] == 70).all()
    edge = overlay[25 * scale, 20 * scale - 1]
    assert edge[0] == 255 and edge[1] == 60


def test_whole_image_is_left_alone():
    assert (np.asarray(draw_overlay(GREY, Region.whole())) == 200).all()


def test_a_long_caption_is_wrapped_under_the_picture():
    plain = draw_overlay(GREY, Region.whole())
    captioned = draw_overlay(GREY, Region.whole(), "a very long answer " * 12)
    assert captioned.width == plain.width and captioned.height > plain.height + 60
    assert np.array_equal(np.asarray(captioned)[: plain.height], np.asarray(plain))


def test_saving_replaces_the_file_whole(tmp_path):
    path = tmp_path / "o.png"
    save_overlay(path, GREY, Region.whole())
    check_overlay(path)  # may be replaced
    save_overlay(path, GREY, Region.from_box(1, 1, 9, 9))
    assert Image.open(path).size == (400, 240)
    assert [file.name for file in tmp_path.iterdir()] == ["o.png"]
    with pytest.raises(ValueError, match="folder not found"):
        save_overlay(tmp_path / "no" / "o.png", GREY, Region.whole())


@pytest.mark.parametrize("strength", [1.0, 0.6, 0.5, 0.1])
def test_the_outline_is_there_at_every_strength(strength):
    overlay = np.asarray(draw_overlay(GREY, Region.from_box(20, 10, 60, 40, strength=strength)))
    outline = (overlay == (255, 60, 200)).all(-1)
    assert outline[25 * 4, 20 * 4 - 1] and outline[25 * 4, 60 * 4]
    assert not outline[:, 20 * 4 : 60 * 4][10 * 4 : 40 * 4].any()


@pytest.mark.parametrize("corner", [(50, 30), (0, 0), (99, 59)])
def test_a_region_too_small_to_be_seen_has_a_ring(corner):
    image = Image.new("RGB", (1000, 600), (200, 200, 200))
    x0, y0 = 10 * corner[0], 10 * corner[1]
    outline = (np.asarray(draw_overlay(image, Region.from_box(x0, y0, x0 + 4, y0 + 4))) == (255, 60, 200)).all(-1)
    assert not outline[y0 : y0 + 4, x0 : x0 + 4].any()  # the region itself is not drawn over
    ring = [(x0 + 2 + dx, y0 + 2 + dy) for dx, dy in ((47, 0), (-47, 0), (0, 47), (0, -47))]
    found = [outline[y, x] for x, y in ring if 0 <= x < 1000 and 0 <= y < 600]
    assert found and all(found)
    large = (np.asarray(draw_overlay(image, Region.from_box(400, 200, 500, 300))) == (255, 60, 200)).all(-1)
    assert not large[:190].any() and not large[310:].any()


def test_a_word_wider_than_the_picture_is_broken():
    one_line, broken = (draw_overlay(GREY, Region.whole(), "w" * count) for count in (3, 300))
    assert broken.height > one_line.height + 60 and broken.width == one_line.width


def test_others_may_read_the_saved_file(tmp_path):
    (tmp_path / "usual").touch()
    save_overlay(tmp_path / "o.png", GREY, Region.whole())
    assert (tmp_path / "o.png").stat().st_mode == (tmp_path / "usual").stat().st_mode
    with pytest.raises(ValueError, match="it is a folder"):
        save_overlay(tmp_path, GREY, Region.whole())
