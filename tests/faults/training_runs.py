"""Training runs that fail: launched, stopped after a time limit, and checked for processes left running."""

import contextlib
import os
import signal
import subprocess
import time
import uuid
from pathlib import Path
from typing import NamedTuple

from mllm.data.build_index import build_index
from mllm.data.shapes import grit_layout, visual_genome_layout
from tests.files import ROOT
from tests.tiny import build_tiny_clip, build_tiny_llava, save_model
from tests.training import BIN, write_splits

PROGRAMS = {"region-tune": "main", "alpha-clip train": "train_alpha_clip"}  # in alpha_clip_commands.region_tune
_MARK = "ALPHA_FAULT_RUN"  # in the environment of every process of a run

RECIPE = """
model: {model}
data: [{train}, {val}]
max_steps: 6
per_device_train_batch_size: 2
learning_rate: 1.0e-2
logging_steps: 2
save_strategy: steps
save_steps: 2
use_cpu: true
disable_tqdm: true
"""


def make_worlds(folder: Path) -> dict[str, Path]:
    """A recipe for each program, with a tiny model and data."""
    recipes = {}
    for name, build, layout in (
        ("region-tune", build_tiny_llava, visual_genome_layout),
        ("alpha-clip train", build_tiny_clip, grit_layout),
    ):
        world = folder / name
        save_model(world / "model", *build())
        write_splits(layout, world, 6)
        for split in ("train", "val"):
            build_index(world / split)
        recipes[name] = world / "recipe.yaml"
        more = "lora_r: 2\nlora_dropout: 0.0\n" if name == "region-tune" else "dataloader_drop_last: true\n"
        recipes[name].write_text(RECIPE.format(**{n: world / n for n in ("model", "train", "val")}) + more)
    return recipes


class Ended(NamedTuple):
    """The end of a run: exit code, seconds from the fault to the end of its last process, and output."""

    code: int
    seconds: float
    output: str

    def errors(self, program: str) -> list[str]:
        """The error lines of the program."""
        return [line for line in self.output.splitlines() if f"{program}: error: " in line]


def run_until_it_ends(command: list, limit: float, fault_time: Path, **environment: str) -> Ended:
    """Run a command that writes the time of its fault to a file. AssertionError if the command or one of its child
    processes is still running `limit` seconds after the fault.
    """
    mark = uuid.uuid4().hex
    path = f"{BIN}:{os.environ['PATH']}"
    started = subprocess.Popen(
        [str(part) for part in command],
        env={**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", _MARK: mark, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        output, _ = started.communicate(timeout=limit + 90)  # startup takes a while
        while processes_of(mark) and time.time() - float(fault_time.read_text()) < limit:
            time.sleep(0.05)
        seconds = time.time() - float(fault_time.read_text())
        assert not processes_of(mark), f"still running after {seconds:.1f} s: {processes_of(mark)}\n{output[-3000:]}"
    finally:
        for process in processes_of(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    assert seconds < limit, f"took {seconds:.1f} s\n{output[-3000:]}"
    return Ended(started.returncode, seconds, output)


def note_time(path: str) -> None:
    """Write the current time to a file atomically, because a worker may be killed meanwhile."""
    own = f"{path}.{os.getpid()}"
    Path(own).write_text(str(time.time()))
    os.replace(own, path)


def processes_of(mark: str) -> list[int]:
    """The processes with a mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if f"{_MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found
