"""Predictions of ours and of others: joined by id, and never scored when something does not fit."""

import json
import re

import pytest

from eval.external_formats import read_references
from eval.predictions import Prediction, read_predictions, write_predictions
from tests.files import write_json, write_json_lines

ROWS = [{"id": 1, "prediction": "a cat", "references": ["a cat"]}, {"id": "x", "prediction": "", "references": ["b"]}]


def test_a_folder_without_predictions_is_named(tmp_path):
    with pytest.raises(ValueError, match="is not a run: expected a folder with predictions.jsonl, or a file"):
        read_predictions(tmp_path)


def test_jsonl_with_references(tmp_path):
    records, notes = read_predictions(write_json_lines(tmp_path / "p.jsonl", ROWS))
    assert [(r.id, r.prediction, r.references) for r in records] == [
        ("1", "a cat", ["a cat"]),
        ("x", "", ["b"]),
    ]
    assert notes == []


def test_a_single_line_is_jsonl_too(tmp_path):
    (record,), _ = read_predictions(write_json_lines(tmp_path / "p.jsonl", ROWS[:1]))
    assert record.prediction == "a cat"


COCO = {
    "images": [{"id": 7}, {"id": 9}],
    "annotations": [
        {"id": 1, "image_id": 7, "caption": "first"},
        {"id": 2, "image_id": 7, "caption": "second"},
        {"id": 7, "image_id": 9, "caption": "third"},
    ],
}
MDETR = {
    "images": [{"id": 7, "caption": "first", "original_id": 1}, {"id": 9, "caption": "third", "original_id": 1}],
    "annotations": [{"id": 5, "image_id": 7, "bbox": [0, 0, 1, 1]}, {"id": 6, "image_id": 9, "bbox": [0, 0, 1, 1]}],
}


@pytest.mark.parametrize(
    "references, expected",
    [
        (COCO, {"7": ["first", "second"], "9": ["third"]}),
        (MDETR, {"7": ["first"], "9": ["third"]}),
        ({"7": ["first"], "9": [{"image_id": 9, "id": 9, "caption": ["third"]}]}, {"7": ["first"], "9": ["third"]}),
        ([{"id": 7, "references": ["first"]}, {"id": 9, "references": ["third"]}], {"7": ["first"], "9": ["third"]}),
    ],
    ids=["coco", "mdetr", "by id", "list"],
)
@pytest.mark.parametrize("results", [[{"image_id": 9, "caption": "b"}, {"image_id": 7, "caption": "a"}]])
def test_results_of_others(tmp_path, references, expected, results):
    file = write_json(tmp_path / "references.json", references)
    assert read_references(file) == expected
    records, _ = read_predictions(write_json(tmp_path / "results.json", results), file)
    assert [(r.id, r.prediction, r.references) for r in records] == [
        ("7", "a", expected["7"]),
        ("9", "b", expected["9"]),
    ]


