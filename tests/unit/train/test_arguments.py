"""Recipes first, flags win, unknown keys are errors; every shipped recipe parses."""

import contextlib
from pathlib import Path

import pytest
import torch

import train
from tests.files import write_json
from train.contrastive import arguments
from train.tuning.arguments import parse_args

RECIPES = sorted(Path(train.__file__).parent.glob("recipes/*.yaml"))
CONTRASTIVE = [recipe for recipe in RECIPES if "alpha-clip train" in recipe.read_text("utf-8")]
REQUIRED = ["--model", "M", "--data", "D", "--output_dir", "O"]


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r not in CONTRASTIVE], ids=lambda path: path.stem)
def test_every_recipe_parses(recipe):
    model, data, training = parse_args([str(recipe), *REQUIRED, "--use_cpu", "true"])  # bf16 is refused without
    assert (model.model, data.data, training.output_dir) == ("M", ["D"], "O")


@pytest.mark.parametrize("recipe", CONTRASTIVE, ids=lambda path: path.stem)
def test_every_contrastive_recipe_parses(recipe):
    # bf16 is refused without use_cpu, fp16 with it
    flags = [str(recipe), *REQUIRED, "--use_cpu", "true", "--fp16", "false"]
    tower, pairs, training = arguments.parse_args(flags)
    assert (tower.model, pairs.data, training.output_dir) == ("M", ["D"], "O")
    if "_paper" in recipe.stem or "_released" in recipe.stem:
        assert (pairs.loss, pairs.equal_texts, pairs.regions_per_image, tower.decay_all) == ("released", False, 1, True)
    else:
        assert (pairs.loss, pairs.equal_texts) == ("symmetric", True)


def test_which_recipes_are_contrastive():
    names = {recipe.stem for recipe in CONTRASTIVE}
    sizes = ("b16", "l14", "l14_336")
    assert names >= {f"alpha_clip_{size}{kind}" for size in sizes for kind in ("", "_paper")}
    assert names >= {"shapes_clip", "shapes_alpha_clip", "shapes_alpha_clip_released"}
    assert names == {recipe.stem for recipe in RECIPES if "alpha_clip" in recipe.stem} | {"shapes_clip"}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there bf16 is no question")
@pytest.mark.parametrize("parse", [parse_args, arguments.parse_args])
def test_a_plan_needs_no_gpu(parse):
    assert parse([*REQUIRED, "--bf16", "true", "--plan", "true"])[0].plan
    with pytest.raises(ValueError, match="bf16"):
        parse([*REQUIRED, "--bf16", "true"])


def test_an_unknown_flag_is_named():
    with pytest.raises(ValueError, match="unknown flags or values without a flag: --lerning_rate 1; --help"):
        parse_args([*REQUIRED, "--lerning_rate", "1"])


