"""The validation images of contrastive training."""

from __future__ import annotations

import dataclasses

import numpy as np

from eval.region_matching import DescribedImage, described_images
from mllm.data.index import IndexedRegion, RegionIndex
from mllm.data.samples import RegionSample, describe_source
from train.contrastive.data import RegionTextDataset
from train.region_dataset import check_region_fits
from train.run import check_not_empty
from vision_tower import Region


def validation_images(dataset: RegionTextDataset, count: int) -> list[DescribedImage]:
    """Up to `count` evenly spaced images of a dataset; items that cannot be used are skipped.

    Raises:
        ValueError: If no image can be used, or more items were skipped than `max_missing` allows.
    """
    split = dataset.skipped.split
    images = [(index, image) for index in dataset.indexes for image in np.flatnonzero(index.image_splits == split)]
    check_not_empty(images, dataset.indexes, f"expected images in the split {split!r} for evaluation")
    spaced = np.linspace(0, len(images) - 1, min(len(images), count)).astype(int)
    chosen = [images[n] for n in spaced.tolist()]
    usable = [validation_samples(dataset, index, image, position) for position, (index, image) in enumerate(chosen)]
    if not any(usable):
        raise ValueError(f"no validation image can be used; all are {dataset.skipped.listed}")
    return described_images(sample for samples in usable for sample in samples)


def validation_samples(dataset: RegionTextDataset, index: RegionIndex, image: int, position: int) -> list[RegionSample]:
    """The described regions of an image, with its caption for the whole image. Each region has the form used in
    training: its box, or its mask if it has one. Items that cannot be used are recorded in `dataset.skipped`.

    Raises:
        ValueError: If more items were skipped than `max_missing` allows.
    """
    described = [
        indexed for indexed in index.read(np.flatnonzero(index.image_rows == image)) if indexed.sample.references
    ]
    if not described:
        return []
    source = describe_source(described[0].sample.image)
    try:
        opened = described[0].sample.open_image()
    except ValueError as error:
        dataset.skipped.add(position, source, None, error)
        return []
    samples = []
    for indexed in described:
        try:
            region = _validation_region(dataset, indexed)
            if dataset.image_processor is not None:
                check_region_fits(region, opened.size, dataset.image_processor)
        except ValueError as error:
            dataset.skipped.add(position, source, indexed.sample.id, error)
        else:
            samples.append(dataclasses.replace(indexed.sample, regions=(region,)))
    return samples


def _validation_region(dataset: RegionTextDataset, indexed: IndexedRegion) -> Region:
    """The region without randomness."""
    if indexed.geometries[0].is_whole:
        return indexed.geometries[0]
    requested = dataset.pair_args.region_input
    return indexed.as_type("available" if requested == "mixed" else requested)
