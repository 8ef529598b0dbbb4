"""RefCOCOg's layouts: the published pickle and the JSON copies, both protocols, and nothing that could run code."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from mllm.data import shapes
from mllm.data.coco import read_captions
from mllm.data.records import ReadReport
from mllm.data.refcocog import read_hub_rows, read_pickle, read_refs
from mllm.data.visual_genome import read_regions
from vision_tower import Region

SQUARE = [10.0, 10.0, 30.0, 10.0, 30.0, 20.0, 10.0, 20.0]


@pytest.fixture
def root(tmp_path):
    """Two regions of one picture, the first with two expressions; as Python 2 would have pickled them."""
    mask = np.zeros((50, 60), np.uint8)
    mask[5:15, 40:55] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    annotations = [
        {"id": 7, "image_id": 1, "category_id": 3, "bbox": [10, 10, 20, 10], "segmentation": [SQUARE, [1, 1, 2, 2]]},
        {"id": 8, "image_id": 1, "category_id": 3, "bbox": [40, 5, 25, 10]},  # reaches over the picture
        {"id": 9, "image_id": 1, "category_id": 4, "bbox": [0, 0, 5, 5], "segmentation": []},
    ]
    annotations[1]["segmentation"] = {"size": [50, 60], "counts": rle["counts"].decode()}
    images = [{"id": 1, "file_name": "COCO_train2014_000000000001.jpg", "width": 60, "height": 50}]
    (tmp_path / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (tmp_path / "train2014").mkdir()
    Image.new("RGB", (60, 50)).save(tmp_path / "train2014" / "COCO_train2014_000000000001.jpg")
    refs = [ref(70, 7, ["the left one", "a square"]), ref(80, 8, ["right"]), ref(90, 9, ["x"], split="train")]
    (tmp_path / "refs(umd).p").write_bytes(pickle.dumps(refs, protocol=0))
    return tmp_path


def ref(ref_id, ann_id, sentences, split="val"):
    return {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "image_id": 1,
        "category_id": 3,
        "split": split,
        "file_name": f"COCO_train2014_000000000001_{ann_id}.jpg",
        "sent_ids": [ref_id + i for i in range(len(sentences))],
        "sentences": [
            {"sent_id": ref_id + i, "sent": s, "raw": s, "tokens": s.split()} for i, s in enumerate(sentences)
        ],
    }


def test_ungrouped_every_expression_is_an_item(root):
    report = ReadReport()
    samples = list(read_refs(root, report=report))
    assert [(s.id, s.references) for s in samples] == [
        ("sent-70", ("the left one",)),
        ("sent-71", ("a square",)),
        ("sent-80", ("right",)),
    ]
    assert samples[0].regions == (Region.from_box(10, 10, 30, 20),)
    assert (
        samples[2].regions == (Region.from_box(40, 5, 60, 15),) and report.counts["reaching over the picture, clamped"]
    )
    meta = {"image_id": 1, "width": 60, "height": 50, "area": round(200 / 3000, 6), "same_class": 1}
    assert samples[0].meta == {**meta, "ref_id": 70, "ann_id": 7, "sent_id": 70}
    assert samples[0].open_image().size == (60, 50)


def test_grouped_a_region_is_an_item(root):
    samples = list(read_refs(root, grouped=True))
    assert [(s.id, s.references) for s in samples] == [("ref-70", ("the left one", "a square")), ("ref-80", ("right",))]
    assert "sent_id" not in samples[0].meta


def test_masks_from_polygons_and_rle(root):
    first, _, last = read_refs(root, region_input="mask")
    polygon, rle = first.regions[0].mask(50, 60), last.regions[0].mask(50, 60)
    expected = coco_mask.decode(coco_mask.frPyObjects([SQUARE], 50, 60))[..., 0]
    assert np.array_equal(polygon > 0.5, expected > 0) and rle.sum() == 150
    with pytest.raises(ValueError, match="annotation 9 has no mask"):
        list(read_refs(root, split="train", region_input="mask"))


def test_a_mask_of_another_size_is_refused(root):
    content = json.loads((root / "instances.json").read_text())
    content["annotations"][1]["segmentation"]["size"] = [60, 50]
    (root / "instances.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="annotation 8.*its picture"):
        list(read_refs(root, region_input="mask"))


def test_unknown_splits_and_files_are_named(root):
    with pytest.raises(ValueError, match="no split 'testA'; it has train, val"):
        list(read_refs(root, split="testA"))
    with pytest.raises(ValueError, match=r"refs\(google\).p is missing"):
        list(read_refs(root, split_by="google"))
    refs = [ref(70, 99, ["no such annotation"])]
    (root / "refs(umd).p").write_bytes(pickle.dumps(refs, protocol=2))
    with pytest.raises(ValueError, match="ref 70 is about annotation 99"):
        list(read_refs(root))


class Evil:
    def __reduce__(self):
        import os

        return os.mkdir, ("/tmp/this-must-never-be-made",)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "content", [Evil(), [Evil()], {"a": np.float64(1)}, ReadReport()], ids=["call", "inside", "numpy", "class"]
)
def test_a_pickle_that_builds_anything_else_is_refused(tmp_path, protocol, content):
    file = tmp_path / "refs(umd).p"
    file.write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(ValueError, match="would be run"):
        read_pickle(file)


@pytest.mark.parametrize("protocol", range(3))
def test_plain_content_comes_back(tmp_path, protocol):
    content = [{"text": "caf\u00e9", "number": 10**20, "list": [1.5, None, True, ("a", 2)]}]
    (tmp_path / "p").write_bytes(pickle.dumps(content, protocol=protocol))
    assert read_pickle(tmp_path / "p") == content


def test_python_2_strings(tmp_path):
    """What Python 2's cPickle writes for [{'sent': 'caf\\xe9', 'raw': u'caf\\xe9'}], protocol 0 and 2."""
    for content in (
        b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xe9'\np3\nsS'raw'\np4\nVcaf\xe9\np5\nsa.",
        b"\x80\x02]q\x00}q\x01(U\x04sentU\x04caf\xe9U\x03rawX\x05\x00\x00\x00caf\xc3\xa9ua.",
    ):
        (tmp_path / "p").write_bytes(content)
        assert read_pickle(tmp_path / "p") == [{"sent": "caf\u00e9", "raw": "caf\u00e9"}]


