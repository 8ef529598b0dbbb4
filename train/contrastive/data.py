"""Index -> region-text pairs -> batches. All random choices depend on (seed, epoch, image) only."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter

from alpha_clip_commands.training.contrastive_arguments import PairArguments
from mllm.data.index import IndexedRegion, RegionIndex
from train.region_dataset import RegionDataset, check_region_fits, sample_region
from vision_tower import AlphaCLIPImageProcessor, AlphaCLIPProcessor, Region

_ALL_REGIONS = 2**31 - 1  # a sample has all regions of an image, some of which are selected in each epoch


class RegionTexts(NamedTuple):
    """An image with some of its regions (or the whole image), each with its text."""

    id: str
    image: Image.Image
    regions: tuple[Region, ...]
    texts: tuple[str, ...]


class RegionTextDataset(RegionDataset):
    """A sample is an image with up to `regions_per_image` of its regions, selected at random in each epoch.

    The whole image with its caption replaces a region with a probability that makes its share of all pairs
    `whole_image_rate`; never if the data has no captions.

    Args:
        indexes: Indexed data.
        pair_args: Regions per image, how regions are given, augmentation.
        split: Split of the data.
        seed: Seed of the run.
        skipped: File that lists skipped items, or None.
        image_processor: If given, regions that it would remove are skipped.
    """

    def __init__(
        self,
        indexes: Sequence[RegionIndex],
        pair_args: PairArguments,
        split: str,
        seed: int,
        skipped: Path | None,
        image_processor: AlphaCLIPImageProcessor | None = None,
    ) -> None:
        super().__init__(indexes, split, ["description"], _ALL_REGIONS, seed, pair_args.max_missing, skipped)
        self.pair_args = pair_args
        self.image_processor = image_processor

    @property
    def has_captions(self) -> bool:
        """Whether any image has a caption; questions about the whole image do not count."""
        groups = zip(self.indexes, self._groups, strict=True)
        return any(bool(index.is_whole[rows].any()) for index, (rows, _) in groups)

    def select_rows(self, index: RegionIndex, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Rows of different regions, with the last one sometimes replaced by the whole image."""
        whole = index.is_whole[rows]
        regions, captions = rows[~whole], rows[whole]
        count = min(len(regions), self.pair_args.regions_per_image)
        selected = rng.choice(regions, count, replace=False)
        if len(captions) and rng.random() < max(count, 1) * self.pair_args.whole_image_rate:
            selected = np.append(selected[: max(count, 1) - 1], rng.choice(captions))
        return selected if len(selected) else captions[:1]  # an image with a caption and no region

    def build_item(self, indexed: IndexedRegion, image: Image.Image, rng: np.random.Generator) -> tuple[Region, str]:
        """A region and its text."""
        region = soften_region(sample_region(indexed, image.size, self.pair_args, rng), image.size, self.pair_args, rng)
        answers = [answer for kind, _, answer in indexed.turns if kind == "description"]
        text = answers[rng.integers(len(answers))]
        if self.image_processor is not None:
            check_region_fits(region, image.size, self.image_processor)
        return region, text

    def build_sample(self, name: str, image: Image.Image, items: list[tuple[Region, str]]) -> RegionTexts:
        """The pairs of an image."""
        regions, texts = zip(*items, strict=True)
        return RegionTexts(name, image, regions, texts)


