"""Protocols: every name reads what it says, counts are checked, and an own sample is called one."""

import pytest

from alpha_clip_commands.task_names import METRICS, VG_SAMPLE
from eval import published, task_list, task_samples, tasks
from mllm.data.densecap_splits import densecap_split
from mllm.data.shapes import visual_genome_layout
from tests.files import read_json, write_json
from tests.unit.mllm.data.readers.test_refcocog import MDETR


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
    assert {"vg/own", "vg-regionqa/own"} <= tasks.TASKS.keys()


def test_only_comparable_protocols_have_published_numbers():
    for task in tasks.TASKS.values():
        assert bool(published.comparable(task.name)) <= task.comparable, task.name


def test_a_count_that_differs_is_refused(tmp_path):
    write_json(tmp_path / "finetune_refcocog_val.json", MDETR)
    task = tasks.find("refcocog-umd-val/ungrouped")
    with pytest.raises(ValueError, match="4,896 items, but .* has 3"):
        task.samples(tmp_path, "box")
    assert [s.references for s in task.samples(tmp_path, "box", limit=2)] == [("the left one",), ("a square",)]
    grouped = tasks.find("refcocog-umd-val/grouped").samples(tmp_path, "box", limit=1)
    assert grouped[0].references == ("the left one", "a square")


def test_an_own_sample_of_visual_genome(tmp_path, monkeypatch):
    visual_genome_layout.write(tmp_path, 8, 3, "test", progress=False)
    monkeypatch.setattr(task_samples, "densecap_split", lambda name: frozenset({1, 2, 3, 4, 5}))
    task = tasks.find("vg-test/sample-6-seed-1")
    first, again = (task.samples(tmp_path, "box") for _ in range(2))
    other = tasks.find("vg-test/sample-6-seed-2").samples(tmp_path, "box")
    assert [s.id for s in first] == [s.id for s in again] != [s.id for s in other]
    assert {s.meta["image_id"] for s in first} <= {1, 2, 3, 4, 5} and not task.comparable
    with pytest.raises(ValueError, match="at least 999"):
        tasks.find("vg-test/sample-999-seed-1").samples(tmp_path, "box")


def test_images_of_any_split(tmp_path, caplog):
    """Visual Genome's layout with images of one's own, of which one is not there."""
    visual_genome_layout.write(tmp_path, 4, 3, "test", progress=False)
    (tmp_path / "VG_100K" / "2.png").unlink()
    for name, kind in (("vg/own", "regions"), ("vg-regionqa/own", "qas")):
        samples = tasks.find(name).samples(tmp_path, "box")
        assert {sample.meta["image_id"] for sample in samples} == {1, 3, 4} and not tasks.find(name).comparable
        assert "1 of 4 images are not in the folder" in caplog.text
        records = read_json(tmp_path / f"{FILE_OF[kind]}.json")
        of_image = {entry["id"]: len(entry[kind]) for entry in records}
        assert len(samples) == sum(count for image, count in of_image.items() if image != 2)


FILE_OF = {"regions": "region_descriptions", "qas": "question_answers"}


def test_why_there_is_no_sample_is_said(tmp_path, monkeypatch):
    visual_genome_layout.write(tmp_path, 2, 3, "test", progress=False)
    monkeypatch.setattr(task_samples, "densecap_split", lambda name: frozenset({7, 8}))
    for name, own in (("vg-test/sample-1-seed-1", "vg/own"), ("vg-regionqa/densecap-test", "vg-regionqa/own")):
        with pytest.raises(ValueError, match=f"none of the 2 images in .* 2 test images; --task {own} evaluates"):
            tasks.find(name).samples(tmp_path, "box", limit=1)
    with pytest.raises(ValueError, match="test.json is missing; .* the tasks vg/own and vg-test/sample"):
        tasks.find("vg-test/full").samples(tmp_path, "box")
    monkeypatch.setattr(task_samples, "densecap_split", lambda name: frozenset({1, 8}))
    (tmp_path / "region_descriptions.json").write_text("[]")
    with pytest.raises(ValueError, match="lists 1 of DenseCap's 2 test images, but no samples"):
        tasks.find("vg-test/sample-1-seed-1").samples(tmp_path, "box")
    for image in (1, 2):
        (tmp_path / "VG_100K" / f"{image}.png").unlink()
    with pytest.raises(ValueError, match="lists 2 images, but none of them is found in"):
        tasks.find("vg/own").samples(tmp_path, "box")


