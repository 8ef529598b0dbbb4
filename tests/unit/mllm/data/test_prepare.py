"""Which layout a folder is in; and files of one's own as an index."""

import os
from collections import Counter

import numpy as np
import pytest

from mllm.data.index import RegionIndex
from mllm.data.prepare import OTHER_SIZES, index_jsonl, make_index
from mllm.data.shapes import grit_layout, visual_genome_layout
from tests.files import write_json_lines
from tests.tiny import noise_image
from vision_tower import Region

ONE, TWO = {"box": [1, 1, 5, 5]}, {"box": [4, 4, 8, 8]}


def write(folder, *lines):
    records = ({"image": "p/a.png", "region": ONE, "answer": "a dog"} | line for line in lines)
    return write_json_lines(folder / "mine.jsonl", records)


def read(file):
    """Facts of a file by picture and number of the region."""
    index = RegionIndex(file)
    facts = index.read(range(len(index)))
    return {(entry.sample.meta["image_id"], entry.sample.meta["region_id"]): entry for entry in facts}


def test_lines_are_put_together_by_picture_and_region(tmp_path):
    lines = [
        {},
        {"image": "p/b.png", "region": TWO, "answer": "a cat"},
        {"region": TWO, "answer": ["a mat", "a rug"]},
        {"region": {"whole": True}, "answer": "a dog on a mat"},
        {"image": "p/b.png", "answer": "a bird"},
        {"question": "What is it?", "answer": "a dog"},
        {"question": "How big?", "answer": "small", "meta": {"type": "size"}},
        {"answer": "the dog"},
    ]
    record = make_index(write(tmp_path, *lines))
    assert record["pictures"] == 2 and record["regions"] == 5
    found = read(tmp_path / "mine.jsonl")
    assert set(found) == {("p/a.png", 0), ("p/a.png", 1), ("p/a.png", None), ("p/b.png", 0), ("p/b.png", 1)}
    dog = found["p/a.png", 0]
    assert dog.forms == (Region.from_box(*ONE["box"]),) and dog.sample.image == str(tmp_path / "p" / "a.png")
    assert dog.turns == (
        ("description", None, "a dog"),
        ("question", "What is it?", "a dog"),
        ("size", "How big?", "small"),
        ("description", None, "the dog"),
    )
    assert found["p/a.png", 1].sample.references == ("a mat", "a rug")
    assert found["p/a.png", None].forms == (Region.whole(),)
    assert found["p/a.png", None].sample.references == ("a dog on a mat",)
    assert found["p/b.png", 0].sample.references == ("a cat",)  # its first region, not that of the other picture
    assert found["p/b.png", 1].forms == dog.forms
    assert Counter(RegionIndex(tmp_path / "mine.jsonl").picture_of.tolist()) == {0: 3, 1: 2}


def test_splits_sizes_and_places_of_lines(tmp_path):
    elsewhere = tmp_path / "elsewhere" / "c.png"
    lines = [
        {"meta": {"split": "val"}},
        {"meta": {"width": 10, "height": 8, "note": "x"}},
        {"image": str(elsewhere), "meta": {"split": "test"}},
    ]
    (tmp_path / "data").mkdir()
    file = write(tmp_path / "data", *lines)
    reports = {}
    record = index_jsonl(file, tmp_path / "index", reports)
    assert record["splits"] == {"test": 1, "train": 1, "val": 1} and reports["lines"].counts["read"] == 3
    index = RegionIndex(tmp_path / "index")
    facts = [index.read(index.rows(split))[0] for split in ("train", "val", "test")]
    paths = [str(tmp_path / "data" / "p" / "a.png")] * 2 + [str(elsewhere)]
    assert [os.path.normpath(entry.sample.image) for entry in facts] == paths
    assert [entry.sample.meta["image_id"] for entry in facts] == ["p/a.png", "p/a.png", elsewhere.as_posix()]
    assert [entry.sample.meta.get("width") for entry in facts] == [10, 10, None]
    (tmp_path / "data" / "p").mkdir()
    noise_image(10, 9).save(tmp_path / "data" / "p" / "a.png")
    with pytest.raises(ValueError, match="its data set says 10 x 8"):
        facts[0].sample.open_image()


