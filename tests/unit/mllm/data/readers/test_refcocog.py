"""RefCOCOg's layouts: the published pickle and the JSON copies, both protocols, and nothing that could run code."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from mllm.data import masks
from mllm.data.readers.coco import read_captions
from mllm.data.readers.refcocog import NO_TEXT, read_hub_rows, read_refs
from mllm.data.readers.visual_genome import read_regions
from mllm.data.records import CLAMPED, ReadReport
from mllm.data.shapes import scenes, visual_genome_layout
from tests.files import encoded_mask, read_json, write_json
from vision_tower import Region

SQUARE = [10.0, 10.0, 30.0, 10.0, 30.0, 20.0, 10.0, 20.0]


@pytest.fixture
def root(tmp_path):
    """Two regions of one picture, the first with two expressions; as Python 2 would have pickled them."""
    mask = np.zeros((50, 60), np.uint8)
    mask[5:15, 40:55] = 1
    annotations = [
        {"id": 7, "image_id": 1, "category_id": 3, "bbox": [10, 10, 20, 10], "segmentation": [SQUARE, [1, 1, 2, 2]]},
        {"id": 8, "image_id": 1, "category_id": 3, "bbox": [40, 5, 25, 10]},  # reaches over the picture
        {"id": 9, "image_id": 1, "category_id": 4, "bbox": [0, 0, 5, 5], "segmentation": []},
    ]
    annotations[1]["segmentation"] = encoded_mask(mask)
    images = [{"id": 1, "file_name": "COCO_train2014_000000000001.jpg", "width": 60, "height": 50}]
    write_json(tmp_path / "instances.json", {"images": images, "annotations": annotations})
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
            {"sent_id": ref_id + i, "sent": s, "raw": s, "tokens": str(s).split()} for i, s in enumerate(sentences)
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
    assert left_out(root, split="train") == {masks.NO_MASK: ["ref 90"]}


def left_out(root, **kwargs):
    """First ids by reason of what was not read, with masks asked for."""
    report = ReadReport()
    list(read_refs(root, **{"region_input": "mask", **kwargs}, report=report))
    return {reason: examples for reason, examples in report.examples.items() if reason not in ("read", CLAMPED)}


def change(root, what, row, **changes):
    """Change a row of instances.json."""
    content = read_json(root / "instances.json")
    content[what][row].update(changes)
    write_json(root / "instances.json", content)


POINTS = [[10, 10], [30, 10], [30, 20], [10, 20]]


@pytest.mark.parametrize(
    "shape", [[SQUARE], SQUARE, [[], SQUARE], [SQUARE, [1, 1, 2, 2], []], [POINTS], POINTS, [[], POINTS, SQUARE]]
)
def test_polygons_in_every_nesting(root, shape):
    change(root, "annotations", 0, segmentation=shape)
    first, *_ = read_refs(root, region_input="mask")
    assert first.regions[0].mask(50, 60).sum() == 200


@pytest.mark.parametrize(
    "shape, reason",
    [
        (None, masks.NO_MASK),
        ([], masks.NO_MASK),
        ([[]], masks.EMPTY_MASK),
        ([[1, 1, 2, 2, 3, 3]], masks.EMPTY_MASK),
        ([[1, 1]], masks.EMPTY_MASK),
        ([["1", "1", "9", "1", "9", "9"]], masks.BAD_MASK),
        ([[1, 1, 9, 1, 9]], masks.BAD_MASK),
        ([[1, 1, 9, None, 9, 9]], masks.BAD_MASK),
        ([[1, 1, 9, float("nan"), 9, 9]], masks.BAD_MASK),
        ([[1, 1, 9, 10**400, 9, 9]], masks.BAD_MASK),
        ([[1, 1, 9, 10**30, 9, 9]], masks.BAD_MASK),
        ([[[1, 1], [9], [9, 9]]], masks.BAD_MASK),
        ([5, [1, 2]], masks.BAD_MASK),
        (json.loads("[" * 300 + "]" * 300), masks.BAD_MASK),
        ("x", masks.BAD_MASK),
        (7, masks.BAD_MASK),
        ({"size": [60, 50], "counts": [0, 3000]}, masks.OTHER_SIZE),
        ({"size": [50, 60], "counts": [3000]}, masks.EMPTY_MASK),
        ({"size": [50, 60], "counts": "!"}, masks.BAD_MASK),
        ({"size": [50, 60], "counts": [0, "3000"]}, masks.BAD_MASK),
        ({"size": [50, True], "counts": [0, 50]}, masks.BAD_MASK),
        ({"size": 5}, masks.BAD_MASK),
    ],
)
def test_masks_that_cannot_be_used_are_counted(root, shape, reason):
    change(root, "annotations", 0, segmentation=shape)
    assert left_out(root) == {reason: ["ref 70"]}


@pytest.mark.parametrize(
    "what, row, changes, named",
    [
        ("annotations", 0, {"bbox": None}, "ref 70, annotation 7: bbox: expected a list, got null"),
        ("annotations", 0, {"bbox": [1, 2]}, "bbox: expected a list of length 4"),
        ("annotations", 0, {"bbox": [1, 2, "3", 4]}, "bbox[2]: expected a number, got text"),
        ("annotations", 0, {"bbox": [1, 2, float("nan"), 4]}, "bbox[2]: expected a number"),
        ("annotations", 0, {"bbox": [1, 2, True, 4]}, "bbox[2]: expected a number, got true or false"),
        ("annotations", 0, {"bbox": [99, 99, 4, 4]}, "ref 70"),
        ("annotations", 0, {"id": "7"}, "annotations[0]: expected an object with an id"),
        ("annotations", 0, {"image_id": 2}, "ref 70: annotation 7 of image 1"),
        ("images", 0, {"width": 0}, "image 1: width: expected a whole number >= 1"),
        ("images", 0, {"height": 5.5}, "image 1: height: expected a whole number, got a number"),
        ("images", 0, {"file_name": 5}, "file_name: expected text or null"),
        ("images", 0, {"file_name": "a\0"}, "file_name: text without NUL"),
        ("images", 0, {"file_name": "\ud800"}, "1"),
        ("images", 0, {"file_name": None}, "1"),
    ],
)
def test_rows_of_other_types_are_counted(root, what, row, changes, named):
    change(root, what, row, **changes)
    examples = [str(example) for found in left_out(root, region_input="box").values() for example in found]
    assert any(named in example for example in examples), examples


@pytest.mark.parametrize("what, key", [("images", 1), ("annotations", 7)])
def test_two_rows_of_one_id_are_refused(root, what, key):
    content = read_json(root / "instances.json")
    content[what].append(content[what][0])
    write_json(root / "instances.json", content)
    with pytest.raises(ValueError, match=rf"instances.json: ids of {what} must differ.* \({key}\)"):
        list(read_refs(root))
    write_json(root / "c.json", content)
    with pytest.raises(ValueError, match=rf"c.json: ids of {what} must differ.* \({key}\)"):
        list(read_captions(root / "c.json", root))


def write_refs(root, refs):
    (root / "refs(umd).p").write_bytes(pickle.dumps(refs, protocol=2))


def test_repeated_refs_and_expressions_are_refused(root):
    write_refs(root, [ref(70, 7, ["a"]), ref(70, 8, [])])
    with pytest.raises(ValueError, match=r"values of ref_id must differ.* \(70\)"):
        list(read_refs(root))
    write_refs(root, [ref(70, 7, ["a", "b"]), ref(71, 8, ["c"])])
    with pytest.raises(ValueError, match=r"values of sent_id must differ.* \(71\)"):
        list(read_refs(root))


@pytest.mark.parametrize("grouped", [True, False])
def test_expressions_without_text_are_left_out(root, grouped):
    write_refs(root, [ref(70, 7, ["a", " ", None, 5, "\ud800"]), ref(80, 8, []), ref(90, 9, [""])])
    report = ReadReport()
    (sample,) = read_refs(root, grouped=grouped, report=report)
    assert sample.references == ("a",)
    if grouped:
        assert report.examples[NO_TEXT] == ["ref 80", "ref 90"]
        assert report.counts[f"expressions {NO_TEXT}"] == 3 and report.unusable == 2
    else:
        assert report.examples[NO_TEXT] == ["sentence 71", "sentence 72", "ref 80", "sentence 90"]
        assert report.unusable == 6


@pytest.mark.parametrize(
    "bad",
    [
        5,
        {},
        {"split": ["val"]},
        {"split": "val"},
        {**ref(99, 7, []), "sentences": None},
        {**ref(99, 7, []), "sentences": {"a": 1}},
        {**ref(99, 7, ["x"]), "ref_id": "99"},
        {**ref(99, 7, ["x"]), "ann_id": None},
        {**ref(99, 7, ["x"]), "ann_id": 10**30},
        {**ref(99, 99, ["no such annotation"])},
        {1: 2, "split": "val"},
    ],
)
def test_a_bad_ref_is_counted_and_the_others_stay(root, bad):
    write_refs(root, [bad, ref(70, 7, ["a"])])
    report = ReadReport()
    (sample,) = read_refs(root, report=report)
    assert sample.id == "sent-70" and report.unusable == 1


def test_unknown_splits_and_files_are_named(root):
    with pytest.raises(ValueError, match="no split 'testA'; it has train, val"):
        list(read_refs(root, split="testA"))
    with pytest.raises(ValueError, match=r"refs\(google\).p is missing"):
        list(read_refs(root, split_by="google"))


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
    write_json(file, MDETR)
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
    write_json(file, {"images": images, "annotations": [*annotations, {**annotations[0], "id": 3, "caption": ""}]})
    report = ReadReport()
    first, second = read_captions(file, tmp_path, report=report)
    assert (first.id, first.references, second.regions) == ("1", ("thing 1",), (Region.from_box(10, 0, 15, 5),))
    assert report.counts == {"without a caption, left out": 1, "read": 2}
    mask = np.zeros((50, 60), np.uint8)
    mask[:2, 5:10] = 1
    beside = tmp_path / "masks.json"
    write_json(beside, {"1": encoded_mask(mask)})
    report = ReadReport()
    (sample,) = read_captions(file, tmp_path, region_input="mask", masks=beside, report=report)
    assert sample.regions[0].mask(50, 60).sum() == 10 and report.examples[masks.NO_MASK] == [2]


def test_two_annotations_of_one_expression_give_one_sample(tmp_path):
    content = {**MDETR, "annotations": [*MDETR["annotations"], {**MDETR["annotations"][0], "id": 903}]}
    write_json(tmp_path / "c.json", content)
    assert [s.id for s in read_captions(tmp_path / "c.json", tmp_path)] == ["500", "501", "502"]


@pytest.mark.parametrize(
    "content, message",
    [
        ([], "a JSON dict"),
        ({"images": [], "annotations": {}}, "'annotations'"),
        ({"images": [{"id": "1"}], "annotations": []}, "images.0.: expected an object with an id"),
        ({**MDETR, "annotations": [{**MDETR["annotations"][0], "bbox": [1, 2, float("nan"), 3]}]}, "annotation 900"),
        ({**MDETR, "annotations": [{**MDETR["annotations"][0], "bbox": [1, 2]}]}, "annotation 900"),
    ],
)
def test_other_forms_are_named(tmp_path, content, message):
    write_json(tmp_path / "c.json", content)
    with pytest.raises(ValueError, match=message):
        list(read_captions(tmp_path / "c.json", tmp_path))


def test_both_readers_give_the_same_shapes(tmp_path):
    visual_genome_layout.write(tmp_path, 6, 3, "test", progress=False)
    for form in ("box", "mask"):
        genome = {(s.image, s.regions, s.references) for s in read_regions(tmp_path, region_input=form)}
        refs = {(s.image, s.regions, s.references) for s in read_refs(tmp_path, region_input=form)}
        assert genome == refs and len(genome) > 20
    counts = {
        s.meta["region_id"]: s.meta["same_class"] for s in scenes.with_same_class(read_regions(tmp_path), tmp_path)
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


def test_rows_of_the_hub_of_other_types(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="comes with datasets; make setup installs it")
    from pyarrow import parquet

    good = {"image": {"bytes": b"x"}, "answer": ["a", " "], "bbox": [1.0, 1.0, 5.0, 5.0], "file_name": None}
    changes = [{}, {"image": None}, {"image": {"bytes": None}}, {"answer": None}, {"answer": []}, {"answer": [None]}]
    changes += [
        {"bbox": None},
        {"bbox": [1.0]},
        {"bbox": [1.0, 1.0, 0.0, 5.0]},
        {"bbox": [1.0, float("nan"), 1.0, 1.0]},
    ]
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([good | change for change in changes]), file)
    report = ReadReport()
    (sample,) = read_hub_rows(tmp_path, report=report)
    assert sample.references == ("a",) and report.unusable == 9
    for content in (b"", b"PAR1", file.read_bytes()[:-20], file.read_bytes().replace(b"bbox", b"bcox")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="cannot read .*a.parquet"):
            list(read_hub_rows(tmp_path))
