"""Index -> region-text pairs -> batches. What is drawn depends on (seed, epoch, picture) alone."""

from __future__ import annotations

import dataclasses
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
from mllm.data.samples import RegionSample, describe_source
from train.sampling import PictureDataset, draw_region
from train.tuning.collators import check_region
from vision_tower import AlphaCLIPImageProcessor, AlphaCLIPProcessor, Region

_ALL = 2**31 - 1  # regions of a picture that make a sample: of all, some are drawn each time


class RegionTexts(NamedTuple):
    """A picture with some of its regions (or the whole of it), each with its text."""

    id: str
    image: Image.Image
    regions: tuple[Region, ...]
    texts: tuple[str, ...]


class RegionTextDataset(PictureDataset):
    """A sample is a picture with up to `regions_per_image` of its regions, drawn anew each epoch.

    The whole image with its caption takes a region's place so often that it is the share `whole_image_rate` of all
    pairs; where the data has no captions it never does.
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
        super().__init__(indexes, split, ["description"], _ALL, seed, pair_args.max_missing, skipped)
        self.pair_args = pair_args
        self.image_processor = image_processor

    @property
    def has_captions(self) -> bool:
        """Whether some picture has a caption of the whole of it; a question about the whole is none."""
        groups = zip(self.indexes, self._groups, strict=True)
        return any(bool(index.is_whole[rows].any()) for index, (rows, _) in groups)

    def drawn_rows(self, index: RegionIndex, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Rows of different regions, and perhaps the whole image's in place of the last."""
        whole = index.is_whole[rows]
        regions, captions = rows[~whole], rows[whole]
        count = min(len(regions), self.pair_args.regions_per_image)
        drawn = rng.choice(regions, count, replace=False)
        if len(captions) and rng.random() < max(count, 1) * self.pair_args.whole_image_rate:
            drawn = np.append(drawn[: max(count, 1) - 1], rng.choice(captions))
        return drawn if len(drawn) else captions[:1]  # a picture with a caption and no region

    def made_of(self, facts: IndexedRegion, image: Image.Image, rng: np.random.Generator) -> tuple[Region, str]:
        """A region and its text."""
        region = softened(draw_region(facts, image.size, self.pair_args, rng), image.size, self.pair_args, rng)
        answers = [answer for kind, _, answer in facts.turns if kind == "description"]
        text = answers[rng.integers(len(answers))]
        if self.image_processor is not None:
            check_region(region, image.size, self.image_processor)
        return region, text

    def sample_of(self, name: str, image: Image.Image, made: list[tuple[Region, str]]) -> RegionTexts:
        """The pairs of a picture."""
        regions, texts = zip(*made, strict=True)
        return RegionTexts(name, image, regions, texts)


def softened(region: Region, size: tuple[int, int], args: PairArguments, rng: np.random.Generator) -> Region:
    """The region with its outline grown or shrunk (`mask_jitter`) and blurred (`max_blur`), each by a random amount.
    Its peak stays what it was.

    Args:
        region: Any region; the whole image stays what it is, and a box keeps its outline.
        size: Width and height of the picture in pixels.
        args: `mask_jitter` in pixels, `max_blur` as a share of the region's longer side.
        rng: What is drawn from.
    """
    if region.is_whole or not (args.mask_jitter or args.max_blur):
        return region
    # rounded up, so that a faint value does not vanish
    mask = Image.fromarray(np.ceil(region.mask(size[1], size[0]) * 255 - 1e-6).astype(np.uint8))
    x0, y0, x1, y1 = mask.getbbox()
    steps = 0 if region.kind in ("box", "nbox") else int(rng.integers(-args.mask_jitter, args.mask_jitter + 1))
    sigma = rng.uniform(0, args.max_blur) * max(x1 - x0, y1 - y0)
    if not steps and not sigma:
        return region
    margin = abs(steps) + math.ceil(3 * sigma)  # only the window that changes: filters are slow
    window = (max(x0 - margin, 0), max(y0 - margin, 0), min(x1 + margin, size[0]), min(y1 + margin, size[1]))
    inside = mask.crop(window)
    if steps:
        moved = inside.filter((ImageFilter.MaxFilter if steps > 0 else ImageFilter.MinFilter)(2 * abs(steps) + 1))
        inside = moved if moved.getbbox() else inside
    alpha = np.asarray(inside, np.float64)
    if sigma:
        blurred = np.asarray(inside.filter(ImageFilter.GaussianBlur(sigma)), np.float64)
        alpha = blurred * (alpha.max() / blurred.max()) if blurred.any() else alpha
    whole = np.zeros((size[1], size[0]))
    whole[window[1] : window[3], window[0] : window[2]] = alpha / 255
    # as shares: a faint mask of whole numbers could be a map of labels
    return Region.from_mask(whole.clip(0, 1), strength=region.strength)


class RegionTextCollator:
    """Makes a batch of samples.

    Returns `pixel_values` (N, 4, S, S) of all pairs in order; `input_ids` and `attention_mask` (M, T) of the M
    different texts among them, padded to the longest: the text tower reads each once; `text_of` (N,), the row of each
    pair's text; `text_ids` (N,) int64, equal for equal texts on all ranks; and `names`, the ids of the samples.
    """

    def __init__(self, processor: AlphaCLIPProcessor, max_length: int) -> None:
        self.processor = processor
        self.max_length = max_length

    def __call__(self, samples: Sequence[RegionTexts]) -> dict[str, Any]:
        """Build the batch; texts longer than the text tower reads are cut, as CLIP's own training does."""
        texts = [text for sample in samples for text in sample.texts]
        encoded = self.processor.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        different = list(dict.fromkeys(map(tuple, encoded)))
        row_of = {tokens: row for row, tokens in enumerate(different)}
        padded = self.processor.tokenizer.pad({"input_ids": list(map(list, different))}, return_tensors="pt")
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
    """63 bits of the hash of a text's tokens: the same number on every rank. Of tokens, since CLIP lowers case."""
    return int.from_bytes(hashlib.sha256(np.array(tokens, np.int64).tobytes()).digest()[:8], "big") >> 1


def chunks_of(batch: dict[str, Any], count: int = 1) -> list[dict[str, torch.Tensor]]:
    """A batch cut into chunks of about as many pairs, each with the texts that it needs."""
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


def held_out_samples(dataset: RegionTextDataset, index: RegionIndex, picture: int, position: int) -> list[RegionSample]:
    """The described regions of one picture of an index (and its caption, as the whole image), each in the form that is
    trained: its box, or its mask where it has one. What cannot be used is left out, and listed in the dataset's list.

    Raises:
        ValueError: If more had to be left out than `max_missing` allows.
    """
    described = [facts for facts in index.read(np.flatnonzero(index.image_rows == picture)) if facts.sample.references]
    if not described:
        return []
    source, wanted = describe_source(described[0].sample.image), dataset.pair_args.region_input
    try:
        image = described[0].sample.open_image()
    except ValueError as error:
        dataset.skipped.add(position, source, None, error)
        return []
    samples = []
    for facts in described:
        try:
            region = facts.geometries[0]
            if not region.is_whole:
                region = facts.as_type("available" if wanted == "mixed" else wanted)
            if dataset.image_processor is not None:
                check_region(region, image.size, dataset.image_processor)
        except ValueError as error:
            dataset.skipped.add(position, source, facts.sample.id, error)
        else:
            samples.append(dataclasses.replace(facts.sample, regions=(region,)))
    return samples
