"""The loss of the released training, its gradients and its schedule, compared with the original functions."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn import functional

from tests.unit.train.contrastive.test_losses import on_two_ranks
from train.contrastive.losses import region_text_loss, released_learning_rate_factor, released_loss

FIXTURE = Path(__file__).parent / "data" / "released_loss.safetensors"  # make_released_loss_fixture.py
# float64. Measured worst case over loss and gradients in every setting: 2.2e-16, values up to 2.8.
TOLERANCE = 1e-12
SETTINGS = ("alone", "group_of_one", "group_of_two")
VALUES = ("loss", "images", "texts", "log_scale")


def run(ranks=1, rank=0):
    """Our loss and gradients on the rows of one rank."""
    content = load_file(FIXTURE)
    rows = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    images, texts = (content[f"input.{name}"][rows].clone().requires_grad_() for name in ("images", "texts"))
    log_scale = content["input.log_scale"].requires_grad_()
    loss = released_loss(functional.normalize(images), functional.normalize(texts), log_scale.exp())
    loss.backward()
    return {"loss": loss.detach(), "images": images.grad, "texts": texts.grad, "log_scale": log_scale.grad}


def run_rank():
    """Run in each of two processes; also the error for different numbers of rows."""
    embeds = functional.normalize(torch.ones(3 + dist.get_rank(), 4))
    with pytest.raises(ValueError, match=r"the same number of rows in every process, got \[3, 4\]"):
        released_loss(embeds, embeds, torch.tensor(1.0))
    return run(2, dist.get_rank())


def run_setting(setting, processes, folder):
    if setting == "group_of_two":
        return on_two_ranks(processes, run_rank, folder)
    if setting == "alone":
        return [run()]
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    try:
        return [run()]
    finally:
        dist.destroy_process_group()


@pytest.mark.compatibility(
    "SunzeY/AlphaCLIP train_grit_1m.py",
    "`released_loss` and its gradients without process group, and in groups of one and two (float64)",
    "1e-12",
)
@pytest.mark.parametrize("setting", SETTINGS)
def test_loss_and_gradients_equal_the_original(setting, processes, tmp_path, measured):
    content = load_file(FIXTURE)
    found = run_setting(setting, processes, tmp_path)
    errors = {
        (rank, name): (output[name] - content[f"{setting}.{rank}.{name}"]).abs().max().item()
        for rank, output in enumerate(found)
        for name in VALUES
    }
    assert len(errors) == sum(key.startswith(f"{setting}.") for key in content)
    measured(max(errors.values()))
    assert max(errors.values()) < TOLERANCE, errors


def test_settings_differ_in_their_gradients():
    """The settings have equal losses but different gradients."""
    content = load_file(FIXTURE)
    assert torch.equal(content["alone.0.loss"], content["group_of_one.0.loss"])
    assert (content["alone.0.images"] - content["group_of_one.0.images"]).abs().max() > 0.01


def test_in_a_group_images_learn_from_half_of_image_to_text():
    content = load_file(FIXTURE)
    images = content["input.images"].clone().requires_grad_()
    texts = functional.normalize(content["input.texts"])
    options = {"label_smoothing": 0.1, "equal_texts": False, "text_to_image": False}
    scale = content["input.log_scale"].exp()
    region_text_loss(functional.normalize(images), texts, scale, torch.arange(8), **options).backward()
    assert (images.grad / 2 - content["group_of_one.0.images"]).abs().max() < TOLERANCE  # measured: 0


@pytest.mark.compatibility(
    "SunzeY/AlphaCLIP scheduler.py", "`released_learning_rate_factor`, warm-up to twice `steps` (float64)", "1e-12"
)
def test_learning_rate_equals_the_original(measured):
    content = load_file(FIXTURE)
    schedules = [key.removesuffix(".steps") for key in content if key.startswith("schedule.") and "steps" in key]
    assert len(schedules) == 4
    errors = []
    for schedule in schedules:
        warmup, steps = map(int, schedule.split(".")[1:])
        ours = [released_learning_rate_factor(step, warmup, steps) for step in content[f"{schedule}.steps"].tolist()]
        errors.append((torch.tensor(ours, dtype=torch.float64) - content[f"{schedule}.factors"]).abs().max().item())
    measured(max(errors))
    assert max(errors) < TOLERANCE, errors
