"""Runs disturbed (killed, out of disk, signalled, twice at once), then rerun: the same bytes as of an undisturbed run.

`make test-faults` kills each of the four commands 20 times, two of them also on two ranks; CI kills twice.
"""

import json
import os
import random
import shutil
import signal
import socket
import time

import pytest

from mllm.data.build_index import build_index
from mllm.data.shapes import grit_layout, visual_genome_layout
from tests.files import write_json_lines
from tests.tiny import build_tiny_clip, build_tiny_llava, save_model

pytestmark = pytest.mark.slow
REQUESTS = 24
TRAINING = """
data: [{data}]
learning_rate: 1.0e-2
max_steps: 6
per_device_train_batch_size: {batch}
logging_steps: 1
save_strategy: steps
save_steps: 2
save_total_limit: 2
use_cpu: true
disable_tqdm: true
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with tiny models (nonzero alpha weight), data, recipes and requests."""
    folder = tmp_path_factory.mktemp("world")
    llava = build_tiny_llava(alpha_std=0.3)
    for name, (model, processor) in (("llava", llava), ("clip", build_tiny_clip(alpha_std=0.3))):
        save_model(folder / name, model, processor)
    visual_genome_layout.write(folder / "shapes", 6, 1, "train", progress=False)
    visual_genome_layout.write(folder / "test", 6, 1, "test", progress=False)
    grit_layout.write(folder / "grit", 8, 1, "train", min_objects=1, progress=False)
    for name in ("shapes", "grit"):
        build_index(folder / name)
    for ranks in (1, 2):
        batch = 4 // ranks
        recipe = TRAINING.format(data=folder / "shapes", batch=batch)
        lora = "lora_r: 4\ntrain_parts: [multi_modal_projector, alpha]\n"
        (folder / f"tune{ranks}.yaml").write_text(f"model: {folder / 'llava'}\n{lora}{recipe}")
        recipe = TRAINING.format(data=folder / "grit", batch=batch)
        (folder / f"contrast{ranks}.yaml").write_text(
            f"model: {folder / 'clip'}\nregions_per_image: 6\ndataloader_drop_last: true\n{recipe}"
        )
    requests = [
        {"id": n, "image": f"test/VG_100K/{n % 6 + 1}.png", "region": {"box": [n, 8, 40 + n, 60]}}
        for n in range(REQUESTS)
    ]
    write_json_lines(folder / "requests.jsonl", requests)
    return folder


def tune(world, out, ranks=1):
    return "alpha_clip_commands.region_tune:main", [world / f"tune{ranks}.yaml", "--output_dir", out]


def contrast(world, out, ranks=1):
    return "alpha_clip_commands.region_tune:train_alpha_clip", [world / f"contrast{ranks}.yaml", "--output_dir", out]


def evaluate(world, out, ranks=1):
    task = ["--task", "shapes-caption", "--metrics", "literal_match", "--no-intervals"]
    model = ["--model", world / "llava", "--batch-size", 2, "--max-new-tokens", 16]
    return "alpha_clip_commands.region_eval:main", ["run", *task, "--data", world / "test", "--out", out, *model]


def batch(world, out, ranks=1):
    out.mkdir(exist_ok=True)
    files = ["--batch", world / "requests.jsonl", "--output", out / "answers.jsonl"]
    settings = ["--model", world / "llava", "--batch-size", 2, "--max-new-tokens", 24]
    return "alpha_clip_commands.region_chat:main", [*files, *settings]


# In the process: each step, each batch takes its time, so that the run is there to be met.
SLOW = """
import time
from mllm.inference import RegionChat
from transformers import TrainerCallback
from train import trainer
def answer_each(self, *args, original=RegionChat.answer_each, **kwargs):
    time.sleep(0.2)
    return original(self, *args, **kwargs)
RegionChat.answer_each = answer_each
trainer.StopOnSignal.on_step_begin = lambda self, *args, **kwargs: time.sleep(0.3)
"""
# command -> the files that must be equal
COMMANDS = {
    tune: ("adapter_model.safetensors", "training_record.json"),
    contrast: ("model.safetensors", "training_record.json"),
    evaluate: ("predictions.jsonl", "metrics.json"),
    batch: ("answers.jsonl",),
}


def named(value):
    return getattr(value, "__name__", str(value))


def start(processes, command, world, out, ranks=1, before=""):
    target, arguments = command(world, out, ranks)
    if ranks == 1:
        return [processes.start(target, arguments, before=before)]
    return processes.start_ranks(target, arguments, count=ranks, before=before)


