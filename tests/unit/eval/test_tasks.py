"""Protocols: every name reads what it says, counts are checked, and an own sample is called one."""

import json

import pytest

from eval import published, tasks
from mllm.data import shapes
from mllm.data.splits import densecap_split
from tests.unit.mllm.data.test_refcocog import MDETR


def test_the_names_of_the_issue_are_there():
    expected = {
        "refcocog-umd-val/ungrouped": 4896,
        "refcocog-umd-val/grouped": 2573,
        "refcocog-umd-test/grouped": 5023,
        "refcocog-google-val/grouped": 5000,
        "refcocog-lmms-eval": 7573,
        "vg-test/subset5k": 5000,
        "vg-test/full": 232_935,
    }
    assert {name: tasks.find(name).items for name in expected} == expected
    assert {"refcoco-unc-testA/grouped", "refcoco+-unc-val/ungrouped", "shapes-vqa", "jsonl"} <= tasks.TASKS.keys()
    with pytest.raises(ValueError, match="sample-N-seed-S"):
        tasks.find("vg-test")


def test_only_comparable_protocols_have_published_numbers():
    for task in tasks.TASKS.values():
        assert bool(published.rows(task.name)) <= task.comparable, task.name


def test_a_count_that_differs_is_refused(tmp_path):
    (tmp_path / "finetune_refcocog_val.json").write_text(json.dumps(MDETR))
    task = tasks.find("refcocog-umd-val/ungrouped")
    with pytest.raises(ValueError, match="4,896 items, .* gives 3"):
        task.samples(tmp_path, "box")
    assert [s.references for s in task.samples(tmp_path, "box", limit=2)] == [("the left one",), ("a square",)]
    grouped = tasks.find("refcocog-umd-val/grouped").samples(tmp_path, "box", limit=1)
    assert grouped[0].references == ("the left one", "a square")


def test_an_own_sample_of_visual_genome(tmp_path, monkeypatch):
    shapes.write(tmp_path, 8, 3, "test", progress=False)
    monkeypatch.setattr(tasks, "densecap_split", lambda name: frozenset({1, 2, 3, 4, 5}))
    task = tasks.find("vg-test/sample-6-seed-1")
    first, again = (task.samples(tmp_path, "box") for _ in range(2))
    other = tasks.find("vg-test/sample-6-seed-2").samples(tmp_path, "box")
    assert [s.id for s in first] == [s.id for s in again] != [s.id for s in other]
    assert {s.meta["image_id"] for s in first} <= {1, 2, 3, 4, 5} and not task.comparable
    with pytest.raises(ValueError, match="at least 999"):
        tasks.find("vg-test/sample-999-seed-1").samples(tmp_path, "box")


def test_visual_genome_questions_of_test_images_only(shared_data, monkeypatch):
    """On published records of images 1 to 5, of which none is a test image: so the split is put in place of it."""
    folder = shared_data / "visual_genome"
    assert not densecap_split("test") & {1, 2, 3, 4, 5}
    task = tasks.find("vg-regionqa/densecap-test")
    assert not task.verified and task.kind == "question" and "{question}" in task.prompt
    with pytest.raises(ValueError, match="is missing"):
        task.samples(folder / "v1.2.0", "box")


def test_prompts_of_the_protocols():
    assert tasks.find("refcocog-lmms-eval").prompt == "Provide a short description for this region."
    assert tasks.find("refcocog-lmms-eval").region_input == "red-box"
