"""`region-eval` from files to report, on synthetic scenes."""

import errno
import itertools
import json
import os
import re
import shutil
import sys

import pytest
import torch

from alpha_clip_commands.region_chat import main as region_chat
from alpha_clip_commands.region_eval import main
from mllm.data.readers.visual_genome import read_region_questions
from mllm.data.shapes import visual_genome_layout
from mllm.locks import locked
from tests.files import read_json, read_json_lines, write_json, write_json_lines

FAST = ["--metrics", "literal_match", "rouge_l"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    visual_genome_layout.write(folder, 6, 11, "test", progress=False)
    return folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run with all views."""
    out = tmp_path_factory.mktemp("runs") / "all"
    assert main(["run", "--task", "shapes-caption", "--data", str(data), "--out", str(out), "--all-views", *FAST]) == 0
    return out


def read(out):
    return read_json(out / "metrics.json")


def lines(out):
    return read_json_lines(out / "predictions.jsonl")


def fails(capsys, *arguments):
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stopped:  # argparse
        code = stopped.code
    assert code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(("region-eval: error: ", f"region-eval {arguments[0]}: error: "))
    return error


def test_the_answers_depend_on_the_region(finished):
    found = read(finished)
    views = {name: entry["metrics"]["literal_match"]["value"] for name, entry in found["views"].items()}
    assert list(views) == ["box", "whole", "other_region", "no_image", "crop", "blur", "red_box"]
    assert views["box"] > 0.8 and views["whole"] < 0.3 and views["other_region"] < 0.1
    assert found["views"]["other_region"]["shown_region_metrics"]["literal_match"]["value"] > 0.8
    assert found["metrics"] == found["views"]["box"]["metrics"]
    assert "<image>" in read_json(finished / "run.json")["prompt"]
    assert found["items"] == len(lines(finished)) and "same_class" in found["by"]
    assert found["command"].startswith("region-eval run --task shapes-caption")
    assert {"torch", "transformers", "pycocoevalcap"} <= found["versions"].keys()


def test_the_report_is_one_file_with_the_numbers(finished):
    page = (finished / "report.html").read_text()
    value = read(finished)["metrics"]["literal_match"]["value"]
    assert f"{100 * value:.1f}" in page and "red_box" in page and "data:image/" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)


def test_an_equal_run_continues_and_another_is_refused(finished, data, capsys):
    before = (finished / "predictions.jsonl").read_bytes()
    run = ["run", "--task", "shapes-caption", "--data", data, "--out", finished, *FAST]
    assert main([str(argument) for argument in run]) == 0
    assert (finished / "predictions.jsonl").read_bytes() == before
    assert "other prompt, prompt_template" in fails(capsys, *run, "--prompt", "What?")
    assert "other batch_size" in fails(capsys, *run, "--batch-size", 5)
    assert "view" in fails(capsys, *run, "--view", "mask")
    assert "strength" in fails(capsys, *run, "--strength", "0.5")
    assert "samples" in fails(capsys, *run, "--limit", 3)


@pytest.mark.slow
def test_two_processes_give_the_same_bytes(data, tmp_path, processes):
    """The batches, and so the file, are those of one process."""
    run = ["run", "--task", "shapes-caption", "--data", str(data), "--batch-size", "4", *FAST]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # as torchrun sets it
        assert main([*run, "--out", str(tmp_path / "one")]) == 0
    finally:
        torch.set_num_threads(threads)
    for rank in processes.start_ranks(
        "alpha_clip_commands.region_eval:main", [*run, "--out", tmp_path / "two"], cwd=data.parent
    ):
        assert rank.wait() == 0, rank.output()
    one, two = ((tmp_path / name / "predictions.jsonl").read_bytes() for name in ("one", "two"))
    assert one == two
    shares = [len(part.read_text().splitlines()) for part in (tmp_path / "two" / "parts").iterdir()]
    assert len(shares) == 2 and min(shares) >= 3  # both worked


def test_scoring_the_file_again_gives_the_same(finished, tmp_path):
    assert main(["score", str(finished), "--out", str(tmp_path / "s"), "--task", "shapes-caption", *FAST]) == 0
    assert read(tmp_path / "s")["metrics"] == read(finished)["metrics"]
    assert main(["score", str(finished), "--out", str(finished), *FAST]) == 2  # the metrics of the run are kept
    shuffled = tmp_path / "p.jsonl"
    rows = (finished / "predictions.jsonl").read_text().splitlines(keepends=True)
    shuffled.write_text("".join(reversed(rows)))
    assert main(["score", str(shuffled), "--out", str(tmp_path / "r"), *FAST]) == 0
    values = {name: entry["value"] for name, entry in read(tmp_path / "r")["metrics"].items()}
    assert values == pytest.approx({name: entry["value"] for name, entry in read(finished)["metrics"].items()})


def test_another_systems_results(tmp_path, capsys):
    results, references = tmp_path / "results.json", tmp_path / "annotations.json"
    write_json(results, [{"image_id": 1, "caption": "a red bus"}, {"image_id": 2, "caption": "a dog"}])
    annotations = [{"id": i + 5, "image_id": i, "caption": "a red bus"} for i in (1, 2)]
    write_json(references, {"images": [{"id": 1}, {"id": 2}], "annotations": annotations})
    score = ["score", str(results), "--references", str(references), "--out", str(tmp_path / "out")]
    assert main([*score, "--metrics", "exact_match"]) == 0
    assert read(tmp_path / "out")["metrics"]["exact_match"]["value"] == 0.5
    assert "50.0" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "out"), str(tmp_path / "out" / "predictions.jsonl")]) == 0
    assert "4,896 items" in fails(capsys, *score, "--task", "refcocog-umd-val/ungrouped")


def test_an_export_is_not_written_into_a_run(finished, tmp_path, capsys):
    before = sorted(finished.rglob("*"))
    assert "reads; choose another folder" in fails(capsys, "export", finished, "--out", finished)
    assert "reads" in fails(capsys, "export", finished / "predictions.jsonl", "--out", finished)
    assert "reads" in fails(capsys, "export", finished, "--out", finished.parent)
    assert main(["export", str(finished), "--out", str(tmp_path / "new" / "coco")]) == 0
    other = tmp_path / "new" / "coco" / "p.jsonl"
    other.write_bytes((finished / "predictions.jsonl").read_bytes())
    assert "written by another command (evaluation)" in fails(capsys, "export", other, "--out", finished)
    assert sorted(finished.rglob("*")) == before


def test_compare(finished, tmp_path, capsys):
    whole = finished / "views" / "whole"
    assert main(["compare", str(finished), str(whole), "--html", str(tmp_path / "c.html")]) == 0
    text = capsys.readouterr().out
    assert "literal match" in text and "Largest changes" in text
    assert "data:image/" in (tmp_path / "c.html").read_text()
    assert "ids" in fails(capsys, "compare", finished, write_half(finished, tmp_path))


def write_half(finished, tmp_path):
    half = tmp_path / "half.jsonl"
    half.write_text("".join((finished / "predictions.jsonl").read_text().splitlines(keepends=True)[:5]))
    return half


@pytest.mark.slow
def test_a_missing_picture_stops_before_the_model_unless_allowed(data, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    (broken / "VG_100K" / "3.png").unlink()
    run = ["run", "--task", "shapes-caption", "--data", broken, "--out", tmp_path / "out", *FAST]
    assert "1 of 6 images are missing" in fails(capsys, *run) and not (tmp_path / "out").exists()
    assert main([str(argument) for argument in (*run, "--allow-missing")]) == 0
    found = read(tmp_path / "out")
    assert any("INCOMPLETE" in note for note in found["notes"]) and found["items"] < len(lines(tmp_path / "out"))
    # after the fix, the same run completes without a warning
    shutil.copy(data / "VG_100K" / "3.png", broken / "VG_100K" / "3.png")
    assert main([str(argument) for argument in run]) == 0
    assert not any("INCOMPLETE" in note for note in read(tmp_path / "out")["notes"])
    assert read(tmp_path / "out")["items"] == len(lines(tmp_path / "out"))


def test_questions(data, tmp_path):
    run = ["run", "--task", "shapes-vqa", "--data", str(data), "--out", str(tmp_path / "q"), "--limit", "12"]
    assert main([*run, "--view", "mask"]) == 0
    found = read(tmp_path / "q")
    assert found["metrics"]["exact_match"]["value"] > 0.8 and "type" in found["by"]
    assert "not comparable" in found["notes"][0]


def test_a_file_of_ones_own(data, tmp_path):
    own = tmp_path / "mine.jsonl"
    scene = lines_of(data)[0]
    write_json_lines(own, [{**scene, "image": os.path.relpath(data / scene["image"], tmp_path)}])
    assert main(["run", "--task", "jsonl", "--data", str(own), "--out", str(tmp_path / "o"), *FAST]) == 0
    assert read(tmp_path / "o")["items"] == 1


def test_questions_of_ones_own_are_scored_as_questions(data, tmp_path, capsys):
    """Two regions of one image with different answers: a dropped or shifted region changes the score."""
    own = data / "questions.jsonl"
    samples = [sample for sample in read_region_questions(data) if sample.question.startswith("What colour")]
    first, second = next(
        (one, two)
        for one, two in itertools.combinations(samples, 2)
        if one.image == two.image and one.references != two.references
    )
    rows = [
        {"id": s.id, "image": os.path.relpath(s.image, data), "region": s.regions[0].to_json(), "question": s.question}
        | {"answer": f"{s.references[0].title()}."}
        for s in (first, second)
    ]
    write_json_lines(own, rows)
    run = ["run", "--task", "jsonl", "--data", own, "--out", tmp_path / "q"]
    assert main([str(argument) for argument in run]) == 0
    found = {name: entry["value"] for name, entry in read(tmp_path / "q")["metrics"].items()}
    assert found == {"exact_match": 1, "contains": 1, "token_f1": 1}
    own.write_text(own.read_text() + json.dumps({**rows[0], "id": "d", "question": None}) + "\n")
    assert "2 of 3 samples are questions" in fails(capsys, *run[:-1], tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


def lines_of(data):
    from mllm.data.readers.visual_genome import read_regions

    sample = next(read_regions(data))
    relative = os.path.relpath(sample.image, data)
    return [{"image": relative, "region": sample.regions[0].to_json(), "answer": list(sample.references)}]


def test_refcocog_layout_goes_through_the_same_command(data, tmp_path, capsys):
    run = ["run", "--task", "refcocog-umd-val/grouped", "--data", data, "--out", tmp_path / "r", *FAST]
    assert "2,573 items" in fails(capsys, *run)
    assert main([str(argument) for argument in (*run, "--limit", 8)]) == 0
    assert read(tmp_path / "r")["metrics"]["literal_match"]["value"] > 0.6 and not read(tmp_path / "r")["published"]


def test_tasks(capsys):
    assert main(["tasks"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("task ") and "\nrefcocog-umd-val/ungrouped " in text and len(text.splitlines()) < 24
    assert main(["tasks", "refcocog-umd-val/ungrouped"]) == 0
    text = capsys.readouterr().out
    assert "UNVERIFIED" in text and "Alpha-CLIP + LLaVA-1.5-7B" in text
    assert "did you mean shapes-caption, shapes-novel, shapes-vqa?" in fails(capsys, "tasks", "shapes")


def test_bad_input(data, tmp_path, capsys):
    out = ["--out", tmp_path / "x"]
    run = ["run", "--data", data, *out]
    assert "unknown task" in fails(capsys, *run, "--task", "refcoco")
    assert "novel" in fails(capsys, *run, "--task", "shapes-novel")
    assert "test.json" in fails(capsys, *run, "--task", "vg-test/full")
    assert "expected 1 or more" in fails(capsys, *run, "--task", "shapes-caption", "--batch-size", 0)
    assert "strength" in fails(capsys, *run, "--task", "shapes-caption", "--strength", 2)
    assert "--prompt is empty" in fails(capsys, *run, "--task", "shapes-caption", "--prompt", " ")
    assert "metrics from" in fails(capsys, *run, "--task", "shapes-caption", "--metrics", "SPICE")
    assert "omit --view" in fails(capsys, *run, "--task", "refcocog-lmms-eval", "--view", "box")
    (tmp_path / "empty.jsonl").write_text("")
    assert "is empty" in fails(capsys, "score", tmp_path / "empty.jsonl", *out)
    assert "predictions not found" in fails(capsys, "score", tmp_path / "no.jsonl", *out)
    assert "two or more" in fails(capsys, "compare", tmp_path / "empty.jsonl")
    assert "directory" in fails(capsys, *run, "--task", "shapes-caption", "--model", tmp_path / "none")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_second_process_is_refused_on_the_command_line(data, finished, tmp_path, capsys):
    out = tmp_path / "s"
    score = ["score", finished, "--out", out, *FAST]
    out.mkdir()
    with locked(out, inside=True):
        assert f"is being written by process {os.getpid()}" in fails(capsys, *score)
    assert main([str(argument) for argument in score]) == 0
    before = read(out)
    assert main([str(argument) for argument in score]) == 0 and read(out) == before
    run = ["run", "--task", "shapes-caption", "--data", data, *FAST]
    assert "not written by this command" in fails(capsys, *run, "--out", out)  # a folder of scores is not a run
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "metrics.json").write_text("{}")  # written by another program
    assert "not written by this command" in fails(capsys, "score", finished, "--out", tmp_path / "t", *FAST)
    assert "reads" in fails(capsys, "score", out, "--out", out, *FAST)


def test_a_full_disk_leaves_the_metrics_that_were_there(data, tmp_path, capsys, monkeypatch):
    run = ["run", "--task", "shapes-caption", "--data", str(data), "--out", str(tmp_path / "r"), "--limit", "4", *FAST]
    assert main(run) == 0
    names = ("predictions.jsonl", "metrics.json", "report.html")
    before = [(tmp_path / "r" / name).read_bytes() for name in names]

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert "No space left on device" in fails(capsys, *run)
    assert [(tmp_path / "r" / name).read_bytes() for name in names] == before


@pytest.mark.parametrize("arguments", [["tasks"], ["--help"], ["run", "--help"]], ids=" ".join)
@pytest.mark.parametrize("command", [main, region_chat], ids=["region-eval", "region-chat"])
def test_a_closed_pipe_ends_quietly(command, arguments, monkeypatch, capsys):
    if command is region_chat and arguments != ["--help"]:
        arguments = ["--version"]
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert command(arguments) == 141
        pipe.flush()  # as the interpreter does at exit
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


def test_closed_pipes_for_errors_too(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        assert main(["compare", "missing.jsonl"]) == 2
        pipe.flush()
        monkeypatch.undo()
