"""`region-tune` in processes: three launchers on one or two ranks, killed, stopped, and with a full disk."""

import os
import resource
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

import mllm
from alpha_clip_commands import alpha_clip, region_tune
from mllm.convert.export import export
from mllm.data.shapes import visual_genome_layout
from tests.files import ROOT, read_json
from tests.tiny import build_tiny_llava, save_model
from tests.training import BIN, assert_equal_runs, launch, losses, recipe_arguments, write_splits
from train.output import COMPLETE, last_checkpoint
from train.stop_on_signal import StopOnSignal

REGION_TUNE = str(BIN / "region-tune")
ALPHA = "patch_embedding.alpha.weight"
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model (nonzero alpha weight), data and a recipe."""
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "start", *build_tiny_llava(alpha_std=0.02))
    write_splits(visual_genome_layout, folder, 6)
    (folder / "recipe.yaml").write_text(
        f"""
model: {folder / "start"}
data: [{folder / "train"}, {folder / "val"}]
lora_r: 4
lora_dropout: 0.0
train_parts: [multi_modal_projector, alpha]
learning_rate: 1.0e-2
max_steps: 6
per_device_train_batch_size: 4
logging_steps: 1
save_strategy: "no"
use_cpu: true
disable_tqdm: true
""",
        encoding="utf-8",
    )
    return folder


def tune(world, out, *flags):
    assert region_tune.main(recipe_arguments(world, out, *flags)) == 0
    return out


@pytest.fixture(scope="module")
def undisturbed(world):
    return tune(world, world / "undisturbed")


def folder_with_a_train_file(world):
    """A folder with files that must not be imported."""
    folder = world / "work"
    folder.mkdir(exist_ok=True)
    for name in ("train", "eval", "mllm"):
        (folder / f"{name}.py").write_text("raise RuntimeError('the wrong file')\n")
    return folder


def tune_with(command, world, out, *flags):
    """Run a launcher that must succeed, and return its output."""
    cwd = ROOT if MODULE in command else folder_with_a_train_file(world)
    # A single process uses as many threads as this one, because rounding depends on it.
    one_thread = command[0] != REGION_TUNE
    code, output = launch(command, recipe_arguments(world, out, *flags), cwd, one_thread, timeout=150)
    assert code == 0, output[-3000:]
    return output


# Two ranks of two = one of four. Measured worst differences of an adapter weight (largest weight 0.2): ZeRO-2 2.7e-6,
# ZeRO-3 5.8e-5; other losses of a step 1e-5.
TORCHRUN = (BIN / "torchrun", "--standalone", "--nproc_per_node", "2")
DEEPSPEED = (BIN / "deepspeed", "--num_accelerators", "2", "--master_port", "29611")
MODULE = "alpha_clip_commands.region_tune"  # in a folder without a train.py; the documented commands run in one with it


@pytest.mark.parametrize(
    ("command", "stage", "tolerance"),
    [
        pytest.param((*TORCHRUN, "--no-python", REGION_TUNE), "zero3", 5e-4, marks=pytest.mark.slow),
        pytest.param((*DEEPSPEED, "--no_python", "region-tune"), "zero2", 5e-5, marks=pytest.mark.slow),
        pytest.param((*DEEPSPEED, "--module", MODULE), "zero1", 5e-5, marks=pytest.mark.slow),
        pytest.param((*TORCHRUN, "--no-python", "region-tune"), None, 5e-5, marks=pytest.mark.slow),
        pytest.param((*TORCHRUN, "-m", MODULE), "zero1", 5e-5, marks=pytest.mark.slow),
        pytest.param((BIN / "region-tune",), None, 5e-5, marks=pytest.mark.slow),
    ],
    ids=["torchrun-zero3", "deepspeed-zero2", "deepspeed-module", "torchrun", "torchrun-module", "region-tune"],
)
def test_ranks_learn_what_one_process_learns(world, undisturbed, tmp_path, command, stage, tolerance):
    two = command[0].name != "region-tune"
    flags = ["--per_device_train_batch_size", 2] if two else []
    flags += ["--deepspeed", stage] if stage else []
    output = tune_with(command, world, tmp_path, *flags)
    assert "multi_modal_projector" in output  # the table of trained parameters, once
    assert output.count("language_model   ") == 1
    assert_equal_runs(undisturbed, tmp_path, ADAPTER, tolerance, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_bfloat16(world, tmp_path, stage):
    """In one process trained weights are float32, under DeepSpeed bfloat16 with a copy in float32: 8 bits of mantissa,
    and 2e-3 between the losses of a step (measured: 1e-3).
    """
    flags = "--bf16", "true", "--dtype", "bfloat16", "--gradient_checkpointing", "true"
    tune(world, tmp_path / "one", *flags)
    two = ["--per_device_train_batch_size", 2, "--deepspeed", stage]
    tune_with((*TORCHRUN, "-m", MODULE), world, tmp_path / "two", *flags, *two)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=2e-3)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    assert all(bool(tensor.any()) for name, tensor in second.items() if "lora_B" in name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("zero", [True, False])
def test_alpha_starts_as_loaded_under_every_stage(world, tmp_path, stage, zero):
    """With a learning rate of zero, the saved weights are the loaded ones."""
    start = world / "start"
    if zero:
        model, processor = build_tiny_llava()
        model.model.vision_tower.embeddings.patch_embedding.alpha.weight.data.zero_()
        start = tmp_path / "start"
        save_model(start, model, processor)
    flags = ["--model", start, "--deepspeed", stage, "--per_device_train_batch_size", 2, "--learning_rate", 0]
    tune_with((*TORCHRUN, "-m", MODULE), world, tmp_path / "out", *flags, "--max_steps", 1)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    (alpha,) = (tensor for name, tensor in stored.items() if name.endswith(ALPHA))
    loaded = load_file(start / "model.safetensors")
    (expected,) = (tensor for name, tensor in loaded.items() if name.endswith(ALPHA))
    assert bool(expected.any()) != zero
    assert torch.equal(alpha, expected)


@pytest.mark.slow
def test_accumulating_eight_batches_of_one_is_a_batch_of_eight(world, tmp_path):
    tune(world, tmp_path / "a", "--per_device_train_batch_size", 8)
    tune(world, tmp_path / "b", "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 8)
    assert_equal_runs(tmp_path / "a", tmp_path / "b", ADAPTER, 5e-5, 5e-5)


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(world, undisturbed, tmp_path):
    tune(world, tmp_path, "--gradient_checkpointing", "true")
    assert_equal_runs(undisturbed, tmp_path, ADAPTER, 1e-6, 1e-6)


@pytest.mark.slow
def test_workers_change_nothing(world, undisturbed, tmp_path):
    tune(world, tmp_path, "--dataloader_num_workers", 2)
    assert_equal_runs(undisturbed, tmp_path, ADAPTER, 0, 0)


def test_evaluation_while_training(world, tmp_path):
    flags = (
        "--eval_strategy",
        "steps",
        "--eval_steps",
        3,
        "--eval_samples",
        9,
        "--eval_metrics",
        "literal_match",
        "cider",
    )
    tune(world, tmp_path, *flags, "--report_to", "tensorboard")
    log = read_json(tmp_path / "training_record.json")["log"]
    for name in ("eval_loss", "eval_literal_match", "eval_cider_frozen_df"):
        assert len([entry for entry in log if name in entry]) == 2, name
    assert list(tmp_path.rglob("events.out.tfevents.*"))


SAVING = ("--save_strategy", "steps", "--save_steps", 2, "--save_total_limit", 2)


def until_a_checkpoint(started, out):
    while started.poll() is None and last_checkpoint(out) is None:
        time.sleep(0.01)


def test_two_processes_learn_what_one_does(world, undisturbed, tmp_path, processes):
    flags = recipe_arguments(world, tmp_path, "--per_device_train_batch_size", 2)
    ranks = processes.start_ranks("alpha_clip_commands.region_tune:main", flags)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].output()[-3000:]
    outputs = [rank.output() for rank in ranks]
    assert [output.count("language_model   ") for output in outputs] == [1, 0]  # the table of trained parameters
    assert_equal_runs(undisturbed, tmp_path, ADAPTER, 5e-5, 5e-5)


def test_a_killed_run_goes_on_to_the_same_end(world, undisturbed, tmp_path, processes):
    started = processes.start("alpha_clip_commands.region_tune:main", recipe_arguments(world, tmp_path, *SAVING))
    until_a_checkpoint(started, tmp_path)
    started.kill_group()
    assert started.wait() == -signal.SIGKILL
    assert last_checkpoint(tmp_path) is not None
    tune(world, tmp_path, *SAVING)
    assert_equal_runs(undisturbed, tmp_path, ADAPTER, 0, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_a_signal_to_all_processes_ends_with_a_checkpoint(world, tmp_path, processes, number):
    """Sent to the process group, as by a launcher or terminal: data-loading workers receive it, too."""
    flags = *SAVING, "--max_steps", 2000, "--dataloader_num_workers", 2, "--dataloader_persistent_workers", "true"
    started = processes.start("alpha_clip_commands.region_tune:main", recipe_arguments(world, tmp_path, *flags))
    until_a_checkpoint(started, tmp_path)
    started.kill_group(number)
    assert started.wait() == 128 + number, started.output()[-3000:]
    assert started.group_is_empty()
    assert f"by {number.name}; rerun the same command to resume" in started.output()
    assert int(last_checkpoint(tmp_path).name.partition("-")[2]) >= 2


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_same_command_goes_on(world, undisturbed, tmp_path, monkeypatch, number):
    original = StopOnSignal.on_step_end

    def killed_at_three(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), number)
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(StopOnSignal, "on_step_end", killed_at_three)
    assert region_tune.main(recipe_arguments(world, tmp_path, *SAVING)) == 128 + number
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    assert not (tmp_path / "adapter_model.safetensors").exists()
    monkeypatch.undo()
    tune(world, tmp_path, *SAVING)
    assert_equal_runs(undisturbed, tmp_path, ADAPTER, 0, 0)


def test_half_written_and_foreign_checkpoints_are_not_picked_up(world, undisturbed, tmp_path, capsys):
    tune(world, tmp_path, *SAVING)
    (tmp_path / "checkpoint-6" / COMPLETE).unlink()
    (tmp_path / "checkpoint-6" / "optimizer.pt").write_bytes(b"half")
    assert last_checkpoint(tmp_path).name == "checkpoint-4"
    tune(world, tmp_path, *SAVING)
    assert_equal_runs(undisturbed, tmp_path, ADAPTER, 0, 0)
    assert region_tune.main(recipe_arguments(world, tmp_path, *SAVING, "--learning_rate", 2e-2)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "belongs to another run: learning_rate was 0.01, now 0.02" in error


def test_a_full_disk_is_named_and_the_run_goes_on_afterwards(world, undisturbed, tmp_path, capsys):
    assert region_tune.main(recipe_arguments(world, tmp_path, *SAVING, "--max_steps", 2)) == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, before[1]))
        assert region_tune.main(recipe_arguments(world, tmp_path / "full", *SAVING)) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot write the checkpoint" in error and "is the disk full?" in error
    assert last_checkpoint(tmp_path / "full") is None
    tune(world, tmp_path / "full", *SAVING)
    assert_equal_runs(undisturbed, tmp_path / "full", ADAPTER, 0, 0)


@pytest.mark.slow
def test_an_export_is_tuned_as_the_model_it_was_made_of(world, undisturbed, tmp_path):
    """Its adapter fits both, and merging it into either gives equal weights."""
    export(*mllm.load(world / "start", device="cpu"), tmp_path / "export")
    out = tune(world, tmp_path / "tuned", f"--model={tmp_path / 'export'}")
    assert_equal_runs(out, undisturbed, ADAPTER, 0, 0)
    for name, adapter in (("export", undisturbed), ("start", out)):
        model = tmp_path / "export" if name == "export" else world / "start"
        flags = [model, tmp_path / f"merged_{name}", "--adapter", adapter]
        assert alpha_clip.main(["export", *map(str, flags)]) == 0
    merged = [load_file(tmp_path / f"merged_{name}" / "model.safetensors") for name in ("export", "start")]
    assert merged[0].keys() == merged[1].keys()
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])
