"""The Visual Genome reader on real records (all versions), and what it must name or count."""

import json
import logging

import numpy as np
import pytest

from mllm.data import masks
from mllm.data.readers.visual_genome import ReadReport, read_free_questions, read_region_questions, read_regions
from tests.files import read_json, write_json
from tests.tiny import noise_image
from vision_tower import Region

CLAMPED = "reaching over the picture, clamped"
NO_AREA = "without area inside the picture, left out"


def link(shared_data, folder, version):
    source = shared_data / "visual_genome"
    for file in (source / "image_data.json", *(source / version).iterdir()):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def read(root, name):
    return read_json(root / f"{name}.json")


def write(root, **files):
    for name, content in files.items():
        write_json(root / f"{name}.json", content)


def raw_regions(root):
    return [region for entry in read(root, "region_descriptions") for region in entry["regions"]]


def clamped_by_hand(root):
    """Boxes by region id; how many were clamped; how many had no area. Without the reader."""
    sizes = {entry["image_id"]: entry for entry in read(root, "image_data")}
    regions = raw_regions(root)
    size = np.array([[sizes[r["image_id"]][side] for side in ("width", "height")] for r in regions])
    low = np.array([[r["x"], r["y"]] for r in regions])
    high = low + [[r["width"], r["height"]] for r in regions]
    inside_low, inside_high = np.clip(low, 0, size), np.clip(high, 0, size)
    some = (inside_high > inside_low).all(axis=1)
    moved = ((inside_low != low) | (inside_high != high)).any(axis=1)
    boxes = np.hstack([inside_low, inside_high]).tolist()
    kept = {r["region_id"]: box for r, box, keep in zip(regions, boxes, some, strict=True) if keep}
    return kept, int((moved & some).sum()), int((~some).sum())


def test_real_regions_of_version_1_2(shared_data, tmp_path):
    root = link(shared_data, tmp_path, "v1.2.0")
    report = ReadReport()
    samples = list(read_regions(root, report=report))
    assert len(samples) == len(raw_regions(root)) == report.counts["read"] == 1278
    assert len({sample.meta["image_id"] for sample in samples}) == 5
    assert report.counts[CLAMPED] == clamped_by_hand(root)[1]
    first = next(sample for sample in samples if sample.id == "vg-region-1382")
    assert first.references == ("the clock is green in colour",)
    assert first.regions == (Region.from_box(421, 57, 503, 196),)
    assert first.question is None and first.image.endswith("VG_100K_2/1.jpg")
    assert first.meta["width"] == 800 and first.meta["region_id"] == 1382


def test_real_boxes_on_smaller_pictures_are_clamped(shared_data, tmp_path):
    root = link(shared_data, tmp_path, "v1.2.0")
    smaller = [{**entry, "width": 501, "height": 333} for entry in read(root, "image_data")]
    write(root, image_data=smaller)
    boxes, clamped, without_area = clamped_by_hand(root)
    assert clamped > 100 and without_area > 100
    report = ReadReport()
    samples = list(read_regions(root, report=report))
    assert report.counts == {"read": len(boxes), CLAMPED: clamped, NO_AREA: without_area}
    assert {s.meta["region_id"]: list(s.regions[0].data) for s in samples} == boxes
    assert len(report.examples[CLAMPED]) == len(report.examples[NO_AREA]) == 20


def test_real_regions_of_version_1_0_are_the_same(shared_data, tmp_path):
    (tmp_path / "old").mkdir(), (tmp_path / "new").mkdir()
    old = {s.id: s for s in read_regions(link(shared_data, tmp_path / "old", "v1.0.0"))}
    new = {s.id: s for s in read_regions(link(shared_data, tmp_path / "new", "v1.2.0"))}
    assert len(old) == sum(len(e["regions"]) for e in read(tmp_path / "old", "region_descriptions"))
    assert {s.meta["image_id"] for s in old.values()} == {1, 2, 3, 4, 5}
    common = old.keys() & new.keys()
    assert len(common) > 1000
    assert all(old[key].regions == new[key].regions for key in common)
    assert all(old[key].references == new[key].references for key in common)


