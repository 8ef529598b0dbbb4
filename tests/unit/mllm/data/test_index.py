"""The index: pictures in files and in tars, regions beside the whole image, forms and turns put together."""

import dataclasses
import tarfile

import numpy as np
import pytest

from mllm.data.index import FORMAT, RegionIndex, index_folder, write_index
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
    write_index(tmp_path / "index", tmp_path, rows, made_of="a test")
    index = RegionIndex(tmp_path / "index")
    found = index.read(range(4))
    assert [facts.sample.image for facts in found] == [first, second, searched, str(tmp_path / "a.png")]
    for facts, seed in zip(found, "abba", strict=True):
        assert np.array_equal(np.asarray(facts.sample.open_image()), np.asarray(noise_image(10, 8, ord(seed))))
    assert index.pictures[0]["image"] == "t/x.tar"  # so that the folder may be moved
    assert RegionIndex(tmp_path / "index", root=tmp_path / "t").read([0])[0].sample.image.tar.endswith("t/t/x.tar")


def test_a_missing_tar_is_listed_once_with_all_its_pictures(tmp_path, members):
    rows = [sample(member, BOX, "x", 0, str(number)) for number, member in enumerate(members)]
    rows.append(sample(str(tmp_path / "a.png"), BOX, "x", 0, "file"))
    write_index(tmp_path / "index", tmp_path, rows, made_of="a test")
    index = RegionIndex(tmp_path / "index")
    assert index.missing_pictures("train") == {}
    (tmp_path / "t" / "x.tar").unlink()
    (tmp_path / "a.png").unlink()
    assert index.missing_pictures("train") == {str(tmp_path / "t" / "x.tar"): len(members), str(tmp_path / "a.png"): 1}
    assert index.missing_pictures("val") == {}


def test_the_whole_image_beside_its_regions(tmp_path):
    image = str(tmp_path / "a.png")
    mask = Region.from_mask(np.eye(8, 10, dtype=bool))
    rows = [
        sample(image, BOX, "one", 0),
        sample(image, mask, "one", 0),
        sample(image, OTHER, "two", 1),
        sample(image, Region.whole(), "one and two"),
    ]
    write_index(tmp_path / "index", tmp_path, rows, made_of="a test")
    index = RegionIndex(tmp_path / "index")
    one, two, whole = index.read(range(len(index)))
    assert one.forms == (BOX, mask) and two.forms == (OTHER,) and whole.forms == (Region.whole(),)
    assert [facts.turns for facts in (one, two, whole)] == [
        (("description", None, text),) for text in ("one", "two", "one and two")
    ]
    assert [facts.sample.meta["region_id"] for facts in (one, two, whole)] == [0, 1, None]
    several = dataclasses.replace(one, forms=(BOX, mask, Region.from_polygon([(1, 1), (5, 1), (3, 5)])))
    assert several.form("mask") == several.form("available") == mask and several.form("box") == BOX
    assert index.picture_of.tolist() == [0, 0, 0] and whole.sample.id == "a/whole"


def test_bytes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="pictures that lie in files, got bytes"):
        write_index(tmp_path / "index", tmp_path, [sample(b"x", BOX, "x", 0)], made_of="a test")


def test_an_index_of_the_format_before_is_refused(tmp_path):
    write_index(tmp_path / "index", tmp_path, [sample("a.png", BOX, "x", 0)], made_of="a test")
    record = read_json(tmp_path / "index" / "index.json")
    assert record["format"] == FORMAT == 2
    write_json(tmp_path / "index" / "index.json", {**record, "format": 1})
    with pytest.raises(ValueError, match="has format 1, this is for 2; make it anew"):
        RegionIndex(tmp_path / "index")


def test_the_index_of_a_file_lies_beside_it(tmp_path):
    assert index_folder(tmp_path / "mine.jsonl") is None
    for name in ("mine.jsonl.region_index", "other.region_index"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.json").write_text("{}")
    assert index_folder(tmp_path / "mine.jsonl") == tmp_path / "mine.jsonl.region_index"
    assert index_folder(tmp_path / "other") is None  # of files only
