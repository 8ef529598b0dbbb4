"""How well an `AlphaCLIPModel` tells the regions of pictures apart by their texts, and the ways to show it a region.

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
from PIL import Image, ImageFilter
from tqdm import tqdm
from transformers.image_utils import OPENAI_CLIP_MEAN

from alpha_clip_commands.command_line import one_line
from alpha_clip_commands.error_limit import MAX_ERRORS, too_many_errors
from mllm.data.samples import RegionSample, describe_source
from vision_tower import AlphaCLIPModel, AlphaCLIPProcessor, Region

logger = logging.getLogger(__name__)

# Source: `crop_scale` in SunzeY/AlphaCLIP, train/dataset/mask_image.py at e5676c9.
_CROP = 1.5
# Standard deviation of the blur as a share of the picture's longer side. Source: `blur_std_dev` 100 (pixels) in
# eval/rec_zs_test/executor.py of SunzeY/AlphaCLIP, as in ReCLIP, on the pictures of RefCOCO, 640 pixels long.
_BLUR = 100 / 640
# Line of the circle as a share of the picture's shorter side. Source: arXiv 2304.06712 has 0.01, from memory: neither
# the paper nor code of its authors was at hand.
_LINE = 0.01
_RED = (255, 0, 0)
# Cosines of unit vectors in float32 that differ by less are equal but for rounding.
_TIE = 1e-6
_NAMED = 3  # problems named in a message
_ROWS = 1024  # of a matrix of similarities made at once


class DescribedPicture(NamedTuple):
    """A picture of the test; `texts` has one entry for each region, `caption` is about the whole picture."""

    image: Image.Image
    regions: tuple[Region, ...]
    texts: tuple[str, ...]
    caption: str | None


def described_pictures(samples: Iterable[RegionSample], max_errors: float = MAX_ERRORS) -> list[DescribedPicture]:
    """The pictures of consecutive samples, grouped by `meta["image_id"]` (by their image where there is none).

    A sample of the whole image gives the caption, others a region; the text is the first reference. What comes again
    (a region or a caption described more than once) is left out: an embedding cannot be nearest to two texts. An image
    that cannot be read, or that one of its regions does not fit, is left out with a warning that counts and names it.

    Args:
        samples: Descriptions of one region each.
        max_errors: Share of the images that may be left out, at most (fewer than 20 always may).

    Raises:
        ValueError: If a sample is a question, has not one region or no reference, or too many images are left out.
    """
    pictures, problems = [], []
    for _, group in itertools.groupby(samples, lambda sample: sample.meta.get("image_id", sample.image)):
        described = list(group)
        for sample in described:
            if sample.question is not None or len(sample.regions) != 1 or not sample.references:
                raise ValueError(
                    f"sample {sample.id}: expected a description of one region, got question {sample.question!r}, "
                    f"{len(sample.regions)} regions and {len(sample.references)} references"
                )
        try:
            pictures.append(_described(described))
        except (ValueError, OSError) as error:
            problems.append(f"{describe_source(described[0].image)}: {one_line(error)}")
    if problems:
        total = len(pictures) + len(problems)
        what = f"{len(problems)} of {total} images cannot be used ({'; '.join(problems[:_NAMED])})"
        if not pictures or too_many_errors(len(problems), total, max_errors):
            raise ValueError(what)
        logger.warning("%s; they are left out", what)
    return pictures


def _described(samples: Sequence[RegionSample]) -> DescribedPicture:
    """One picture, of its samples."""
    image = samples[0].open_image()
    texts: dict[Region, str] = {}
    for sample in samples:
        (region,) = sample.regions
        region.bounding_box(image.height, image.width)  # does it fit?
        texts.setdefault(Region.whole() if region.is_whole else region, sample.references[0])
    caption = texts.pop(Region.whole(), None)
    return DescribedPicture(image, tuple(texts), tuple(texts.values()), caption)


def _crop(image: Image.Image, region: Region) -> tuple[Image.Image, Region]:
    x0, y0, x1, y1 = region.bounding_box(image.height, image.width)
    half = _CROP * max(x1 - x0, y1 - y0) / 2
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    left, top = max(round(x - half), 0), max(round(y - half), 0)
    left, top = min(left, image.width - 1), min(top, image.height - 1)
    right, bottom = min(round(x + half), image.width), min(round(y + half), image.height)
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1))), Region.whole()


def _masked(image: Image.Image, region: Region) -> tuple[Image.Image, Region]:
    colour = tuple(round(255 * channel) for channel in OPENAI_CLIP_MEAN)
    return _only_inside(image, region, Image.new("RGB", image.size, colour)), Region.whole()


def _blurred(image: Image.Image, region: Region) -> tuple[Image.Image, Region]:
    around = image.filter(ImageFilter.GaussianBlur(_BLUR * max(image.size)))
    return _only_inside(image, region, around), Region.whole()


def _only_inside(image: Image.Image, region: Region, around: Image.Image) -> Image.Image:
    """The picture inside the region, `around` outside, mixed at soft edges."""
    inside = np.rint(region.mask(image.height, image.width) * 255).astype(np.uint8)
    return Image.composite(image, around, Image.fromarray(inside))


def _circle(image: Image.Image, region: Region) -> tuple[Image.Image, Region]:
    """A red ellipse through the corners of the bounding box, its line outside of it: nothing of the box is hidden."""
    x0, y0, x1, y1 = region.bounding_box(image.height, image.width)
    line = max(_LINE * min(image.size), 1.0)
    xs = np.arange(image.width) + 0.5 - (x0 + x1) / 2
    ys = (np.arange(image.height) + 0.5 - (y0 + y1) / 2)[:, None]
    a, b = (x1 - x0) / 2**0.5, (y1 - y0) / 2**0.5
    outside = (xs / a) ** 2 + (ys / b) ** 2 > 1
    drawn = outside & ((xs / (a + line)) ** 2 + (ys / (b + line)) ** 2 <= 1)
    return Image.composite(Image.new("RGB", image.size, _RED), image, Image.fromarray(drawn)), Region.whole()


# name -> what the model is given of an RGB picture and its region (of strength 1, not the whole image)
VIEWS: dict[str, Callable[[Image.Image, Region], tuple[Image.Image, Region]]] = {
    "alpha": lambda image, region: (image, region),
    "whole": lambda image, region: (image, Region.whole()),
    "crop": _crop,  # the bounding box enlarged to a square half as large again, as far as the picture reaches
    "masked": _masked,  # CLIP's mean colour outside the region
    "blurred": _blurred,  # a strong blur outside the region
    "circle": _circle,  # a red ellipse around the bounding box
}


def embed_regions(
    model: AlphaCLIPModel,
    processor: AlphaCLIPProcessor,
    pictures: Sequence[DescribedPicture],
    view: str = "alpha",
    batch_size: int = 64,
    progress: bool = False,
) -> torch.Tensor:
    """Embeddings of all regions of the pictures, in their order: (R, projection_dim) float32 on the CPU, of length 1.

    The model computes on its own device in its own type, or in that of the caller's autocast, in eval mode; the mode of
    each module is restored.

    Raises:
        ValueError: If the view is unknown, a region does not fit its picture, or the processor's centre crop cuts it
            away.
    """
    if view not in VIEWS:
        raise ValueError(f"expected a view out of {', '.join(VIEWS)}, got {view!r}")
    show = VIEWS[view]
    shown = (show(picture.image, region) for picture in pictures for region in picture.regions)
    return _embed_images(model, processor, shown, sum(len(p.regions) for p in pictures), batch_size, progress)


def embed_whole(
    model: AlphaCLIPModel,
    processor: AlphaCLIPProcessor,
    pictures: Sequence[DescribedPicture],
    batch_size: int = 64,
    progress: bool = False,
) -> torch.Tensor:
    """Embeddings of the pictures with alpha 1 everywhere: (pictures, projection_dim), as `embed_regions`."""
    shown = ((picture.image, Region.whole()) for picture in pictures)
    return _embed_images(model, processor, shown, len(pictures), batch_size, progress)


def embed_texts(
    model: AlphaCLIPModel,
    processor: AlphaCLIPProcessor,
    texts: Sequence[str],
    batch_size: int = 64,
    truncation: bool = False,
) -> torch.Tensor:
    """Embeddings of texts: (M, projection_dim), as `embed_regions`.

    Raises:
        ValueError: If a text is longer than the text tower's context, unless `truncation` cuts it there.
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
    pictures: Sequence[DescribedPicture],
    *,
    view: str = "alpha",
    batch_size: int = 64,
    truncation: bool = False,
    progress: bool = False,
) -> dict[str, float]:
    """Scores of one process, over all the pictures it is given.

    A text is nearest where its cosine is above that of every other text; at a tie none is, so that a model to which
    everything is alike scores 0. Texts of which the tokenizer makes the same (CLIP lowers case) are one text.

    Args:
        model: With both towers.
        processor: Its processor.
        pictures: At least one, with a region or a caption.
        view: One of `VIEWS`, how regions are shown.
        batch_size: Of images or texts.
        truncation: Cut texts at the end of the text tower's context.
        progress: Show a progress bar.

    Returns:
        Those of these that have something to count, from 0 to 1 (the cosine from -1):

        - "top1": share of the regions whose text is nearest among the texts of all pictures, if these are two or more.
        - "top1_same_image": the same among the texts of the region's own picture, over the pictures with two or more.
        - "cosine_same_image": cosine of the embeddings of two different regions of a picture, mean over its pairs, then
          over the pictures.
        - "whole_top1": share of the captions that are nearest to their whole picture among all captions, if these are
          two or more.

    Raises:
        ValueError: If there is nothing to count, a picture has not one text for each region, or as `embed_regions` and
            `embed_texts`.
    """
    for picture in pictures:
        if len(picture.regions) != len(picture.texts):
            raise ValueError(
                f"expected a text for each of {len(picture.regions)} regions of a picture, got {len(picture.texts)}"
            )
    texts = [text for picture in pictures for text in picture.texts]
    captioned = [picture for picture in pictures if picture.caption is not None]
    scores = {}
    if texts:
        images = embed_regions(model, processor, pictures, view, batch_size, progress).numpy()
        candidates, right = _distinct(model, processor, texts, truncation)
        embedded = embed_texts(model, processor, candidates, batch_size, truncation).numpy()
        scores |= _score_regions(pictures, images, embedded, right)
    if captioned:
        candidates, right = _distinct(model, processor, [picture.caption for picture in captioned], truncation)
        if len(candidates) > 1:
            images = embed_whole(model, processor, captioned, batch_size, progress).numpy()
            embedded = embed_texts(model, processor, candidates, batch_size, truncation).numpy()
            scores["whole_top1"] = float(_nearest(images, embedded, right).mean())
    if not scores:
        raise ValueError(
            f"expected pictures with two different texts, got {len(pictures)} pictures with {len(texts)} regions and "
            f"{len(captioned)} captions: nothing can be told apart"
        )
    return scores


