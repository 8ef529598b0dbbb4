"""Skipped samples, checkpoints on disk, and the shutdown of several ranks in training."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import mllm
from alpha_clip_commands import region_tune
from alpha_clip_commands.training.tuning_arguments import DataArguments
from mllm.data.build_index import build_index
from mllm.data.index import TRAIN, RegionIndex
from mllm.locks import locked
from tests.faults.training_runs import make_worlds
from tests.files import read_json, write_json_lines
from tests.tiny import build_tiny_blip2, build_tiny_llava, noise_image
from train import output
from train import process as train_process
from train import run as train_run
from train import trainer as trainers
from train.output import COMPLETE, TRAINING_RECORD, last_checkpoint, remove_older_checkpoints
from train.skipped import SKIPPED, read_skipped
from train.trainer import RegionTrainer
from train.tuning.collators import IGNORE_INDEX, ConversationCollator
from train.tuning.conversations import ConversationDataset

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return make_worlds(tmp_path_factory.mktemp("worlds"))["region-tune"]


def flags(recipe, out, *more):
    return [str(flag) for flag in (recipe, "--output_dir", out, *more)]


# items


def indexed(folder, regions, size=(64, 32)):
    """An index with one image and one answer per region."""
    noise_image(*size).save(folder / "0.png")
    lines = [{"image": "0.png", "region": region, "answer": "red", "meta": {"split": TRAIN}} for region in regions]
    write_json_lines(folder / "own.jsonl", lines)
    build_index(folder / "own.jsonl")
    return RegionIndex(folder / "own.jsonl")


def skipped_reasons(folder, index, geometry="pad", **settings):
    _, processor = build_tiny_llava(geometry)
    args = DataArguments(data=["d"], regions_per_image=1, max_missing=1.0, **settings)
    check = ConversationCollator(processor, max_length=512).check
    dataset = ConversationDataset([index], args, TRAIN, ["What?"], 0, folder / SKIPPED, check)
    for position in range(len(dataset)):
        assert len(dataset[position]) == 1
    return sorted(item.reason for item in read_skipped(folder / SKIPPED))


def test_a_region_that_the_centre_crop_cuts_away_is_left_out(tmp_path):
    index = indexed(tmp_path, [{"box": [0, 0, 10, 10]}, {"box": [20, 4, 40, 30]}])
    (reason,) = set(skipped_reasons(tmp_path, index, "crop"))
    assert "crop" in reason, reason


def test_a_region_without_the_mask_that_is_asked_for_is_left_out(tmp_path):
    mask = {"polygon": [2, 2, 30, 2, 30, 30]}
    index = indexed(tmp_path, [{"box": [0, 0, 10, 10]}, mask])
    (reason,) = set(skipped_reasons(tmp_path, index, region_input="mask"))
    assert "mask" in reason, reason


def test_a_region_outside_of_the_image_that_is_there_is_left_out(tmp_path):
    index = indexed(tmp_path, [{"box": [40, 0, 60, 30]}, {"box": [2, 2, 10, 10]}])
    noise_image(32, 32).save(tmp_path / "0.png")
    reasons = set(skipped_reasons(tmp_path, index))
    assert len(reasons) == 1, reasons


# checkpoints


def checkpoints(out):
    return sorted(folder.name for folder in Path(out).glob("checkpoint-*") if (folder / COMPLETE).exists())


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (None, None, [2, 4, 6, 8]),
        (9, None, [2, 4, 6, 8]),
        (5, None, [2, 4, 6, 8]),
        (2, None, [6, 8]),
        (1, None, [8]),
        (1, 4, [4, 8]),
        (3, 2, [2, 6, 8]),
    ],
)
def test_only_older_whole_checkpoints_are_removed(tmp_path, keep, best, left):
    for step in (2, 4, 6, 8, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 100:  # incomplete: neither counted nor removed
            (tmp_path / f"checkpoint-{step}" / COMPLETE).write_text("{}")
    remove_older_checkpoints(tmp_path, keep, best and str(tmp_path / f"checkpoint-{best}"))
    assert checkpoints(tmp_path) == [f"checkpoint-{step}" for step in left]
    assert (tmp_path / "checkpoint-100").is_dir()


@pytest.mark.slow
def test_the_last_whole_checkpoint_stays_until_the_next_is_whole(recipe, tmp_path, monkeypatch):
    original = trainers.write_json

    def full(path, content, *args):
        if path.parent.name == "checkpoint-4":
            raise OSError(28, "No space left on device")
        original(path, content, *args)

    monkeypatch.setattr(trainers, "write_json", full)
    assert region_tune.main(flags(recipe, tmp_path, "--save_total_limit", 1)) == 2
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    monkeypatch.undo()
    assert region_tune.main(flags(recipe, tmp_path, "--save_total_limit", 1)) == 0
    assert checkpoints(tmp_path) == ["checkpoint-6"]


@pytest.mark.slow
def test_a_model_is_on_disk_before_its_record_says_so(recipe, tmp_path, monkeypatch):
    done = []
    sync, write = output.sync_files, output.write_json

    def noted(paths):
        paths = list(paths)
        done.extend(path.name for path in paths)
        sync(paths)

    monkeypatch.setattr(output, "sync_files", noted)
    monkeypatch.setattr(output, "write_json", lambda path, content: (done.append(path.name), write(path, content)))
    assert region_tune.main(flags(recipe, tmp_path, "--max_steps", 1, "--save_strategy", "no")) == 0
    assert done[-1] == TRAINING_RECORD and {ADAPTER, "adapter_config.json", "tokenizer.json"} <= set(done[:-1])


# T5


def test_labels_of_an_encoder_decoder_are_smoothed(recipe, tmp_path, monkeypatch):
    model, processor = build_tiny_blip2("t5")
    model.config.text_config.dropout_rate = 0.0
    model.config.qformer_config.hidden_dropout_prob = model.config.qformer_config.attention_probs_dropout_prob = 0.0
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    batches, original = [], RegionTrainer.training_step
    monkeypatch.setattr(
        RegionTrainer,
        "training_step",
        lambda self, m, inputs, *a: (batches.append(dict(inputs)), original(self, m, inputs, *a))[1],
    )
    more = "--model", tmp_path / "model", "--label_smoothing_factor", 0.25, "--learning_rate", 0, "--max_turns", 1
    more += "--max_steps", 1, "--logging_steps", 1, "--save_strategy", "no"
    assert region_tune.main(flags(recipe, tmp_path / "out", *more)) == 0
    loaded, _ = mllm.load(tmp_path / "model", device="cpu")
    with torch.no_grad():
        logits = loaded(**batches[0]).logits.flatten(0, 1)
    labels = batches[0]["labels"].flatten()
    losses = [
        functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, label_smoothing=s).item() for s in (0.25, 0)
    ]
    log = read_json(tmp_path / "out" / TRAINING_RECORD)["log"]
    assert log[0]["loss"] == pytest.approx(losses[0], abs=2e-3) and abs(losses[0] - losses[1]) > 1e-2


# processes

AT_STEP = """
import os, signal, sys
from train import trainer