def finish(started):
    """Wait for all ranks; their exit codes. As torchrun does, the others are asked to end when one has failed, and
    killed after half a minute.
    """
    asked, begin = None, time.monotonic()
    while any(process.poll() is None for process in started):
        if time.monotonic() > begin + 180:
            for process in started:
                process.kill_group()
            raise TimeoutError(f"still running after 180 s: {started[0].output()[-3000:]}")
        if asked is None and any(process.returncode for process in started):
            asked = time.monotonic()
            for process in started:
                process.kill_group(signal.SIGTERM)
        if asked is not None and time.monotonic() > asked + 30:
            for process in started:
                process.kill_group()
        time.sleep(0.02)
    return [process.returncode for process in started]


def result(command, out):
    """The content of the files that must be bit-identical."""
    contents = {name: (out / name).read_bytes() for name in COMMANDS[command]}
    if "training_record.json" in contents:
        record = json.loads(contents["training_record.json"])
        contents["training_record.json"] = {key: value for key, value in record.items() if key != "times"}
    return contents


@pytest.fixture(scope="module")
def undisturbed(world, processes):
    """The result and the seconds of a command. Its folder is deleted, because the name is used again."""
    known = {}

    def run(command, ranks=1):
        if (command, ranks) not in known:
            processes.run("pass\n")  # the first process waits for the imports, which do not count
            out = world / f"{command.__name__}{ranks}"
            for _ in range(2):  # the first run is slower: its imports are read from disk
                begin = time.monotonic()
                started = start(processes, command, world, out, ranks)
                assert finish(started) == [0] * ranks, started[0].output()[-3000:]
                known[command, ranks] = result(command, out), time.monotonic() - begin
                shutil.rmtree(out)
        return known[command, ranks]

    return run


@pytest.mark.parametrize(
    ("command", "ranks"), [*((command, 1) for command in COMMANDS), (tune, 2), (evaluate, 2)], ids=named
)
def test_a_killed_run_gives_the_same_bytes(world, processes, undisturbed, command, ranks, request):
    expected, seconds = undisturbed(command, ranks)
    out = world / f"{command.__name__}{ranks}"
    rng = random.Random(f"{command.__name__} {ranks}")
    killed, share = 0, 1.0
    for _ in range(request.config.getoption("kills")):
        started = start(processes, command, world, out, ranks)
        time.sleep(rng.uniform(0.1, 1.0) * share * seconds)
        victims = started if rng.random() < 0.5 else [rng.choice(started)]
        for process in victims:
            process.kill_group()
        codes = finish(started)
        killed += -signal.SIGKILL in codes
        share *= 1 if -signal.SIGKILL in codes else 0.7  # the time measured on a busy machine is too long
        if rng.random() < 0.3:
            continue  # killed again after resuming
        again = start(processes, command, world, out, ranks)
        assert finish(again) == [0] * ranks, again[0].output()[-3000:]
        assert result(command, out) == expected
        shutil.rmtree(out)
    again = start(processes, command, world, out, ranks)
    assert finish(again) == [0] * ranks, again[0].output()[-3000:]
    assert result(command, out) == expected
    shutil.rmtree(out)
    assert killed, "no run was killed before its end"


def one_error(process):
    """The error line of a failed process; a traceback is an AssertionError."""
    output = process.output()
    assert "Traceback" not in output, output[-3000:]
    line = output.strip().splitlines()[-1]
    assert ": error: " in line, output[-3000:]
    return line


# In the process: its files may not grow beyond a size, but what it prints goes to a pipe, as to a terminal.
LIMIT = """
import os, resource, subprocess, sys
terminal = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
for number in (1, 2):
    os.dup2(terminal.stdin.fileno(), number)
terminal.stdin.close()
sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
resource.setrlimit(resource.RLIMIT_FSIZE, ({largest}, resource.RLIM_INFINITY))
"""


@pytest.mark.parametrize("command", COMMANDS, ids=named)
def test_a_full_disk_is_an_error_and_the_rerun_gives_the_same_bytes(world, processes, undisturbed, command, request):
    expected, _ = undisturbed(command)
    out = world / f"{command.__name__}1"
    rng = random.Random(command.__name__)
    for _ in range(request.config.getoption("kills")):
        largest = rng.choice([0, 100, 1000, 4000, 16_000, 60_000])
        (limited,) = start(processes, command, world, out, before=LIMIT.format(largest=largest))
        limited.wait()
        assert limited.group_is_empty()  # including `cat`
        if limited.returncode != 0:  # the limit may exceed all files
            assert limited.returncode == 2, limited.output()[-3000:]
            one_error(limited)
        (again,) = start(processes, command, world, out)
        assert again.wait() == 0, again.output()[-3000:]
        assert result(command, out) == expected
        shutil.rmtree(out)