def _score_regions(
    pictures: Sequence[DescribedPicture], images: np.ndarray, texts: np.ndarray, right: np.ndarray
) -> dict[str, float]:
    """Scores of regions (R, D) whose right text is `texts[right]`, (M, D)."""
    scores = {}
    if len(texts) > 1:
        scores["top1"] = float(_nearest(images, texts, right).mean())
    told_apart, cosines, start = [], [], 0
    for picture in pictures:
        rows = slice(start, start + len(picture.regions))
        start = rows.stop
        own, which = np.unique(right[rows], return_inverse=True)
        if len(own) > 1:
            told_apart.extend(_nearest(images[rows], texts[own], which))
        different = np.array([[a != b for b in picture.regions] for a in picture.regions], bool)
        if different.any():
            cosines.append((images[rows] @ images[rows].T)[different].clip(-1, 1).mean())
    if told_apart:
        scores["top1_same_image"] = float(np.mean(told_apart))
    if cosines:
        scores["cosine_same_image"] = float(np.mean(cosines))
    return scores


def _nearest(images: np.ndarray, texts: np.ndarray, right: np.ndarray) -> np.ndarray:
    """For each image (N, D) whether its text is nearer than all the other `texts` (M, D): bool (N,)."""
    parts = []
    for start in range(0, len(images), _ROWS):
        index = right[start : start + _ROWS, None]
        cosine = images[start : start + _ROWS] @ texts.T
        own = np.take_along_axis(cosine, index, 1)[:, 0]
        np.put_along_axis(cosine, index, -np.inf, 1)
        parts.append(own > cosine.max(1) + _TIE)
    return np.concatenate(parts)


