"""A whole evaluation: what reaches the model, differences, locks, interruptions, published numbers."""

import dataclasses
import errno
import os
import threading

import pytest
import torch

from eval import tasks
from eval.evaluate import EvalConfig, _differences, evaluate, read_samples, write_results
from eval.generate import GenerationSettings, Processes
from eval.metrics.intervals import Difference
from eval.page import Thumbnail
from eval.predictions import Prediction, read_predictions
from eval.report import ReportData
from eval.results import MetricValue, Protocol, Result, RunConfig, read_result, read_run_config
from eval.score import measure
from mllm.data.shapes import visual_genome_layout
from mllm.inference import Answer, RegionChat
from mllm.locks import locked
from tests.files import read_json, write_json, write_json_lines
from tests.processes import Killed

BOX, CROP = RunConfig(view="box"), RunConfig(view="crop")


@pytest.mark.parametrize(
    "task, config, notes, comparable",
    [
        ("refcocog-umd-val/ungrouped", BOX, [], True),
        ("refcocog-umd-val/ungrouped", RunConfig(view="mask"), [], True),
        ("refcocog-umd-val/ungrouped", RunConfig(), [], True),  # another system's file, scored
        ("refcocog-umd-val/ungrouped", CROP, [], False),
        ("refcocog-umd-val/ungrouped", RunConfig(view="box", protocol=Protocol(limit=100)), [], False),
        ("refcocog-umd-val/ungrouped", BOX, ["INCOMPLETE: 1 of 4,896 samples"], False),
        ("refcoco-unc-val/grouped", BOX, [], False),
    ],
)
def test_published_results_are_those_of_the_same_protocol(tmp_path, task, config, notes, comparable):
    predictions = [Prediction(id="1", prediction="a", references=["a"], image="x")]
    result = Result(task=task, protocol=Protocol(), items=1, metrics={"rouge_l": MetricValue(0.5)}, notes=notes)
    report = ReportData(result, config, predictions, measure(predictions, ["rouge_l"]))
    write_results(tmp_path, tasks.find(task), report, "region-eval", 0, None)
    published = read_json(tmp_path / "metrics.json")["published"]
    assert bool(published) == comparable


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    visual_genome_layout.write(folder, 3, 5, "test", progress=False)
    return folder


@pytest.fixture
def plan(data, tmp_path):
    task = tasks.find("shapes-caption")
    settings = GenerationSettings(batch_size=4, max_new_tokens=4)
    return EvalConfig(task, data, tmp_path / "out", settings, limit=9, metrics=("literal_match",), intervals=False)


@pytest.mark.parametrize(("shown", "form"), [("box", "box"), ("mask", "mask"), ("crop", "box"), ("whole", "box")])
def test_regions_are_read_in_the_form_that_is_shown(plan, shown, form):
    samples = read_samples(dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, view=shown)))
    assert {sample.regions[0].kind for sample in samples} == {form}


def say_something(self, requests, **options):
    """Answers without a model: of the region alone."""
    return [Answer("" if region is None else str(region), truncated=False) for _, region, _ in requests]


def test_differences_are_of_the_same_samples(plan):
    """Samples alone in their images have no wrong region: the base is then measured on the others only."""

    def record(number, prediction):
        return Prediction(id=str(number), prediction=prediction, references=["a"], meta={"image_id": number})

    main = [record(0, "a"), record(1, "a"), record(2, "b"), record(3, "b"), record(4, "a")]
    wrong = [record(2, "a"), record(3, "b"), record(4, "b")]
    metrics = ("literal_match",)
    found = _differences(plan, main, measure(main, metrics), wrong, measure(wrong, metrics))
    # of samples 2, 3, 4: 0 1, 0 0, 1 0
    assert found["literal_match"].value == pytest.approx(0)
    same = _differences(plan, main, measure(main, metrics), main, measure(main, metrics))
    assert same["literal_match"] == Difference(0.0, 0.0, 0.0, 1.0)
    wrong[0] = record(2, "b")
    found = _differences(plan, main, measure(main, metrics), wrong, measure(wrong, metrics))
    assert found["literal_match"].value == pytest.approx(-1 / 3)


@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "No space left on device")], ids=["killed", "full"])
def test_stopped_at_any_moment_and_rerun_it_gives_the_same_bytes(embedded, plan, monkeypatch, error):
    """At every system call that writes: predictions and metrics are those of an uninterrupted run."""
    monkeypatch.setattr(RegionChat, "answer_each", say_something)
    monkeypatch.setattr(
        "mllm.fingerprints.directory_fingerprint", lambda *arguments: "same"
    )  # a tenth of a second each
    monkeypatch.setattr("mllm.fingerprints.added_weights_fingerprint", lambda model: "same")
    monkeypatch.setattr("eval.report.thumbnail", lambda *arguments: Thumbnail(problem="not drawn"))
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