def test_real_questions_split_into_mapped_and_free(shared_data, tmp_path):
    root = link(shared_data, tmp_path, "v1.2.0")
    qas = [qa for entry in read(root, "question_answers") for qa in entry["qas"]]
    assert len(qas) == 721
    mapping = {str(qas[0]["qa_id"]): 1382, str(qas[1]["qa_id"]): 999999999}
    write(root, qa_to_region_mapping=mapping)
    report = ReadReport()
    (asked,) = read_region_questions(root, report=report)
    assert asked.question == "What color is the clock?" and asked.references == ("Green.",)
    assert asked.regions == (Region.from_box(421, 57, 503, 196),)
    assert report.counts == {"read": 1, "questions on an unknown region, left out": 1}
    free = list(read_free_questions(root))
    assert len(free) == 719
    assert all(sample.regions == (Region.whole(),) for sample in free)


def region(region_id, phrase="x", **changes):
    """A record of version 1.2: 5 x 5 pixels in image 1."""
    place = {"image_id": 1, "x": 0, "y": 0, "width": 5, "height": 5}
    return {"region_id": region_id, **place, "phrase": phrase, **changes}


def qa(qa_id, question="What?", answer="A clock.", **changes):
    """A record of version 1.2 in image 1."""
    return {"qa_id": qa_id, "image_id": 1, "question": question, "answer": answer, **changes}


