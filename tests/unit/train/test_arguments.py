"""Recipes first, flags win, unknown keys are errors; every shipped recipe parses."""

from pathlib import Path

import pytest

import train
from train.arguments import parse_args

RECIPES = sorted(Path(train.__file__).parent.glob("recipes/*.yaml"))
REQUIRED = ["--model", "M", "--data", "D", "--output_dir", "O"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses(recipe):
    model, data, training = parse_args([str(recipe), *REQUIRED, "--use_cpu", "true"])  # bf16 is refused without
    assert (model.model, data.data, training.output_dir) == ("M", ["D"], "O")


def test_flags_win_over_the_recipe(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: A\ndata: D\noutput_dir: O\nlearning_rate: 1.0e-3\nmax_turns: 3\n")
    model, data, training = parse_args([str(recipe)])
    assert (model.model, data.max_turns, training.learning_rate) == ("A", 3, 1e-3)
    model, _, training = parse_args(["--local_rank=0", str(recipe), "--learning_rate", "5e-4", "--model", "B"])
    assert (model.model, training.learning_rate) == ("B", 5e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1", "unknown keys learning_rat"),
        ("- 1", "expected 'key: value'"),
        ("a: [", "is not YAML"),
        ("region_input: circle", "region_input: expected one of"),
        ("max_turns: 0", "max_turns: expected 1 or more"),
        ("optimizer: sgd", "optimizer: expected trainer or muon"),
        ("turn_weights: [left=0]", "turn_weights: expected NAME=NUMBER"),
        ("turn_weights: [left]", "turn_weights: expected NAME=NUMBER"),
        ("learning_rates: [alpha=-1]", "learning_rates: expected NAME=NUMBER"),
        ("box_jitter: 0.5", "box_jitter: expected a share from 0 to below 0.5"),
        ("min_strength: 2", "min_strength: expected a number from 0 to 1"),
        ("regions_per_image: 0", "regions_per_image: expected 1 or more"),
        ("eval_metrics: [SPICE]", "eval_metrics: expected names out of"),
        ("dtype: int8", "dtype: expected float32"),
        ("load_in: 4bit", "quantised weights cannot be trained; give lora_r"),
        ("lora_tower: true", "need lora_r above 0"),
        ("save_total_limit: 1", "save_total_limit: expected 2 or more"),
        ("deepspeed: zero9", "deepspeed: expected one of zero1, zero2, zero2_offload, zero3, zero3_offload"),
        ("deepspeed: zero2\noptimizer: muon", "muon runs without DeepSpeed only"),
        ("deepspeed: zero2_offload\nlearning_rates: [alpha=1.0]", "brings an optimizer of one learning rate"),
    ],
)
def test_bad_recipes(tmp_path, content, message):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(content)
    with pytest.raises(ValueError, match=message):
        parse_args([str(recipe), *REQUIRED])
