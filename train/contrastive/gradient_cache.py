"""Contrastive batches larger than memory: embed in chunks, compute the loss over all, embed again with gradients.

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
    """Backward pass of a loss over all chunks, with the graph of only one chunk in memory at a time.

    The gradients equal those of `loss_of` over `embed` of all chunks at once, including dropout: each chunk is embedded
    twice with the same random state. The cost is the second forward pass.

    Args:
        chunks: Inputs of `embed`, at least one. Under DDP or ZeRO-3 every process needs the same number.
        embed: Maps a chunk to named tensors: embeddings of its rows, (rows, ...), and values shared by all chunks, (),
            such as a learned scale. They must include everything learned that the loss depends on.
        loss_of: Maps tensors with the same names to a () loss. It receives the rows of all chunks in order, and a ()
            tensor of the last chunk, as leaves of at least float32, so that small gradients are not lost before
            `backward` scales them. It may gather from other processes, and is called once.
        backward: Called for each chunk with (surrogate, is_last). The gradients of the () surrogate are the chunk's
            share; its value is meaningless. Must not retain the graph.
        around: Called with is_last; its context encloses the second embedding of a chunk and its `backward`. For DDP's
            `no_sync`, which must also be active in the forward pass, on all chunks except the last.

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
            # a separate function, because a local variable would keep this graph while the next chunk is embedded
            _backward_chunk(chunk, own, embed, backward, is_last)
    return loss


def _loss_and_gradients(
    embedded: Sequence[Embeddings], loss_of: Callable[[Embeddings], Tensor]
) -> tuple[Tensor, dict[str, list[Tensor | None]]]:
    """The loss, detached, and by name the gradient of each chunk's tensor."""
    leaves = {}
    for name, tensor in embedded[-1].items():
        rows = torch.cat([chunk[name] for chunk in embedded]) if tensor.ndim else tensor
        if rows.is_floating_point():
            # also for a frozen tower: whether the second pass needs a gradient is not known yet
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
    """Embed a chunk with gradients, and backpropagate the gradients of its embeddings."""
    embeddings = embed(chunk)
    parts = [
        (embeddings[name].to(gradient.dtype) * gradient).sum()
        for name, gradient in gradients.items()
        if embeddings[name].requires_grad
    ]
    backward(sum(parts), is_last)


def _random_state() -> list[Tensor]:
    """The state of torch's random generators: the CPU's and the current accelerator's, if any."""
    states = [torch.get_rng_state()]
    if torch.accelerator.is_available():
        states.append(torch.get_device_module().get_rng_state())
    return states


def _set_random_state(states: list[Tensor]) -> None:
    """Restore the state returned by `_random_state`."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module().set_rng_state(states[1])
