"""Contrastive training: exactly which weights move, what is saved and goes on, what is refused."""

import functools
import shutil
import signal

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from alpha_clip_commands import region_tune
from eval.region_matching import described_images, score_region_text
from mllm.data.readers.grit import read_grit
from mllm.data.readers.visual_genome import read_regions
from mllm.data.shapes import grit_layout, visual_genome_layout
from tests.files import read_json, write_json_lines
from tests.tensors import changed_tensors
from tests.tiny import build_tiny_clip, noise_image, save_model
from tests.training import train, write_splits
from train import alpha_clip
from train.contrastive import trainer as contrastive_trainer
from train.contrastive.losses import released_learning_rate_factor
from train.output import last_checkpoint
from vision_tower import AlphaCLIPModel, AlphaCLIPProcessor, Region

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
ALPHA = "vision_model.embeddings.patch_embedding.alpha.weight"
SAVING = ("--save_strategy", "steps", "--save_steps", 2)
PLAIN = ("--optim", "sgd", "--max_grad_norm", 0, "--lr_scheduler_type", "constant")  # moves by the gradient itself


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    return write_splits(grit_layout, folder, 6, ("train", "val", "test"), min_objects=1)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """An Alpha-CLIP whose alpha weight is not zero."""
    return saved(tmp_path_factory.mktemp("start"))


def saved(folder, alpha_std=0.3, **vision):
    model, processor = build_tiny_clip(alpha_std=alpha_std)
    for name, value in vision.items():
        setattr(model.config.vision_config, name, value)
    return save_model(folder, model, processor)


def run(start, data, out, *flags):
    batch = ("--per_device_train_batch_size", 4, "--dataloader_drop_last", "true", "--regions_per_image", 4)
    settings = "--learning_rate 1e-2 --logging_steps 1 --save_strategy no".split()
    return train(region_tune.train_alpha_clip, start, (data / "train", data / "val"), out, *batch, *settings, *flags)


def weights(folder):
    return AlphaCLIPModel.from_pretrained(folder).state_dict()


def of_parts(names, *prefixes):
    """Those under the prefixes, but for what has no gradient: softmax ignores what is added to all keys alike."""
    return {name for name in names if name.startswith(prefixes) and not name.endswith("k_proj.bias")}


def largest_difference(one, two):
    return max((one[name] - two[name]).abs().max().item() for name in one)


def log(out):
    return read_json(out / "training_record.json")["log"]


def error_line(capsys):
    """The one line that a user is told."""
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("alpha-clip train: error:"))
    return line


@pytest.fixture()
def trainers(monkeypatch):
    """The trainers of the runs in a test."""
    found = []
    original = alpha_clip.train_and_save
    monkeypatch.setattr(alpha_clip, "train_and_save", lambda t, checkpoint: found.append(t) or original(t, checkpoint))
    return found


# which weights move

TOWER = ("vision_model.", "visual_projection.")


def test_image_tower_projection_and_alpha_move_and_nothing_else(start, data, tmp_path):
    assert run(start, data, tmp_path) == 0
    before = weights(start)
    names = changed_tensors(before, weights(tmp_path))
    assert ALPHA in names and of_parts(names, *TOWER) == of_parts(before, *TOWER)
    assert all(name.startswith(TOWER) for name in names)  # no text tower, no temperature


def test_the_last_blocks_alone(start, data, tmp_path):
    assert run(start, data, tmp_path, "--train_blocks", 1) == 0
    before = weights(start)
    parts = "vision_model.encoder.layers.2.", "vision_model.post_layernorm.", "visual_projection.", ALPHA
    names = changed_tensors(before, weights(tmp_path))
    assert of_parts(names, "") == of_parts(before, *parts) and all(name.startswith(parts) for name in names)


def test_no_block_at_all(start, data, tmp_path):
    assert run(start, data, tmp_path, "--train_blocks", 0, "--train_parts", "vision_model") == 0
    assert changed_tensors(weights(start), weights(tmp_path)) == {
        f"vision_model.post_layernorm.{n}" for n in ("weight", "bias")
    }


def test_alpha_alone(start, data, tmp_path):
    assert run(start, data, tmp_path, "--train_parts", "alpha") == 0
    assert changed_tensors(weights(start), weights(tmp_path)) == {ALPHA}