def test_a_cut_pickle_is_named(root):
    file = root / "refs(umd).p"
    for length in (0, 10, 300, file.stat().st_size - 1):
        (root / "cut").write_bytes(file.read_bytes()[:length])
        with pytest.raises(ValueError, match="damaged"):
            read_pickle(root / "cut")


MDETR = {
    "images": [
        {"id": 500, "original_id": 1, "file_name": "a.jpg", "width": 60, "height": 50, "caption": "the left one"},
        {"id": 501, "original_id": 1, "file_name": "a.jpg", "width": 60, "height": 50, "caption": "a square"},
        {"id": 502, "original_id": 1, "file_name": "a.jpg", "width": 60, "height": 50, "caption": "right"},
    ],
    "annotations": [
        {"id": 900, "image_id": 500, "original_id": 7, "category_id": 3, "bbox": [10, 10, 20, 10]},
        {"id": 901, "image_id": 501, "original_id": 7, "category_id": 3, "bbox": [10, 10, 20, 10]},
        {"id": 902, "image_id": 502, "original_id": 8, "category_id": 3, "bbox": [40, 5, 15, 10]},
    ],
}


def test_mdetr_has_an_image_entry_for_each_expression(tmp_path):
    file = tmp_path / "finetune_refcocog_val.json"
    file.write_text(json.dumps(MDETR))
    samples = list(read_captions(file, tmp_path))
    assert [(s.id, s.references, s.meta["image_id"]) for s in samples] == [
        ("500", ("the left one",), 1),
        ("501", ("a square",), 1),
        ("502", ("right",), 1),
    ]
    grouped = list(read_captions(file, tmp_path, grouped=True))
    assert [(s.id, s.references) for s in grouped] == [
        ("object-7", ("the left one", "a square")),
        ("object-8", ("right",)),
    ]


