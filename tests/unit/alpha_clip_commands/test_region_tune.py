"""The arguments of the training commands, read without Transformers, are those that Transformers reads."""

import dataclasses
import re

import pytest
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.trainer_pt_utils import AcceleratorConfig

from alpha_clip_commands.flag_values import finite_number, switch, whole_number
from alpha_clip_commands.training import programs
from alpha_clip_commands.training.recipe import RECIPES, recipe_names, split_recipe
from alpha_clip_commands.training.training_fields import accelerator_fields, dictionary_fields, training_fields

PROGRAMS = (programs.TUNE, programs.TRAIN_ALPHA_CLIP)
REQUIRED = ["--model", "M", "--data", ".", "--output_dir", "O"]


def test_fields_are_those_of_the_class():
    assert list(dictionary_fields()) == TrainingArguments._VALID_DICT_FIELDS
    assert list(accelerator_fields()) == [field.name for field in dataclasses.fields(AcceleratorConfig)]
    assert list(training_fields()) == [field.name for field in dataclasses.fields(TrainingArguments) if field.init]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_flags_are_those_of_huggingface(program):
    """Names, how many values, choices, and what is required."""
    theirs = HfArgumentParser((*program.kinds, TrainingArguments))._option_string_actions
    ours = programs.build_parser(program)._option_string_actions
    assert ours.keys() - {"--version"} == theirs.keys()
    for option, action in theirs.items():
        assert ours[option].nargs == action.nargs or option in ("-h", "--help"), option
        checked = {int: whole_number, float: finite_number, string_to_bool: switch}
        assert ours[option].type == checked.get(action.type, ours[option].type), option
        if ours[option].choices is not None:
            assert list(ours[option].choices) == list(action.choices), option
    assert sum(action.choices is not None for action in ours.values()) > 5


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_every_recipe_is_of_one_program_and_accepted(program, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip_l14_336_grit_20m_4xe.pth").touch()
    names = recipe_names(programs.known_keys(program))
    other = recipe_names(programs.known_keys(PROGRAMS[program is programs.TUNE]))
    assert sorted(names + other) == sorted(path.stem for path in RECIPES.glob("*.yaml")) and len(names) > 5
    for name in names:
        programs.check(program, [name, *REQUIRED])
        programs.check(program, ["--local_rank=0", str(RECIPES / f"{name}.yaml"), *REQUIRED])
    with pytest.raises(ValueError, match=f"unknown recipe '{other[0]}'; expected a .yaml file, or one of {names[0]}"):
        programs.check(program, [other[0], *REQUIRED])


@pytest.mark.parametrize(
    ("argv", "path", "rest"),
    [
        (["shapes_lora", "--data", "D"], "shapes_lora", ["--data", "D"]),
        (["--local_rank=1", "shapes_lora", "--data", "D"], "shapes_lora", ["--local_rank=1", "--data", "D"]),
        (["--data", "shapes_lora"], None, ["--data", "shapes_lora"]),
        (["--data", "D", "r.yaml"], "r.yaml", ["--data", "D"]),
        ([], None, []),
    ],
)
def test_where_a_recipe_is(argv, path, rest):
    found, others = split_recipe(argv)
    assert others == rest
    assert found == (str(RECIPES / f"{path}.yaml") if path == "shapes_lora" else path)


@pytest.mark.parametrize(
    "flags",
    [
        ["--bf16"],
        ["--no_average_tokens_across_devices"],
        ["--no-average-tokens-across-devices"],
        ["--gradient_checkpointing", "true", "--gradient-checkpointing-kwargs", '{"use_reentrant": false}'],
        ["--label_names", "a", "b", "--include_for_metrics", "loss"],
        ["--lr_scheduler_type", "cosine", "--optim", "adamw_torch", "--save_strategy", "no"],
        ["--warmup_steps", "0.5", "--eval_steps", "0.1", "--weight_d", "1"],  # abbreviated
        ["--report_to", "none", "--run_name", "5", "--debug", "underflow_overflow"],
        ["--plan", "--alpha_weights", "none.pth"],
        ["--deepspeed", "zero2", "--local_rank=0", "--plan", "--lora-r", "4", "--lora_alpha", "8"],
        ["--learning_rates", "alpha=1e-3", "--turn_weights", "left=2"],
    ],
)
def test_what_huggingface_takes_is_not_refused(flags, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    programs.check(programs.TUNE, [*REQUIRED, *flags])


def test_values_of_a_recipe_are_read_as_flags(tmp_path):
    """As where a number stands in quotes; and LoRA's rank may be in the recipe, its scale on the command line."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("lora_r: '4'\nlora_dropout: 0.0\ndata: .\n")
    programs.check(programs.TUNE, [str(recipe), "--output_dir", "O", "--lora_alpha", "8"])
    recipe.write_text("lora_r: 4\ndata: .\n")
    programs.check(programs.TUNE, [str(recipe), "--output_dir", "O", "--lora_alpha", "8"])
    recipe.write_text("lora_r: 0\ndata: .\n")
    with pytest.raises(ValueError, match="no effect without LoRA"):
        programs.check(programs.TUNE, [str(recipe), "--output_dir", "O", "--lora_alpha", "8"])


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_help_lists_our_flags_and_says_where_the_others_are(program):
    text = programs.build_parser(program).format_help()
    for kind in program.kinds:
        for field in dataclasses.fields(kind):
            assert f"--{field.name}" in text
    assert "Every field of transformers.TrainingArguments" in text and "--adam_beta1" not in text
    assert re.search(r"--lora_dropout.*\(default 0", text, re.S)


def test_a_finished_run_needs_no_data(tmp_path):
    """It says that it is finished; whether its data is still there does not matter."""
    (tmp_path / "out").mkdir()
    programs.check(programs.TUNE, ["--data", "gone", "--output_dir", str(tmp_path / "out")])
