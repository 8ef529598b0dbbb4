"""`alpha-clip prepare`: missing files, skipped records, held-out images; real records of Visual Genome."""

import json
import shutil

import pytest

from alpha_clip_commands import alpha_clip
from mllm.data.densecap_splits import densecap_split
from mllm.data.index import RegionIndex
from mllm.data.readers import mask_imagenet
from mllm.data.shapes import grit_layout, visual_genome_layout
from tests.files import read_json, write_json, write_json_lines


@pytest.fixture
def folder(tmp_path):
    visual_genome_layout.write(tmp_path / "shapes", 3, 1, progress=False)
    return tmp_path / "shapes"


def refused(capsys, *arguments):
    assert alpha_clip.main(["prepare", *map(str, arguments)]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("kind", ["vg", "refcocog"])
def test_both_layouts_are_indexed(folder, capsys, kind):
    assert alpha_clip.main(["prepare", kind, "--source", str(folder)]) == 0
    printed = capsys.readouterr().out
    regions = len(read_json(folder / "instances.json")["annotations"])
    assert len(RegionIndex(folder).rows("train", ["description"])) == regions
    assert f"{regions} read" in printed and "in 3 images" in printed and "missing" not in printed


@pytest.mark.parametrize("kind", ["vg", "refcocog"])
def test_the_index_may_lie_elsewhere(folder, tmp_path, capsys, kind):
    assert alpha_clip.main(["prepare", kind, "--source", str(folder), "--out", str(tmp_path / "index")]) == 0
    assert f"training images in the test and validation splits of {folder} itself: 0" in capsys.readouterr().out
    assert not (folder / "region_index").exists() and len(RegionIndex(tmp_path / "index"))


@pytest.mark.parametrize("tars", [0, 2])
def test_grits_layout_is_indexed(tmp_path, capsys, tars):
    source, held_out = tmp_path / "grit", tmp_path / "held_out"
    grit_layout.write(source, 3, 1, tars=tars, progress=False)
    grit_layout.write(held_out, 2, 1, "test", tars=tars, progress=False)
    alpha_clip.main(["prepare", "grit", "--source", str(held_out)])
    assert alpha_clip.main(["prepare", "grit", "--source", str(source), "--against", str(held_out)]) == 0
    printed = capsys.readouterr().out
    assert "split train: " in printed and "in 3 images" in printed and "missing" not in printed
    assert f"training images in the test and validation splits of {source} itself: 0" in printed
    assert f"training images in the test and validation splits of {held_out}: 0" in printed
    (source / "00000" / "000000002.png" if not tars else source / "00001.tar").unlink()
    if not tars:
        assert alpha_clip.main(["prepare", "grit", "--source", str(source)]) == 0
        assert "1 skipped: JSON without an image (ids 00000/000000002 ...)" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert "nothing in" in refused(capsys, "grit", "--source", tmp_path / "empty")


def test_a_file_of_one_s_own_is_indexed(tmp_path, folder, capsys):
    line = {"image": "shapes/VG_100K/1.png", "region": {"box": [1, 1, 9, 9]}, "answer": "x"}
    others = [
        {**line, "region": {"box": [2, 2, 9, 9]}, "meta": {"split": "val"}},
        {**line, "image": "no.png"},
        {**line, "image": "no.png", "meta": {"split": "test"}},
    ]
    file = tmp_path / "mine.jsonl"
    write_json_lines(file, [line, *others])
    assert alpha_clip.main(["prepare", "jsonl", "--source", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "lines: 4 read" in printed and "split train: 2 regions in 2 images, 1 of them missing" in printed
    shared = f"2 (first: file {tmp_path / 'no.png'}, vg 1)"
    assert f"training images in the test and validation splits of {file} itself: {shared}" in printed
    assert len(RegionIndex(file)) == 4 and (tmp_path / "mine.jsonl.region_index").is_dir()
    assert "source not found" in refused(capsys, "jsonl", "--source", tmp_path / "no.jsonl")


def test_mask_imagenet_needs_its_list(tmp_path, capsys):
    assert f"{mask_imagenet.LIST} (huggingface.co" in refused(capsys, "mask-imagenet", "--source", tmp_path)
    rle = {"size": [4, 4], "counts": [5, 2, 9]}
    write_json(tmp_path / mask_imagenet.LIST, [[0, 0, "x/1.JPEG", rle, [1, 1, 1, 2], 0, "a tench"]])
    assert alpha_clip.main(["prepare", "mask-imagenet", "--source", str(tmp_path)]) == 0
    assert "1 of them missing" in capsys.readouterr().out


def test_missing_files_are_named_with_where_they_are_published(tmp_path, folder, capsys):
    (tmp_path / "empty").mkdir()
    error = refused(capsys, "vg", "--source", tmp_path / "empty")
    assert "image_data.json (visualgenome.org" in error and "region_descriptions.json" in error
    error = refused(capsys, "refcocog", "--source", tmp_path / "empty")
    assert "refs(umd).p (github.com/lichengunc/refer" in error
    (folder / "VG_100K" / "2.png").unlink()
    (folder / "question_answers.json").unlink()
    assert alpha_clip.main(["prepare", "vg", "--source", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "question_answers.json is missing" in printed
    assert "1 of them missing" in printed and "2.png" in printed and "images.zip" in printed


def test_orphans_and_damage(folder, capsys):
    mapping = read_json(folder / "qa_to_region_mapping.json")
    first = next(iter(mapping))
    mapping[first] = 10**6
    write_json(folder / "qa_to_region_mapping.json", mapping)
    assert alpha_clip.main(["prepare", "vg", "--source", str(folder)]) == 0
    assert "1 questions skipped: unknown region" in capsys.readouterr().out
    path = folder / "region_descriptions.json"
    whole = path.read_text()
    content = json.loads(whole)
    first, second, third, *_ = content[0]["regions"]
    first["width"], second["phrase"], third["region_id"] = 0, " ", content[1]["regions"][0]["region_id"]
    (folder / "region_masks.json").unlink()
    write_json(path, content)
    assert alpha_clip.main(["prepare", "vg", "--source", str(folder)]) == 0
    skipped = {entry["reason"]: entry for entry in RegionIndex(folder).info["skipped"] if entry["reader"] == "regions"}
    assert {reason: entry["count"] for reason, entry in skipped.items()} == {
        "skipped: no area inside the image": 1,
        "skipped: no phrase": 1,
        "skipped: duplicate id": 1,
    }
    assert skipped["skipped: no phrase"]["examples"] == [second["region_id"]]
    before = (folder / "region_index" / "regions.arrow").read_bytes()
    path.write_text(whole[:-40])
    assert "region_descriptions.json is not valid JSON" in refused(capsys, "vg", "--source", folder)
    assert (folder / "region_index" / "regions.arrow").read_bytes() == before  # the old index is kept
    (folder / "refs(umd).p").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "which would run code" in refused(capsys, "refcocog", "--source", folder)


def test_training_images_that_are_held_out_elsewhere_are_counted(tmp_path, folder, capsys):
    train, test = (sorted(densecap_split(name))[:3] for name in ("train", "test"))
    entries = read_json(folder / "image_data.json")
    regions = read_json(folder / "region_descriptions.json")
    (folder / "dataset.json").unlink()
    for name in ("question_answers.json", "qa_to_region_mapping.json", "region_masks.json"):
        (folder / name).unlink()
    for entry, region, number, coco in zip(entries, regions, [*train[:2], test[0]], (7, 8, 9), strict=True):
        entry |= {"image_id": number, "coco_id": coco}
        region["id"] = number
        for record in region["regions"]:
            record["image_id"] = number
    write_json(folder / "image_data.json", entries)
    write_json(folder / "region_descriptions.json", regions)
    mix = [{"image": f"vg/VG_100K/{test[0]}.jpg"}, {"image": "coco/train2017/000000000009.jpg"}, {"id": "text only"}]
    write_json(tmp_path / "mix.json", mix)
    assert alpha_clip.main(["prepare", "vg", "--source", str(folder), "--against", str(tmp_path / "mix.json")]) == 0
    printed = capsys.readouterr().out
    assert f"training images in the test and validation splits of {folder} itself: 0" in printed
    line = next(line for line in printed.splitlines() if "mix.json that are" in line)
    assert ": 2 (first: coco 9, vg" in line  # one image under both of its names


def test_real_records(shared_data, tmp_path, capsys):
    source = tmp_path / "vg"
    shutil.copytree(shared_data / "visual_genome" / "v1.2.0", source)
    shutil.copy(shared_data / "visual_genome" / "image_data.json", source)
    (source / "question_answers.json").unlink()  # the published files do not include its mapping
    assert alpha_clip.main(["prepare", "vg", "--source", str(source)]) == 0
    index = RegionIndex(source)
    assert len(index) == 1278 and len(index.images) == 5
    assert "5 of them missing" in capsys.readouterr().out
    raw = read_json(source / "region_descriptions.json")
    wanted = {region["region_id"]: region["phrase"].strip() for entry in raw for region in entry["regions"]}
    for region in index.read(range(0, 1278, 97)):
        assert region.sample.references == (wanted[region.sample.meta["region_id"]],)