def test_flags_win_over_the_recipe(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: A\ndata: D\noutput_dir: O\nlearning_rate: 1.0e-3\nmax_turns: 3\n")
    model, data, training = parse_args([str(recipe)])
    assert (model.model, data.max_turns, training.learning_rate) == ("A", 3, 1e-3)
    model, _, training = parse_args(["--local_rank=0", str(recipe), "--learning_rate", "5e-4", "--model", "B"])
    assert (model.model, training.learning_rate) == ("B", 5e-4)


@pytest.mark.parametrize("content", ["deepspeed: zero2\nlearning_rates: [alpha=1.0]", "deepspeed: zero2_offload"])
def test_an_optimizer_of_deepspeeds_is_in_the_way_of_rates_of_parts_only(tmp_path, content):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    *_, training = parse_args([str(recipe), *REQUIRED])
    assert Path(training.deepspeed).stem == content.split()[1]


def test_renamed_settings_of_earlier_recipes_are_read(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("eval_metrics: [exactly right, CIDEr]\n")
    assert parse_args([str(recipe), *REQUIRED])[1].eval_metrics == ["literal_match", "cider"]
    recipe.write_text("eval_metrics: exactly right\nmetric_for_best_model: eval_exactly_right_descriptions\n")
    _, data, training = parse_args([str(recipe), *REQUIRED])
    assert data.eval_metrics == ["literal_match"]
    assert training.metric_for_best_model == "eval_literal_match_descriptions"
    recipe.write_text("eval_pictures: 7\npatch_weight: 0.0\n")
    assert arguments.parse_args([str(recipe), *REQUIRED])[1].eval_images == 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1", "unknown keys learning_rat"),
        ("- 1", "expected 'key: value'"),
        ("a: 1\nb: [", "r.yaml, line 2, column 5, is not YAML: expected the node content"),
        ("region_input: circle", "region_input: expected one of"),
        ("max_turns: 0", "max_turns: expected 1 or more"),
        ("optimizer: sgd", "optimizer: expected trainer or muon"),
        ("turn_weights: [left=0]", "turn_weights: expected NAME=NUMBER"),
        ("turn_weights: [left]", "turn_weights: expected NAME=NUMBER"),
        ("learning_rates: [alpha=-1]", "learning_rates: expected NAME=NUMBER"),
        ("box_jitter: 0.5", "box_jitter: expected a share from 0 to below 0.5"),
        ("min_strength: 2", "min_strength: expected a number from 0 to 1"),
        ("regions_per_image: 0", "regions_per_image: expected 1 or more"),
        ("eval_metrics: [SPICE]", "eval_metrics: expected literal_match or cider"),
        ("eval_metrics: [exact match]", "use literal_match"),
        ("dtype: int8", "dtype: expected float32"),
        ("load_in: 4bit", "quantized weights cannot be trained; set lora_r"),
        ("lora_tower: true", "no effect without LoRA; set lora_r"),
        ("deepspeed: zero9", "deepspeed: expected one of zero1, zero2, zero2_offload, zero3, zero3_offload"),
        ("deepspeed: zero2\noptimizer: muon", "muon cannot be used with DeepSpeed"),
        ("deepspeed: zero2_offload\nlearning_rates: [alpha=1.0]", "defines an optimizer with a single learning rate"),
    ],
)
def test_bad_recipes(tmp_path, content, message):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(content)
    with pytest.raises(ValueError, match=message):
        parse_args([str(recipe), *REQUIRED])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("regions: 1", "unknown keys regions"),
        ("max_turns: 1", "unknown keys max_turns"),  # of region-tune
        ("geometry: squash", "geometry: expected one of crop, pad, stretch"),
        ("train_blocks: -1", "train_blocks: expected 0 or more"),
        ("train_blocks: 1\ntrain_parts: [alpha]", "train_blocks: requires vision_model"),
        ("train_blocks: 1\nlora_r: 2", "train_blocks: blocks are frozen with LoRA"),
        ("lora_r: -1", "lora_r: expected 0"),
        ("lora_targets: [q_proj]", "no effect without LoRA; set lora_r"),
        ("lora_alpha: 2.0", "no effect without LoRA; set lora_r"),
        ("lora_dropout: 0.1", "no effect without LoRA; set lora_r"),
        ("lora_r: 2\ntrain_parts: [alpha, logit_scale]", "an adapter cannot contain logit_scale"),
        ("logit_scale: 0", "logit_scale: expected a factor above 0 and up to 100"),
        ("logit_scale: 101", "logit_scale: expected a factor above 0 and up to 100"),
        ("learning_rates: [alpha]", "learning_rates: expected NAME=NUMBER"),
        ("optimizer: sgd", "optimizer: expected trainer or muon"),
        ("deepspeed: zero2\noptimizer: muon", "muon cannot be used with DeepSpeed"),
        ("region_input: circle", "region_input: expected one of"),
        ("loss: clip", "loss: expected one of symmetric, released"),
        ("schedule: cosine", "schedule: expected one of trainer, released"),
        ("regions_per_image: 0", "regions_per_image: expected 1 or more"),
        ("released_steps: 0", "released_steps: expected 1 or more"),
        ("eval_pictures: 0", "eval_images: expected 1 or more"),
        ("mask_share: 1.5", "mask_share: expected a number from 0 to 1"),
        ("min_strength: -0.1", "min_strength: expected a number from 0 to 1"),
        ("max_missing: 2", "max_missing: expected a number from 0 to 1"),
        ("whole_image_rate: 1.1", "whole_image_rate: expected a number from 0 to 1"),
        ("whole_image_rate: 0.5\nregions_per_image: 4", "expected at most 0.25, got 0.5"),
        ("max_blur: 2", "max_blur: expected a number from 0 to 1"),
        ("mask_jitter: -1", "mask_jitter: expected 0 or more"),
        ("patch_weight: 0.5", "patch_weight was removed: .* delete the key"),
        ("cache_chunk: -1", "cache_chunk: expected 0 or more"),
        ("box_jitter: 0.5", "box_jitter: expected a share from 0 to below 0.5"),
        ("loss: released\ncache_chunk: 4", "released does not support cache_chunk"),
        ("cache_chunk: 4\ngradient_accumulation_steps: 2", "replaces gradient_accumulation_steps"),
        ("load_best_model_at_end: true\neval_strategy: steps\neval_steps: 500", "evaluations have no loss"),
    ],
)
def test_bad_contrastive_recipes(tmp_path, content, message):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(content)
    with pytest.raises(ValueError, match=message):
        arguments.parse_args([str(recipe), *REQUIRED])


