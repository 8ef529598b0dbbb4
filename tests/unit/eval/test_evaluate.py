"""A whole evaluation: what reaches the model, differences, locks, interruptions, published numbers."""

import dataclasses
import errno
import os
import threading

import pytest
import torch

from eval import tasks
from eval.evaluate import Plan, _differences, evaluate, read_samples, write_results
from eval.generate import Processes, Settings
from eval.page import Picture
from eval.predictions import read_predictions
from eval.report import Results
from eval.score import measure
from mllm.data.shapes import visual_genome_layout
from mllm.inference import Answer, RegionChat
from mllm.locks import locked
from tests.files import read_json, write_json_lines
from tests.processes import Killed

RECORD = {"protocol": {"limited to": None}, "region_input": "box"}


@pytest.mark.parametrize(
    "task, record, notes, beside",
    [
        ("refcocog-umd-val/ungrouped", RECORD, [], True),
        ("refcocog-umd-val/ungrouped", {**RECORD, "region_input": "mask"}, [], True),
        ("refcocog-umd-val/ungrouped", {"protocol": {}}, [], True),  # another system's file, scored
        ("refcocog-umd-val/ungrouped", {**RECORD, "region_input": "crop"}, [], False),
        ("refcocog-umd-val/ungrouped", {**RECORD, "protocol": {"limited to": 100}}, [], False),
        ("refcocog-umd-val/ungrouped", RECORD, ["INCOMPLETE: 1 of 4,896 samples"], False),
        ("refcoco-unc-val/grouped", RECORD, [], False),
    ],
)
def test_published_numbers_stand_beside_their_own_protocol_only(tmp_path, task, record, notes, beside):
    entry = {"value": 0.5, "low": None, "high": None, "interval": None}
    records = [{"id": "1", "prediction": "a", "references": ["a"], "meta": {}, "image": "x", "region": None}]
    metrics = {"task": task, "protocol": {}, "items": 1, "metrics": {"ROUGE-L": entry}, "by": {}, "notes": notes}
    results = Results({**metrics, "inputs": {}}, record, records, measure(records, ["ROUGE-L"]))
    write_results(tmp_path, tasks.find(task), results, "region-eval", 0, None)
    published = read_json(tmp_path / "metrics.json")["published"]
    assert bool(published) == beside


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    visual_genome_layout.write(folder, 3, 5, "test", progress=False)
    return folder


@pytest.fixture
def plan(data, tmp_path):
    task = tasks.find("shapes-caption")
    settings = Settings(batch_size=4, max_new_tokens=4)
    return Plan(task, data, tmp_path / "out", settings, limit=9, metrics=("exactly right",), intervals=False)


@pytest.mark.parametrize(("shown", "form"), [("box", "box"), ("mask", "mask"), ("crop", "box"), ("whole", "box")])
def test_regions_are_read_in_the_form_that_is_shown(plan, shown, form):
    samples = read_samples(dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, region_input=shown)))
    assert {sample.regions[0].kind for sample in samples} == {form}


def say_something(self, requests, **options):
    """Answers without a model: of the region alone."""
    return [Answer("" if region is None else str(region), truncated=False) for _, region, _ in requests]


