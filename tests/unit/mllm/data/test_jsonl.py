"""A user's own file of regions: read as written, every bad line named."""

import json

import pytest
from PIL import Image

from mllm.data.jsonl import read_jsonl
from vision_tower import Region

LINE = {"id": "a", "image": "p/x.png", "region": {"box": [1, 2, 3, 4]}, "answer": "a dog"}


def write(folder, *lines):
    file = folder / "mine.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return file


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
        ({**LINE, "id": "a"}, "'a' occurs again"),
        ({**LINE, "id": None}, "id as text"),
        ({**LINE, "id": 2, "boxes": []}, "unknown keys ..boxes.."),
        ({**LINE, "id": 2, "image": None}, '"image"'),
        ({**LINE, "id": 2, "region": "box"}, '"region"'),
        ({**LINE, "id": 2, "region": {"box": [3, 2, 1, 4]}}, "x0 < x1"),
        ({**LINE, "id": 2, "region": {"mask": "no.png"}}, "no.png"),
        ({**LINE, "id": 2, "question": 5}, "question as text"),
        ({**LINE, "id": 2, "answer": []}, "answer as text"),
        ({**LINE, "id": 2, "answer": " "}, "answer as text"),
        ({**LINE, "id": 2, "references": ["x"]}, "not both"),
        ({**LINE, "id": 2, "meta": []}, "meta as an object"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=message) as caught:
        list(read_jsonl(write(tmp_path, LINE, line)))
    assert "mine.jsonl, line 2: " in str(caught.value)


def test_damaged_json_is_named_by_line_and_column(tmp_path):
    with pytest.raises(ValueError, match=r"mine.jsonl, line 2, column 7: Expecting ':' delimiter$"):
        list(read_jsonl(write(tmp_path, LINE, '{"id" 1}')))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot read"):
        list(read_jsonl(tmp_path / "no.jsonl"))