@pytest.mark.parametrize(("stage", "is_refused"), [(0, True), (1, False)])
def test_zero_stage_0_in_16_bits_is_refused(tmp_path, stage, is_refused):
    """It keeps no float32 weights within reach: what it saved would be rounded."""
    file = tmp_path / "own.json"
    write_json(file, {"zero_optimization": {"stage": stage}, "bf16": {"enabled": "auto"}})
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"deepspeed: {file}")
    expected = pytest.raises(ValueError, match="has ZeRO stage 0") if is_refused else contextlib.nullcontext()
    with expected:
        arguments.parse_args([str(recipe), *REQUIRED, "--use_cpu", "true", "--bf16", "true"])
    arguments.parse_args([str(recipe), *REQUIRED])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("turn_weights: null", r"turn_weights: expected a value, got null; to use the default, delete the key"),
        ("max_turns: null", "max_turns: expected a value, got null"),
        ("max_turns: many", "max_turns: expected an integer of up to 32 bits, got 'many'"),
        ("max_turns: 2.5", "max_turns: expected an integer"),
        ("max_turns: true", "max_turns: expected text or a number, got true"),
        ("max_turns: [1]", "max_turns: expected one value, got a list"),
        ("max_turns: {a: 1}", "max_turns: expected one value or a list, got a mapping"),
        ("max_turns: 99999999999999999999", "max_turns: expected an integer of up to 32 bits"),
        ("max_turns: 2001-01-01", "max_turns: expected text or a number, got date"),
        ("learning_rate: 1e400", "learning_rate: expected a finite number, got '1e400'"),
        ("learning_rate: .inf", "learning_rate: expected a finite number"),
        ("learning_rate: .nan", "learning_rate: expected a finite number"),
        ("learning_rate: high", "learning_rate: expected a finite number, got 'high'"),
        ("learning_rate: -1.0e-3", "learning_rate: expected 0 or more, got -0.001"),
        ("max_steps: -5", "max_steps: expected 1 or more, or -1"),
        ("max_steps: 0", "max_steps: expected 1 or more, or -1"),
        ("num_train_epochs: -1", "num_train_epochs: expected 0 or more"),
        ("per_device_train_batch_size: 0", "per_device_train_batch_size: expected 1 or more"),
        ("gradient_accumulation_steps: 0", "gradient_accumulation_steps: expected 1 or more"),
        ("warmup_steps: -1", "warmup_steps"),
        ("label_smoothing_factor: 2", "label_smoothing_factor: expected a number from 0 to 1"),
        ("seed: -1", "seed: expected a number from 0 to"),
        ("dataloader_num_workers: -1", "dataloader_num_workers: expected a number from 0 to 1024"),
        ("lora_r: 2\nlora_alpha: .nan", "lora_alpha: expected a finite number"),
        ("lora_r: 2\nlora_alpha: -1", "lora_alpha: expected a number above 0"),
        ("lora_r: 2\nlora_dropout: 1.5", "lora_dropout: expected a number from 0 to below 1"),
        ("lr_scheduler_type: steep", "lr_scheduler_type: .*steep"),
        ("bf16: maybe", "bf16: .*maybe"),
        ("bf16: [true]", "bf16: expected one value, got a list"),
        ("wordings: [own]", "wordings: expected one value, got a list"),
        ("wordings: 5", "wordings: expected text, got the number 5; put it in quotes"),
        ("wordings: {own: 1}", "wordings: expected one value or a list, got a mapping"),
        ('wordings: "a\\0b"', "wordings: expected text without NUL characters"),
        ("turn_kinds: [[left]]", "turn_kinds: expected text or a number, got list"),
        ("turn_kinds: [null]", "turn_kinds: expected text or a number, got NoneType"),
        ("turn_weights: [left=1e400]", "turn_weights: expected NAME=NUMBER"),
        ("turn_weights: [left=1, left=2]", "turn_weights: 'left' is given twice"),
        ("turn_weights: [=1]", "turn_weights: expected NAME=NUMBER"),
        ("accelerator_config: {speed: 1}", "accelerator_config: unknown keys speed"),
        ("parallelism_config: 5", "parallelism_config: it can be set in Python only"),
        ("deepspeed: {a: 1}", "deepspeed: expected one value or a list, got a mapping"),
        ("max_turns: 1\nmax_turns: 2", "line 2, column 1, is not YAML: a repeated key: 'max_turns'"),
        ("1: 2", "is not YAML: expected text as the key: '1'"),
        ("null: 2", "is not YAML: expected text as the key"),
        ("? [a]\n: 2", "is not YAML: expected text as the key"),
        ("a: &a {b: 1}\nc: {<<: *a}", "is not YAML: expected text as the key: '<<'"),
        ("a: 2001-13-45", "a value cannot be read: month must be"),
        ("a: !!int x", "expected a decimal number, got 'x'"),
        ("a: 010", "expected a decimal number, got '010'"),  # 8
        ("a: 1:30", "expected a decimal number, got '1:30'"),  # 90
        ("a: 0x1f", "expected a decimal number, got '0x1f'"),
        ("a: !!bool x", "is not YAML: a value cannot be read"),
        ("a: !!timestamp x", "is not YAML: a value cannot be read"),
        ("a: !!python/object:os.system x", "is not YAML: could not determine a constructor"),
        ("a: " + "9" * 5000, "is not YAML: a value cannot be read: Exceeds the limit"),
        ("a: " + "[" * 5000, "5,000 opening brackets"),
        ("a: " + "{b: " * 1000, "is not YAML: nested too deeply"),
        ("a: x\0y", "is not YAML: .*special characters"),
        ("a: &a [*a]", "more than 10,000 values"),
        (
            "x: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
            + "".join(f"y{i}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(9)),
            "more than 10,000 values",
        ),
        ("# " + "x" * 70_000, "more than 65,536 bytes"),
        (b"a: \xff", "is not UTF-8 at byte 3"),
        (b"", "expected 'key: value' lines, got NoneType"),
    ],
)
def test_recipes_of_other_forms_are_named_by_key(tmp_path, content, message):
    recipe = tmp_path / "r.yaml"
    recipe.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        parse_args([str(recipe), *REQUIRED])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_what_is_no_recipe_is_named(tmp_path):
    (tmp_path / "r.yaml").mkdir()
    for recipe in (tmp_path / "r.yaml", tmp_path / "none.yaml"):
        with pytest.raises(ValueError, match=f"recipe not found, or not a file: {recipe}"):
            parse_args([str(recipe), *REQUIRED])


