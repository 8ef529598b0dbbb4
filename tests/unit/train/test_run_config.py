"""Which settings make a run: a checkpoint is resumed under the same ones, and refused under any other."""

import pytest

from tests.files import write_json
from train.contrastive import arguments as contrastive_arguments
from train.output import COMPLETE, last_checkpoint, locked_output, read_completion, read_training_record
from train.run import run_config
from train.skipped import SKIPPED
from train.tuning import arguments

PARSERS = {"region-tune": arguments.parse_args, "train.alpha_clip": contrastive_arguments.parse_args}


def parsed(program, out, *flags):
    """Training arguments, and what makes the run."""
    argv = ["--model", "m", "--data", "d", "--output_dir", str(out), "--use_cpu", "true"]
    argv += ["--per_device_train_batch_size", "4", "--eval_strategy", "no", *flags]
    *others, training = PARSERS[program](argv)
    return training, run_config(training, *others)


def store(program, checkpoint):
    _, run = parsed(program, checkpoint.parent)
    write_json(checkpoint / COMPLETE, {"step": 2, "run_config": run})


def resumed(program, out, *flags):
    """The checkpoint that a command would resume from."""
    with locked_output(*parsed(program, out, *flags)) as resumption:
        return resumption.checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("program", PARSERS)
def test_the_list_of_skipped_items_is_kept_where_a_run_resumes(program, checkpoint):
    out = checkpoint.parent
    (out / SKIPPED).write_text("kept\n")
    store(program, checkpoint)
    assert resumed(program, out) == checkpoint and (out / SKIPPED).exists()


@pytest.mark.parametrize("program", PARSERS)
def test_the_list_of_skipped_items_is_begun_anew_with_the_run(program, tmp_path):
    with locked_output(*parsed(program, tmp_path / "out")):
        (tmp_path / "out" / SKIPPED).write_text("of an attempt that saved nothing\n")
    assert resumed(program, tmp_path / "out") is None and not (tmp_path / "out" / SKIPPED).exists()


OLD_CHECKPOINT = """{"step": 2, "unlogged": {"losses": [0.5], "since": 1}, "run": {"learning_rate": 1e-05,
"eval_metrics": ["exactly right", "CIDEr"], "eval_pictures": 200, "patch_weight": 0.0}}"""
OLD_RECORD = """{"run": {"seed": 42}, "skipped_pictures": ["a.png"], "skipped_regions": [], "log": [], "files": {}}"""


def test_files_of_earlier_versions_are_read(tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    assert last_checkpoint(tmp_path) is None
    (checkpoint / "whole.json").write_text(OLD_CHECKPOINT)
    assert last_checkpoint(tmp_path) == checkpoint
    settings = {"learning_rate": 1e-5, "eval_metrics": ["literal_match", "cider"], "eval_images": 200}
    completion = read_completion(checkpoint)
    assert completion == {"step": 2, "unlogged": {"losses": [0.5], "since": 1}, "run_config": settings}
    (tmp_path / "training_record.json").write_text(OLD_RECORD)
    record = read_training_record(tmp_path / "training_record.json")
    assert record["run_config"] == {"seed": 42} and record["skipped_images"] == ["a.png"]


LEARNED = [
    ("per_device_train_batch_size", "8"),
    ("gradient_accumulation_steps", "2"),
    ("learning_rate", "1e-3"),
    ("max_steps", "7"),
    ("num_train_epochs", "2"),
    ("seed", "5"),
    ("weight_decay", "0.1"),
    ("warmup_steps", "3"),
    ("lr_scheduler_type", "cosine"),
    ("optim", "sgd"),
    ("max_grad_norm", "0.5"),
    ("label_smoothing_factor", "0.1"),
    ("bf16", "true"),
    ("model", "other"),
    ("data", "other"),
    ("min_strength", "0.5"),
    ("region_input", "available"),
    ("regions_per_image", "2"),
    ("train_parts", "alpha"),
    ("optimizer", "muon"),
    ("dataloader_drop_last", "true"),
]


@pytest.mark.parametrize(
    ("program", "name", "value"),
    [*(("region-tune", *setting) for setting in LEARNED), ("train.alpha_clip", *LEARNED[0])],
)
def test_what_is_learned_depends_on_it(checkpoint, program, name, value):
    store(program, checkpoint)
    assert resumed(program, checkpoint.parent) == checkpoint
    with pytest.raises(ValueError, match=f"belongs to another run: {name} was"):
        resumed(program, checkpoint.parent, f"--{name}", value)


@pytest.mark.parametrize(
    ("name", "value"), [("logging_steps", "3"), ("save_steps", "9"), ("dataloader_num_workers", "2")]
)
def test_what_is_learned_does_not_depend_on_it(checkpoint, name, value):
    store("region-tune", checkpoint)
    assert resumed("region-tune", checkpoint.parent, f"--{name}", value) == checkpoint