@pytest.mark.parametrize("parts", [("alpha",), ("vision_model", "visual_projection", "alpha")])
def test_lora_and_the_named_parts(start, data, tmp_path, trainers, parts):
    flags = "--lora_r", 2, "--train_parts", *parts, "--lora_dropout", 0.1
    assert run(start, data, tmp_path, *flags) == 0
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()
    assert sum("lora_B" in name for name in stored) == 18  # 6 matrices in each of 3 blocks
    before = weights(start)
    reloaded = PeftModel.from_pretrained(AlphaCLIPModel.from_pretrained(start), tmp_path).eval()
    with torch.no_grad():
        pixels = torch.randn(2, 4, 32, 32)
        here = trainers[0].model.eval().get_base_model().get_image_features(pixels).pooler_output
        there = reloaded.get_base_model().get_image_features(pixels).pooler_output
    assert torch.equal(here, there)
    adapted = {n for n in before if n.startswith("vision_model.encoder.layers.") and before[n].ndim == 2}
    expected = adapted | {ALPHA} | ({"visual_projection.weight"} if len(parts) == 3 else set())
    assert changed_tensors(before, reloaded.merge_and_unload().state_dict()) == expected


def test_a_clip_trained_from_nothing_keeps_its_alpha_at_zero(data, tmp_path, caplog):
    """As in the recipe shapes_clip."""
    start = saved(tmp_path / "start", alpha_std=0)
    parts = "vision_model", "visual_projection", "text_model", "text_projection", "logit_scale"
    flags = "--whole_image_rate", 1, "--regions_per_image", 1, "--optimizer", "muon", "--weight_decay", 0.05
    assert run(start, data, tmp_path / "out", "--train_parts", *parts, *flags) == 0
    assert "no captions" not in caplog.text
    before, after = weights(start), weights(tmp_path / "out")
    assert of_parts(changed_tensors(before, after), "") == of_parts(before, "") - {ALPHA}
    assert torch.equal(after[ALPHA], torch.zeros_like(after[ALPHA])) and after["logit_scale"].ndim == 0


