"""Rerun training: finished runs, runs killed during the last save or between two logs, and skipped samples."""

import os
import shutil
import signal

import pytest

from alpha_clip_commands import region_tune
from mllm.data.build_index import build_index
from mllm.locks import locked
from tests.faults.training_runs import PROGRAMS, make_worlds
from tests.files import read_json, write_json
from tests.processes import Killed
from train import run as train_run
from train.output import TRAINING_RECORD, last_checkpoint
from train.skipped import SKIPPED, read_skipped
from train.stop_on_signal import StopOnSignal
from train.trainer import RegionTrainer

BOTH = ["region-tune", pytest.param("alpha-clip train", marks=pytest.mark.slow)]
WEIGHTS = {"region-tune": "adapter_model.safetensors", "alpha-clip train": "model.safetensors"}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    return make_worlds(tmp_path_factory.mktemp("worlds"))


def train(recipes, program, out, *flags):
    main = getattr(region_tune, PROGRAMS[program])
    return main([str(flag) for flag in (recipes[program], "--output_dir", out, *flags)])


def content(out, program):
    """The reproducible output of a run: the bytes of its weights, and its record without times."""
    record = read_json(out / TRAINING_RECORD)
    assert record.pop("times")
    assert not any("runtime" in name or "second" in name for entry in record["log"] for name in entry)
    return (out / WEIGHTS[program]).read_bytes(), record


@pytest.fixture(scope="module")
def undisturbed(recipes, tmp_path_factory):
    made = {}
    for program in PROGRAMS:
        out = tmp_path_factory.mktemp("undisturbed")
        assert train(recipes, program, out) == 0
        made[program] = out
    return made