def test_all_tasks_fit_on_a_screen():
    """24 lines of 80 columns, the prompt in the last one."""
    text = task_list.all_tasks()
    lines = text.splitlines()
    assert len(lines) <= 23 and max(map(len, lines)) <= 80
    listed = {line.split()[0] for line in lines}
    assert {task.family or task.name for task in tasks.TASKS.values()} | {VG_SAMPLE} <= listed


@pytest.mark.parametrize("name", [*tasks.TASKS, "vg-test/sample-10-seed-1"])
def test_one_task_in_full(name):
    task = tasks.find(name)
    text = task_list.one_task(task)
    flat = " ".join(text.split())
    assert text.startswith(f"{name}\n") and max(map(len, text.splitlines())) <= 80
    assert " ".join(task.files.split()) in flat and task.references in flat
    assert ", ".join(METRICS[metric] for metric in task.metrics) in flat and (
        task.prompt is None or repr(task.prompt) in flat
    )
    assert ("UNVERIFIED" in text) == (task.verified is False)
    for row in published.comparable(name):
        assert f"{row.meteor or '-'}" in text and row.system in flat and row.source in flat
    for row, reason in published.not_comparable(name):
        assert row.system in flat and reason in flat


@pytest.mark.parametrize(
    "name, meant",
    [
        ("refcocog-umd-val", "did you mean refcocog-umd-val/ungrouped, refcocog-umd-val/grouped"),
        ("RefCOCOg_umd_val/groupd", "did you mean refcocog-umd-val/grouped"),
        ("vqa", "did you mean shapes-vqa?"),
        ("json", "did you mean jsonl?"),
        ("vg-test/sample-N-seed-S", "numbers for N and S .vg-test/sample-1000-seed-0."),
        ("vg-test/sample-0-seed-1", "numbers for N and S"),
        (f"vg-test/sample-{'9' * 5000}-seed-1", "numbers for N and S"),
        ("\x1b[2J", r"unknown task '\\x1b\[2J'; `region-eval tasks` lists all tasks"),
        ("", "unknown task ''; `region-eval tasks`"),
    ],
)
def test_an_unknown_name_is_one_line_with_names_like_it(name, meant):
    with pytest.raises(ValueError, match=meant) as found:
        tasks.find(name)
    assert "\n" not in str(found.value) and len(str(found.value)) < 400


@pytest.mark.parametrize(
    "questions, task, named, expected",
    [
        (["What?", "Where?"], "jsonl", (), tasks.QUESTION_METRICS),
        ([None, " "], "jsonl", (), tasks.CAPTION_METRICS),
        (["What?", None], "jsonl", ("cider",), ("cider",)),
        (["What?", None], "shapes-caption", (), tasks.find("shapes-caption").metrics),
        (["What?"], None, (), tasks.QUESTION_METRICS),
    ],
)
def test_metrics_are_those_of_the_samples(questions, task, named, expected):
    assert tasks.metrics_for(questions, task and tasks.find(task), named) == expected
    assert tasks.metrics_for(questions, task and tasks.find(task), named, "DIR")[len(expected) :] == (
        "s_iou",
        "semantic_similarity",
    )


def test_questions_and_descriptions_have_no_metric_in_common():
    with pytest.raises(ValueError, match="1 of 2 samples are questions, .* specify --metrics"):
        tasks.metrics_for(["What?", None], tasks.find("jsonl"))


def test_visual_genome_questions_of_test_images_only(shared_data, monkeypatch):
    """On published records of images 1 to 5, of which none is a test image: so the split is put in place of it."""
    folder = shared_data / "visual_genome"
    assert not densecap_split("test") & {1, 2, 3, 4, 5}
    task = tasks.find("vg-regionqa/densecap-test")
    assert not task.verified and task.kind == "question" and "{question}" in task.prompt
    with pytest.raises(ValueError, match="file not found"):
        task.samples(folder / "v1.2.0", "box")


def test_prompts_of_the_protocols():
    assert tasks.find("refcocog-lmms-eval").prompt == "Provide a short description for this region."
    assert tasks.find("refcocog-lmms-eval").view == "red_box"
