"""Whatever JSON a data set's file holds, readers give samples that can be written, or a ValueError of one line."""

import copy
import json
import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eval.external_formats import read_references
from eval.predictions import read_predictions
from mllm.data.build_index import dataset_split
from mllm.data.readers.coco import read_coco
from mllm.data.readers.jsonl import read_jsonl
from mllm.data.readers.mask_imagenet import LIST, read_mask_imagenet
from mllm.data.readers.refcocog import read_refcocog
from mllm.data.readers.visual_genome import read_image_questions, read_region_questions, read_regions
from tests.files import write_json

DEEP = json.loads("[" * 400 + "]" * 400)
ODD = [None, True, 0, -1, 1, 7, 2**63, 10**30, 10**400, 0.5, float("nan"), float("inf"), "", " ", "x", "7", "\ud800"]
ODD += ["a\0b", [], [[]], [1], ["x"], [None], {}, {"a": 1}, {"size": [8, 8], "counts": [0, 64]}, DEEP]
RLE = {"size": [8, 8], "counts": [0, 64]}
IMAGES = [{"id": 1, "image_id": 1, "width": 8, "height": 8, "file_name": "a.jpg", "url": "x/1.jpg", "caption": "c"}]
ROWS = [{"id": 7, "image_id": 1, "bbox": [0, 0, 4, 4], "category_id": 1, "segmentation": RLE, "caption": "x"}]
REGION = {"region_id": 5, "image_id": 1, "x": 0, "y": 0, "width": 4, "height": 4, "phrase": "x"}
QA = {"qa_id": 9, "image_id": 1, "question": "q", "answer": "a", "type": "what"}
REF = {"ref_id": 1, "ann_id": 7, "image_id": 1, "split": "val", "sentences": [{"sent_id": 3, "sent": "x"}]}
META = {"area": 0.5, "same_class": 1, "image_id": 1, "type": "x"}
LINE = {
    "id": 1,
    "image": "a.jpg",
    "region": {"box": [0, 0, 4, 4]},
    "question": "q",
    "answer": ["a"],
    "meta": {"area": 1},
}
ROW = {
    "id": 1,
    "prediction": "a",
    "references": ["a"],
    "meta": {"area": 0.5, "same_class": 1, "image_id": 1, "type": "x"},
}


def genome(folder):
    for form in ("box", "mask"):
        yield from read_regions(folder, region_type=form)
    yield from read_region_questions(folder)
    yield from read_image_questions(folder)


def refs(folder):
    for grouped in (False, True):
        yield from read_refcocog(folder, region_type="mask", grouped=grouped)


def dump(path, content):
    write_json(path, content)


# name: (content by file, reader)
LAYOUTS = {
    "genome": (
        {
            "image_data.json": IMAGES,
            "region_descriptions.json": [{"id": 1, "regions": [REGION]}],
            "question_answers.json": [{"id": 1, "qas": [QA, {**QA, "qa_id": 10}]}],
            "qa_to_region_mapping.json": {"9": 5},
            "region_masks.json": {"5": RLE},
        },
        genome,
    ),
    "coco": (
        {"c.json": {"images": IMAGES, "annotations": ROWS}},
        lambda folder: read_coco(folder / "c.json", folder, region_type="mask"),
    ),
    "refs": ({"refs(umd).p": [REF], "instances.json": {"images": IMAGES, "annotations": ROWS}}, refs),
    "masks": ({LIST: [["n", 0, "a.jpg", RLE, [0, 0, 4, 4], 0, "x"]]}, read_mask_imagenet),
    "jsonl": ({"x.jsonl": LINE}, lambda folder: read_jsonl(folder / "x.jsonl")),
    "split": ({"dataset.json": {"split": "val"}}, lambda folder: [dataset_split(folder)] and []),
    "predictions": ({"x.jsonl": ROW}, lambda folder: read_predictions(folder / "x.jsonl")[0]),
    "results": ({"x.json": [ROW]}, lambda folder: read_predictions(folder / "x.json")[0]),
    "references": (
        {"x.json": {"images": IMAGES, "annotations": ROWS}},
        lambda folder: read_references(folder / "x.json").items(),
    ),
    "references by id": ({"x.json": {"1": ["a", {"caption": "b"}]}}, lambda f: read_references(f / "x.json").items()),
}


def places(content, path=()):
    """Where something can be put: each value of nested lists and objects."""
    yield path
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield from places(value, (*path, key))


def put(content, path, value):
    """Content with another value at a place."""
    if not path:
        return value
    content = copy.deepcopy(content)
    target = content
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return content


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)], ids=["a fifth", "all"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_value_at_any_place(tmp_path, layout, step):
    files, read = LAYOUTS[layout]
    write = {name: pickle.dumps if name.endswith(".p") else lambda value: json.dumps(value).encode() for name in files}
    for name, content in files.items():
        (tmp_path / name).write_bytes(write[name](content))
    assert list(read(tmp_path)) or layout == "split"
    for name, content in files.items():
        for number, path in enumerate(places(content)):
            for value in ODD[number % step :: step]:
                (tmp_path / name).write_bytes(write[name](put(content, path, value)))
                check(read, tmp_path)
        (tmp_path / name).write_bytes(write[name](content))


def check(read, folder):
    """Read: samples can be written and sent to workers, errors are one line that names the file."""
    try:
        samples = list(read(folder))
    except ValueError as error:
        assert str(folder) in str(error) and "\n" not in str(error) and len(str(error)) < 3000
        return
    for sample in samples:
        if hasattr(sample, "meta"):
            assert sample.references and all(text.strip() for text in sample.references)
            sample = [sample.id, sample.image, sample.question, sample.references, dict(sample.meta)]
        json.dumps(sample, allow_nan=False, ensure_ascii=False).encode()


anything = st.recursive(
    st.sampled_from(ODD) | st.text(max_size=3) | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["id", "image_id", "size"]), inner),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_anything_at_any_place(tmp_path, data):
    files, read = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))]
    for name, content in files.items():
        content = put(content, data.draw(st.sampled_from(list(places(content)))), data.draw(anything))
        as_bytes = pickle.dumps(content) if name.endswith(".p") else json.dumps(content).encode()
        (tmp_path / name).write_bytes(as_bytes)
    check(read, tmp_path)