def untrainable(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a finished run trained on")

    monkeypatch.setattr(RegionTrainer, "training_step", fail)


@pytest.mark.parametrize("program", BOTH)
@pytest.mark.parametrize(
    "flags",
    [
        (),
        pytest.param(("--save_strategy", "no"), marks=pytest.mark.slow),
        pytest.param(("--max_steps", -1, "--num_train_epochs", 1.5), marks=pytest.mark.slow),
    ],
)
def test_a_finished_run_stays_what_it_is(recipes, tmp_path, monkeypatch, capsys, program, flags):
    assert train(recipes, program, tmp_path, *flags) == 0
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    monkeypatch.setattr(train_run, "train_and_save", None)
    capsys.readouterr()
    assert train(recipes, program, tmp_path, *flags) == 0
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def killed(*args, **kwargs):
    raise Killed


def damage_nothing(out, weights):
    pass


def cut_weights(out, weights):
    (out / weights).write_bytes((out / weights).read_bytes()[:100])


def lose_weights_after_the_end(out, weights):
    (out / weights).unlink()


@pytest.mark.parametrize("program", BOTH)
@pytest.mark.parametrize("damage", [damage_nothing, pytest.param(cut_weights, marks=pytest.mark.slow)])
def test_a_run_killed_in_its_last_save_saves_again(recipes, undisturbed, tmp_path, monkeypatch, program, damage):
    with monkeypatch.context() as patch:
        patch.setattr(train_run, "write_training_record", killed)
        with pytest.raises(Killed):
            train(recipes, program, tmp_path)
    assert not (tmp_path / TRAINING_RECORD).exists()
    damage(tmp_path, WEIGHTS[program])
    untrainable(monkeypatch)
    assert train(recipes, program, tmp_path) == 0
    assert content(tmp_path, program) == content(undisturbed[program], program)
    assert last_checkpoint(tmp_path).name == "checkpoint-6"


@pytest.mark.slow
@pytest.mark.parametrize("change", [cut_weights, lose_weights_after_the_end])
def test_a_finished_model_that_is_damaged_is_saved_again(recipes, undisturbed, tmp_path, monkeypatch, change):
    program, out = "region-tune", tmp_path / "out"
    shutil.copytree(undisturbed[program], out)
    change(out, WEIGHTS[program])
    untrainable(monkeypatch)
    assert train(recipes, program, out) == 0
    assert content(out, program) == content(undisturbed[program], program)


@pytest.mark.slow
@pytest.mark.parametrize("program", BOTH)
def test_a_run_without_checkpoints_killed_in_its_last_save_trains_again(
    recipes, undisturbed, tmp_path, monkeypatch, program
):
    flags = "--save_strategy", "no"
    with monkeypatch.context() as patch:
        patch.setattr(train_run, "write_training_record", killed)
        with pytest.raises(Killed):
            train(recipes, program, tmp_path, *flags)
    assert train(recipes, program, tmp_path, *flags) == 0
    weights, record = content(tmp_path, program)
    expected, expected_record = content(undisturbed[program], program)
    assert weights == expected and record["log"] == expected_record["log"]


@pytest.mark.slow
@pytest.mark.parametrize("program", BOTH)
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_run_stopped_between_two_logs_logs_the_same(recipes, undisturbed, tmp_path, monkeypatch, program, number):
    original = StopOnSignal.on_step_end

    def stopped_at_three(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # launchers send it twice
        original(self, args, state, control, **kwargs)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(StopOnSignal, "on_step_end", stopped_at_three)
        assert train(recipes, program, tmp_path) == 128 + number
    assert signal.getsignal(number) is before
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    assert train(recipes, program, tmp_path) == 0
    assert content(tmp_path, program) == content(undisturbed[program], program)


@pytest.mark.slow
def test_evaluations_of_a_resumed_run_are_those_of_an_uninterrupted_one(recipes, tmp_path, monkeypatch):
    program, flags = "region-tune", ("--eval_strategy", "steps", "--eval_steps", 2, "--eval_on_start", "true")
    original = RegionTrainer.training_step
    calls = []

    def killed_at_four(*args, **kwargs):
        calls.append(1)
        return killed() if len(calls) == 4 else original(*args, **kwargs)

    assert train(recipes, program, tmp_path / "one", *flags) == 0
    with monkeypatch.context() as patch:
        patch.setattr(RegionTrainer, "training_step", killed_at_four)
        with pytest.raises(Killed):
            train(recipes, program, tmp_path / "two", *flags)
    assert train(recipes, program, tmp_path / "two", *flags) == 0
    assert content(tmp_path / "one", program) == content(tmp_path / "two", program)


# one output, one run


@pytest.mark.parametrize("program", BOTH)
def test_a_second_run_is_refused_and_changes_nothing(recipes, undisturbed, tmp_path, capsys, program):
    out = tmp_path / "out"
    shutil.copytree(undisturbed[program], out)
    (out / TRAINING_RECORD).unlink()
    (out / SKIPPED).write_text("kept\n")
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if not file.name.startswith(".")}
    with locked(out, inside=True):
        assert train(recipes, program, out) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error:" in line)
    assert f"is being written by process {os.getpid()} on " in line
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*") if not file.name.startswith(".")} == before


@pytest.mark.parametrize("program", BOTH)
@pytest.mark.parametrize("place", ["foreign", "data", "parent of the data"])
def test_what_is_not_a_runs_folder_is_refused(recipes, tmp_path, capsys, program, place):
    world = recipes[program].parent
    out = {"foreign": tmp_path, "data": world / "train", "parent of the data": world}[place]
    (tmp_path / "thesis.txt").write_text("years of work")
    before = sorted(file for file in out.rglob("*"))
    assert train(recipes, program, out) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert sorted(file for file in out.rglob("*")) == before


@pytest.mark.slow
def test_a_folder_inside_the_data_and_one_of_an_earlier_version_are_taken(recipes, undisturbed, tmp_path):
    program = "region-tune"
    inside = recipes[program].parent / "train" / "runs"
    assert train(recipes, program, inside, "--max_steps", 1) == 0
    shutil.rmtree(inside)
    older = tmp_path / "older"
    shutil.copytree(undisturbed[program], older)
    for file in (".made_by.json", TRAINING_RECORD):
        (older / file).unlink()
    assert train(recipes, program, older) == 0
    assert content(older, program) == content(undisturbed[program], program)


# one item, one error


def spoiled(recipes, folder):
    """A copy of the data with a too long answer, a region outside the image and a damaged image."""
    shutil.copytree(recipes["region-tune"].parent / "train", folder, ignore=shutil.ignore_patterns("region_index"))
    described = read_json(folder / "region_descriptions.json")
    described[0]["regions"][0]["phrase"] = "a word " * 400
    region = described[1]["regions"][0]
    region["x"], region["y"] = 5000, 5000
    write_json(folder / "region_descriptions.json", described)
    (folder / "VG_100K" / "3.png").write_bytes(b"\x89PNG broken")
    build_index(folder)
    return folder


def test_items_that_cannot_be_used_are_left_out_the_same_way_each_time(recipes, tmp_path, capsys):
    program, data = "region-tune", spoiled(recipes, tmp_path / "data")
    flags = (
        "--data",
        data,
        "--max_missing",
        0.5,
        "--max_steps",
        -1,
        "--num_train_epochs",
        1,
        "--turn_kinds",
        "description",
    )
    contents = []
    for workers in (0, 2):
        out = tmp_path / str(workers)
        assert train(recipes, program, out, *flags, "--dataloader_num_workers", workers) == 0
        contents.append(content(out, program))
        listed = read_skipped(out / SKIPPED)
        assert {item.name.rpartition("/")[2] for item in listed} >= {"3.png"}
    assert contents[0] == contents[1]
    record = contents[0][1]
    assert len(record["skipped_images"]) == 1 and len(record["skipped_regions"]) >= 1
    assert any("more than the 512 of the model" in item.reason for item in listed)
    capsys.readouterr()
    assert train(recipes, program, tmp_path / "refused", *flags, "--max_missing", 0.001) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error:" in line)
    assert "max_missing (0.1%) allows; all are listed in" in line and SKIPPED in line
