import contextlib
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.tiny import tiny_clip_config
from tests.unit.train.contrastive.test_losses import on_two_ranks
from train.contrastive.gradient_cache import cached_backward
from train.contrastive.losses import region_text_loss
from vision_tower import AlphaCLIPConfig, AlphaCLIPModel

TEXT_IDS = torch.tensor([4, 5, 4, 6, 7, 8, 5, 9])
# float32, of the largest gradient (3 to 11). Measured worst case: 9.9e-8 in one process, 4.4e-7 on two ranks.
TOLERANCE = 1e-5


class Embedder(nn.Module):
    """A tiny Alpha-CLIP that gives what the loss takes; dropout inside its attention and on its image embeddings."""

    def __init__(self, dropout):
        super().__init__()
        torch.manual_seed(0)
        config = AlphaCLIPConfig(**{**tiny_clip_config().to_dict(), "model_type": "alpha_clip"})
        config.vision_config.attention_dropout = config.text_config.attention_dropout = dropout
        self.clip = AlphaCLIPModel(config)
        nn.init.normal_(self.clip.vision_model.embeddings.patch_embedding.alpha.weight, std=0.3)
        self.dropout = nn.Dropout(dropout)
        self.train()

    def forward(self, pixel_values, input_ids, text_ids):
        output = self.clip(pixel_values=pixel_values, input_ids=input_ids)
        return {
            "image_embeds": nn.functional.normalize(self.dropout(output.image_embeds), dim=-1),
            "text_embeds": output.text_embeds,
            "logit_scale": self.clip.logit_scale.exp(),
            "text_ids": text_ids,
        }


def chunks_of(sizes):
    torch.manual_seed(1)
    count = sum(sizes)
    input_ids = torch.randint(3, 50, (count, 9))
    input_ids[:, -1] = 2
    inputs = torch.randn(count, 4, 32, 32), input_ids, TEXT_IDS[:count]
    return list(zip(*(tensor.split(sizes) for tensor in inputs), strict=True))


def loss_of(rows):
    return region_text_loss(**rows, label_smoothing=0.1)


def embedder_of(dropout=0.1, frozen=()):
    model = Embedder(dropout)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    return model


def plain(model, chunks):
    """Every chunk with its graph, and one backward through all."""
    embedded = [model(*chunk) for chunk in chunks]
    rows = {name: torch.cat([part[name] for part in embedded]) for name in embedded[0] if name != "logit_scale"}
    loss = loss_of({**rows, "logit_scale": embedded[-1]["logit_scale"]})
    loss.backward()
    return loss.detach()


def cached(model, chunks, **options):
    return cached_backward(
        chunks, lambda chunk: model(*chunk), loss_of, lambda surrogate, is_last: surrogate.backward(), **options
    )


def worst_error(found, expected):
    """Over all parameters, of the largest gradient."""
    gradients = {name: p.grad for name, p in expected.named_parameters() if p.grad is not None}
    others = {name.removeprefix("module."): p.grad for name, p in found.named_parameters() if p.grad is not None}
    assert others.keys() == gradients.keys()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    return max((others[name] - gradient).abs().max() / largest for name, gradient in gradients.items()).item()


@pytest.mark.parametrize(
    ("sizes", "frozen"),
    [
        ((7,), ()),
        ((3, 3, 1), ()),
        ((1, 4, 2), ()),
        ((1, 4, 2), ("clip.text",)),
        ((1, 4, 2), ("clip.text", "clip.logit_scale")),
    ],
    ids=str,
)
def test_gradients_are_those_of_the_whole_batch(sizes, frozen):
    chunks = chunks_of(sizes)
    losses, models = [], []
    for run in (plain, cached):
        model = embedder_of(frozen=frozen)
        torch.manual_seed(2)
        losses.append(run(model, chunks))
        models.append(model)
    assert losses[0] == losses[1] and not losses[1].requires_grad
    assert worst_error(models[1], models[0]) < TOLERANCE
    learned = models[1].clip.logit_scale.grad
    assert learned is None if "clip.logit_scale" in frozen else learned.abs() > 0.01


