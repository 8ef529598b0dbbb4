"""`train.alpha_clip` in processes: killed, and on two ranks with each ZeRO stage of DeepSpeed."""

import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alpha_clip_commands import region_tune
from alpha_clip_commands.training.contrastive_arguments import PairArguments
from mllm.data.build_index import build_index
from mllm.data.index import TRAIN, RegionIndex
from mllm.data.shapes import grit_layout
from tests.tensors import same_tensors
from tests.tiny import build_tiny_clip, save_model
from tests.training import assert_equal_runs, launch, recipe_arguments, write_splits
from train import alpha_clip
from train.contrastive.data import RegionTextDataset
from train.epoch_sampler import EpochSampler
from train.output import last_checkpoint
from vision_tower import AlphaCLIPModel

TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
DEEPSPEED = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "--master_port", "29613"]
ALPHA = "vision_model.embeddings.patch_embedding.alpha.weight"
# 8 images of 1 to 6 objects, 4 per step: an epoch has two steps, and two ranks have different numbers of pairs
RECIPE = """
model: {start}
data: [{train}, {val}]
regions_per_image: 6
learning_rate: 1.0e-2
max_steps: 6
per_device_train_batch_size: 4
dataloader_drop_last: true
logging_steps: 1
save_strategy: "no"
use_cpu: true
disable_tqdm: true
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model (nonzero alpha weight), data and a recipe."""
    folder = tmp_path_factory.mktemp("world")
    for name, alpha_std in (("start", 0.3), ("blind", 0.0)):
        save_model(folder / name, *build_tiny_clip(alpha_std=alpha_std))
    write_splits(grit_layout, folder, 8, min_objects=1)
    for split in ("train", "val"):
        build_index(folder / split)
    (folder / "recipe.yaml").write_text(RECIPE.format(**{n: folder / n for n in ("start", "train", "val")}))
    return folder


def train(world, out, *flags):
    assert region_tune.train_alpha_clip(recipe_arguments(world, out, *flags)) == 0
    return out


SAVING = ("--save_strategy", "steps", "--save_steps", 3, "--save_total_limit", 2)
KILLED_AT_FIVE = """
import os, signal, sys
from alpha_clip_commands import region_tune
from train import trainer


def on_step_end(self, args, state, control, **kwargs):
    if state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

trainer.StopOnSignal.on_step_end = on_step_end
region_tune.train_alpha_clip(sys.argv[1:])
"""


def test_a_run_killed_within_an_epoch_goes_on_to_the_same_end(world, tmp_path, processes):
    """Killed at step 5; the checkpoint of step 3 is in the middle of the second epoch."""
    flags = (*SAVING, "--region_input", "mixed", "--min_strength", 0.5, "--mask_jitter", 1)
    killed = processes.start(KILLED_AT_FIVE, recipe_arguments(world, tmp_path / "killed", *flags))
    assert killed.wait() == -signal.SIGKILL, killed.output()[-3000:]
    assert last_checkpoint(tmp_path / "killed").name == "checkpoint-3"
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    train(world, tmp_path / "killed", *flags)
    train(world, tmp_path / "undisturbed", *flags)
    assert_equal_runs(tmp_path / "undisturbed", tmp_path / "killed", "model.safetensors", 0, 0)


def test_ranks_have_unequal_numbers_of_pairs(world, tmp_path):
    """Otherwise the tests of two ranks would prove less."""
    args = PairArguments(data=["d"], regions_per_image=6)
    pictures = RegionTextDataset([RegionIndex(world / "train")], args, TRAIN, 42, tmp_path / "skipped.jsonl")
    pairs = [len(pictures[position].texts) for position in EpochSampler(8, seed=42)]
    assert any(sum(pairs[step : step + 2]) != sum(pairs[step + 2 : step + 4]) for step in (0, 4))