def test_differences_are_of_the_same_samples(plan):
    """Samples alone in their images have no wrong region: the base is then measured on the others only."""

    def record(number, prediction):
        return {"id": str(number), "prediction": prediction, "references": ["a"], "meta": {"image_id": number}}

    main = [record(0, "a"), record(1, "a"), record(2, "b"), record(3, "b"), record(4, "a")]
    wrong = [record(2, "a"), record(3, "b"), record(4, "b")]
    metrics = ("exactly right",)
    found = _differences(plan, main, measure(main, metrics), wrong, measure(wrong, metrics))
    # of samples 2, 3, 4: 0 1, 0 0, 1 0
    assert found["exactly right"]["value"] == pytest.approx(0)
    same = _differences(plan, main, measure(main, metrics), main, measure(main, metrics))
    assert same["exactly right"] == {"value": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    wrong[0]["prediction"] = "b"
    found = _differences(plan, main, measure(main, metrics), wrong, measure(wrong, metrics))
    assert found["exactly right"]["value"] == pytest.approx(-1 / 3)


@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "No space left on device")], ids=["killed", "full"])
def test_stopped_at_any_moment_and_rerun_it_gives_the_same_bytes(embedded, plan, monkeypatch, error):
    """At every system call that writes: predictions and metrics are those of an uninterrupted run."""
    monkeypatch.setattr(RegionChat, "answer_each", say_something)
    monkeypatch.setattr(
        "mllm.fingerprints.directory_fingerprint", lambda *arguments: "same"
    )  # a tenth of a second each
    monkeypatch.setattr("mllm.fingerprints.added_weights_fingerprint", lambda model: "same")
    monkeypatch.setattr("eval.report.picture_of", lambda *arguments: Picture(problem="not drawn"))
    real = {name: getattr(os, name) for name in ("write", "fsync", "replace", "ftruncate")}

    def run(folder, at=None):
        calls = 0

        def failing(name):
            def call(*arguments):
                nonlocal calls
                calls += 1
                if at is None or calls < at:
                    return real[name](*arguments)
                if name == "write" and calls == at:
                    real[name](arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise error

            return call

        with pytest.MonkeyPatch.context() as patch:
            for name in real:
                patch.setattr(os, name, failing(name))
            evaluate(dataclasses.replace(plan, out=folder), lambda: RegionChat(*embedded), "embedded")
        return calls

    calls = run(plan.out)
    names = ("predictions.jsonl", "metrics.json", "report.html")
    whole = [(plan.out / name).read_bytes() for name in names]
    assert calls > 20
    for number in range(1, calls + 1):
        place = plan.out.with_name(f"out {number}")
        with pytest.raises((type(error), ValueError)):
            run(place, number)
        run(place)
        assert [(place / name).read_bytes() for name in names] == whole


def test_a_second_process_is_refused_before_it_loads_a_model(embedded, plan, monkeypatch):
    monkeypatch.setattr(RegionChat, "answer_each", say_something)
    plan.out.mkdir()
    with (
        locked(plan.out, inside=True),
        pytest.raises(ValueError, match=f"is being written by process {os.getpid()} on "),
    ):
        evaluate(plan, lambda: pytest.fail("loaded"), "embedded")
    evaluate(plan, lambda: RegionChat(*embedded), "embedded")  # the lock of one that ended does not block


def test_what_others_wrote_is_never_an_output(embedded, plan, data, monkeypatch):
    monkeypatch.setattr(RegionChat, "answer_each", say_something)
    thesis = plan.out / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("mine")
    (plan.out / "run.json").write_text("{}")
    for out in (plan.out, data, data.parent):
        with pytest.raises(ValueError, match=r"choose another folder"):
            evaluate(dataclasses.replace(plan, out=out), lambda: pytest.fail("loaded"), "embedded")
    assert sorted(file.name for file in plan.out.iterdir()) == ["run.json", "thesis.tex"]


def test_a_run_of_an_earlier_version_is_ours(embedded, plan, monkeypatch):
    monkeypatch.setattr(RegionChat, "answer_each", say_something)
    evaluate(plan, lambda: RegionChat(*embedded), "embedded")
    (plan.out / ".made_by.json").unlink()
    evaluate(plan, lambda: RegionChat(*embedded), "embedded")


def test_too_many_samples_without_a_prediction_are_refused_even_if_missing_ones_are_allowed(tmp_path):
    good = {"id": 0, "prediction": "a", "references": ["a"]}
    bad = {"id": 0, "error": "cannot read the image", "references": ["a"]}
    file = tmp_path / "predictions.jsonl"

    def read(number_of_good, **options):
        lines = [{**row, "id": n} for n, row in enumerate([good] * number_of_good + [bad] * 20)]
        write_json_lines(file, lines)
        return read_predictions(file, allow_missing=True, **options)

    with pytest.raises(ValueError, match=r"20 of 39 samples have no prediction .*than --max-errors 0.5 allows"):
        read(19)
    for records, notes in (read(20), read(19, max_errors=0.6)):
        assert len(records) in (19, 20) and "INCOMPLETE" in notes[0]
    with pytest.raises(ValueError, match="than --max-errors 0.2 allows"):
        read(20, max_errors=0.2)


def test_all_processes_of_a_refused_run_end(monkeypatch):
    """Two processes, as two threads: what one raises, the other reports, instead of waiting for it."""
    said, barrier, ends = [None, None], threading.Barrier(2, timeout=20), {}

    def gather(problems, problem):
        said[int(threading.current_thread().name)] = problem
        barrier.wait()
        problems[:] = said
        barrier.wait()

    def process(rank):
        try:
            with Processes(rank, 2).together():
                if rank == 0:
                    raise ValueError("the folder is in use")
        except ValueError as error:
            ends[rank] = str(error)

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    threads = [threading.Thread(target=process, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert ends == {0: "the folder is in use", 1: "process 0 of this run failed: the folder is in use"}