# In the process: root obeys the permissions of files, without becoming somebody who cannot read Python's own.
WITHOUT_PRIVILEGE = """
import ctypes, os
if os.geteuid() == 0:
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    for part in range(3):
        sets[part] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0
"""


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of another kind")
@pytest.mark.parametrize("mode", [0o755, 0o555])
@pytest.mark.parametrize("command", COMMANDS, ids=named)
def test_a_folder_that_cannot_be_written_is_an_error(world, processes, command, mode):
    if mode == 0o755 and os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    out = world / f"readonly-{mode:o}-{command.__name__}"
    command(world, out)  # the batch creates its folder
    out.mkdir(exist_ok=True)
    out.chmod(mode)
    if mode == 0o755:
        os.chown(out, 65534, 65534)
    (refused,) = start(processes, command, world, out, before=WITHOUT_PRIVILEGE)
    assert refused.wait() == 2, refused.output()[-3000:]
    assert str(out) in one_error(refused)
    assert not list(out.iterdir())


@pytest.mark.parametrize("command", COMMANDS, ids=named)
def test_a_second_process_is_refused_while_the_first_lives(world, processes, undisturbed, command):
    expected, _ = undisturbed(command)
    out = world / f"{command.__name__}1"
    first = start(processes, command, world, out, before=SLOW)
    lock = out / ".lock.json" if command is not batch else out / ".answers.jsonl.lock.json"
    while not lock.exists():
        assert first[0].poll() is None, first[0].output()[-3000:]
        time.sleep(0.01)
    (second,) = start(processes, command, world, out)
    assert second.wait() == 2, second.output()[-3000:]
    line = one_error(second)
    assert f"process {first[0].pid} on {socket.gethostname()}" in line, line
    assert finish(first) == [0]
    assert result(command, out) == expected
    shutil.rmtree(out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("command", COMMANDS, ids=named)
def test_each_signal_ends_a_run_which_the_same_command_resumes(world, processes, undisturbed, command, number):
    expected, seconds = undisturbed(command)
    out = world / f"{command.__name__}1"
    rng = random.Random(number.name)
    (process,) = start(processes, command, world, out)
    time.sleep(rng.uniform(0.3, 0.9) * seconds)
    process.kill_group(number)
    assert process.wait(30) in (0, 128 + number, -number), process.output()[-3000:]
    assert "Traceback" not in process.output(), process.output()[-3000:]
    assert process.group_is_empty()
    (again,) = start(processes, command, world, out)
    assert again.wait() == 0, again.output()[-3000:]
    assert result(command, out) == expected
    shutil.rmtree(out)


# In the process: an image disappears once the run has read its data.
DELETE = """
import os
from mllm.data.samples import RegionSample
from mllm.inference import RegionChat
def without_the_image(original):
    def open_image(*args):
        if os.path.exists({image!r}):
            os.rename({image!r}, {image!r} + ".gone")
        return original(*args)
    return open_image
for kind in (RegionSample, RegionChat):
    kind.open_image = without_the_image(kind.open_image)
"""


@pytest.mark.parametrize("command", COMMANDS, ids=named)
def test_an_image_deleted_in_the_middle_is_one_error(world, processes, command):
    image = {contrast: world / "grit" / "00000" / "000000003.png"}.get(command)
    if image is None:
        image = world / ("shapes" if command is tune else "test") / "VG_100K" / "3.png"
    assert image.exists(), sorted(image.parent.parent.rglob("*"))
    out = world / f"deleted-{command.__name__}"
    target, arguments = command(world, out)
    allowed = ["--max_missing", "0.5"] if command in (tune, contrast) else []
    try:
        process = processes.start(target, [*arguments, *allowed], before=DELETE.format(image=str(image)))
        code = process.wait()
    finally:
        gone = image.with_name(f"{image.name}.gone")
        if gone.exists():
            gone.rename(image)
    output = process.output()
    assert "Traceback" not in output, output[-3000:]
    assert image.name in output + "".join(path.read_text() for path in out.rglob("*.jsonl")), output[-3000:]
    # training goes on without it; a batch says that some failed; an evaluation scores nothing that is incomplete
    assert code == {batch: 1, evaluate: 2}.get(command, 0), output[-3000:]
