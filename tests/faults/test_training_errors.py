"""After an error in any process, both training programs report it, end, and leave no process running."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from alpha_clip_commands import region_tune
from alpha_clip_commands.command_line import stopping_signals
from tests.faults.training_runs import BIN, PROGRAMS, make_worlds, note_time, run_until_it_ends  # noqa: F401, the scripts call note_time
from train import run as train_run
from train.region_dataset import RegionDataset
from train.trainer import RegionTrainer

ROOT_FOLDER = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    return make_worlds(tmp_path_factory.mktemp("worlds"))


def in_worker():
    return multiprocessing.parent_process() is not None


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def from_call(number, fail, original):
    """A function that calls `original`, and `fail` at the call with this number."""
    calls = []

    def called(*args, **kwargs):
        calls.append(1)
        return (fail if len(calls) >= number else original)(*args, **kwargs)

    return called


def kill_itself(*args):
    if in_worker():
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
# name: where, at which call, what happens, exit code, what is said in one line (None: a traceback)
FAULTS = {
    "data": (RegionDataset, "__getitem__", 3, raising(ValueError("the data is\nbad")), 2, "the data is bad"),
    "unreadable file": (RegionDataset, "__getitem__", 3, raising(PermissionError(13, "no", "f")), 2, "f"),
    "killed worker": (RegionDataset, "__getitem__", 3, kill_itself, 2, "DataLoader worker (pid"),
    "worker without memory": (RegionDataset, "__getitem__", 3, raising(MemoryError()), 2, "out of memory"),
    "mistake in a worker": (RegionDataset, "__getitem__", 3, raising(TypeError("our mistake")), 1, None),
    "memory": (RegionTrainer, "training_step", 2, raising(NO_MEMORY), 2, "lower per_device_train_batch_size"),
    "mistake": (RegionTrainer, "training_step", 2, raising(TypeError("our mistake")), 1, None),
    "interrupted": (RegionTrainer, "training_step", 2, raising(KeyboardInterrupt()), 130, None),
    "evaluation": (RegionTrainer, "_evaluate", 1, raising(ValueError("no answers")), 2, "no answers"),
    "checkpoint": (RegionTrainer, "_save_optimizer_and_scheduler", 1, raising(OSError(28, "full")), 2, "disk full?"),
    "last save": (train_run, "write_training_record", 1, raising(SafetensorError("I/O error")), 2, "disk full?"),
}


def inject(name, monkeypatch, before=lambda: None):
    place, attribute, number, fail, *_ = FAULTS[name]

    def failing(*args, **kwargs):
        before()
        return fail(*args, **kwargs)

    monkeypatch.setattr(place, attribute, from_call(number, failing, getattr(place, attribute)))


def arguments(recipes, program, out, *flags):
    evaluating = ("--eval_strategy", "steps", "--eval_steps", 2, "--max_missing", 1)
    return [str(flag) for flag in (recipes[program], "--output_dir", out, *evaluating, *flags)]


def handlers():
    return {number: signal.getsignal(number) for number in (*stopping_signals(), signal.SIGCHLD)}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("program", [pytest.param("region-tune", marks=pytest.mark.slow), "alpha-clip train"])
@pytest.mark.parametrize("name", FAULTS)
def test_an_error_ends_the_run_and_its_workers(recipes, tmp_path, monkeypatch, capsys, name, program, workers):
    check_in_this_process(recipes, tmp_path, monkeypatch, capsys, name, program, workers)


@pytest.mark.parametrize(
    ("program", "name"), [("region-tune", "data"), ("region-tune", "killed worker"), ("alpha-clip train", "mistake")]
)
def test_live_workers_are_ended(recipes, tmp_path, monkeypatch, capsys, program, name):
    check_in_this_process(recipes, tmp_path, monkeypatch, capsys, name, program, 2)


def check_in_this_process(recipes, out, monkeypatch, capsys, name, program, workers):
    main = getattr(region_tune, PROGRAMS[program])
    before, others = handlers(), multiprocessing.active_children()
    inject(name, monkeypatch)
    flags = arguments(recipes, program, out, "--dataloader_num_workers", workers, *PERSISTENT[: 2 * (workers > 0)])
    *_, code, said = FAULTS[name]
    if code == 1:
        with pytest.raises(TypeError, match="our mistake"):
            main(flags)
    else:
        assert main(flags) == code
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"{program}: ")]
        assert len(lines) == 1 and (said or "interrupted") in lines[0], lines
        assert "Traceback" not in lines[0]
    assert multiprocessing.active_children() == others
    after = handlers()
    assert all(after[number] == before[number] for number in stopping_signals())


PERSISTENT = ("--dataloader_persistent_workers", "true")

# A real process: the same faults, injected by a script that is given their name
SCRIPT = """
import os, sys, pytest
from tests.faults import test_training_errors as tests