# SGD: Adam would amplify gradients that are rounding errors
PLAIN = ("--optim", "sgd", "--lr_scheduler_type", "constant", "--learning_rate", 0.1, "--learning_rates", "alpha=10")
CHUNKS = ("--cache_chunk", 3)
# Measured worst differences: of a weight 2.4e-7, where the largest change is 1.9e-2; of a loss 7.2e-7.
TOLERANCE, OF_LOSSES = 1e-5, 3e-5


@pytest.mark.parametrize(
    ("stage", "flags"),
    [
        ("processes", CHUNKS),  # launched in the slow tests; DeepSpeed first compiles for a minute
        *(
            pytest.param(stage, flags, marks=pytest.mark.slow)
            for stage, flags in [
                (None, ()),
                (None, CHUNKS),
                ("zero1", ()),
                ("zero1", CHUNKS),
                ("zero2", ()),
                ("zero2", CHUNKS),
                ("zero3", ()),
                ("zero3", CHUNKS),
            ]
        ),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_two_ranks_learn_what_one_does(world, tmp_path, processes, stage, flags):
    """All parts (under ZeRO-3 without the temperature); one rank without gradient caching."""
    flags = [*PLAIN, "--train_parts", *(p for p in alpha_clip.PARTS if (stage, p) != ("zero3", "logit_scale")), *flags]
    train(world, tmp_path / "one", *flags, "--cache_chunk", 0)
    two = ["--per_device_train_batch_size", 2]
    if stage == "processes":
        ranks = processes.start_ranks(
            "alpha_clip_commands.region_tune:train_alpha_clip", recipe_arguments(world, tmp_path / "two", *flags, *two)
        )
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].output()[-3000:]
    else:
        two += ["--deepspeed", stage] if stage else []
        arguments = recipe_arguments(world, tmp_path / "two", *flags, *two)
        code, output = launch([*TORCHRUN, "-m", "alpha_clip_commands.alpha_clip", "train"], arguments)
        assert code == 0, output[-3000:]
    assert_equal_runs(tmp_path / "one", tmp_path / "two", "model.safetensors", TOLERANCE, OF_LOSSES)
    before, after = (load_file(folder / "model.safetensors") for folder in (world / "start", tmp_path / "two"))
    assert max((before[name] - after[name]).abs().max().item() for name in before) > 1e-2
    assert (before[ALPHA] - after[ALPHA]).abs().max() > 1e-3
    assert ("logit_scale" in flags) == (before["logit_scale"] != after["logit_scale"]).item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "deepspeed"),
    [
        ([*TORCHRUN, "--no-python", "alpha-clip", "train"], ()),
        ([*DEEPSPEED, "--no_python", "alpha-clip", "train"], ("--deepspeed", "zero1")),
    ],
    ids=["torchrun", "deepspeed"],
)
def test_the_documented_commands_learn_what_one_process_does(world, tmp_path, command, deepspeed):
    """From a folder with files named like our packages."""
    for name in ("train", "eval", "mllm"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong file')\n")
    train(world, tmp_path / "one", *PLAIN)
    two = ["--per_device_train_batch_size", 2, *deepspeed]
    code, output = launch(command, recipe_arguments(world, tmp_path / "two", *PLAIN, *two), cwd=tmp_path)
    assert code == 0, output[-3000:]
    assert_equal_runs(tmp_path / "one", tmp_path / "two", "model.safetensors", TOLERANCE, OF_LOSSES)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_alpha_stays_at_zero_under_every_stage(world, tmp_path, stage):
    """With a learning rate of zero, the saved weights are the loaded ones."""
    flags = "--model", world / "blind", "--deepspeed", stage, "--per_device_train_batch_size", 2
    command = [*TORCHRUN, "-m", "alpha_clip_commands.alpha_clip", "train"]
    code, output = launch(command, recipe_arguments(world, tmp_path, *flags, "--learning_rate", 0, "--max_steps", 1))
    assert code == 0, output[-3000:]
    before, after = (load_file(folder / "model.safetensors") for folder in (world / "blind", tmp_path))
    assert not after[ALPHA].any()
    assert same_tensors(before, after)


def launch_two(world, out, script, *flags):
    """Launch two ranks of a script."""
    file = out.with_name(f"{out.name}.py")
    file.write_text(script)
    return launch([*TORCHRUN, str(file)], recipe_arguments(world, out, *flags, "--per_device_train_batch_size", 2))


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", [(), ("--deepspeed", "zero2")], ids=["torchrun", "zero2"])
def test_two_ranks_killed_within_an_epoch_go_on_to_the_same_end(world, tmp_path, deepspeed):
    flags = (*SAVING, *deepspeed, "--learning_rates", "alpha=3e-2")
    code, output = launch_two(world, tmp_path / "killed", KILLED_AT_FIVE, *flags)
    assert code != 0 and "SIGKILL" in output, output[-3000:]
    assert last_checkpoint(tmp_path / "killed").name == "checkpoint-3"
    goes_on = KILLED_AT_FIVE.replace("trainer.StopOnSignal.on_step_end = on_step_end", "")
    for name in ("killed", "undisturbed"):
        code, output = launch_two(world, tmp_path / name, goes_on, *flags)
        assert code == 0, output[-3000:]
    assert_equal_runs(tmp_path / "undisturbed", tmp_path / "killed", "model.safetensors", 0, 0)


NAN_ON_ONE = """
import os, sys
from alpha_clip_commands import region_tune
from train.contrastive import trainer as contrastive_trainer

loss_of = contrastive_trainer.region_text_loss
calls = []


def spoiled(*args, **kwargs):
    calls.append(1)
    loss = loss_of(*args, **kwargs)
    return loss * float("nan") if os.environ["RANK"] == "1" and len(calls) == 5 else loss

contrastive_trainer.region_text_loss = spoiled
sys.exit(region_tune.train_alpha_clip(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_loss_that_is_no_number_on_one_rank_ends_both(world, tmp_path):
    code, output = launch_two(world, tmp_path / "out", NAN_ON_ONE, *SAVING)
    assert code != 0
    assert "error: the loss is nan at step 4 on process 1, batch of" in output, output[-3000:]
    assert "exitcode  : 2" in output and output.count("error: the loss is") == 2  # both ranks ended
    assert last_checkpoint(tmp_path / "out").name == "checkpoint-3"
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "parts"),
    [(CHUNKS, ()), (("--deepspeed", "zero2"), ("--train_parts", *alpha_clip.PARTS)), (("--deepspeed", "zero3"), ())],
    ids=["torchrun", "zero2, all parts", "zero3"],
)
def test_two_ranks_in_bfloat16_learn_what_one_does(world, tmp_path, flags, parts):
    """Up to rounding: DeepSpeed computes with rounded weights. Saved weights and the text tower are not rounded."""
    both = (*PLAIN, "--bf16", "true", *parts)
    train(world, tmp_path / "one", *both)
    two = ("--per_device_train_batch_size", 2, *flags)
    code, output = launch(
        [*TORCHRUN, "-m", "alpha_clip_commands.alpha_clip", "train"],
        recipe_arguments(world, tmp_path / "two", *both, *two),
    )
    assert code == 0, output[-3000:]
    assert_equal_runs(tmp_path / "one", tmp_path / "two", "model.safetensors", 8e-3, 2e-2)  # the largest move is 7.7e-2
    before, after = (load_file(folder / "model.safetensors") for folder in (world / "start", tmp_path / "two"))
    assert all(weight.dtype == torch.float32 for weight in after.values())
    assert {p.dtype for p in AlphaCLIPModel.from_pretrained(tmp_path / "two").parameters()} == {torch.float32}
    unmoved = [name for name in before if torch.equal(before[name], after[name])]
    assert all(name in unmoved for name in before if name.startswith("text_") and not parts)
    assert not parts or len(unmoved) < len(before) / 10
    rounded = [name for name, weight in after.items() if torch.equal(weight, weight.bfloat16().float())]
    assert ALPHA not in rounded and len(rounded) < len(after) / 2  # zeros and ones are equal
