"""Training runs on tiny models: in this process, or in the ranks that a launcher starts."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.files import ROOT, read_json

BIN = Path(sys.executable).parent


def write_splits(layout, folder, count, splits=("train", "val"), **options):
    """Synthetic scenes of each split, in a folder with its name."""
    for split in splits:
        layout.write(folder / split, count, 1, split, progress=False, **options)
    return folder


def train(program, model, data, out, *flags):
    """Run two steps in this process, unless a flag says otherwise; returns the exit code."""
    arguments = ["--model", model, "--data", *data, "--output_dir", out, "--max_steps", 2]
    arguments += ["--per_device_train_batch_size", 2, "--use_cpu", "true", "--disable_tqdm", "true", *flags]
    return program([str(argument) for argument in arguments])


def recipe_arguments(world, out, *flags):
    """The arguments of a run of the recipe in a folder."""
    return [str(argument) for argument in (world / "recipe.yaml", "--output_dir", out, *flags)]


def launch(command, arguments, cwd=ROOT, one_thread=True, timeout=400):
    """Run a launcher with these arguments; returns its exit code and output."""
    if "--deepspeed" in arguments and shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("DeepSpeed compiles what its ranks on CPUs talk through: no C++ compiler here")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}"}
    if one_thread:
        environment["OMP_NUM_THREADS"] = "1"
    started = subprocess.Popen(
        [*map(str, command), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        start_new_session=True,
    )
    try:
        output, _ = started.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)  # its ranks too
        raise
    return started.returncode, output


def losses(out):
    """The losses in the record of a finished run."""
    return [entry["loss"] for entry in read_json(out / "training_record.json")["log"] if "loss" in entry]


def assert_equal_runs(one, two, file, tolerance, loss_tolerance):
    """Assert that two runs logged and saved the same up to the tolerances."""
    first, second = (load_file(out / file) for out in (one, two))
    assert {name: tensor.shape for name, tensor in first.items()} == {n: tensor.shape for n, tensor in second.items()}
    worst = max((first[name] - second[name]).abs().max().item() for name in first)
    assert worst <= tolerance, worst
    assert losses(one) == pytest.approx(losses(two), abs=loss_tolerance)