def test_grit_has_a_caption_in_each_annotation_and_masks_beside(tmp_path):
    file = tmp_path / "test.json"
    annotations = [
        {"id": i, "image_id": 55, "category_id": 1, "bbox": [5 * i, 0, 5, 5], "caption": f"thing {i}"} for i in (1, 2)
    ]
    images = [{"id": 55, "file_name": "55.jpg", "width": 60, "height": 50}]
    file.write_text(
        json.dumps({"images": images, "annotations": [*annotations, {**annotations[0], "id": 3, "caption": ""}]})
    )
    report = ReadReport()
    first, second = read_captions(file, tmp_path, report=report)
    assert (first.id, first.references, second.regions) == ("1", ("thing 1",), (Region.from_box(10, 0, 15, 5),))
    assert report.counts == {"without a caption, left out": 1, "read": 2}
    mask = np.zeros((50, 60), np.uint8)
    mask[:2, 5:10] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    masks = tmp_path / "masks.json"
    masks.write_text(json.dumps({"1": {"size": [50, 60], "counts": rle["counts"].decode()}}))
    samples = read_captions(file, tmp_path, region_input="mask", masks=masks)
    assert next(samples).regions[0].mask(50, 60).sum() == 10
    with pytest.raises(ValueError, match="annotation 2 has no mask"):
        next(samples)


@pytest.mark.parametrize(
    "content, message",
    [
        ([], "a JSON dict"),
        ({"images": [], "annotations": {}}, "'annotations'"),
        ({"images": [{"id": "1"}], "annotations": []}, "'id', a whole number"),
        ({**MDETR, "annotations": [{**MDETR["annotations"][0], "bbox": [1, 2, float("nan"), 3]}]}, "annotation 900"),
        ({**MDETR, "annotations": [{**MDETR["annotations"][0], "bbox": [1, 2]}]}, "annotation 900"),
    ],
)
def test_other_forms_are_named(tmp_path, content, message):
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        list(read_captions(tmp_path / "c.json", tmp_path))


def test_both_readers_give_the_same_shapes(tmp_path):
    shapes.write(tmp_path, 6, 3, "test", progress=False)
    for form in ("box", "mask"):
        genome = {(s.image, s.regions, s.references) for s in read_regions(tmp_path, region_input=form)}
        refs = {(s.image, s.regions, s.references) for s in read_refs(tmp_path, region_input=form)}
        assert genome == refs and len(genome) > 20
    counts = {
        s.meta["region_id"]: s.meta["same_class"] for s in shapes.with_same_class(read_regions(tmp_path), tmp_path)
    }
    assert counts == {s.meta["ann_id"]: s.meta["same_class"] for s in read_refs(tmp_path)} and set(counts.values()) > {
        0
    }


def test_rows_of_the_hub(tmp_path):
    datasets = pytest.importorskip("datasets", reason="an optional dependency; make setup installs it")
    Image.new("RGB", (60, 50), "red").save(tmp_path / "a.png")
    row = {
        "question_id": "1",
        "question": "x",
        "answer": ["a", "b"],
        "bbox": [10.0, 5.0, 20.0, 10.0],
        "file_name": "a.png",
    }
    features = datasets.Features(
        {
            "question_id": datasets.Value("string"),
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answer": datasets.Sequence(datasets.Value("string")),
            "bbox": datasets.Sequence(datasets.Value("float64")),
            "file_name": datasets.Value("string"),
        }
    )
    rows = [{**row, "image": {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}}]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / "val-0.parquet")
    (sample,) = read_hub_rows(tmp_path)
    assert sample.regions == (Region.from_box(10, 5, 30, 15),) and sample.references == ("a", "b")
    assert sample.open_image().size == (60, 50)
    with pytest.raises(ValueError, match="no parquet"):
        list(read_hub_rows(tmp_path / "none"))