@pytest.fixture
def small(tmp_path):
    """A made-up folder with one of each oddity."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").touch()
    images = [
        {"image_id": 1, "url": None, "width": 100, "height": 80},
        {"id": 2, "url": "x/VG_100K/2.png", "width": 10, "height": 10},
    ]
    regions = [
        region(1, " over the edge ", x=-5, y=70, width=20, height=30),
        region(2, "outside", x=200),
        region(3, "no area", width=0),
        region(4, "  "),
        region(7, None),
        region(5, "orphan", image_id=9),
        region(1, "again"),
        {"id": 6, "image": 2, "x": 1, "y": 1, "width": 5, "height": 5, "phrase": "old keys"},
    ]
    write(tmp_path, image_data=images, region_descriptions=[{"id": 1, "regions": regions}])
    return tmp_path


def test_every_oddity_is_clamped_or_counted(small, caplog):
    report = ReadReport()
    samples = list(read_regions(small, report=report))
    assert [sample.id for sample in samples] == ["vg-region-1", "vg-region-6"]
    assert samples[0].regions == (Region.from_box(0, 70, 15, 80),)
    assert samples[0].references == ("over the edge",)
    assert samples[0].image == str(small / "images" / "1.jpg")
    assert samples[1].image.endswith("VG_100K/2.png")
    assert report.counts == {
        "read": 2,
        CLAMPED: 1,
        NO_AREA: 2,
        "without a phrase, left out": 2,
        "of an unknown image, left out": 1,
        "with a repeated id, left out": 1,
    }
    assert report.examples["of an unknown image, left out"] == [5]
    assert "1 of an unknown image, left out" in caplog.text
    assert [s.id for s in read_regions(small, image_ids={2})] == ["vg-region-6"]
    assert [s.id for s in read_regions(small, image_ids=[2])] == ["vg-region-6"]


def test_logged_as_a_warning_only_where_something_was_left_out(small, caplog):
    caplog.set_level(logging.INFO)
    list(read_regions(small, image_ids={2}))
    assert {record.levelno for record in caplog.records} == {logging.INFO}
    assert "1 read" in caplog.text
    caplog.clear()
    write(small, region_descriptions=[{"id": 1, "regions": [region(1, x=-1)]}])
    list(read_regions(small))
    assert {record.levelno for record in caplog.records} == {logging.INFO}
    assert CLAMPED in caplog.text
    caplog.clear()
    list(read_regions(small, image_ids={77}))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "0 read" in caplog.text


def test_every_oddity_of_questions_is_counted(small):
    mapping = {"1": 1, "2": 2, "3": 99, "4": 1, "5": 6, "6": 1, "7": 1, "8": 1}
    questions = [
        qa(1, " What? ", " A clock. ", type="what"),
        qa(2),  # its region lies outside the picture
        qa(3),  # no such region
        qa(4, None),
        qa(5),  # its region is of image 2
        qa(6, answer=" "),
        qa(7, image_id=9),
        qa(1, "again?"),
        {"id": 8, "image": 1, "question": "old keys?", "answer": "x"},
        qa(20, type="count"),
        qa(20),
        qa(21, answer=None),
    ]
    write(small, question_answers=[{"id": 1, "qas": questions}], qa_to_region_mapping=mapping)
    report = ReadReport()
    first, second = read_region_questions(small, report=report)
    assert (first.id, first.question, first.references) == ("vg-qa-1", "What?", ("A clock.",))
    assert first.regions == (Region.from_box(0, 70, 15, 80),)
    size = {"image_id": 1, "width": 100, "height": 80, "area": 15 * 10 / (100 * 80)}
    assert first.meta == {**size, "qa_id": 1, "region_id": 1, "type": "what"}
    assert (second.id, second.question) == ("vg-qa-8", "old keys?")
    assert second.meta == {**size, "qa_id": 8, "region_id": 1}
    assert report.counts == {
        "read": 2,
        CLAMPED: 1,
        NO_AREA: 1,
        "with a repeated id, left out": 1,
        "questions on a region that was left out, left out": 1,
        "questions on an unknown region, left out": 1,
        "questions on a region of another image, left out": 1,
        "questions on an unknown image, left out": 1,
        "questions with a repeated id, left out": 1,
        "questions without text or answer, left out": 2,
    }
    report = ReadReport()
    (free,) = read_free_questions(small, report=report)
    assert free.id == "vg-qa-20" and free.regions == (Region.whole(),)
    del size["area"]
    assert free.meta == {**size, "qa_id": 20, "type": "count"}
    assert report.counts == {
        "read": 1,
        "questions with a repeated id, left out": 1,
        "questions without text or answer, left out": 1,
    }
    assert list(read_free_questions(small, image_ids={2})) == []


def test_a_region_listed_for_an_unknown_image_too_keeps_its_questions(small):
    lists = [{"id": 1, "regions": [region(1, image_id=9), region(1)]}]
    write(small, region_descriptions=lists, qa_to_region_mapping={"1": 1})
    write(small, question_answers=[{"id": 1, "qas": [qa(1)]}])
    assert [s.id for s in read_region_questions(small)] == ["vg-qa-1"]


@pytest.mark.parametrize("key", ["id", "image_id"])
def test_records_without_an_image_take_that_of_their_list(small, key):
    records = region(1), region(2)
    for record in records:
        del record["image_id"]
    lists = [{key: 1, "regions": records[:1]}, {key: 2, "regions": records[1:]}]
    write(small, region_descriptions=lists)
    assert [s.meta["image_id"] for s in read_regions(small)] == [1, 2]


@pytest.mark.parametrize(
    ("url", "files", "expected"),
    [
        ("https://x/VG_100K_2/1.jpg", ["VG_100K/1.jpg", "VG_100K_2/1.jpg"], "VG_100K_2/1.jpg"),
        ("https://x/VG_100K_2/1.jpg", ["VG_100K/1.jpg"], "VG_100K/1.jpg"),
        ("https://x/VG_100K_2/1.jpg", ["1.jpg", "images/1.jpg"], "1.jpg"),
        ("https://x/VG_100K/1.jpg", ["images/1.jpg"], "images/1.jpg"),
        ("https://x/VG_100K_2/1.jpg", [], "VG_100K_2/1.jpg"),
        ("VG_100K/other.png", ["VG_100K/1.jpg", "VG_100K/other.png"], "VG_100K/other.png"),
        (None, ["VG_100K_2/1.png"], "VG_100K_2/1.png"),
        (None, ["1.png", "images/1.jpg"], "1.png"),
        (None, [], "VG_100K/1.jpg"),
    ],
)
def test_where_a_picture_is(small, url, files, expected):
    (small / "images" / "1.jpg").unlink()
    write(small, image_data=[{"image_id": 1, "url": url, "width": 100, "height": 80}])
    for file in files:
        (small / file).parent.mkdir(exist_ok=True)
        (small / file).touch()
    sample = next(read_regions(small))
    assert sample.image == str(small / expected)


def test_pictures_are_opened_late_and_checked(small):
    sample, missing = read_regions(small)
    with pytest.raises(ValueError, match=r"image file not found: .*VG_100K/2\.png"):
        missing.open_image()
    noise_image(100, 80).save(small / "images" / "1.jpg")
    assert sample.open_image().size == (100, 80)
    noise_image(80, 100).save(small / "images" / "1.jpg")
    with pytest.raises(ValueError, match="vg-region-1: .* is 80 x 100 pixels"):
        sample.open_image()


def test_masks(small):
    rle = Region.from_box(1, 1, 6, 6).mask(80, 100) > 0
    write(small, region_masks={"1": Region.from_mask(rle).to_json()["rle"]})
    report = ReadReport()
    (sample,) = read_regions(small, region_input="mask", report=report)
    assert sample.regions == (Region.from_mask(rle),)
    assert report.counts[masks.NO_MASK] == 1 and report.examples[masks.NO_MASK] == [6]
    write(small, qa_to_region_mapping={"1": 1, "2": 6}, question_answers=[{"id": 1, "qas": [qa(1), qa(2, image_id=2)]}])
    report = ReadReport()
    (asked,) = read_region_questions(small, region_input="mask", report=report)
    assert asked.regions == (Region.from_mask(rle),) and report.examples[masks.NO_MASK] == [2]


@pytest.mark.parametrize(
    ("rle", "reason"),
    [
        ({"size": [100, 80], "counts": [5, 7995]}, masks.OTHER_SIZE),
        ({"size": [80, 100], "counts": [5, 5]}, masks.BAD_MASK),
        ({"size": [80, 100], "counts": [8000]}, masks.EMPTY_MASK),
        ({"size": None, "counts": [8000]}, masks.BAD_MASK),
        ({"size": [80, 100], "counts": [8000, 10**400]}, masks.BAD_MASK),
        ("zz", masks.BAD_MASK),
        ({}, masks.NO_MASK),
        (None, masks.NO_MASK),
        (5, masks.BAD_MASK),
    ],
)
def test_unusable_masks_are_counted(small, rle, reason):
    write(small, region_masks={"1": rle})
    report = ReadReport()
    assert list(read_regions(small, region_input="mask", report=report)) == []
    assert 1 in report.examples[reason]


def test_what_cannot_be_asked_for(small):
    with pytest.raises(ValueError, match="expected region_input 'box' or 'mask', got 'polygon'"):
        next(read_regions(small, region_input="polygon"))
    with pytest.raises(ValueError, match="region_masks.json is missing"):
        next(read_regions(small, region_input="mask"))


def in_list(*records, key="regions"):
    return json.dumps([{"id": 1, key: records}])


REGIONS, IMAGES, QAS = "region_descriptions", "image_data", "question_answers"
MAPPING = "qa_to_region_mapping"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, None, "is missing"),
        (IMAGES, '[{"id": 1, "width": 5, "height": 5}, {"image_id": 1, "width": 5, "height": 5}]', r"images.*once .1."),
        (REGIONS, None, "is missing"),
        (REGIONS, '[{"id": 1, "regi', "cut short"),
        (REGIONS, b"[\xff\xfe]", "not whole JSON"),
        (REGIONS, "", "cut short"),
        (REGIONS, "[", "cut short"),
        (REGIONS, "[]]", "not whole JSON"),
        (REGIONS, "[1 2]", "not whole JSON"),
        (REGIONS, "[1,]", "not whole JSON"),
        (REGIONS, "{}", "expected a JSON list"),
        (REGIONS, "[" * 100_000, "nested too deeply"),
        (QAS, None, "is missing"),
        (MAPPING, None, "is missing"),
        (MAPPING, "[[1, 1]]", "expected a JSON dict"),
        (MAPPING, '{"1": 1, "1": 2}', "must differ"),
        (MAPPING, '{"1": 1, "01": 2}', "must differ"),
        (MAPPING, '{"1": ' * 100_000, "nested too deeply"),
    ],
)
def test_damaged_files_are_named(small, name, content, message):
    write(small, question_answers=[{"id": 1, "qas": [qa(1)]}], qa_to_region_mapping={"1": 1})
    read_all = read_region_questions if name in (QAS, MAPPING) else read_regions
    list(read_all(small))  # fine so far
    file = small / f"{name}.json"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        list(read_all(small))
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


NAN, HUGE = float("nan"), 10**30


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        (IMAGES, "[1]", "entry 0: expected an object, got a whole number"),
        (IMAGES, '[{"url": null, "width": 5, "height": 5}]', "entry 0: expected image_id"),
        (IMAGES, '[{"id": [1], "width": 5, "height": 5}]', "id: expected a whole number or null, got a list"),
        (IMAGES, '[{"id": 1, "height": 2}]', "missing required field 'width'"),
        (IMAGES, '[{"id": 1, "url": 5, "width": 2, "height": 2}]', "url: expected text or null, got a whole number"),
        (IMAGES, '[{"id": 1, "width": 2, "height": 0}]', "height: expected a whole number >= 1"),
        (REGIONS, "[1]", "entry 0 of region_descriptions.json: expected an object with a list 'regions'"),
        (REGIONS, '[{"id": 1}]', "a list 'regions'"),
        (REGIONS, in_list("text"), "a record in entry 0 of region_descriptions.json: expected an object"),
        (REGIONS, '[{"regions": [{"region_id": 1}]}]', "a record in entry 0"),
        (REGIONS, in_list({"phrase": "x"}), "expected region_id, a whole number"),
        (REGIONS, in_list(region(HUGE)), "expected region_id, a whole number of 64 bits"),
        (REGIONS, in_list(region(True)), "expected region_id, a whole number"),
        (REGIONS, in_list({"region_id": 1, "x": 1}), "region 1: object missing required field 'y'"),
        (REGIONS, in_list(region(1, x="0")), "region 1: x: expected a number, got text"),
        (REGIONS, in_list(region(1, width=None)), "region 1: width: expected a number, got null"),
        (REGIONS, in_list(region(1, width=True)), "region 1: width: expected a number, got true or false"),
        (REGIONS, in_list(region(1, width=HUGE)), "region 1: width: expected a number <="),
        (REGIONS, in_list(region(1, y=NAN)), "region 1: y: expected a number >="),
        (REGIONS, in_list(region(1, y=-1)).replace("-1", "1e400"), "region 1: y: expected a number <="),
        (REGIONS, in_list(region(1, phrase=["x"])), "region 1: phrase: expected text or null, got a list"),
        (REGIONS, in_list(region(1, phrase="a \ud800")), "1"),
        (QAS, '[{"id": 1, "regions": []}]', "a list 'qas'"),
        (QAS, in_list({"question": "x"}, key="qas"), "expected qa_id"),
        (QAS, in_list(qa(1, answer=2), key="qas"), "question 1: answer: expected text or null, got a whole number"),
        (QAS, in_list(qa(1, type=[]), key="qas"), "question 1: type: expected text or null, got a list"),
        (MAPPING, '{"one": 1}', "'one'"),
        (MAPPING, '{"1": "1"}', "'1'"),
    ],
)
def test_records_of_other_types_are_counted_and_named(small, name, content, named):
    write(small, question_answers=[{"id": 1, "qas": [qa(1)]}], qa_to_region_mapping={"1": 1})
    (small / f"{name}.json").write_text(content)
    report = ReadReport()
    read_all = read_region_questions if name in (QAS, MAPPING) else read_regions
    assert list(read_all(small, report=report)) == []
    assert any(named in str(example) for examples in report.examples.values() for example in examples)


def test_one_bad_record_is_one_error(small):
    bad = [region(i, **{"phrase": 5} if i % 2 else {}) for i in range(1, 31)]
    write(small, region_descriptions=[{"id": 1, "regions": bad}, "text"])
    report = ReadReport()
    with pytest.raises(
        ValueError, match="16 of 31 records cannot be used .at most 50% .*15 of another form, left out .ids reg"
    ):
        list(read_regions(small, report=report))
    write(small, region_descriptions=[{"id": 1, "regions": bad}])
    assert len(list(read_regions(small))) == 15  # half is not more than half
    write(small, region_descriptions=[{"id": 1, "regions": bad[:19]}])  # too few to judge
    assert len(list(read_regions(small))) == 9


def test_a_byte_order_mark_is_ignored(small):
    write(small, question_answers=[{"id": 1, "qas": [qa(1)]}], qa_to_region_mapping={"1": 1})
    expected = list(read_region_questions(small))
    for file in small.glob("*.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert list(read_region_questions(small)) == expected and expected


def test_a_folder_in_place_of_a_file_is_named(small):
    (small / "image_data.json").unlink()
    (small / "image_data.json").mkdir()
    with pytest.raises(ValueError, match="cannot read .*image_data.json"):
        next(read_regions(small))