def test_dropout_is_on():
    """What the test above would not see were it off: from another state the gradients are others."""
    model, other, chunks = embedder_of(), embedder_of(), chunks_of((3, 4))
    for seed, run in ((2, model), (3, other)):
        torch.manual_seed(seed)
        cached(run, chunks)
    assert worst_error(model, other) > 0.01


def test_no_graph_is_alive_while_another_chunk_is_embedded():
    model, chunks = embedder_of(), chunks_of((2, 2, 3))
    alive, passes = weakref.WeakSet(), []

    class Saved:
        """Stands for a tensor that a graph keeps."""

        def __init__(self, tensor):
            self.tensor = tensor.detach()  # else an output that is saved would hold its own graph
            alive.add(self)

    def embed(chunk):
        passes.append((torch.is_grad_enabled(), len(alive)))
        embeddings = model(*chunk)
        if torch.is_grad_enabled():
            assert len(alive) > 100
            alive.add(embeddings["image_embeds"])  # and its node, which outlives what it saved
        return embeddings

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        cached_backward(chunks, embed, loss_of, lambda surrogate, is_last: surrogate.backward())
    assert passes == [(False, 0)] * 3 + [(True, 0)] * 3


def test_around_holds_from_embedding_to_backward():
    events = []

    @contextlib.contextmanager
    def around(is_last):
        events.append(("enter", is_last))
        yield
        events.append(("leave", is_last))

    weight = torch.tensor(2.0, requires_grad=True)

    def embed(chunk):
        events.append(("embed", torch.is_grad_enabled()))
        return {"rows": weight * chunk}

    def backward(surrogate, is_last):
        events.append(("backward", is_last))
        surrogate.backward()

    chunks = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    loss = cached_backward(chunks, embed, lambda leaves: leaves["rows"].square().sum(), backward, around)
    assert loss == 4 * 14 and weight.grad == 2 * 2 * 14
    assert events[:2] == [("embed", False)] * 2
    parts = [[("enter", last), ("embed", True), ("backward", last), ("leave", last)] for last in (False, True)]
    assert events[2:] == parts[0] + parts[1]


def test_small_gradients_survive_half_precision_until_they_are_scaled():
    """1e-9 is 0 in float16; a loss scale brings it back only if it was still there."""
    weight = torch.tensor(1.0, requires_grad=True)
    cached_backward(
        [torch.ones(2), torch.ones(1)],
        lambda chunk: {"rows": (weight * chunk).half()},
        lambda rows: rows["rows"].sum() * 1e-9,
        lambda surrogate, is_last: (surrogate * 2**20).backward(),
    )
    assert weight.grad.item() == pytest.approx(3e-9 * 2**20, rel=1e-3)


def ddp_in_chunks():
    """Run in each of two processes: DDP, three and five pairs, each in two chunks, one synchronisation."""
    model = DistributedDataParallel(embedder_of(dropout=0))
    reductions = []

    def count(_state, bucket):
        reductions.append(bucket.index())
        return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda done: done.value()[0])

    model.register_comm_hook(None, count)
    chunks = chunks_of((2, 1, 3, 2))[2 * dist.get_rank() :][:2]
    cached(model, chunks, around=lambda is_last: contextlib.nullcontext() if is_last else model.no_sync())
    assert len(reductions) == len(set(reductions)) > 0  # each bucket once
    return {name: parameter.grad for name, parameter in model.module.named_parameters()}


def test_ddp_synchronises_once_and_learns_what_one_process_learns(tmp_path, processes):
    expected, found = embedder_of(dropout=0), embedder_of(dropout=0)
    plain(expected, chunks_of((8,)))
    for gradients in on_two_ranks(processes, ddp_in_chunks, tmp_path):
        for name, parameter in found.named_parameters():
            parameter.grad = gradients[name]
        assert worst_error(found, expected) < TOLERANCE
