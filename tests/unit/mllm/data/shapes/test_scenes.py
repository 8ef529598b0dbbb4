"""The Shapes world keeps its promises; its files are read by the Visual Genome reader."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alpha_clip_commands import alpha_clip
from mllm.data.readers.visual_genome import read_image_questions, read_region_questions, read_regions
from mllm.data.shapes import drawing, scenes, visual_genome_layout
from tests.files import read_json

COUNT = 60


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    for split in scenes.SPLITS:
        visual_genome_layout.write(root / split, COUNT, 5, split, progress=False)
    return root


@pytest.fixture(scope="module")
def drawn():
    return {split: [scene for _, scene in scenes.scenes(COUNT, 5, split)] for split in scenes.SPLITS}


def test_the_world_is_as_large_as_promised():
    assert len(drawing.COLORS) >= 8 and len(drawing.SHAPES) >= 6
    assert len(drawing.PATTERNS) >= 3 and len(drawing.SIZES) >= 2


def test_scenes(drawn):
    counts = Counter()
    for scene in sum(drawn.values(), []):
        assert scene.pixels.shape == (96, 96, 3) and scene.pixels.dtype == np.uint8
        assert 3 <= len(scene.objects) <= 6
        counts[len(scene.objects)] += 1
        assert len({obj.phrase for obj in scene.objects}) == len(scene.objects)
        for index, (obj, mask) in enumerate(zip(scene.objects, scene.masks, strict=True)):
            assert obj.x - obj.radius >= 0 and obj.x + obj.radius <= 96
            assert mask.sum() > 40
            for other in scene.objects[index + 1 :]:
                assert (
                    max(abs(obj.x - other.x), abs(obj.y - other.y)) > obj.radius + other.radius
                )  # no overlapping boxes
    assert set(counts) == {3, 4, 5, 6}


def test_scenes_are_those_of_earlier_versions():
    """The embedded model knows this world: five scenes of each split, as they were drawn for it."""
    file = Path(__file__).with_name("shapes_scenes.png")
    rows = [np.concatenate([s.pixels for _, s in scenes.scenes(5, 5, split)], 1) for split in scenes.SPLITS]
    with Image.open(file) as expected:
        difference = np.abs(np.concatenate(rows).astype(int) - np.asarray(expected))
    assert (difference > 2).mean() < 1e-3  # sines may be rounded differently elsewhere


def test_masks_are_where_the_colour_is(drawn):
    for scene in drawn["train"][:30]:
        for obj, mask in zip(scene.objects, scene.masks, strict=True):
            if obj.pattern == "plain":
                inside = scene.pixels[mask].mean(0)
                assert np.abs(inside - np.array(drawing.COLORS[obj.color])).max() < 40


def test_same_seed_same_bytes_and_pixels(folders, tmp_path):
    visual_genome_layout.write(tmp_path / "again", COUNT, 5, "train", progress=False)
    for file in (folders / "train").glob("*.json"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    for image_id in range(1, COUNT + 1):
        first, second = (
            np.asarray(Image.open(root / "VG_100K" / f"{image_id}.png"))
            for root in (folders / "train", tmp_path / "again")
        )
        assert np.array_equal(first, second)


def test_a_longer_set_begins_with_the_shorter():
    short, long = ([scenes.scene_hash(s.pixels) for _, s in scenes.scenes(n, 5, "test")] for n in (3, 6))
    assert long[:3] == short


def test_splits_share_no_scene(drawn):
    hashes = [{scenes.scene_hash(scene.pixels) for scene in split} for split in drawn.values()]
    assert all(len(group) == COUNT for group in hashes)
    assert len(set.union(*hashes)) == COUNT * len(hashes)


def pairs_in(folder):
    """Every colour-shape pair that a split's objects or answers name."""
    texts = [s.references[0] for s in read_regions(folder)] + [s.references[0] for s in read_region_questions(folder)]
    return {
        (words[-2], words[-1])
        for words in (text.split() for text in texts)
        if len(words) > 1 and words[-1] in drawing.SHAPES
    }


def test_novel_pairs_appear_nowhere_in_train_answers_included(folders):
    novel = pairs_in(folders / "novel")
    assert novel == set(drawing.NOVEL_PAIRS)
    assert not novel & pairs_in(folders / "train") and not novel & pairs_in(folders / "test")


def test_unseen_backgrounds_are_not_in_train(drawn):
    assert {s.background for s in drawn["background"]} == set(drawing.UNSEEN_BACKGROUNDS)
    assert {s.background for s in drawn["train"]} == set(drawing.BACKGROUNDS)


def test_one_canonical_phrase_an_object(folders):
    regions = read_json(folders / "test" / "region_descriptions.json")
    objects = read_json(folders / "test" / "objects.json")
    for entry, scene in zip(regions, objects, strict=True):
        assert [r["phrase"] for r in entry["regions"]] == [
            f"a {' '.join(o['attributes'])} {o['names'][0]}" for o in scene["objects"]
        ]
        assert [(r["x"], r["y"], r["width"], r["height"]) for r in entry["regions"]] == [
            (o["x"], o["y"], o["w"], o["h"]) for o in scene["objects"]
        ]


def test_boxes_are_tight_around_masks(folders, drawn):
    boxes, masks = (list(read_regions(folders / "test", region_type=form)) for form in ("box", "mask"))
    drawn_masks = [mask for scene in drawn["test"] for mask in scene.masks]
    for box, mask, pixels in zip(boxes, masks, drawn_masks, strict=True):
        assert np.array_equal(mask.regions[0].mask(96, 96), pixels)
        assert box.regions[0].bounding_box(96, 96) == mask.regions[0].bounding_box(96, 96)
        assert box.open_image().size == (96, 96)


def test_neighbours_are_unique_and_right(drawn):
    asked = 0
    for scene in drawn["test"]:
        for index, obj in enumerate(scene.objects):
            for direction, (ux, uy) in scenes.DIRECTIONS.items():
                found = scenes.neighbor(scene.objects, index, direction)
                if found is None:
                    continue
                asked += 1
                towards = [
                    o
                    for o in scene.objects
                    if o is not obj
                    and (o.x - obj.x) * ux + (o.y - obj.y) * uy > abs((o.x - obj.x) * uy) + abs((o.y - obj.y) * ux)
                ]
                assert towards == [found]  # the only one in its quadrant
    assert asked > COUNT


def test_questions_about_the_whole_image_are_not_mapped(folders):
    free = list(read_image_questions(folders / "test"))
    assert len(free) == COUNT // 5 and all(
        sample.regions[0].is_whole and sample.meta["type"] == "count" for sample in free
    )


def test_command_line(tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "x"), "--images", "2", "--seed", "1", "--split", "novel"]
    assert alpha_clip.main(["shapes", *arguments]) == 0
    assert read_json(tmp_path / "x" / "dataset.json") == {"world": "shapes", "split": "novel", "seed": 1, "images": 2}
    before = {file.name: file.read_bytes() for file in (tmp_path / "x").rglob("*") if file.is_file()}
    assert alpha_clip.main(["shapes", *arguments]) == 0  # the marker too is the same
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "x").rglob("*") if file.is_file()}
    (tmp_path / "x" / "VG_100K" / "mine.png").touch()
    assert alpha_clip.main(["shapes", *arguments]) == 2 and "VG_100K/mine.png" in capsys.readouterr().err
