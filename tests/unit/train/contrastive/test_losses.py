import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from transformers import CLIPModel

from tests.tiny import tiny_clip_config
from train.contrastive.losses import _gather, _row_counts, region_text_loss, released_learning_rate_factor

ROWS = {"equal": (4, 4), "unequal": (3, 5)}  # on each of two ranks
OPTIONS = {
    "plain": {},
    "own pairs": {"equal_texts": False},
    "smooth": {"label_smoothing": 0.1},
    "smooth own pairs": {"label_smoothing": 0.1, "equal_texts": False},
    "image to text": {"label_smoothing": 0.1, "text_to_image": False},
}
TEXT_IDS = torch.tensor([7, 3, 7, 5, 3, 7, 9, 1])  # 7 and 3 are on both ranks
# float64. Measured worst case over all of these, loss and gradients: 4.4e-16, values up to 2.8.
TOLERANCE = 1e-12


class Towers(nn.Module):
    """Two linear towers and a learned temperature."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.image, self.text = nn.Linear(6, 4), nn.Linear(5, 4)
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.double()

    def forward(self, images, texts):
        return unit(self.image(images)), unit(self.text(texts)), self.scale.exp()


def unit(rows):
    return functional.normalize(rows, dim=-1)


def pictures_and_texts():
    torch.manual_seed(4)
    return torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)


def loss_and_gradients(rows, options):
    """Of the mean over ranks, as DDP takes it."""
    towers = Towers()
    images, texts = pictures_and_texts()
    loss = region_text_loss(*towers(images[rows], texts[rows]), TEXT_IDS[rows], **options)
    loss.backward()
    found = {"loss": loss.detach()} | {
        name: parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        for name, parameter in towers.named_parameters()
    }
    if dist.is_initialized():
        for value in found.values():
            dist.all_reduce(value)
            value /= dist.get_world_size()
    return found


RANK = """
import importlib, sys, torch
import torch.distributed as dist
worker, folder = sys.argv[1:]
module, _, function = worker.partition(":")
dist.init_process_group("gloo")
torch.save(getattr(importlib.import_module(module), function)(), f"{folder}/{dist.get_rank()}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def on_two_ranks(processes, worker, folder):
    """What `worker()` gives in each of two processes of a gloo group."""
    ranks = processes.start_ranks(RANK, [f"{worker.__module__}:{worker.__name__}", folder])
    for rank in ranks:
        assert rank.wait() == 0, rank.output()
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


def rows_of_rank(name):
    first = sum(ROWS[name][: dist.get_rank()])
    return slice(first, first + ROWS[name][dist.get_rank()])


def gather_rows(rows):
    return _gather(rows, _row_counts(rows))


def every_case():
    """Run in each of two processes."""
    found = {
        (rows, options): loss_and_gradients(rows_of_rank(rows), OPTIONS[options])
        for rows, options in itertools.product(ROWS, OPTIONS)
    }
    own = torch.full((dist.get_rank() + 1, 2), float(dist.get_rank()), requires_grad=True)
    everyone = gather_rows(own)
    # rank r weighs row i by 10 ** r * (i + 1)
    (everyone * torch.tensor([1.0, 2.0, 3.0])[:, None] * 10 ** dist.get_rank()).sum().backward()
    ids = gather_rows(torch.arange(dist.get_rank() + 1) + 2**40)
    # (rows without gradient, and of one rank without rows)
    some = gather_rows(torch.ones(2 * dist.get_rank(), 3))
    return found | {"gathered": everyone.detach(), "gradient": own.grad, "ids": ids, "some": some}


@pytest.fixture(scope="module")
def ranks(processes, tmp_path_factory):
    return on_two_ranks(processes, every_case, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rows", ROWS)
def test_two_ranks_are_one_with_both_batches(ranks, rows, options):
    expected = loss_and_gradients(slice(None), OPTIONS[options])
    assert expected["image.weight"].abs().max() > 0.01 and expected["scale"].abs() > 0.01
    for found in ranks:
        errors = {name: (found[rows, options][name] - value).abs().max().item() for name, value in expected.items()}
        assert max(errors.values()) < TOLERANCE, errors


def test_rows_are_gathered_in_order_and_their_gradients_summed(ranks):
    for rank, found in enumerate(ranks):
        assert found["gathered"].tolist() == [[0, 0], [1, 1], [1, 1]]
        assert found["gradient"].tolist() == [[[11, 11]], [[22, 22], [33, 33]]][rank]
        assert found["ids"].dtype == torch.int64 and (found["ids"] - 2**40).tolist() == [0, 0, 1]
        assert found["some"].shape == (2, 3)


def test_one_process_gathers_nothing():
    rows = torch.randn(2, 3)
    assert gather_rows(rows) is rows


def by_hand(images, texts, scale, ids, label_smoothing=0.0, equal_texts=True, text_to_image=True):
    """The same loss, a number after the other."""

    def direction(rows, candidates):
        total = 0.0
        for i, row in enumerate(rows):
            logits = [scale * sum(float(a) * float(b) for a, b in zip(row, other, strict=True)) for other in candidates]
            log_sum = math.log(sum(math.exp(logit) for logit in logits))
            positives = [j for j in range(len(logits)) if (ids[i] == ids[j] if equal_texts else i == j)]
            for j, logit in enumerate(logits):
                target = (1 - label_smoothing) * (j in positives) / len(positives) + label_smoothing / len(logits)
                total -= target * (logit - log_sum)
        return total / len(rows)

    if not text_to_image:
        return direction(images, texts)
    return (direction(images, texts) + direction(texts, images)) / 2


@pytest.mark.parametrize("options", OPTIONS)
def test_loss_is_that_of_a_double_loop(options):
    images, texts, scale = (tensor.detach() for tensor in Towers()(*pictures_and_texts()))
    found = region_text_loss(images, texts, scale, TEXT_IDS, **OPTIONS[options]).item()
    # measured worst case: 8.9e-16
    assert abs(found - by_hand(images, texts, scale.item(), TEXT_IDS.tolist(), **OPTIONS[options])) < TOLERANCE


@pytest.mark.parametrize("equal_texts", [True, False])
def test_smoothing_is_cross_entropys(equal_texts):
    images, texts, scale = Towers()(*pictures_and_texts())
    logits = scale * images @ texts.T
    expected = sum(functional.cross_entropy(m, torch.arange(8), label_smoothing=0.2) / 2 for m in (logits, logits.T))
    ids = torch.arange(8)  # no equal texts: the soft targets are the own pairs
    found = region_text_loss(images, texts, scale, ids, label_smoothing=0.2, equal_texts=equal_texts)
    assert abs(found - expected).item() < TOLERANCE  # measured: 0


def test_equal_texts_are_not_negatives():
    """With two texts, two pairs each, and perfect embeddings, the best that can be reached is reached."""
    embeds = unit(torch.eye(2, 4)).repeat_interleave(2, 0)
    ids = torch.tensor([5, 5, 6, 6])
    scale = torch.tensor(100.0, requires_grad=True)
    shared = region_text_loss(embeds.requires_grad_(), embeds, scale, ids)
    assert shared.item() == pytest.approx(math.log(2), abs=1e-6)  # the entropy of two positives
    (gradient,) = torch.autograd.grad(shared, embeds)
    assert gradient.abs().max() < 1e-5
    apart = region_text_loss(embeds, embeds, scale, ids, label_smoothing=0.1)
    assert apart > shared + 1  # smoothing asks for some of the other text, at a cosine of 0


def test_without_equal_texts_it_is_clips_own_loss():
    torch.manual_seed(0)
    model = CLIPModel(tiny_clip_config()).eval().double()
    inputs = {"pixel_values": torch.randn(6, 3, 32, 32, dtype=torch.float64)}
    inputs["input_ids"] = torch.randint(3, 50, (6, 9))
    inputs["input_ids"][:, -1] = 2
    output = model(**inputs, return_loss=True)
    ours = region_text_loss(output.image_embeds, output.text_embeds, model.logit_scale.exp(), torch.arange(6))
    theirs = torch.autograd.grad(output.loss, list(model.parameters()), retain_graph=True)
    found = torch.autograd.grad(ours, list(model.parameters()))
    # float64. Measured: loss 0, gradients 8.4e-15, values up to 11
    assert abs(ours - output.loss).item() < TOLERANCE
    assert max((a - b).abs().max().item() for a, b in zip(found, theirs, strict=True)) < TOLERANCE


@pytest.mark.parametrize("autocast", [True, False])
def test_logits_are_of_float32_also_under_autocast(autocast):
    images, texts, _ = (rows.bfloat16() for rows in Towers()(*pictures_and_texts()))
    scale = torch.tensor(100.0)
    expected = region_text_loss(images.float(), texts.float(), scale, TEXT_IDS)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = region_text_loss(images, texts, scale, TEXT_IDS)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_released_rate_warms_up_falls_and_rises_again():
    factors = [released_learning_rate_factor(step, 200, 5000) for step in range(10_000)]
    assert factors[0] == 1 / 200 and factors[199] == factors[200] == 1
    assert factors[5000] < 1e-9 and min(factors[201:]) == factors[5000]
    assert factors[8000] > 0.6 and released_learning_rate_factor(0, 0, 10) == 1


def test_equal_texts_as_targets_come_to_the_same():
    """Rows of one text have the same logits: the loss is linear in their targets, which add up to the same."""
    torch.manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(6, 5, dtype=torch.float64), dim=-1)
    distinct = torch.nn.functional.normalize(torch.randn(3, 5, dtype=torch.float64), dim=-1)
    ids = torch.tensor([0, 1, 0, 2, 0, 1])
    results = []
    for equal_texts in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in (images, distinct, torch.tensor(10.0).double())]
        loss = region_text_loss(leaves[0], leaves[1][ids], leaves[2], ids, equal_texts=equal_texts)
        results.append((loss.item(), torch.autograd.grad(loss, leaves)))
    (shared, gradients), (own, other_gradients) = results
    assert shared == pytest.approx(own, abs=1e-12)
    for gradient, other in zip(gradients, other_gradients, strict=True):
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-12)