def test_result_lines_of_the_google_toolkit(tmp_path):
    results = write_json(tmp_path / "r.json", [{"annotation_id": 5, "generated_refexp": "tie"}])
    references = write_json_lines(tmp_path / "ref.jsonl", [{"id": 5, "references": ["the tie", "a red tie"]}])
    assert read_predictions(results, references)[0][0].prediction == "tie"


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "captions, references",
    [
        ({"7": "a", "9": "b"}, COCO),
        ({"7": "a", "9": "b"}, {"7": ["first"], "9": ["third"]}),
        ({"id": "a cat"}, {"id": ["a dog"]}),
        ({"": "a", "text": "b"}, [{"id": "", "references": ["c"]}, {"id": "text", "references": ["d"]}]),
    ],
    ids=["COCO's whole numbers", "text", "an id called id", "odd ids"],
)
def test_an_object_of_captions_by_id(tmp_path, captions, references, indent):
    (tmp_path / "p.json").write_text(json.dumps(captions, indent=indent))
    records, _ = read_predictions(tmp_path / "p.json", write_json(tmp_path / "r.json", references))
    assert {r.id: r.prediction for r in records} == captions
    with pytest.raises(ValueError, match="--references"):
        read_predictions(tmp_path / "p.json")


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"1": ["a cat"], "2": "a dog"}', "an object of id: caption, .* got an object with .'a cat'. under '1'"),
        ('{"": null}', "None under ''"),
        ('{"1": 5}', "5 under '1'"),
        ('{"results": [{"image_id": 1, "caption": "a"}]}', "under 'results'"),
        ('{"1": "a", "1": "b"}', "keys of an object must be unique"),
        ('[{"image_id": 1, "caption": "a", "caption": "b"}]', "keys of an object must be unique"),
        ('{"1": "half a pair \\ud83d"}', "not valid UTF-8"),
        ('{"1": "a"}\n{"2": "b"}\n', "expected objects with an id"),
        ("{}", "is empty"),
        ('"a cat"', "expected a JSON list, or one object per line"),
        ('["a cat"]', "expected objects with an id"),
        ("id,caption\n1,a cat\n", "not valid JSON"),
    ],
)
def test_other_content_is_an_error(tmp_path, text, message):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=message) as found:
        read_predictions(tmp_path / "p.json", write_json(tmp_path / "r.json", {"1": ["a cat"]}))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "empty"),
        ([*ROWS, {**ROWS[0], "prediction": "again"}], "1 occur again .1."),
        ([{"id": 1, "prediction": "a"}], "--references"),
        ([{"id": 1, "references": ["a"]}], "prediction"),
        ([{"prediction": "a", "references": ["a"]}], "an id"),
        ([{"id": 1, "prediction": 3, "references": ["a"]}], "text"),
        ([{"id": 1, "prediction": "a", "references": []}], "references"),
        ([{"id": 1, "prediction": "a", "references": "a"}], "references"),
    ],
)
def test_bad_files_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_predictions(write_json_lines(tmp_path / "p.jsonl", rows))


@pytest.mark.parametrize(
    "content", [{"a": 3}, {"a": [3]}, [1, 2], [{"id": 1}], {"annotations": [], "images": []}, {"annotations": [3]}]
)
def test_bad_references_are_named(tmp_path, content):
    with pytest.raises(ValueError, match="r.json"):
        read_references(write_json(tmp_path / "r.json", content))


def test_torn_and_missing_files_are_named(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1])[:20])
    with pytest.raises(ValueError, match="line 2.*truncated"):
        read_predictions(tmp_path / "p.jsonl")
    with pytest.raises(ValueError, match="file not found"):
        read_predictions(tmp_path / "no.jsonl")


def test_unknown_and_missing_ids_are_never_left_out_silently(tmp_path):
    references = write_json_lines(tmp_path / "ref.jsonl", [{"id": i, "references": ["a"]} for i in range(4)])
    unknown = write_json_lines(tmp_path / "u.jsonl", [{"id": i, "prediction": "a"} for i in (0, 1, 2, 3, 8)])
    with pytest.raises(ValueError, match="1 of 5 ids are not in .* .8."):
        read_predictions(unknown, references)
    with pytest.raises(ValueError, match="ids are not in"):
        read_predictions(unknown, references, allow_missing=True)
    missing = write_json_lines(tmp_path / "m.jsonl", [{"id": i, "prediction": "a"} for i in (3, 0, 1)])
    with pytest.raises(ValueError, match="1 of 4 samples have no prediction .2."):
        read_predictions(missing, references)
    records, notes = read_predictions(missing, references, allow_missing=True)
    assert [r.id for r in records] == ["0", "1", "3"] and "INCOMPLETE: 1 of 4" in notes[0]


