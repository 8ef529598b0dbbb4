"""The index: images in files and tars, regions and whole images, several geometries and turns per region."""

import dataclasses
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mllm.data.index import FORMAT, RegionIndex, find_index
from mllm.data.index_writer import write_index
from mllm.data.samples import RegionSample, TarMember
from tests.files import read_json, write_json
from tests.tiny import noise_image
from vision_tower import Region

BOX, OTHER = Region.from_box(1, 1, 5, 5), Region.from_box(4, 4, 8, 8)


def sample(image, region, text, region_id=None, image_id="a", **meta):
    meta = {"image_id": image_id, **({} if region_id is None else {"region_id": region_id}), **meta}
    return "train", RegionSample(f"{image_id}/{region_id}", image, (region,), None, (text,), meta=meta)


@pytest.fixture
def members(tmp_path):
    """Two pictures in a tar, with and without their place in it."""
    for name in ("a", "b"):
        noise_image(10, 8, ord(name)).save(tmp_path / f"{name}.png")
    (tmp_path / "t").mkdir()
    with tarfile.open(tmp_path / "t" / "x.tar", "w") as archive:
        for name in ("a", "b"):
            archive.add(tmp_path / f"{name}.png", f"{name}.png")
    with tarfile.open(tmp_path / "t" / "x.tar") as archive:
        found = [TarMember(str(tmp_path / "t" / "x.tar"), m.name, m.offset_data, m.size) for m in archive]
    return found[0], found[1], TarMember(found[1].tar, "b.png")


def test_pictures_in_tars_and_in_files(tmp_path, members):
    first, second, searched = members
    rows = [
        sample(first, BOX, "a thing", 0, width=10, height=8),
        sample(second, BOX, "b thing", 0, "b"),
        sample(searched, BOX, "c thing", 0, "c"),
        sample(str(tmp_path / "a.png"), BOX, "d thing", 0, "d"),
    ]
    write_index(tmp_path / "index", tmp_path, rows, layout="a test")
    index = RegionIndex(tmp_path / "index")
    found = index.read(range(4))
    assert [region.sample.image for region in found] == [first, second, searched, str(tmp_path / "a.png")]
    for region, seed in zip(found, "abba", strict=True):
        assert np.array_equal(np.asarray(region.sample.open_image()), np.asarray(noise_image(10, 8, ord(seed))))
    assert index.images[0]["path"] == "t/x.tar"  # so that the folder may be moved
    assert RegionIndex(tmp_path / "index", root=tmp_path / "t").read([0])[0].sample.image.tar.endswith("t/t/x.tar")


def test_a_missing_tar_is_listed_once_with_all_its_pictures(tmp_path, members):
    rows = [sample(member, BOX, "x", 0, str(number)) for number, member in enumerate(members)]
    rows.append(sample(str(tmp_path / "a.png"), BOX, "x", 0, "file"))
    write_index(tmp_path / "index", tmp_path, rows, layout="a test")
    index = RegionIndex(tmp_path / "index")
    assert index.missing_images("train") == {}
    (tmp_path / "t" / "x.tar").unlink()
    (tmp_path / "a.png").unlink()
    assert index.missing_images("train") == {str(tmp_path / "t" / "x.tar"): len(members), str(tmp_path / "a.png"): 1}
    assert index.missing_images("val") == {}


def test_the_whole_image_beside_its_regions(tmp_path):
    image = str(tmp_path / "a.png")
    mask = Region.from_mask(np.eye(8, 10, dtype=bool))
    rows = [
        sample(image, BOX, "one", 0),
        sample(image, mask, "one", 0),
        sample(image, OTHER, "two", 1),
        sample(image, Region.whole(), "one and two"),
    ]
    write_index(tmp_path / "index", tmp_path, rows, layout="a test")
    index = RegionIndex(tmp_path / "index")
    one, two, whole = index.read(range(len(index)))
    assert one.geometries == (BOX, mask) and two.geometries == (OTHER,) and whole.geometries == (Region.whole(),)
    assert [region.turns for region in (one, two, whole)] == [
        (("description", None, text),) for text in ("one", "two", "one and two")
    ]
    assert [region.sample.meta["region_id"] for region in (one, two, whole)] == [0, 1, None]
    several = dataclasses.replace(one, geometries=(BOX, mask, Region.from_polygon([(1, 1), (5, 1), (3, 5)])))
    assert several.as_type("mask") == several.as_type("available") == mask and several.as_type("box") == BOX
    assert index.image_rows.tolist() == [0, 0, 0] and whole.sample.id == "a/whole"


def test_bytes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="requires image files, got an image as bytes"):
        write_index(tmp_path / "index", tmp_path, [sample(b"x", BOX, "x", 0)], layout="a test")


def test_an_index_of_format_2_is_read():
    """Written by an earlier version from a JSONL file in the parent folder."""
    folder = Path(__file__).with_name("index_format_2")
    index = RegionIndex(folder)
    assert index.root == folder.parent and index.info["images"] == 2 and index.info["layout"] == "JSONL"
    assert index.image_rows.tolist() == [0, 0, 1] and index.is_whole.tolist() == [False, True, False]
    assert index.image_splits.tolist() == ["train", "val"] and index.lengths.tolist() == [13, 14, 5]
    dog, whole, cat = index.read(range(3))
    assert dog.geometries == (BOX,) and dog.sample.image == str(folder.parent / "p/a.png")
    assert dog.turns == (("description", None, "a dog"), ("size", "How big?", "small"))
    assert dog.sample.meta == {"image_id": "p/a.png", "region_id": 0, "width": 10, "height": 8}
    assert whole.geometries == (Region.whole(),) and cat.geometries == (OTHER,)
    assert index.descriptions("train") == ["a dog", "a dog on a mat"]
    assert index.rows("train", ["question"]).tolist() == [0]
    assert index.missing_images("val") == {str(folder.parent / "p/b.png"): 1}


def test_an_index_of_another_format_is_an_error(tmp_path):
    write_index(tmp_path / "index", tmp_path, [sample("a.png", BOX, "x", 0)], layout="a test")
    info = read_json(tmp_path / "index" / "index.json")
    assert info["format"] == FORMAT == 3
    write_json(tmp_path / "index" / "index.json", {**info, "format": 1})
    with pytest.raises(ValueError, match="has format 1, expected 3; rebuild the index"):
        RegionIndex(tmp_path / "index")


def test_the_index_of_a_file_lies_beside_it(tmp_path):
    assert find_index(tmp_path / "mine.jsonl") is None
    for name in ("mine.jsonl.region_index", "other.region_index"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.json").write_text("{}")
    assert find_index(tmp_path / "mine.jsonl") == tmp_path / "mine.jsonl.region_index"
    assert find_index(tmp_path / "other") is None  # of files only
