"""Contrastive batches larger than memory: embed in chunks, take the loss over all of them, embed again with gradient.

Source: GradCache, Gao et al., arXiv 2101.06983.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

Embeddings = dict[str, Tensor]


def cached_backward(
    chunks: Sequence[Any],
    embed: Callable[[Any], Embeddings],
    loss_of: Callable[[Embeddings], Tensor],
    backward: Callable[[Tensor, bool], None],
    around: Callable[[bool], AbstractContextManager] | None = None,
) -> Tensor:
    """Go backward through a loss over all chunks, with the graph of one chunk in memory at a time.

    The gradients are those of `loss_of` over `embed` of all chunks at once, dropout included: each chunk is embedded
    twice, from the same state of the random generators of torch. The price is that second forward pass.

    Args:
        chunks: What `embed` takes; at least one. Under DDP or ZeRO-3 every process needs as many.
        embed: Chunk -> named tensors: embeddings of its rows, (rows, ...), and what all chunks have in common, (),
            such as a learned scale. Everything learned that the loss depends on must be among them.
        loss_of: The same names -> (). It gets the rows of all chunks in order, and of a () tensor the last chunk's,
            each as a leaf of float32 at least, so that no small gradient is lost before `backward` scales it. It may
            gather from other processes; it is called once.
        backward: Called once a chunk with (surrogate, whether it is the last chunk). The surrogate is a () tensor
            whose gradients to the parameters are the chunk's share; its value means nothing. Must not retain the graph.
        around: Entered with "whether it is the last chunk" around the second embedding of a chunk and its `backward`:
            DDP's `no_sync`, which must hold in the forward pass already, for all chunks but the last.

    Returns:
        (), the loss, detached.
    """
    states, embedded = [], []
    for chunk in chunks:
        states.append(_random_state())
        with torch.no_grad():
            embedded.append(embed(chunk))
    loss, gradients = _loss_and_gradients(embedded, loss_of)
    for number, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
        is_last = number == len(chunks) - 1
        own = {name: parts[number] for name, parts in gradients.items() if parts[number] is not None}
        with around(is_last) if around is not None else nullcontext():
            _set_random_state(state)
            # in a function of its own: a name here would keep one chunk's graph while the next is embedded
            _backward_chunk(chunk, own, embed, backward, is_last)
    return loss


def _loss_and_gradients(
    embedded: Sequence[Embeddings], loss_of: Callable[[Embeddings], Tensor]
) -> tuple[Tensor, dict[str, list[Tensor | None]]]:
    """The loss, detached, and by name the gradient to each chunk's tensor."""
    leaves = {}
    for name, tensor in embedded[-1].items():
        rows = torch.cat([chunk[name] for chunk in embedded]) if tensor.ndim else tensor
        if rows.is_floating_point():
            # whether the second pass will have a gradient for it cannot be known yet: of a frozen tower too
            rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32)).requires_grad_()
        leaves[name] = rows
    loss = loss_of(leaves)
    learned = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(loss, list(learned.values()), allow_unused=True)
    gradients: dict[str, list[Tensor | None]] = {}
    for name, gradient in zip(learned, found, strict=True):
        if gradient is None:
            continue
        if gradient.ndim:
            gradients[name] = list(gradient.split([len(chunk[name]) for chunk in embedded]))
        else:
            gradients[name] = [None] * (len(embedded) - 1) + [gradient]
    return loss.detach(), gradients


def _backward_chunk(
    chunk: Any,
    gradients: Embeddings,
    embed: Callable[[Any], Embeddings],
    backward: Callable[[Tensor, bool], None],
    is_last: bool,
) -> None:
    """Embed a chunk with gradient and go backward from the gradients to its embeddings."""
    embeddings = embed(chunk)
    parts = [
        (embeddings[name].to(gradient.dtype) * gradient).sum()
        for name, gradient in gradients.items()
        if embeddings[name].requires_grad
    ]
    backward(sum(parts), is_last)


def _random_state() -> list[Tensor]:
    """The state of torch's random generators: the processor's, and the current accelerator's if there is one."""
    states = [torch.get_rng_state()]
    if torch.accelerator.is_available():
        states.append(torch.get_device_module().get_rng_state())
    return states


def _set_random_state(states: list[Tensor]) -> None:
    """Put back what `_random_state` gave."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module().set_rng_state(states[1])