def test_an_unanswered_sample_is_missing(tmp_path):
    rows = [ROWS[0], {"id": 2, "error": "there is no image file x.png", "references": ["b"]}]
    with pytest.raises(ValueError, match="no image file x.png"):
        read_predictions(write_json_lines(tmp_path / "p.jsonl", rows))
    assert len(read_predictions(tmp_path / "p.jsonl", allow_missing=True)[0]) == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"references": [""]}, "1 has no list of 'references' that are not empty"),
        ({"references": ["a", " "]}, "1 has no list of 'references'"),
        ({"references": ["a", 5]}, "1 has no list of 'references'"),
        ({"references": [["a"]]}, "1 has no list of 'references'"),
        ({"id": None}, "expected an id"),
        ({"id": [1]}, "expected an id"),
        ({"prediction": {"a": 1}}, "prediction of 1"),
        ({"question": 5}, "1: question: expected text or null, got an integer"),
        ({"image": 5}, "1: image: expected text or null"),
        ({"region": [1]}, "1: region: expected an object or null"),
        ({"meta": [1]}, "1: meta: expected an object or null, got a list"),
        ({"meta": {"area": "0.1"}}, "1: meta.area: expected a number or null, got text"),
        ({"meta": {"area": True}}, "1: meta.area: expected a number or null"),
        ({"meta": {"area": -1}}, "1: meta.area: expected a number >= 0"),
        ({"meta": {"area": 5000}}, "1: meta.area: expected a number <= 1"),
        ({"meta": {"same_class": "1"}}, "1: meta.same_class: expected an integer"),
        ({"meta": {"image_id": [1]}}, "1: meta.image_id"),
        ({"meta": {"type": 5}}, "1: meta.type"),
        ({"meta": {"area": float("nan")}}, "line 1: NaN or infinite number"),
        ({"prediction": "\ud800"}, "line 1: text is not valid UTF-8"),
        ({"meta": json.loads("[" * 300 + "]" * 300)}, "line 1: nested more than 100 levels deep"),
    ],
)
def test_fields_of_other_types_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_predictions(write_json_lines(tmp_path / "p.jsonl", [{**ROWS[0], **changes}, ROWS[1]]))
    assert "p.jsonl" in str(caught.value) and "\n" not in str(caught.value)


def test_fields_that_are_null_are_those_that_are_not_there(tmp_path):
    nulls = dict.fromkeys(("question", "image", "region", "prompt", "cut", "error", "meta"))
    (record, _), notes = read_predictions(write_json_lines(tmp_path / "p.jsonl", [{**ROWS[0], **nulls}, ROWS[1]]))
    assert (record.prediction, record.meta, notes) == ("a cat", {}, [])


@pytest.mark.parametrize(
    "content, message",
    [
        ({"7": [""]}, "7 has no reference: expected text that is not empty"),
        ({"7": [{"caption": " "}]}, "7 has no reference"),
        (
            [{"id": 7, "references": ["a"]}, {"id": "7", "references": ["b"]}],
            r"ids of references must be unique.* \(7\)",
        ),
        ({**COCO, "annotations": COCO["annotations"] * 2}, r"ids of annotations must be unique.* \(1, 2, 7\)"),
        ({**MDETR, "images": MDETR["images"] * 2}, r"ids of images must be unique.* \(7, 9\)"),
        ({"annotations": [{"caption": "x", "image_id": 7}], "images": 5}, "expected a list of images, got 5"),
        ('{"7": ["a"], "7": ["b"]}', "keys of an object must be unique"),
        ("[" * 100_000, "nested too deeply"),
        ('{"7": ' * 100_000, "nested too deeply"),
        ("5", "expected a JSON list, or one object per line, got 5"),
    ],
)
def test_references_that_cannot_be_told_apart_are_refused(tmp_path, content, message):
    file = tmp_path / "r.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        read_references(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_a_byte_order_mark_is_ignored(tmp_path, name):
    write = write_json_lines if name == "p.jsonl" else write_json
    file = write(tmp_path / name, ROWS)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(read_predictions(file)[0]) == 2


def test_a_line_is_read_as_it_was_written(tmp_path):
    region = {"box": [1, 2, 3, 4]}
    answered = Prediction(
        id="1",
        image="a.png",
        region=region,
        prompt="Q",
        prediction="a",
        truncated=True,
        references=["a"],
        meta={"x": 1},
    )
    failed = Prediction(id="2", error="image not found", references=["b"])
    write_predictions(tmp_path / "p.jsonl", [answered, failed])
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert lines[0]["truncated"] and "error" not in lines[0] and "prediction" not in lines[1]
    assert read_predictions(tmp_path / "p.jsonl", allow_missing=True)[0] == [answered]


def test_a_line_of_version_0_1_0(tmp_path):
    line = """{"id": "vg-region-1", "image": "VG_100K/1.png", "region": {"box": [15.0, 4.0, 43.0, 30.0]},
        "question": null, "prompt": "Describe this region.", "prediction": "a large", "cut": true,
        "references": ["a large plain purple star"], "meta": {"image_id": 1, "area": 0.078993}}"""
    (tmp_path / "p.jsonl").write_text(line.replace("\n", ""))
    ((prediction,), _) = read_predictions(tmp_path / "p.jsonl")
    assert prediction.truncated and prediction.text == "a large" and prediction.meta["image_id"] == 1