def test_a_run_of_version_0_1_0_is_resumed(embedded, plan, monkeypatch):
    """Its settings have other keys, and its folder has no marker."""
    monkeypatch.setattr(RegionChat, "answer_each", say_something)
    evaluate(plan, lambda: RegionChat(*embedded), "embedded")
    (plan.out / ".made_by.json").unlink()
    settings = read_json(plan.out / "run.json")
    former = {"view": "region_input", "prompt_template": "wording", "quantized": "quantised"}
    former["alpha_and_adapter"] = "alpha and adapter"
    protocol = {"item": "region", "items": 9, "references": "1", "region form": "box", "limited to": 9}
    settings = {former.get(key, key): value for key, value in settings.items()} | {"protocol": protocol}
    write_json(plan.out / "run.json", settings)
    before = (plan.out / "predictions.jsonl").read_bytes()
    evaluate(plan, lambda: RegionChat(*embedded), "embedded")
    assert (plan.out / "predictions.jsonl").read_bytes() == before
    write_json(plan.out / "run.json", settings | {"wording": "What?"})
    with pytest.raises(ValueError, match="belongs to a run with other prompt_template"):
        evaluate(plan, lambda: RegionChat(*embedded), "embedded")


def test_files_of_version_0_1_0(tmp_path):
    (tmp_path / "run.json").write_text("""{"task": "shapes-caption", "protocol": {"item": "region", "items": 24,
        "references": "1", "region form": "box", "limited to": null}, "data": "shapes", "samples": "0ab8e0",
        "model": "embedded", "weights": "3b7723", "quantised": "None", "alpha and adapter": "b9042d",
        "dtype": "torch.float32", "region_input": "red-box", "strength": 1.0, "geometry": "pad", "prompt": "<image>",
        "wording": null, "decoding": "greedy", "max_new_tokens": 64, "batch_size": 8, "version": "0.1.0"}""")
    config = read_run_config(tmp_path / "run.json")
    assert (config.view, config.quantized, config.alpha_and_adapter) == ("red_box", "None", "b9042d")
    assert config.protocol == Protocol(item="region", items=24, references="1", region_form="box")
    value = '{"value": 0.5, "low": null, "high": null, "interval": null}'
    (tmp_path / "metrics.json").write_text(f"""{{"task": "shapes-caption", "protocol": {{"items": 24}}, "items": 24,
        "metrics": {{"exactly right": {value}, "BLEU-4": {value}, "CIDEr": {value}}},
        "by": {{"same class": {{"0": {{"items": 6, "exactly right": 1.0, "CIDEr (df of all items)": 10.0}}}}}},
        "length": {{"words a prediction": 5.0, "words a reference": 5.0}}, "counts": {{"empty predictions": 0}},
        "notes": [], "inputs": {{"box": {{"items": 24, "metrics": {{"exactly right": {value}}}, "notes": []}},
        "wrong": {{"items": 24, "metrics": {{"exactly right": {value}}}, "notes": [],
        "shown": {{"exactly right": {value}}}}}}}, "published": [{{"system": "GRiT", "trained": null, "METEOR": 17.1,
        "CIDEr": 142.0, "protocol": "vg-test/full", "source": "arXiv", "verified": true, "note": null,
        "excluded": null}}], "command": "region-eval run", "versions": {{}}, "seed": 0}}""")
    result = read_result(tmp_path / "metrics.json")
    assert list(result.metrics) == ["literal_match", "bleu_4", "cider"]
    assert result.by["same_class"]["0"] == {"items": 6, "literal_match": 1.0, "cider_df_of_all_items": 10.0}
    assert result.views["other_region"].shown_region_metrics == {"literal_match": MetricValue(0.5)}
    assert result.published[0].cider == 142.0 and result.length["words_per_prediction"] == 5.0


def test_a_view_of_another_type_in_a_file_of_version_0_1_0(tmp_path):
    (tmp_path / "run.json").write_text('{"region_input": ["wrong"]}')
    with pytest.raises(ValueError, match="cannot read .*run.json"):
        read_run_config(tmp_path / "run.json")


def test_views_of_a_run_of_version_0_1_0_are_resumed_in_their_folders(plan):
    assert plan.folder("no_image") == plan.out / "views" / "no_image"
    (plan.out / "controls" / "blind").mkdir(parents=True)
    assert plan.folder("no_image") == plan.out / "controls" / "blind" and plan.folder("box") == plan.out


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