def soften_region(region: Region, size: tuple[int, int], args: PairArguments, rng: np.random.Generator) -> Region:
    """Dilate or erode a region (`mask_jitter`) and blur it (`max_blur`), each by a random amount. The maximum of its
    alpha map does not change.

    Args:
        region: Any region. The whole image is returned unchanged, and a box is only blurred.
        size: Width and height of the image in pixels.
        args: `mask_jitter` in pixels, `max_blur` as a share of the region's longer side.
        rng: Random generator.
    """
    if region.is_whole or not (args.mask_jitter or args.max_blur):
        return region
    # rounded up, so that a small value does not become 0
    mask = Image.fromarray(np.ceil(region.mask(size[1], size[0]) * 255 - 1e-6).astype(np.uint8))
    x0, y0, x1, y1 = mask.getbbox()
    steps = 0 if region.kind in ("box", "nbox") else int(rng.integers(-args.mask_jitter, args.mask_jitter + 1))
    sigma = rng.uniform(0, args.max_blur) * max(x1 - x0, y1 - y0)
    if not steps and not sigma:
        return region
    margin = abs(steps) + math.ceil(3 * sigma)  # only the part that changes, because filters are slow
    window = (max(x0 - margin, 0), max(y0 - margin, 0), min(x1 + margin, size[0]), min(y1 + margin, size[1]))
    inside = mask.crop(window)
    if steps:
        moved = inside.filter((ImageFilter.MaxFilter if steps > 0 else ImageFilter.MinFilter)(2 * abs(steps) + 1))
        inside = moved if moved.getbbox() else inside
    alpha = np.asarray(inside, np.float64)
    if sigma:
        blurred = np.asarray(inside.filter(ImageFilter.GaussianBlur(sigma)), np.float64)
        alpha = blurred * (alpha.max() / blurred.max()) if blurred.any() else alpha
    full = np.zeros((size[1], size[0]))
    full[window[1] : window[3], window[0] : window[2]] = alpha / 255
    # floats in 0..1: a mask of small integers could be taken for a label map
    return Region.from_mask(full.clip(0, 1), strength=region.strength)


class RegionTextCollator:
    """Builds a batch from samples.

    Returns a dict with `pixel_values` (N, 4, S, S) of all pairs in order; `input_ids` and `attention_mask` (M, T) of
    the M distinct texts, padded to the longest, so that the text tower encodes each text once; `text_of` (N,), the row
    of each pair's text; `text_ids` (N,) int64, equal for equal texts on all ranks; and `names`, the IDs of the samples.

    Args:
        processor: The processor of the model.
        max_length: Maximum number of tokens per text.
    """

    def __init__(self, processor: AlphaCLIPProcessor, max_length: int) -> None:
        self.processor = processor
        self.max_length = max_length

    def __call__(self, samples: Sequence[RegionTexts]) -> dict[str, Any]:
        """Build the batch; longer texts are truncated, as in CLIP's training."""
        texts = [text for sample in samples for text in sample.texts]
        encoded = self.processor.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        distinct = list(dict.fromkeys(map(tuple, encoded)))
        row_of = {tokens: row for row, tokens in enumerate(distinct)}
        padded = self.processor.tokenizer.pad({"input_ids": list(map(list, distinct))}, return_tensors="pt")
        pixels = self.processor.image_processor(
            [sample.image for sample in samples], [list(sample.regions) for sample in samples], return_tensors="pt"
        )
        return {
            "pixel_values": pixels["pixel_values"],
            "input_ids": padded["input_ids"],
            "attention_mask": padded["attention_mask"],
            "text_of": torch.tensor([row_of[tuple(tokens)] for tokens in encoded]),
            "text_ids": torch.tensor([text_id(tokens) for tokens in encoded]),
            "names": [sample.id for sample in samples],
        }


def text_id(tokens: Sequence[int]) -> int:
    """63 bits of the hash of a text's tokens, the same on every rank. CLIP's tokenizer lowercases, so texts that differ
    only in case are equal.
    """
    return int.from_bytes(hashlib.sha256(np.array(tokens, np.int64).tobytes()).digest()[:8], "big") >> 1


def chunks_of(batch: dict[str, Any], count: int = 1) -> list[dict[str, torch.Tensor]]:
    """Split a batch into `count` chunks of about equal size, each with the texts of its pairs."""
    bounds = np.linspace(0, len(batch["text_of"]), count + 1).round().astype(int).tolist()
    chunks = []
    for start, end in itertools.pairwise(bounds):
        rows, text_of = torch.unique(batch["text_of"][start:end], return_inverse=True)
        chunks.append(
            {
                "pixel_values": batch["pixel_values"][start:end],
                "input_ids": batch["input_ids"][rows],
                "attention_mask": batch["attention_mask"][rows],
                "text_of": text_of,
            }
        )
    return chunks
