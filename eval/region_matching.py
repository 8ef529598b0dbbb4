"""Score how well an `AlphaCLIPModel` matches regions of images with their texts.

A plain CLIP is scored as an `AlphaCLIPModel` whose alpha weight is zero, with a view other than "alpha".
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers.image_utils import OPENAI_CLIP_MEAN

from alpha_clip_commands.command_line import one_line
from alpha_clip_commands.error_limit import MAX_ERRORS, too_many_errors
from eval.views import blur_outside, replace_outside
from mllm.data.samples import RegionSample, describe_source
from vision_tower import AlphaCLIPModel, AlphaCLIPProcessor, Region

logger = logging.getLogger(__name__)

# Source: `crop_scale` in SunzeY/AlphaCLIP, train/dataset/mask_image.py at e5676c9.
_CROP = 1.5
# Standard deviation of the blur as a share of the image's longer side. Source: `blur_std_dev` 100 (pixels) in
# eval/rec_zs_test/executor.py of SunzeY/AlphaCLIP, as in ReCLIP, for the images of RefCOCO, which are 640 pixels long.
_BLUR = 100 / 640
# Line of the circle as a share of the image's shorter side. Source: arXiv 2304.06712, quoted from memory; neither the
# paper nor its code was available to check it.
_LINE = 0.01
_RED = (255, 0, 0)
# Cosines of unit vectors in float32 that differ by less are treated as equal.
_TIE = 1e-6
_MAX_LISTED = 3  # problems in a message
_CHUNK = 1024  # rows of the similarity matrix that are computed at once


class DescribedImage(NamedTuple):
    """An image with regions and a text for each; `caption` describes the whole image."""

    image: Image.Image
    regions: tuple[Region, ...]
    texts: tuple[str, ...]
    caption: str | None


def described_images(samples: Iterable[RegionSample], max_errors: float = MAX_ERRORS) -> list[DescribedImage]:
    """Group consecutive samples by `meta["image_id"]`, or by their image if there is no id.

    A sample of the whole image is the caption, other samples are regions; the text is the first reference. Further
    descriptions of the same region are skipped, because an embedding cannot be nearest to two texts. Images that
    cannot be read, or that one of their regions does not fit, are skipped with a warning.

    Args:
        samples: Descriptions of one region each.
        max_errors: Maximum share of images that may be skipped (fewer than 20 always may).

    Raises:
        ValueError: If a sample is a question, or does not have one region and a reference, or too many images are
            skipped.
    """
    images, problems = [], []
    for _, group in itertools.groupby(samples, lambda sample: sample.meta.get("image_id", sample.image)):
        group_samples = list(group)
        for sample in group_samples:
            if sample.question is not None or len(sample.regions) != 1 or not sample.references:
                raise ValueError(
                    f"sample {sample.id}: expected a description of one region, got question {sample.question!r}, "
                    f"{len(sample.regions)} regions and {len(sample.references)} references"
                )
        try:
            images.append(_described(group_samples))
        except (ValueError, OSError) as error:
            problems.append(f"{describe_source(group_samples[0].image)}: {one_line(error)}")
    if problems:
        total = len(images) + len(problems)
        what = f"{len(problems)} of {total} images cannot be used ({'; '.join(problems[:_MAX_LISTED])})"
        if not images or too_many_errors(len(problems), total, max_errors):
            raise ValueError(what)
        logger.warning("%s; they were skipped", what)
    return images


def _described(samples: Sequence[RegionSample]) -> DescribedImage:
    """The image of some samples."""
    image = samples[0].open_image()
    texts: dict[Region, str] = {}
    for sample in samples:
        (region,) = sample.regions
        region.bounding_box(image.height, image.width)  # raises if it does not fit
        texts.setdefault(Region.whole() if region.is_whole else region, sample.references[0])
    caption = texts.pop(Region.whole(), None)
    return DescribedImage(image, tuple(texts), tuple(texts.values()), caption)


def _crop(image: Image.Image, region: Region) -> tuple[Image.Image, Region]:
    x0, y0, x1, y1 = region.bounding_box(image.height, image.width)
    half = _CROP * max(x1 - x0, y1 - y0) / 2
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    left, top = max(round(x - half), 0), max(round(y - half), 0)
    left, top = min(left, image.width - 1), min(top, image.height - 1)
    right, bottom = min(round(x + half), image.width), min(round(y + half), image.height)
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1))), Region.whole()


def _masked(image: Image.Image, region: Region) -> tuple[Image.Image, Region]:
    mean_color = tuple(round(255 * channel) for channel in OPENAI_CLIP_MEAN)
    return replace_outside(image, region, Image.new("RGB", image.size, mean_color)), Region.whole()


def _blurred(image: Image.Image, region: Region) -> tuple[Image.Image, Region]:
    return blur_outside(image, region, _BLUR), Region.whole()


def _circle(image: Image.Image, region: Region) -> tuple[Image.Image, Region]:
    """Draw a red ellipse around the bounding box, through its corners, with the line outside."""
    x0, y0, x1, y1 = region.bounding_box(image.height, image.width)
    line = max(_LINE * min(image.size), 1.0)
    xs = np.arange(image.width) + 0.5 - (x0 + x1) / 2
    ys = (np.arange(image.height) + 0.5 - (y0 + y1) / 2)[:, None]
    a, b = (x1 - x0) / 2**0.5, (y1 - y0) / 2**0.5
    outside = (xs / a) ** 2 + (ys / b) ** 2 > 1
    drawn = outside & ((xs / (a + line)) ** 2 + (ys / (b + line)) ** 2 <= 1)
    return Image.composite(Image.new("RGB", image.size, _RED), image, Image.fromarray(drawn)), Region.whole()


# view -> the image and region that the model receives, given an RGB image and a region of strength 1
TOWER_VIEWS: dict[str, Callable[[Image.Image, Region], tuple[Image.Image, Region]]] = {
    "alpha": lambda image, region: (image, region),
    "whole": lambda image, region: (image, Region.whole()),
    "crop": _crop,  # a square around the bounding box, 1.5 times its longer side, clipped to the image
    "masked": _masked,  # CLIP's mean color outside the region
    "blur": _blurred,  # a strong blur outside the region
    "circle": _circle,  # a red ellipse around the bounding box
}


def embed_regions(
    model: AlphaCLIPModel,
    processor: AlphaCLIPProcessor,
    images: Sequence[DescribedImage],
    view: str = "alpha",
    batch_size: int = 64,
    progress: bool = False,
) -> torch.Tensor:
    """Embed all regions of the images, in order.

    The model runs in eval mode, with its device and dtype or those of the caller's autocast; the mode of each module is
    restored.

    Returns:
        (R, projection_dim) float32 on the CPU, normalized.

    Raises:
        ValueError: If the view is unknown, a region does not fit its image, or the processor's center crop removes it.
    """
    if view not in TOWER_VIEWS:
        raise ValueError(f"expected a view from {', '.join(TOWER_VIEWS)}, got {view!r}")
    show = TOWER_VIEWS[view]
    shown = (show(described.image, region) for described in images for region in described.regions)
    return _embed_images(model, processor, shown, sum(len(p.regions) for p in images), batch_size, progress)


def embed_whole(
    model: AlphaCLIPModel,
    processor: AlphaCLIPProcessor,
    images: Sequence[DescribedImage],
    batch_size: int = 64,
    progress: bool = False,
) -> torch.Tensor:
    """Embed the images with alpha 1 everywhere: (images, projection_dim), as `embed_regions`."""
    shown = ((described.image, Region.whole()) for described in images)
    return _embed_images(model, processor, shown, len(images), batch_size, progress)


def embed_texts(
    model: AlphaCLIPModel,
    processor: AlphaCLIPProcessor,
    texts: Sequence[str],
    batch_size: int = 64,
    truncation: bool = False,
) -> torch.Tensor:
    """Embed texts: (M, projection_dim), as `embed_regions`.

    Raises:
        ValueError: If a text is longer than the context of the text tower and `truncation` is False.
    """
    rows = _tokens(model, processor, texts, truncation)
    batches = []
    with _evaluating(model):
        for start in range(0, len(rows), batch_size):
            padded = processor.tokenizer.pad({"input_ids": rows[start : start + batch_size]}, return_tensors="pt")
            batches.append(_unit(model.get_text_features(**padded.to(model.device))))
    return _joined(batches, model)


def score_region_text(
    model: AlphaCLIPModel,
    processor: AlphaCLIPProcessor,
    images: Sequence[DescribedImage],
    *,
    view: str = "alpha",
    batch_size: int = 64,
    truncation: bool = False,
    progress: bool = False,
) -> dict[str, float]:
    """Score the matching of regions and texts. Each process scores the images it is given.

    A text is nearest if its cosine is higher than that of every other text. Ties count as errors, so that constant
    embeddings score 0. Texts with equal tokens are one text (CLIP's tokenizer lower-cases).

    Args:
        model: With both towers.
        processor: Of the model.
        images: At least one, with a region or a caption.
        view: One of `TOWER_VIEWS`.
        batch_size: Of images or texts.
        truncation: Truncate texts to the context of the text tower.
        progress: Show a progress bar.

    Returns:
        Those of the following that are defined for the images, in [0, 1] (the cosine in [-1, 1]):

        - "top1": share of regions whose text is nearest among the texts of all images, if there are at least two.
        - "top1_same_image": the same among the texts of the region's image, over images with at least two texts.
        - "cosine_same_image": cosine of the embeddings of two different regions of an image, mean over its pairs, then
          over images.
        - "whole_top1": share of captions that are nearest to their image among all captions, if there are at least
          two.

    Raises:
        ValueError: If no score is defined, the numbers of regions and texts of an image differ, or as `embed_regions`
            and `embed_texts`.
    """
    _check_texts(images)
    texts = [text for image in images for text in image.texts]
    captioned = [image for image in images if image.caption is not None]
    scores = {}
    if texts:
        embeddings = embed_regions(model, processor, images, view, batch_size, progress).numpy()
        candidates, own_text = _distinct(model, processor, texts, truncation)
        embedded = embed_texts(model, processor, candidates, batch_size, truncation).numpy()
        scores |= _score_regions(images, embeddings, embedded, own_text)
    if captioned:
        candidates, own_text = _distinct(model, processor, [image.caption for image in captioned], truncation)
        if len(candidates) > 1:
            embeddings = embed_whole(model, processor, captioned, batch_size, progress).numpy()
            embedded = embed_texts(model, processor, candidates, batch_size, truncation).numpy()
            scores["whole_top1"] = float(_nearest(embeddings, embedded, own_text).mean())
    if not scores:
        raise ValueError(
            f"expected images with at least two different texts, got {len(images)} images with {len(texts)} regions "
            f"and {len(captioned)} captions"
        )
    return scores


def _check_texts(images: Sequence[DescribedImage]) -> None:
    for image in images:
        if len(image.regions) != len(image.texts):
            raise ValueError(
                f"expected a text for each of {len(image.regions)} regions of an image, got {len(image.texts)}"
            )


def _score_regions(
    images: Sequence[DescribedImage], embeddings: np.ndarray, texts: np.ndarray, own_text: np.ndarray
) -> dict[str, float]:
    """Scores of regions (R, D) whose own text is `texts[own_text]`, (M, D)."""
    scores = {}
    if len(texts) > 1:
        scores["top1"] = float(_nearest(embeddings, texts, own_text).mean())
    nearest, cosines, start = [], [], 0
    for image in images:
        rows = slice(start, start + len(image.regions))
        start = rows.stop
        own, which = np.unique(own_text[rows], return_inverse=True)
        if len(own) > 1:
            nearest.extend(_nearest(embeddings[rows], texts[own], which))
        different = np.array([[a != b for b in image.regions] for a in image.regions], bool)
        if different.any():
            cosines.append((embeddings[rows] @ embeddings[rows].T)[different].clip(-1, 1).mean())
    if nearest:
        scores["top1_same_image"] = float(np.mean(nearest))
    if cosines:
        scores["cosine_same_image"] = float(np.mean(cosines))
    return scores


def _nearest(embeddings: np.ndarray, texts: np.ndarray, own_text: np.ndarray) -> np.ndarray:
    """Whether the own text of each image (N, D) is nearer than all other `texts` (M, D): bool (N,)."""
    parts = []
    for start in range(0, len(embeddings), _CHUNK):
        index = own_text[start : start + _CHUNK, None]
        cosine = embeddings[start : start + _CHUNK] @ texts.T
        own = np.take_along_axis(cosine, index, 1)[:, 0]
        np.put_along_axis(cosine, index, -np.inf, 1)
        parts.append(own > cosine.max(1) + _TIE)
    return np.concatenate(parts)


def _distinct(
    model: AlphaCLIPModel, processor: AlphaCLIPProcessor, texts: Sequence[str], truncation: bool
) -> tuple[list[str], np.ndarray]:
    """The texts with different tokens, and for each of `texts` its index among them."""
    number: dict[tuple[int, ...], int] = {}
    candidates, own_text = [], []
    for text, ids in zip(texts, _tokens(model, processor, texts, truncation), strict=True):
        index = number.setdefault(tuple(ids), len(candidates))
        if index == len(candidates):
            candidates.append(text)
        own_text.append(index)
    return candidates, np.array(own_text)


def _tokens(
    model: AlphaCLIPModel, processor: AlphaCLIPProcessor, texts: Sequence[str], truncation: bool
) -> list[list[int]]:
    """Token ids of each text, not longer than the context."""
    if not texts:
        return []
    longest = model.config.text_config.max_position_embeddings
    cut = {"truncation": True, "max_length": longest} if truncation else {}
    rows = processor.tokenizer(list(texts), verbose=False, **cut)["input_ids"]
    for text, ids in zip(texts, rows, strict=True):
        if len(ids) > longest:
            raise ValueError(
                f"the text {text!r} has {len(ids)} tokens, the text tower supports {longest}; shorten it, or pass "
                "truncation=True"
            )
    return rows


def _embed_images(
    model: AlphaCLIPModel,
    processor: AlphaCLIPProcessor,
    shown: Iterator[tuple[Image.Image, Region]],
    total: int,
    batch_size: int,
    progress: bool,
) -> torch.Tensor:
    batches = []
    with _evaluating(model), tqdm(total=total, desc="embedding", unit="image", disable=not progress) as bar:
        while batch := list(itertools.islice(shown, batch_size)):
            # consecutive regions of one image share its resizing
            groups = [list(group) for _, group in itertools.groupby(batch, lambda pair: id(pair[0]))]
            images, regions = [group[0][0] for group in groups], [[region for _, region in group] for group in groups]
            pixels = processor(images=images, regions=regions, return_tensors="pt")["pixel_values"]
            batches.append(_unit(model.get_image_features(pixel_values=pixels.to(model.device, model.dtype))))
            bar.update(len(batch))
    return _joined(batches, model)


def _unit(output) -> torch.Tensor:
    """Projected embeddings (N, D), normalized, float32 on the CPU."""
    return torch.nn.functional.normalize(output.pooler_output.float(), dim=-1).cpu()


def _joined(batches: list[torch.Tensor], model: AlphaCLIPModel) -> torch.Tensor:
    return torch.cat(batches) if batches else torch.empty(0, model.config.projection_dim)


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients; the mode of each module is restored (a frozen tower may be in eval mode)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