def on_step_end(self, args, state, control, original=trainer.StopOnSignal.on_step_end, **kwargs):
    if state.global_step == 3:
        {what}
    original(self, args, state, control, **kwargs)

trainer.StopOnSignal.on_step_end = on_step_end
"""
CLOSED_TERMINAL = """
terminal, inside = os.openpty()
os.dup2(inside, 1)
os.dup2(inside, 2)
os.close(inside)
sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP")
def test_a_closed_terminal_ends_with_a_checkpoint(recipe, tmp_path, processes):
    before = AT_STEP.format(what="os.close(terminal); os.kill(os.getpid(), signal.SIGHUP)") + CLOSED_TERMINAL
    run = processes.start(
        "alpha_clip_commands.region_tune:main",
        flags(recipe, tmp_path, "--disable_tqdm", "false", "--logging_steps", 1),
        before=before,
    )
    assert run.wait() == 128 + signal.SIGHUP
    assert last_checkpoint(tmp_path).name == "checkpoint-3"


def in_ranks(processes, recipe, out, *more, before=("", "")):
    ranks = processes.start_ranks(
        "alpha_clip_commands.region_tune:main",
        flags(recipe, out, "--per_device_train_batch_size", 1, *more),
        before=f"import os\nif os.environ['RANK'] == '0':\n    exec({before[0]!r})\nelse:\n    exec({before[1]!r})\n",
    )
    codes = [rank.wait() for rank in ranks]
    assert all(rank.group_is_empty() for rank in ranks)
    return codes, ranks[0].output()[-3000:] + ranks[1].output()[-3000:]


