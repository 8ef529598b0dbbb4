"""Contrastive losses of image regions and texts, over the batches of all processes.

`region_text_loss` is the default; `released_loss` and `released_learning_rate_factor` reproduce the released Alpha-CLIP
training.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def region_text_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    text_ids: Tensor,
    *,
    label_smoothing: float = 0.0,
    equal_texts: bool = True,
    text_to_image: bool = True,
) -> Tensor:
    """CLIP's symmetric loss over the pairs of all processes, in which equal texts are not negatives.

    Each process compares its N images with all texts and its N texts with all images, so memory is N times the global
    batch. N may differ between processes. Loss and gradients are scaled so that their mean over the processes, as DDP
    and DeepSpeed compute it, equals that of one process with the global batch. This is a collective operation: every
    process must call it and its backward pass.

    Args:
        image_embeds: (N, D), normalized, of any dtype; compared in at least float32, also under autocast.
        text_embeds: (N, D), normalized.
        logit_scale: (), factor of the cosines: exp of the learned parameter.
        text_ids: (N,) int64, equal for equal texts, also across processes.
        label_smoothing: In [0, 1]; the share of each row's target that is distributed over all candidates.
        equal_texts: Whether a row's target is distributed evenly over all pairs with its text; otherwise only its own
            pair is the target.
        text_to_image: Whether the loss is the mean of both directions; otherwise only image to text is used.

    Returns:
        (), the loss of this process.

    Source: CLIP, Radford et al., arXiv 2103.00020, figure 3; targets with several positives per row are from UniCL,
        Yang et al., arXiv 2204.03610.
    """
    image_embeds, text_embeds, logit_scale = map(_at_least_float32, (image_embeds, text_embeds, logit_scale))
    counts = _row_counts(image_embeds)
    if equal_texts:
        targets = (text_ids[:, None] == _gather(text_ids, counts)).to(image_embeds.dtype)
        targets /= targets.sum(1, keepdim=True)
    else:
        targets = _own_rows(counts, image_embeds.device)
    logits = [_logits(image_embeds, _gather(text_embeds, counts), logit_scale)]
    if text_to_image:
        logits.append(_logits(text_embeds, _gather(image_embeds, counts), logit_scale))
    # reduction="mean" would divide by this process's number of rows
    sums = [functional.cross_entropy(m, targets, reduction="sum", label_smoothing=label_smoothing) for m in logits]
    return sum(sums) / len(sums) * (len(counts) / sum(counts))


def released_loss(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, *, label_smoothing: float = 0.1
) -> Tensor:
    """The loss of the released Alpha-CLIP training, including its gradients.

    The original gathers embeddings without gradient. With a process group, even of one process, the text-to-image term
    therefore has no gradient for the image tower and the image-to-text term none for the texts. With the text tower
    frozen, only half of the image-to-text term has an effect. Without a process group, both terms have full gradients.
    Equal texts are negatives. Logits are computed in at least float32; the original follows autocast.

    Args:
        image_embeds: (N, D), normalized; N must be the same in all processes.
        text_embeds: (N, D), normalized.
        logit_scale: (), factor of the cosines: 100 in the original, not learned.
        label_smoothing: In [0, 1]; 0.1 in the original.

    Returns:
        (), the loss of this process.

    Raises:
        ValueError: If processes have different numbers of rows, for which the original's labels are wrong.

    Source: `CLIP_Clean_Train.inference` and `concat_all_gather` in SunzeY/AlphaCLIP, train/ at e5676c9.
    """
    image_embeds, text_embeds, logit_scale = map(_at_least_float32, (image_embeds, text_embeds, logit_scale))
    counts = _row_counts(image_embeds)
    if len(set(counts)) > 1:
        raise ValueError(
            f"expected the same number of rows in every process, got {counts}; drop the last incomplete batch, or use "
            "region_text_loss"
        )
    all_images, all_texts = image_embeds, text_embeds
    if dist.is_available() and dist.is_initialized():
        all_images, all_texts = (_gather(rows.detach(), counts) for rows in (image_embeds, text_embeds))
    labels = _own_rows(counts, image_embeds.device)
    image_to_text = _logits(image_embeds, all_texts, logit_scale)
    text_to_image = _logits(text_embeds, all_images, logit_scale)
    return sum(
        functional.cross_entropy(logits, labels, label_smoothing=label_smoothing) / 2
        for logits in (image_to_text, text_to_image)
    )


def released_learning_rate_factor(step: int, warmup: int, steps: int) -> float:
    """Learning rate factor of the released training: a linear warmup, then a cosine that reaches 0 at `steps`.

    After `steps` the cosine rises again. The released script uses 5000 steps regardless of the length of the run.

    Args:
        step: Optimizer step, from 0.
        warmup: Warmup steps; the factor of the first one is 1 / warmup. 0 for no warmup.
        steps: Step at which the factor is 0; greater than `warmup`.

    Source: `cosine_lr` in SunzeY/AlphaCLIP, train/scheduler.py at e5676c9.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _row_counts(rows: Tensor) -> list[int]:
    """The number of rows of each process, by rank."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [len(rows)]
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=rows.device)
    counts[dist.get_rank()] = len(rows)
    dist.all_reduce(counts)
    return counts.tolist()


def _gather(rows: Tensor, counts: list[int]) -> Tensor:
    """The rows of all processes in rank order, given their numbers; gradients are summed over processes."""
    return rows if len(counts) == 1 else _GatherRows.apply(rows, counts)


class _GatherRows(torch.autograd.Function):
    """All-gather of different numbers of rows. The collective requires equal shapes, so rows are padded."""

    @staticmethod
    def forward(ctx, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # all_reduce works in place
        dist.all_reduce(gradient)
        return gradient.split(ctx.counts)[dist.get_rank()], None


def _own_rows(counts: list[int], device: torch.device) -> Tensor:
    """Positions of this process's rows in the gathered rows, (N,) int64."""
    rank = 0 if len(counts) == 1 else dist.get_rank()
    return torch.arange(counts[rank], device=device) + sum(counts[:rank])


def _logits(rows: Tensor, candidates: Tensor, logit_scale: Tensor) -> Tensor:
    """Scaled cosines (rows, candidates) in the dtype of the embeddings, without autocast."""
    with torch.autocast(rows.device.type, enabled=False):
        return logit_scale * (rows @ candidates.T)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
