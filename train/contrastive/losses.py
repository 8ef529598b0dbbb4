"""Losses of contrastive training: images of regions against texts, over the batches of all processes.

Pure functions over tensors. `region_text_loss` is what we train with; `released_loss` and
`released_learning_rate_factor` are what the released Alpha-CLIP training does, to compare with.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from vision_tower.alpha_embedding import WHOLE_IMAGE


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
    """CLIP's symmetric loss over the pairs of all processes, in which equal texts are not each other's negatives.

    Each process compares its own N images with all texts and its own N texts with all images: memory is N x all.
    Processes may hold different numbers of pairs. Loss and gradients are scaled so that their mean over the processes,
    which is what DDP and DeepSpeed take, is that of one process with the whole batch. It communicates: every process
    must call it, and go backward.

    Args:
        image_embeds: (N, D), each of length 1, of any dtype; compared in float32 (float64 stays), also under autocast.
        text_embeds: (N, D), each of length 1.
        logit_scale: (), what the cosines are multiplied with: exp of the learned parameter.
        text_ids: (N,) int64, equal where texts are equal, in other processes too.
        label_smoothing: In [0, 1]; the share of each row's target that is spread over all candidates.
        equal_texts: Whether a row's target is shared evenly among all pairs with its text; otherwise its own pair has
            it all.
        text_to_image: Whether the loss is the mean of both directions; otherwise it is image to text alone.

    Returns:
        (), the loss of this process.

    Source: the loss is that of CLIP, Radford et al., arXiv 2103.00020, figure 3; targets shared among the positives of
        a row are UniCL's, Yang et al., arXiv 2204.03610.
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
    # the sum, since mean would divide by this process's own number of rows
    sums = [functional.cross_entropy(m, targets, reduction="sum", label_smoothing=label_smoothing) for m in logits]
    return sum(sums) / len(sums) * (len(counts) / sum(counts))


def released_loss(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, *, label_smoothing: float = 0.1
) -> Tensor:
    """The loss of the released Alpha-CLIP training, gradients included: to reproduce it, and to measure what
    `region_text_loss` changes.

    The original gathers without gradient. As soon as there is a process group, even of one process, its text-to-image
    half therefore gives the image tower no gradient, and the image-to-text half gives none to the texts; with the text
    tower frozen, half of image to text is all that is learned from. Without a process group both halves are whole.
    Equal texts are negatives of each other. Logits are of float32 at least, where the original follows autocast.

    Args:
        image_embeds: (N, D), each of length 1; N must be the same in all processes.
        text_embeds: (N, D), each of length 1.
        logit_scale: (), what the cosines are multiplied with: 100 in the original, not learned.
        label_smoothing: In [0, 1]; 0.1 in the original.

    Returns:
        (), the loss of this process.

    Raises:
        ValueError: If processes have different numbers of rows: the original's labels would be of other rows.

    Source: `CLIP_Clean_Train.inference` and `concat_all_gather` in SunzeY/AlphaCLIP, train/ at e5676c9.
    """
    image_embeds, text_embeds, logit_scale = map(_at_least_float32, (image_embeds, text_embeds, logit_scale))
    counts = _row_counts(image_embeds)
    if len(set(counts)) > 1:
        raise ValueError(
            f"expected as many rows in every process, got {counts}; drop the last incomplete batch, or take "
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
    """What the released training multiplies its learning rate with: a linear warm-up, then a cosine to 0 at `steps`.

    It does not stop there: the cosine rises again afterwards. The released script has `steps` 5000 whatever the length
    of the run.

    Args:
        step: From 0.
        warmup: Steps of the warm-up; the first has 1 / warmup. 0 for none.
        steps: Where the factor is 0, more than `warmup`.

    Source: `cosine_lr` in SunzeY/AlphaCLIP, train/scheduler.py at e5676c9.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def region_patch_embeds(patch_tokens: Tensor, alpha: Tensor, patch_size: int) -> Tensor:
    """The mean of the patch tokens, each weighted by how much of its patch the region covers.

    Args:
        patch_tokens: (N, P, D), row by row, without the class token.
        alpha: (N, 1, H, W), as in channel 3 of `pixel_values`: (alpha - 0.5) / 0.26; nowhere 0 everywhere.
        patch_size: Pixels; H / patch_size x W / patch_size = P.

    Returns:
        (N, D) in the dtype of the tokens, not normalised. For the whole image it is the plain mean.
    """
    # both ends in alpha's own dtype: -1.923 is rounded in bfloat16, and by the constants alone the background would
    # weigh 3e-4 a pixel, which outweighs a small region
    whole = torch.tensor(WHOLE_IMAGE, dtype=alpha.dtype, device=alpha.device).float()
    coverage = ((alpha.float() + whole) / (2 * whole)).clamp(0, 1)
    weights = functional.avg_pool2d(coverage, patch_size).flatten(1)
    weights = (weights / weights.sum(1, keepdim=True)).to(patch_tokens.dtype)
    return (weights[:, None] @ patch_tokens)[:, 0]


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes in the order of their ranks; the input itself where there is one process.

    Gradients go back to the process that the rows came from, summed over all processes. It communicates: every process
    must call it, and go backward through it if one does.

    Args:
        rows: (N, ...); N may differ between processes, the rest may not.

    Returns:
        (sum of N, ...) of the same dtype.
    """
    return _gather(rows, _row_counts(rows))


def _row_counts(rows: Tensor) -> list[int]:
    """The number of rows of each process, by rank."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [len(rows)]
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=rows.device)
    counts[dist.get_rank()] = len(rows)
    dist.all_reduce(counts)
    return counts.tolist()


def _gather(rows: Tensor, counts: list[int]) -> Tensor:
    """`gather_rows` with the numbers of rows known."""
    return rows if len(counts) == 1 else _GatherRows.apply(rows, counts)


class _GatherRows(torch.autograd.Function):
    """All-gather of different numbers of rows. The collective takes equal shapes only, so rows are padded, then cut."""

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
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # all_reduce writes into it
        dist.all_reduce(gradient)
        return gradient.split(ctx.counts)[dist.get_rank()], None


def _own_rows(counts: list[int], device: torch.device) -> Tensor:
    """Where this process's rows are among the gathered ones, (N,) int64."""
    rank = 0 if len(counts) == 1 else dist.get_rank()
    return torch.arange(counts[rank], device=device) + sum(counts[:rank])


def _logits(rows: Tensor, candidates: Tensor, logit_scale: Tensor) -> Tensor:
    """Scaled cosines (rows, candidates) in the dtype of the embeddings: autocast would multiply in bfloat16."""
    with torch.autocast(rows.device.type, enabled=False):
        return logit_scale * (rows @ candidates.T)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