def saved(out):
    record = read_json(out / TRAINING_RECORD)
    return (out / ADAPTER).read_bytes(), {key: value for key, value in record.items() if key != "times"}


@pytest.fixture(scope="module")
def two_ranks(recipe, tmp_path_factory, processes):
    out = tmp_path_factory.mktemp("two") / "out"
    codes, said = in_ranks(processes, recipe, out)
    assert codes == [0, 0], said
    return saved(out)


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_both_and_they_resume_to_the_same_bytes(recipe, two_ranks, tmp_path, processes):
    stop = AT_STEP.format(what="os.kill(os.getpid(), signal.SIGTERM)")
    codes, said = in_ranks(processes, recipe, tmp_path, before=("", stop))
    assert codes == [143, 143], said
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    codes, said = in_ranks(processes, recipe, tmp_path)
    assert codes == [0, 0], said
    assert saved(tmp_path) == two_ranks


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_other_within_seconds(recipe, two_ranks, tmp_path, processes):
    begin = time.monotonic()
    kill = AT_STEP.format(what="os.kill(os.getpid(), signal.SIGKILL)")
    codes, said = in_ranks(processes, recipe, tmp_path, "--dataloader_num_workers", 1, before=("", kill))
    assert codes == [2, -signal.SIGKILL] and "another process of the run failed" in said, said
    assert time.monotonic() - begin < 30
    codes, said = in_ranks(processes, recipe, tmp_path)
    assert codes == [0, 0], said
    assert saved(tmp_path) == two_ranks


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_finished_training_under_deepspeed_saves_the_same_again(recipe, tmp_path, processes, stage):
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("DeepSpeed compiles what its ranks on CPUs talk through: no C++ compiler here")
    contents = []
    killed = "from train import run\nrun.write_training_record = lambda *args: os.kill(os.getpid(), 9)"
    for name, before in (("undisturbed", ""), ("killed", killed)):
        codes, said = in_ranks(processes, recipe, tmp_path / name, "--deepspeed", stage, before=(before, ""))
        assert (codes == [0, 0]) == (not before), said
        if before:
            codes, said = in_ranks(processes, recipe, tmp_path / name, "--deepspeed", stage)
            assert codes == [0, 0], said
        contents.append(saved(tmp_path / name))
    assert contents[0] == contents[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_does_not_interrupt_the_last_save(recipe, tmp_path, monkeypatch, number):
    """Without checkpoints, the entire training would be lost."""
    original = train_run.write_training_record

    def signalled(*args):
        os.kill(os.getpid(), number)
        original(*args)

    monkeypatch.setattr(train_run, "write_training_record", signalled)
    before = signal.getsignal(number)
    assert region_tune.main(flags(recipe, tmp_path, "--save_strategy", "no", "--max_steps", 1)) == 0
    assert signal.getsignal(number) is before
    assert (tmp_path / TRAINING_RECORD).exists()


def test_a_lock_that_cannot_be_removed_hides_no_error(tmp_path, monkeypatch):
    def refused(path, missing_ok=False):
        raise PermissionError(13, "Permission denied", str(path))

    with pytest.raises(OSError, match="the real one"), locked(tmp_path, inside=True):
        monkeypatch.setattr(Path, "unlink", refused)
        raise OSError("the real one")
    monkeypatch.undo()
    with locked(tmp_path, inside=True):
        pass


def test_lost_workers_and_closed_outputs_are_explained(capsys):
    assert "loader worker" in train_process.explanation(ConnectionResetError(104, "Connection reset by peer"))
    assert "loader worker" in train_process.explanation(EOFError())

    def closed(arguments):
        raise BrokenPipeError(32, "Broken pipe")

    assert train_process.run_command("p", closed, []) == 141
    assert capsys.readouterr().err == ""
