"""Index -> training samples: which regions form a sample, and how each region is given to the model.

All random choices depend on (seed, epoch, sample) only, so they are the same after a resume and with any number of
loader workers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from alpha_clip_commands.training.shared_arguments import RegionArguments
from mllm.data.index import IndexedRegion, RegionIndex
from mllm.data.samples import describe_source
from train.skipped import SkippedItems
from vision_tower import AlphaCLIPImageProcessor, Region
from vision_tower.geometry import place_alpha


class RegionDataset(Dataset):
    """Samples of up to `regions_per_sample` regions of one image, which is opened once for all of them.

    A position is `epoch * len(dataset) + sample`, as `EpochSampler` yields it. Images that cannot be read and regions
    that cannot be used (no mask or box as requested, outside the image, text too long) are skipped and listed.

    Args:
        indexes: Indexed data.
        split: Split of the data.
        kinds: Kinds of turns; only regions with such a turn are used. Empty for all regions.
        regions_per_sample: Maximum number of regions per sample.
        seed: Seed of the run.
        max_missing: Maximum share of images, and of regions, that may be skipped.
        skipped: File that lists skipped items, or None.

    Attributes:
        lengths: (N,), characters of the longest turn of each sample, to group samples by length without opening images.
        skipped: The skipped items.
    """

    def __init__(
        self,
        indexes: Sequence[RegionIndex],
        split: str,
        kinds: Sequence[str],
        regions_per_sample: int,
        seed: int,
        max_missing: float,
        skipped: Path | None,
    ) -> None:
        self.indexes = indexes
        self.seed = seed
        # arrays rather than lists: there may be millions of samples
        self._groups = [group_rows(index.rows(split, kinds), index.image_rows, regions_per_sample) for index in indexes]
        self._first = np.cumsum([0, *(len(bounds) - 1 for _, bounds in self._groups)])
        pairs = list(zip(indexes, self._groups, strict=True))
        self.lengths = np.concatenate([_longest_turns(index, *group) for index, group in pairs])
        images = sum(len(np.unique(index.image_rows[rows])) for index, (rows, _) in pairs)
        regions = sum(len(rows) for rows, _ in self._groups)
        self.skipped = SkippedItems(skipped, split, max_missing, images, regions)

    def __len__(self) -> int:
        return int(self._first[-1])

    def rows_of(self, sample: int) -> tuple[RegionIndex, np.ndarray]:
        """The index that contains a sample, and the rows of the sample's regions."""
        number = int(np.searchsorted(self._first, sample, side="right")) - 1
        rows, bounds = self._groups[number]
        group = sample - self._first[number]
        return self.indexes[number], rows[bounds[group] : bounds[group + 1]]

    def __getitem__(self, position: int) -> Any:
        """The sample at a position, or the next usable one.

        Raises:
            ValueError: If more items were skipped than `max_missing` allows.
        """
        epoch, first = divmod(position, len(self))
        for step in range(len(self)):
            sample = (first + step) % len(self)
            index, rows = self.rows_of(sample)
            rng = np.random.default_rng([self.seed, epoch, sample])
            indexed = index.read(self.select_rows(index, rows, rng))
            source = describe_source(indexed[0].sample.image)
            try:
                image = indexed[0].sample.open_image()
            except ValueError as error:
                self.skipped.add(position, source, None, error)
                continue
            items = []
            for entry in indexed:
                try:
                    items.append(self.build_item(entry, image, rng))
                except ValueError as error:
                    self.skipped.add(position, source, entry.sample.id, error)
            if items:
                return self.build_sample(indexed[0].sample.id, image, items)
        raise ValueError(f"no sample of the data can be used; all are {self.skipped.listed}")

    def select_rows(self, index: RegionIndex, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The rows of a sample that are used in this epoch. Default: all."""
        return rows

    def build_item(self, indexed: IndexedRegion, image: Image.Image, rng: np.random.Generator) -> Any:
        """The item of one region.

        Raises:
            ValueError: If the region cannot be used.
        """
        raise NotImplementedError

    def build_sample(self, name: str, image: Image.Image, items: list) -> Any:
        """The sample for the collator. Default: the list of items."""
        return items


def group_rows(rows: np.ndarray, image_of: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Split rows into groups of at most `size` rows of one image. Group sizes differ as little as possible.

    Neighboring rows of an image go to different groups, because annotators' near-duplicates are next to each other.

    Args:
        rows: (M,), sorted by image.
        image_of: Image number by row.
        size: Maximum number of rows per group.

    Returns:
        The rows in the order of the groups, (M,), and the bounds of the groups, (G + 1,).
    """
    images = image_of[rows]
    starts = np.flatnonzero(np.diff(images, prepend=-1))
    counts = np.diff(starts, append=len(rows))
    groups = -(-counts // size)  # per image
    within = (np.arange(len(rows)) - np.repeat(starts, counts)) % np.repeat(groups, counts)
    group_of = np.repeat(np.cumsum(groups) - groups, counts) + within
    bounds = np.concatenate([[0], np.cumsum(np.bincount(group_of, minlength=groups.sum()))])
    return rows[np.argsort(group_of, kind="stable")], bounds


def _longest_turns(index: RegionIndex, rows: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Characters of the longest turn of each group of rows, (G,)."""
    return np.maximum.reduceat(index.lengths[rows], bounds[:-1]) if len(rows) else np.zeros(0, np.int32)


def sample_region(
    indexed: IndexedRegion, size: tuple[int, int], args: RegionArguments, rng: np.random.Generator
) -> Region:
    """A region as its box or mask, with random box jitter and a random strength if requested.

    Args:
        indexed: The region.
        size: Width and height of the image in pixels.
        args: `region_input`, `mask_share`, `box_jitter`, `min_strength`.
        rng: Random generator.

    Raises:
        ValueError: If a mask or a box is requested and the region has none.
    """
    if indexed.geometries[0].is_whole:
        return indexed.geometries[0]
    requested = args.region_input
    if requested == "mixed":
        requested = "mask" if rng.random() < args.mask_share else "box"
    region = indexed.as_type(requested)
    if args.box_jitter and region.kind == "box":
        region = Region.from_box(*jitter_box(region.data, size, args.box_jitter, rng))
    if args.min_strength < 1:
        region = dataclasses.replace(region, strength=float(rng.uniform(args.min_strength, 1)))
    return region


def jitter_box(box: Sequence[float], size: tuple[int, int], share: float, rng: np.random.Generator) -> list[float]:
    """Move each edge of a box x0, y0, x1, y1 by up to `share` (below 0.5) of its width or height, within the image."""
    x0, y0, x1, y1 = box
    extent = np.array([x1 - x0, y1 - y0] * 2)
    moved = np.array(box) + rng.uniform(-share, share, 4) * extent
    return [float(value) for value in np.clip(moved, 0, [*size, *size])]


def check_region_fits(region: Region, size: tuple[int, int], image_processor: AlphaCLIPImageProcessor) -> None:
    """Raise ValueError if a region does not fit its image of `size` (W, H), or the center crop removes it."""
    width, height = size
    if image_processor.geometry == "crop":
        place_alpha(region, height, width, image_processor.crop_size.height, "crop")
    else:  # without resizing, which takes as long as building the batch
        region.mask(height, width)
