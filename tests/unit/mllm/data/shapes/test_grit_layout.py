"""The Shapes world in GRIT's layout: the same scenes; regions come back from an index where they were drawn."""

import numpy as np
import pytest

from alpha_clip_commands import alpha_clip
from mllm.data.index import RegionIndex
from mllm.data.prepare import index_grit, make_index
from mllm.data.readers.grit import read_grit
from mllm.data.samples import TarMember
from mllm.data.shapes import grit_layout, scenes
from tests.alpha_maps import iou
from tests.files import read_json

COUNT, SEED = 12, 5


@pytest.fixture(scope="module", params=[0, 3], ids=["folder", "tars"])
def root(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grit") / "data"
    grit_layout.write(folder, COUNT, SEED, tars=request.param, min_objects=1, progress=False)
    make_index(folder)
    return folder


@pytest.fixture(scope="module")
def drawn():
    return [scene for _, scene in scenes.scenes(COUNT, SEED, "train", 1)]


def facts_of(index, scene_number):
    rows = [row for row in index.rows("train") if index.picture_of[row] == scene_number]
    return index.read(rows)


def test_regions_from_the_index_lie_where_their_phrase_was_drawn(root, drawn):
    index = RegionIndex(root)
    assert len(index.pictures) == COUNT and index.missing_pictures("train") == {}
    for number, scene in enumerate(drawn):
        *regions, whole = facts_of(index, number)
        truth = {obj.phrase: mask for obj, mask in zip(scene.objects, scene.masks, strict=True)}
        assert len(regions) == len(truth)
        for facts in regions:
            ((kind, question, phrase),) = facts.turns
            mask = truth.pop(phrase)
            assert (kind, question) == ("description", None) and [f.kind for f in facts.forms] == ["box", "mask"]
            assert iou(facts.forms[1].mask(96, 96) > 0.5, mask) == 1
            around = np.zeros_like(mask)
            rows, columns = np.nonzero(mask)
            around[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
            assert iou(facts.forms[0].mask(96, 96) > 0.5, around) >= 0.95
            assert np.array_equal(np.asarray(facts.sample.open_image()), scene.pixels)
        assert not truth and [form.is_whole for form in whole.forms] == [True]
        assert whole.sample.meta.get("region_id") is None
        assert whole.turns == (("description", None, grit_layout.annotation(scene)["caption"]),)


def test_pictures_in_tars_are_read_at_their_place(root):
    image = RegionIndex(root).read([0])[0].sample.image
    if (root / "00000").exists():
        assert image == str(root / "00000" / "000000001.png")
    else:
        assert isinstance(image, TarMember) and image.tar == str(root / "00000.tar")
        assert image.name == "000000001.png" and image.offset % 512 == 0 and image.size > 100
        assert len(list(root.glob("*.tar"))) == 3


def test_captions_name_objects_from_left_to_right_and_spans_are_exact(drawn):
    for scene in drawn:
        record = grit_layout.annotation(scene)
        by_place = sorted(scene.objects, key=lambda obj: obj.x)
        assert record["caption"] == ", ".join(obj.phrase for obj in by_place)
        assert [record["caption"][int(row[0]) : int(row[1])] for row in record["ref_exps"]] == [
            obj.phrase for obj in by_place
        ]
        for row in record["ref_exps"]:
            assert all(type(value) is float for value in row) and row[6] == 1.0
            assert 0 <= row[2] < row[4] <= 1 and 0 <= row[3] < row[5] <= 1


def test_all_is_of_the_split_that_the_folder_names(tmp_path):
    grit_layout.write(tmp_path / "x", 2, 1, "test", progress=False)
    assert read_json(tmp_path / "x" / "dataset.json") == {"world": "shapes", "split": "test", "seed": 1, "images": 2}
    scenes.expect_split(tmp_path / "x", "test")
    index_grit(tmp_path / "x")
    index = RegionIndex(tmp_path / "x")
    assert index.rows("train").size == 0 and index.rows("test").size == len(index)
    (tmp_path / "x" / "dataset.json").write_text("{}")
    with pytest.raises(ValueError, match="missing required field 'split'"):
        index_grit(tmp_path / "x")


def test_the_scenes_are_those_of_shapes_where_nothing_else_is_asked(tmp_path):
    grit_layout.write(tmp_path / "x", 4, 1, progress=False)
    drawn = [scene for _, scene in scenes.scenes(4, 1, "train")]
    pictures = {sample.meta["image_id"]: sample for sample in read_grit(tmp_path / "x")}
    for sample, scene in zip(pictures.values(), drawn, strict=True):
        assert np.array_equal(np.asarray(sample.open_image()), scene.pixels) and len(scene.objects) >= 3


def test_scenes_of_one_to_six_objects():
    counts = [len(scene.objects) for _, scene in scenes.scenes(60, 1, "train", 1)]
    assert set(counts) == {1, 2, 3, 4, 5, 6}
    assert {len(scene.objects) for _, scene in scenes.scenes(30, 1, "train", 1, 2)} == {1, 2}
    for fewest, most in ((0, 6), (1, 7), (3, 2)):
        with pytest.raises(ValueError, match=f"1 to 6 objects a scene, got {fewest} to {most}"):
            next(scenes.scenes(1, 1, "train", fewest, most))


def test_same_seed_same_bytes(tmp_path):
    for name in ("a", "b"):
        grit_layout.write(tmp_path / name, 5, 1, tars=2, progress=False)
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


def test_command_line(tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "x"), "--images", "2", "--seed", "1", "--tars", "2", "--min-objects", "1"]
    arguments += ["--max-objects", "1"]
    assert alpha_clip.main(["shapes", "--layout", "grit", *arguments]) == 0
    assert {sample.references[0].count(",") for sample in read_grit(tmp_path / "x")} == {0}  # one object each
    assert sorted(file.name for file in (tmp_path / "x").iterdir()) == [
        ".made_by.json",
        "00000.tar",
        "00001.tar",
        "dataset.json",
    ]
    (tmp_path / "x" / "mine.tar").touch()
    for wrong, message in (
        (arguments, "contains files that this command did not write (first: mine.tar)"),
        ([*arguments, "--out", str(tmp_path / "y"), "--tars", "3"], "0 to that many tars, got 2 and 3"),
        ([*arguments, "--out", str(tmp_path / "y"), "--min-objects", "9"], "objects a scene, got 9"),
    ):
        assert alpha_clip.main(["shapes", "--layout", "grit", *wrong]) == 2 and message in capsys.readouterr().err