program, name, rank, fault_time = sys.argv[1:5]
if os.environ.get("RANK", "0") == rank:
    tests.inject(name, pytest.MonkeyPatch(), lambda: tests.note_time(fault_time))
main = getattr(tests.region_tune, tests.PROGRAMS[program])
sys.exit(main(sys.argv[5:]))
"""
TIMES = []


@pytest.fixture(scope="module", autouse=True)
def table_of_times():
    yield
    for row in TIMES:
        sys.stderr.write("".join(f"{value:<24}" for value in row) + "\n")


def ended(recipes, tmp_path, launcher, program, name, rank, flags, limit):
    script, fault_time = tmp_path / "faulty.py", tmp_path / "time"
    script.write_text(SCRIPT)
    options = arguments(recipes, program, tmp_path / "out", *flags)
    command = [*launcher, script, program, name, rank, fault_time, *options]
    return run_until_it_ends(command, limit, fault_time, PYTHONPATH=path_of_tests())


def path_of_tests():
    return os.pathsep.join([str(ROOT_FOLDER), os.environ.get("PYTHONPATH", "")])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", ["data", "killed worker", "memory", "mistake", "checkpoint"])
def test_a_process_ends_within_seconds(recipes, tmp_path, name, program, workers):
    flags = ("--dataloader_num_workers", workers, *PERSISTENT[: 2 * (workers > 0)])
    done = ended(recipes, tmp_path, [sys.executable], program, name, 0, flags, 20)
    TIMES.append((program, name, f"{workers} workers", f"{done.seconds:.1f} s"))
    *_, code, said = FAULTS[name]
    assert done.code == code, done.output[-3000:]
    if said is None:
        assert "TypeError: our mistake" in done.output
    else:
        (line,) = done.errors(program)
        assert said in line and "Traceback" not in done.output


TORCHRUN = (BIN / "torchrun", "--standalone", "--nproc_per_node", "2")
TWO_RANKS = ("--dataloader_num_workers", 2, "--per_device_train_batch_size", 1, *PERSISTENT)
# Of ranks that nothing watches, each must notice by itself that the other has failed.
INJECTING = """
import os, pytest
from tests.faults import test_training_errors as tests

if os.environ["RANK"] == "{rank}":
    tests.inject("{name}", pytest.MonkeyPatch(), lambda: tests.note_time("{fault_time}"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("name", "rank"),
    [
        *((name, rank) for name in ("data", "killed worker", "memory", "mistake") for rank in (0, 1)),
        ("checkpoint", 0),  # only rank 0 writes one
    ],
)
def test_two_ranks_end_within_seconds(recipes, tmp_path, processes, name, program, rank):
    fault_time = tmp_path / "time"
    ranks = processes.start_ranks(
        f"alpha_clip_commands.region_tune:{PROGRAMS[program]}",
        arguments(recipes, program, tmp_path / "out", *TWO_RANKS),
        before=INJECTING.format(rank=rank, name=name, fault_time=fault_time),
    )
    codes = [started.wait(90) for started in ranks]
    assert all(started.group_is_empty() for started in ranks)
    seconds = time.time() - float(fault_time.read_text())
    TIMES.append((program, name, f"rank {rank}, unwatched", f"{seconds:.1f} s"))
    assert seconds < 30
    *_, code, said = FAULTS[name]
    output = ranks[rank].output()
    assert codes[rank] == code and codes[1 - rank] != 0, output[-3000:]
    assert (said or "TypeError: our mistake") in output
    assert said is None or "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("name", "rank", "stage"),
    [
        ("data", 1, None),
        ("mistake", 0, None),
        ("memory", 1, "zero2"),
        ("checkpoint", 1, "zero2"),
        ("data", 0, "zero3"),
        ("mistake", 1, "zero3"),
    ],
)
def test_torchrun_ends_within_seconds(recipes, tmp_path, name, program, rank, stage):
    flags = [*TWO_RANKS, *(("--deepspeed", stage) if stage else ())]
    done = ended(recipes, tmp_path, TORCHRUN, program, name, rank, flags, 30)
    TIMES.append((program, name, f"rank {rank}, {stage or 'DDP'}", f"{done.seconds:.1f} s"))
    *_, code, said = FAULTS[name]
    assert done.code != 0
    if said is None:
        assert "TypeError: our mistake" in done.output
    else:
        assert any(said in line for line in done.errors(program)), done.output[-3000:]
        assert "Traceback" not in done.output.partition("ChildFailedError")[0].rpartition("Traceback")[0]
