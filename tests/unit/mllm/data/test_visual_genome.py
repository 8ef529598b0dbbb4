"""The Visual Genome reader on real records (all versions) and on every damage it must name or count."""

import json

import pytest

from mllm.data.visual_genome import ReadReport, read_free_questions, read_region_questions, read_regions
from vision_tower import Region


def link(shared_data, folder, version):
    (folder / "image_data.json").write_bytes((shared_data / "visual_genome/image_data.json").read_bytes())
    for file in (shared_data / "visual_genome" / version).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_real_regions_of_version_1_2(shared_data, tmp_path):
    root = link(shared_data, tmp_path, "v1.2.0")
    report = ReadReport()
    samples = list(read_regions(root, report=report))
    raw = [
        region for entry in json.loads((root / "region_descriptions.json").read_text()) for region in entry["regions"]
    ]
    sizes = {entry["image_id"]: entry for entry in json.loads((root / "image_data.json").read_text())}
    over = sum(
        r["x"] < 0
        or r["y"] < 0
        or r["x"] + r["width"] > sizes[r["image_id"]]["width"]
        or r["y"] + r["height"] > sizes[r["image_id"]]["height"]
        for r in raw
    )
    assert len(samples) == len(raw) == report.counts["read"] == 1278
    assert report.counts["reaching over the picture, clamped"] == over
    first = next(sample for sample in samples if sample.id == "vg-region-1382")
    assert first.references == ("the clock is green in colour",)
    assert first.regions == (Region.from_box(421, 57, 503, 196),)
    assert first.question is None and first.image.endswith("VG_100K_2/1.jpg")
    assert first.meta["width"] == 800 and first.meta["region_id"] == 1382


def test_real_regions_of_version_1_0_are_the_same(shared_data, tmp_path):
    (tmp_path / "old").mkdir(), (tmp_path / "new").mkdir()
    old = {s.id: s for s in read_regions(link(shared_data, tmp_path / "old", "v1.0.0"))}
    new = {s.id: s for s in read_regions(link(shared_data, tmp_path / "new", "v1.2.0"))}
    common = old.keys() & new.keys()
    assert len(common) > 1000
    assert all(old[key].regions == new[key].regions and old[key].references == new[key].references for key in common)


def test_real_questions_split_into_mapped_and_free(shared_data, tmp_path):
    root = link(shared_data, tmp_path, "v1.2.0")
    qas = [qa for entry in json.loads((root / "question_answers.json").read_text()) for qa in entry["qas"]]
    mapping = {str(qas[0]["qa_id"]): 1382, str(qas[1]["qa_id"]): 999999999}
    (root / "qa_to_region_mapping.json").write_text(json.dumps(mapping))
    report = ReadReport()
    (asked,) = read_region_questions(root, report=report)
    assert asked.question == "What color is the clock?" and asked.references == ("Green.",)
    assert asked.regions == (Region.from_box(421, 57, 503, 196),)
    assert report.counts == {"read": 1, "questions on an unknown region, left out": 1}
    free = list(read_free_questions(root))
    assert len(free) == len(qas) - 2 == 719
    assert all(sample.regions == (Region.whole(),) for sample in free)


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
        {"region_id": 1, "image_id": 1, "x": -5, "y": 70, "width": 20, "height": 30, "phrase": " over the edge "},
        {"region_id": 2, "image_id": 1, "x": 200, "y": 0, "width": 5, "height": 5, "phrase": "outside"},
        {"region_id": 3, "image_id": 1, "x": 0, "y": 0, "width": 0, "height": 5, "phrase": "no area"},
        {"region_id": 4, "image_id": 1, "x": 0, "y": 0, "width": 5, "height": 5, "phrase": "  "},
        {"region_id": 5, "image_id": 9, "x": 0, "y": 0, "width": 5, "height": 5, "phrase": "orphan"},
        {"region_id": 1, "image_id": 1, "x": 0, "y": 0, "width": 5, "height": 5, "phrase": "again"},
        {"id": 6, "image": 2, "x": 1, "y": 1, "width": 5, "height": 5, "phrase": "old keys"},
    ]
    (tmp_path / "image_data.json").write_text(json.dumps(images))
    (tmp_path / "region_descriptions.json").write_text(json.dumps([{"id": 1, "regions": regions}]))
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
        "reaching over the picture, clamped": 1,
        "without area inside the picture, left out": 2,
        "without a phrase, left out": 1,
        "of an unknown image, left out": 1,
        "with a repeated id, left out": 1,
    }
    assert report.examples["of an unknown image, left out"] == [5]
    assert "1 of an unknown image, left out" in caplog.text
    assert [s.id for s in read_regions(small, image_ids={2})] == ["vg-region-6"]


def test_masks(small):
    rle = Region.from_box(1, 1, 6, 6).mask(80, 100) > 0
    (small / "region_masks.json").write_text(json.dumps({"1": Region.from_mask(rle).to_json()["rle"]}))
    samples = read_regions(small, region_input="mask")
    assert next(samples).regions == (Region.from_mask(rle),)
    with pytest.raises(ValueError, match="no mask for region 6"):
        next(samples)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("image_data.json", None, "is missing"),
        ("region_descriptions.json", '[{"id": 1, "regi', "cut short"),
        ("region_descriptions.json", "{}", "expected a JSON list"),
        ("region_descriptions.json", '[{"id": 1}]', "expected a list 'regions'"),
        (
            "region_descriptions.json",
            '[{"id": 1, "regions": [{"image_id": 1, "phrase": "x"}]}]',
            "expected 'region_id'",
        ),
        (
            "region_descriptions.json",
            '[{"id": 1, "regions": [{"region_id": 1, "image_id": 1, "x": 1}]}]',
            "region 1 has no 'y'",
        ),
    ],
)
def test_damaged_files_are_named(small, name, content, message):
    if content is None:
        (small / name).unlink()
    else:
        (small / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_regions(small))