def test_same_seed_same_model(start, data, tmp_path):
    flags = "--region_input", "mixed", "--mask_jitter", 2, "--max_blur", 0.02, "--min_strength", 0.5
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run(start, data, tmp_path / name, "--seed", seed, *flags) == 0
    assert not changed_tensors(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert changed_tensors(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_the_temperature_can_be_set_and_is_frozen(start, data, tmp_path):
    assert run(start, data, tmp_path, "--logit_scale", 50) == 0
    assert weights(tmp_path)["logit_scale"].exp().item() == pytest.approx(50)


# how they move


def groups_of(trainer):
    """Learning rate and weight decay by name."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return {
        names[id(parameter)]: (group["initial_lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("decay_all", [False, True])
def test_alpha_has_its_own_learning_rate_and_what_decays(start, data, tmp_path, trainers, decay_all):
    parts = "--train_parts", "vision_model", "alpha", "logit_scale"
    flags = "--learning_rates", "alpha=3e-3", "--weight_decay", 0.1, "--decay_all", str(decay_all).lower()
    assert run(start, data, tmp_path, *parts, *flags) == 0
    groups = groups_of(trainers[0])
    assert {name for name, (rate, _) in groups.items() if rate == 3e-3} == {ALPHA}
    assert {rate for rate, _ in groups.values()} == {3e-3, 1e-2}
    undecayed = {name for name, (_, decay) in groups.items() if decay == 0}
    assert {decay for _, decay in groups.values()} == ({0.1} if decay_all else {0.0, 0.1})
    if not decay_all:
        before = AlphaCLIPModel.from_pretrained(start)
        small = {n for n, p in before.named_parameters() if n.startswith("vision_model.") and p.ndim < 2}
        assert undecayed == (small - {"vision_model.embeddings.class_embedding"}) | {"logit_scale"}


def test_the_released_schedule_rises_again(start, data, tmp_path):
    flags = "--schedule", "released", "--released_steps", 5, "--warmup_steps", 2, "--max_steps", 9
    assert run(start, data, tmp_path, *flags) == 0
    rates = [entry["learning_rate"] / 1e-2 for entry in log(tmp_path) if "loss" in entry]
    assert rates == pytest.approx([released_learning_rate_factor(step, 2, 5) for step in range(9)])
    assert min(rates[1:]) == rates[5] == pytest.approx(0) and rates[8] == pytest.approx(1)


def test_the_released_cosine_must_not_end_in_the_warm_up(start, data, tmp_path, capsys):
    assert run(start, data, tmp_path, "--schedule", "released", "--released_steps", 2, "--warmup_steps", 2) == 2
    assert "released_steps: expected more than the 2 warmup steps, got 2" in error_line(capsys)


# Largest difference of a weight after two plain steps, where the largest move is 0.1. Measured: 1.2e-7 with text tower
# and temperature, 6.0e-8 with patches, 0 in one chunk with dropout.
CACHED = 1e-6
LEARNED = (
    "--train_parts",
    "vision_model",
    "visual_projection",
    "alpha",
    "text_model",
    "text_projection",
    "logit_scale",
)


@pytest.mark.parametrize("more", [(), ("--label_smoothing_factor", 0.1)], ids=["", "smoothed"])
def test_gradient_caching_learns_the_same(start, data, tmp_path, more):
    for name, chunk in (("whole", 0), ("chunks", 3)):
        assert run(start, data, tmp_path / name, *PLAIN, *LEARNED, *more, "--cache_chunk", chunk) == 0
    whole, chunks = weights(tmp_path / "whole"), weights(tmp_path / "chunks")
    assert largest_difference(whole, weights(start)) > 1e-3
    assert largest_difference(whole, chunks) <= CACHED
    losses = [[entry["loss"] for entry in log(tmp_path / name) if "loss" in entry] for name in ("whole", "chunks")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_gradient_caching_goes_twice_through_the_same_dropout(data, tmp_path):
    """In one chunk: more of them draw other numbers than a batch at once does."""
    start = saved(tmp_path / "start", attention_dropout=0.6)
    for name, chunk in (("whole", 0), ("chunk", 100)):
        assert run(start, data, tmp_path / name, *PLAIN, "--cache_chunk", chunk) == 0
    whole, chunk = weights(tmp_path / "whole"), weights(tmp_path / "chunk")
    assert largest_difference(whole, chunk) <= CACHED
    assert run(saved(tmp_path / "none"), data, tmp_path / "undropped", *PLAIN) == 0
    assert largest_difference(whole, weights(tmp_path / "undropped")) > 1e-4  # or there was no dropout


# what is saved


def test_what_is_saved_tells_two_regions_apart(data, tmp_path):
    start = saved(tmp_path / "start", alpha_std=0)  # it cannot
    assert run(start, data, tmp_path / "out", "--geometry", "stretch") == 0
    wide, regions = noise_image(40, 24), [Region.from_box(0, 0, 12, 24), Region.from_box(20, 4, 40, 20)]

    def embeddings(folder):
        model, processor = AlphaCLIPModel.from_pretrained(folder), AlphaCLIPProcessor.from_pretrained(folder)
        with torch.no_grad():
            inputs = processor(images=wide, regions=regions, return_tensors="pt")
            return processor, inputs, model.get_image_features(**inputs).pooler_output

    _, _, (one, two) = embeddings(start)
    assert torch.equal(one, two)
    processor, inputs, (one, two) = embeddings(tmp_path / "out")
    assert not torch.equal(one, two)
    assert processor.image_processor.geometry == "stretch"
    assert (inputs["pixel_values"][0, 3, :, :8] > 1.9).all()  # stretched: no padding above
    record = read_json(tmp_path / "out" / "training_record.json")
    assert record["run_config"]["geometry"] == "stretch" and record["skipped_images"] == []


def test_evaluation_while_training_is_that_of_the_saved_model(start, data, tmp_path):
    flags = "--eval_strategy", "steps", "--eval_steps", 1, "--eval_images", 4
    assert run(start, data, tmp_path / "out", *flags) == 0
    evaluations = [entry for entry in log(tmp_path / "out") if "eval_top1" in entry]
    assert [entry["step"] for entry in evaluations] == [1, 2]
    samples = list(read_grit(data / "val"))
    masks = [s for s in samples if s.id.endswith(("/mask", "/whole"))]
    pictures = [described_images(masks)[number] for number in (0, 1, 3, 5)]  # evenly spaced
    model, processor = (kind.from_pretrained(tmp_path / "out") for kind in (AlphaCLIPModel, AlphaCLIPProcessor))
    scores = score_region_text(model, processor, pictures, truncation=True)
    assert set(scores) == {"top1", "top1_same_image", "cosine_same_image", "whole_top1"}
    assert {name: evaluations[-1][f"eval_{name}"] for name in scores} == pytest.approx(scores, abs=1e-6)
    assert run(start, data, tmp_path / "without") == 0
    assert not changed_tensors(weights(tmp_path / "out"), weights(tmp_path / "without"))


# data


def write_jsonl(folder, of_scenes):
    lines = [
        {
            "image": sample.image,
            "region": {"box": list(sample.regions[0].data)},
            "answer": sample.references[0],
            "meta": {"split": "train"},
        }
        for sample in read_regions(of_scenes)
    ]
    folder.mkdir()
    write_json_lines(folder / "own.jsonl", lines)
    return folder / "own.jsonl"


@pytest.mark.parametrize("layout", ["Visual Genome", *map(slow, ("RefCOCOg", "JSONL", "GRIT folder")), "GRIT tar"])
def test_every_layout_trains_alpha(start, tmp_path, layout):
    folder, form = tmp_path / "data", "mask"
    if layout.startswith("GRIT"):
        grit_layout.write(folder, 4, 1, tars=2 if layout.endswith("tar") else 0, progress=False)
    else:
        visual_genome_layout.write(folder, 4, 1, progress=False)
    if layout == "RefCOCOg":
        (folder / "image_data.json").unlink()
    if layout == "JSONL":
        folder, form = write_jsonl(tmp_path / "own", folder), "box"
    flags = "--train_parts", "alpha", "--region_input", form, "--data", folder
    assert run(start, tmp_path, tmp_path / "out", *flags) == 0
    assert changed_tensors(weights(start), weights(tmp_path / "out")) == {ALPHA}
    (index,) = tmp_path.glob("*/*region_index/index.json")
    expected = {"Visual Genome": "Visual Genome", "RefCOCOg": "RefCOCO", "JSONL": "JSONL"}.get(layout, "GRIT")
    assert read_json(index)["layout"].startswith(expected)


# what goes wrong


def test_a_loss_that_is_no_number_ends_the_run_which_goes_on_afterwards(start, data, tmp_path, monkeypatch, capsys):
    flags = (*SAVING, "--max_steps", 4)
    assert run(start, data, tmp_path / "undisturbed", *flags) == 0
    original, calls = contrastive_trainer.region_text_loss, []

    def third_is_none(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(contrastive_trainer, "region_text_loss", third_is_none)
    capsys.readouterr()
    assert run(start, data, tmp_path / "out", *flags) == 2
    line = error_line(capsys)
    assert "the loss is nan at step 2 on process 0, batch of 4 samples: 00000/00000000" in line
    assert "the last complete checkpoint is kept" in line and line.count("00000/00000000") == 4
    assert last_checkpoint(tmp_path / "out").name == "checkpoint-2"
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # given back: the next Ctrl-C is heard
    monkeypatch.undo()
    assert run(start, data, tmp_path / "out", *flags) == 0
    assert not changed_tensors(weights(tmp_path / "undisturbed"), weights(tmp_path / "out"))


@pytest.mark.parametrize("chunk", [0, 3])
def test_a_weight_that_is_no_number_is_noticed_at_once(data, tmp_path, capsys, chunk):
    start = saved(tmp_path / "start")
    stored = load_file(start / "model.safetensors")
    stored["visual_projection.weight"][0, 0] = float("nan")
    save_file(stored, start / "model.safetensors", {"format": "pt"})
    assert run(start, data, tmp_path / "out", "--cache_chunk", chunk) == 2
    assert "the loss is nan at step 0" in error_line(capsys)


@pytest.fixture(scope="module")
def wrong_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    saved(folder / "widths")
    stored = load_file(folder / "widths" / "model.safetensors")
    stored["text_projection.weight"] = stored["text_projection.weight"][:8].clone()
    save_file(stored, folder / "widths" / "model.safetensors", {"format": "pt"})
    model, processor = build_tiny_clip()
    save_model(folder / "tower", model.vision_model, processor)
    saved(folder / "part")
    stored = load_file(folder / "part" / "model.safetensors")
    del stored["vision_model.encoder.layers.1.mlp.fc1.weight"]
    save_file(stored, folder / "part" / "model.safetensors", {"format": "pt"})
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("widths", "do not match AlphaCLIPModel: 1 of another shape (first: ('text_projection.weight'"),
        ("tower", "expected a directory or hub id of a CLIP with both towers, got"),
        ("tower", "got model_type 'alpha_clip_vision_model'"),
        ("part", "1 missing (first: vision_model.encoder.layers.1.mlp.fc1.weight)"),
        ("nothing", "directory not found"),
        ("empty", "without a config.json"),
    ],
)
def test_what_is_no_clip_is_refused_in_one_line(wrong_models, data, tmp_path, capsys, name, message):
    assert run(wrong_models / name, data, tmp_path / "out") == 2
    line = error_line(capsys)
    assert message in line and f"wrong0/{name}" in line
    assert not list((tmp_path / "out").glob("[!.]*"))


def test_a_hub_id_without_network_is_refused_at_once(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mllm.hub.hub_is_available", lambda: False)
    assert run("nobody/no-clip", data, tmp_path / "out") == 2
    assert "got 'nobody/no-clip': directory not found, and no such model on a reachable hub" in error_line(capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--train_parts", "tower"), "train_parts: expected one of vision_model, visual_projection"),
        (("--learning_rates", "tower=1e-3"), "learning_rates: expected one of vision_model, visual_projection"),
        (("--learning_rates", "text_model=1e-3"), "learning_rates: text_model: not trained; add it to train_parts"),
        (("--train_blocks", 4), "train_blocks: the tower has 3 blocks, got 4"),
        (("--lora_r", 2, "--lora_targets", "query"), "lora_targets: expected one of fc1"),
        (("--lora_r", 2, "--train_parts", "logit_scale"), "an adapter cannot contain logit_scale"),
    ],
)
def test_what_the_model_has_not_is_refused_in_one_line(start, data, tmp_path, capsys, flags, message):
    assert run(start, data, tmp_path / "out", *flags) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize(
    ("folders", "flags", "message"),
    [
        (
            ["train"],
            ("--eval_strategy", "steps", "--eval_steps", 1),
            "expected images in the split 'val'",
        ),
        (["test"], (), "expected region descriptions in the split 'train', got data with the splits test"),
        (["val"], (), "expected region descriptions in the split 'train', got data with the splits val"),
        (["nothing"], (), "data not found"),
    ],
)
def test_data_of_other_splits_is_refused_in_one_line(start, data, tmp_path, capsys, folders, flags, message):
    assert run(start, data, tmp_path / "out", *flags, "--data", *[data / folder for folder in folders]) == 2
    assert message in error_line(capsys)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_less_data_than_a_batch_is_refused(start, data, tmp_path, capsys):
    assert run(start, data, tmp_path, "--per_device_train_batch_size", 16) == 2
    assert "the data has 6 samples, fewer than one batch of 16" in error_line(capsys)


def test_a_finished_run_is_not_written_over_by_another(start, data, tmp_path, capsys):
    assert run(start, data, tmp_path) == 0 and not last_checkpoint(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    assert run(start, data, tmp_path, "--learning_rate", "2e-2", "--seed", 7) == 2
    line = error_line(capsys)
    assert "training_record.json belongs to another run: learning_rate was 0.01, now 0.02; also seed." in line
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_mask_of_another_size_than_its_picture_is_left_out_and_listed(start, data, tmp_path, capsys):
    lines = []
    for number, side in enumerate((40, 41)):
        noise_image(40, 40).save(tmp_path / f"{number}.png")
        region = Region.from_mask(np.eye(40, side)).to_json()
        lines.append({"image": f"{number}.png", "region": region, "answer": "a cat"})
    write_json_lines(tmp_path / "mine.jsonl", lines)
    flags = "--data", tmp_path / "mine.jsonl", "--region_input", "mask", "--per_device_train_batch_size", 1
    assert run(start, data, tmp_path / "some", *flags, "--max_missing", 0.5) == 0
    (skipped,) = (tmp_path / "some" / "skipped.jsonl").read_text().splitlines()
    assert all(text in skipped for text in ("1.png", "40 x 40", "41 x 40"))
    assert run(start, data, tmp_path / "none", *flags) == 2
    assert "1 of 2 images cannot be read (first: " in error_line(capsys)


@pytest.mark.parametrize(("most", "code"), [(0.5, 0), (0.1, 2)])
def test_missing_pictures_are_listed(start, data, tmp_path, capsys, most, code):
    shutil.copytree(data / "train", tmp_path / "train")
    (tmp_path / "train" / "00000" / "000000002.png").unlink()
    shutil.rmtree(tmp_path / "train" / "region_index")
    shutil.copytree(data / "train" / "region_index", tmp_path / "train" / "region_index")
    assert run(start, data, tmp_path / "out", "--data", tmp_path / "train", "--max_missing", most) == code
    assert (tmp_path / "out" / "missing_images.txt").read_text().splitlines()[0].endswith("000000002.png")
    assert not code or "1 of 6 training images are missing" in error_line(capsys)