def _distinct(
    model: AlphaCLIPModel, processor: AlphaCLIPProcessor, texts: Sequence[str], truncation: bool
) -> tuple[list[str], np.ndarray]:
    """One text for each that the model can tell apart, and for each of `texts` the index of its own."""
    number: dict[tuple[int, ...], int] = {}
    candidates, right = [], []
    for text, ids in zip(texts, _tokens(model, processor, texts, truncation), strict=True):
        index = number.setdefault(tuple(ids), len(candidates))
        if index == len(candidates):
            candidates.append(text)
        right.append(index)
    return candidates, np.array(right)


def _tokens(
    model: AlphaCLIPModel, processor: AlphaCLIPProcessor, texts: Sequence[str], truncation: bool
) -> list[list[int]]:
    """Token ids of each text, no longer than the context."""
    if not texts:
        return []
    longest = model.config.text_config.max_position_embeddings
    cut = {"truncation": True, "max_length": longest} if truncation else {}
    rows = processor.tokenizer(list(texts), verbose=False, **cut)["input_ids"]
    for text, ids in zip(texts, rows, strict=True):
        if len(ids) > longest:
            raise ValueError(
                f"the text {text!r} has {len(ids)} tokens, the text tower takes {longest}; shorten it, or ask for "
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
            # neighbours that share a picture share its resizing
            groups = [list(group) for _, group in itertools.groupby(batch, lambda pair: id(pair[0]))]
            images, regions = [group[0][0] for group in groups], [[region for _, region in group] for group in groups]
            pixels = processor(images=images, regions=regions, return_tensors="pt")["pixel_values"]
            batches.append(_unit(model.get_image_features(pixel_values=pixels.to(model.device, model.dtype))))
            bar.update(len(batch))
    return _joined(batches, model)


def _unit(output) -> torch.Tensor:
    """Projected embeddings (N, D) as float32 of length 1 on the CPU."""
    return torch.nn.functional.normalize(output.pooler_output.float(), dim=-1).cpu()


def _joined(batches: list[torch.Tensor], model: AlphaCLIPModel) -> torch.Tensor:
    return torch.cat(batches) if batches else torch.empty(0, model.config.projection_dim)


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards each module has its own mode again (a frozen tower may be in eval)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
