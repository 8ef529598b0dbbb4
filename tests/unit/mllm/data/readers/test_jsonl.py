"""A user's own file of regions: read as written, every bad line named."""

import json
import re

import pytest
from PIL import Image

from mllm.data import json_files
from mllm.data.readers.jsonl import DAMAGED, read_jsonl
from mllm.data.records import ReadReport
from tests.files import write_json_lines
from vision_tower import Region

LINE = {"id": "a", "image": "p/x.png", "region": {"box": [1, 2, 3, 4]}, "answer": "a dog"}


def write(folder, *lines):
    return write_json_lines(folder / "mine.jsonl", lines)


def test_lines_become_samples(tmp_path):
    (tmp_path / "p").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "p" / "x.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "p" / "m.png")
    others = {"image": "p/x.png", "region": {"mask": "p/m.png"}, "question": "What?", "references": ["a", "b"]}
    first, second = read_jsonl(write(tmp_path, LINE, "", {**others, "meta": {"image_id": 5}}))
    assert (first.id, first.regions, first.question, first.references) == (
        "a",
        (Region.from_box(1, 2, 3, 4),),
        None,
        ("a dog",),
    )
    assert (second.id, second.question, second.references, second.meta) == ("3", "What?", ("a", "b"), {"image_id": 5})
    assert second.regions[0].mask(8, 8).all() and first.open_image().size == (8, 8)


@pytest.mark.parametrize(
    "line, message",
    [
        ([1], "expected an object"),
        ({**LINE, "id": "a"}, "line 2: a$"),
        ({**LINE, "id": None}, "id: expected a whole number or text, got null"),
        ({**LINE, "id": True}, "id: expected a whole number or text, got true or false"),
        ({**LINE, "id": 2, "boxes": []}, "unknown field 'boxes'"),
        ({**LINE, "id": 2, "image": None}, "image: expected text, got null"),
        ({**LINE, "id": 2, "image": "a\0b"}, "image: text without NUL"),
        ({**LINE, "id": 2, "region": "box"}, "region: expected an object, got text"),
        ({**LINE, "id": 2, "region": {"box": [3, 2, 1, 4]}}, "x0 < x1"),
        ({**LINE, "id": 2, "region": {"mask": "no.png"}}, "no.png"),
        ({**LINE, "id": 2, "question": 5}, "question: expected text or null, got a whole number"),
        ({**LINE, "id": 2, "question": "\ud800"}, "text that is not UTF-8"),
        ({**LINE, "id": 2, "answer": []}, "answer as text"),
        ({**LINE, "id": 2, "answer": " "}, "answer as text"),
        ({**LINE, "id": 2, "answer": ["a", 5]}, r"answer.*expected text, got a whole number"),
        ({**LINE, "id": 2, "references": ["x"]}, "not both"),
        ({**LINE, "id": 2, "meta": []}, "meta: expected an object, got a list"),
        ({**LINE, "id": 2, "meta": {"image_id": [1]}}, "meta: image_id: expected a whole number or text or null"),
        ({**LINE, "id": 2, "meta": {"area": float("nan")}}, "NaN or infinite"),
        ({**LINE, "id": 2, "meta": {"area": "0.1"}}, "meta: area: expected a number or null, got text"),
        ('{"id": 2, "meta": ' + "[" * 100_000, "nested more than 100 levels deep"),
        ({**LINE, "id": 2, "meta": json.loads('{"a": ' * 200 + "1" + "}" * 200)}, "nested more than 100 levels deep"),
        ('{"id" 1}', "line 2: not JSON: Expecting ':' delimiter at column 7"),
        ('{"id": ' + "9" * 5000 + "}", "line 2: Exceeds the limit"),
    ],
)
def test_a_bad_line_is_counted_and_named_and_the_others_stay(tmp_path, caplog, line, message):
    report = ReadReport()
    file = write(tmp_path, LINE, line, {**LINE, "id": "last"})
    assert [sample.id for sample in read_jsonl(file, report=report)] == ["a", "last"]
    ((named,),) = (examples for reason, examples in report.examples.items() if reason != "read")
    assert named.startswith("line 2: ") and re.search(message, named) and "\n" not in named
    assert "line 2: " in caplog.text


def test_bytes_that_are_no_text_and_lines_too_long(tmp_path, monkeypatch):
    file = write(tmp_path, LINE, {**LINE, "id": "last"})
    file.write_bytes(
        b"\xef\xbb\xbf" + file.read_bytes() + b'{"id": "\xff"}\n' + b'{"id":' + b" " * 300 + b'1}\n{"id":1\n'
    )
    monkeypatch.setattr(json_files, "LARGEST_RECORD", 200)
    report = ReadReport()
    assert [sample.id for sample in read_jsonl(file, report=report)] == ["a", "last"]
    assert [named.split(":")[1] for named in report.examples[DAMAGED]] == [
        " not UTF-8 at byte 8",
        " over 200 bytes",
        " not JSON",
    ]
    assert report.examples[DAMAGED][2].startswith("line 5")


def test_a_file_of_bad_lines_is_refused(tmp_path):
    with pytest.raises(ValueError, match="mine.jsonl: 1 of 1 records cannot be used.*line 1: expected an object"):
        list(read_jsonl(write(tmp_path, [1])))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot read"):
        list(read_jsonl(tmp_path / "no.jsonl"))