def test_a_recipe_takes_what_the_flags_take(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_bytes(
        b"\xef\xbb\xbfmodel: A\ndata: D\noutput_dir: O\nlearning_rate: 2e-5\nmax_turns: '3'\nturn_weights: left=2\n"
        b"lora_alpha: null\nlr_scheduler_kwargs: {num_cycles: 1}\nplan: 'yes'\nreport_to: [none]\n"
    )
    model, data, training = parse_args([str(recipe)])
    assert (data.data, training.learning_rate, data.max_turns, model.plan) == (["D"], 2e-5, 3, True)
    assert data.turn_weights == ["left=2"] and training.lr_scheduler_kwargs == {"num_cycles": 1}


@pytest.mark.parametrize("parse", [parse_args, arguments.parse_args])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rate", "nan"], "--learning_rate[^:]*: expected a finite number, got 'nan'"),
        (["--learning_rate", "inf"], "--learning_rate[^:]*: expected a finite number"),
        (["--learning_rate", "-1"], "learning_rate: expected 0 or more"),
        (["--max_steps", "-5"], "max_steps: expected 1 or more, or -1"),
        (["--max_steps", "x"], "--max_steps[^:]*: expected an integer"),
        (["--lora_r", "2", "--lora_alpha", "nan"], "--lora_alpha[^:]*: expected a finite number"),
        (["--lora_r", "1e3"], "--lora_r[^:]*: expected an integer"),
        (["--lora_r", "9" * 30], "--lora_r[^:]*: expected an integer of up to 32 bits"),
        (["--seed"], "--seed[^:]*: expected one argument"),
        (["--box_jitter", "nan"], "--box_jitter[^:]*: expected a finite number"),
        (["--max_missing", "nan"], "--max_missing[^:]*: expected a finite number"),
        (["--device_tflops", "0"], "device_tflops: expected a number above 0"),
        (["--lr_scheduler_type", "x"], "lr_scheduler_type"),
    ],
)
def test_flags_of_other_forms_are_named(parse, flags, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse([*REQUIRED, *flags])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not valid JSON"),
        ("[]", "expected a JSON dict"),
        ('{"zero_optimization": 5}', "zero_optimization: expected an object, got an integer"),
        ('{"zero_optimization": {"stage": "2"}}', "zero_optimization.stage: expected an integer, got text"),
        ('{"zero_optimization": {"stage": 9}}', "zero_optimization.stage: expected an integer <= 3"),
        ('{"optimizer": []}', "optimizer: expected an object or null"),
        ('{"bf16": true}', "bf16: expected an object or null"),
        ('{"bf16": {}, "bf16": {}}', "keys of an object must be unique"),
        ('{"gradient_clipping": NaN}', "NaN or infinite"),
        ("{" + '"a": {' * 200 + "}" * 201, "nested more than 100"),
        ('{"a": ' * 100_000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("as_flag", [True, False])
def test_deepspeed_files_of_other_forms_are_named(tmp_path, content, message, as_flag):
    file, recipe = tmp_path / "own.json", tmp_path / "r.yaml"
    file.write_text(content)
    recipe.write_text("max_turns: 1" if as_flag else f"deepspeed: {file}")
    with pytest.raises(ValueError, match=message) as caught:
        parse_args([str(recipe), *REQUIRED, *(["--deepspeed", str(file)] if as_flag else [])])
    assert str(file) in str(caught.value) or str(recipe) in str(caught.value)