@pytest.mark.parametrize(
    "meta, message",
    [
        ({"split": 1}, "split: expected text or null, got a whole number"),
        ({"split": ""}, "split: expected text of length >= 1"),
        ({"type": 5}, "type: expected text or null"),
        ({"width": "10", "height": 8}, "width: expected a whole number or null, got text"),
        ({"width": 0, "height": 8}, "width: expected a whole number >= 1"),
    ],
)
def test_what_cannot_be_taken_of_a_line_is_counted(tmp_path, meta, message):
    file = write(tmp_path, {"meta": {"width": 10, "height": 8}}, {"id": "bad", "meta": meta})
    record = index_jsonl(file)
    (left_out,) = record["left_out"]["lines"].values()
    assert record["regions"] == 1 and left_out["count"] == 1 and message in left_out["first"][0]


@pytest.mark.parametrize("size", [{"width": 10}, {"width": 10, "height": 9}])
def test_an_image_of_several_sizes_is_left_out(tmp_path, size):
    lines = [{"meta": {"width": 10, "height": 8}}, {"meta": size}, {"image": "p/b.png"}]
    record = index_jsonl(write(tmp_path, *lines))
    assert record["pictures"] == 1 and record["left_out"]["lines"][OTHER_SIZES]["count"] == 1
    assert "p/a.png" in record["left_out"]["lines"][OTHER_SIZES]["first"][0]


def test_a_mask_states_the_size_of_its_picture(tmp_path):
    stated = [{"region": Region.from_mask(np.ones((8, side))).to_json()} for side in (10, 11)]
    index_jsonl(write(tmp_path, stated[0]))
    (facts,) = RegionIndex(tmp_path / "mine.jsonl").read([0])
    assert (facts.sample.meta["width"], facts.sample.meta["height"]) == (10, 8)
    record = index_jsonl(write(tmp_path, stated[0], {"id": "other", **stated[1]}))
    assert record["left_out"]["lines"][OTHER_SIZES]["count"] == 1


def test_layouts_are_told_apart(tmp_path):
    with pytest.raises(ValueError, match="there is no folder .*nothing"):
        make_index(tmp_path / "nothing")
    visual_genome_layout.write(tmp_path / "vg", 1, 1, progress=False)
    assert make_index(tmp_path / "vg")["made_of"] == "Visual Genome's layout"
    (tmp_path / "vg" / "image_data.json").unlink()
    assert make_index(tmp_path / "vg")["made_of"] == "RefCOCO's layout, refs(umd)"
    for tars in (0, 1):
        grit_layout.write(tmp_path / f"grit{tars}", 1, 1, tars=tars, progress=False)
        first, again = make_index(tmp_path / f"grit{tars}"), make_index(tmp_path / f"grit{tars}")
        assert first["made_of"] == "GRIT's layout" and first["left_out"] == {} and again == first
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.json").write_text("{}")
    with pytest.raises(ValueError) as caught:
        make_index(tmp_path / "other")
    for named in ("other", "image_data.json is missing", "refs(...).p", "*.tar", ".jsonl"):
        assert named in str(caught.value)


def test_what_grit_left_out_is_in_the_record(tmp_path):
    grit_layout.write(tmp_path / "x", 2, 1, progress=False)
    (tmp_path / "x" / "00000" / "000000002.png").unlink()
    record = make_index(tmp_path / "x")
    assert record["pictures"] == 1
    assert record["left_out"] == {
        "regions and captions": {
            "with JSON but without a picture, left out": {"count": 1, "first": ["00000/000000002"]}
        }
    }
