"""Index -> training conversations: which regions make a sample, in which form, asked what; and in which order.

Everything random is drawn from (seed, epoch, sample): a run that is resumed, or has other workers, draws the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from alpha_clip_commands.training.tuning_arguments import DataArguments, RegionArguments
from mllm.data.index import IndexedRegion, RegionIndex
from mllm.data.samples import describe_source
from mllm.messages import Message
from train.skipped import SkippedItems
from vision_tower import Region

Conversation = list[Message]


class PictureDataset(Dataset):
    """Samples of up to `regions_per_sample` regions of one picture, which is opened once for all of them.

    An index stands for a sample and an epoch: `epoch * len(dataset) + sample`, as `EpochSampler` gives them.

    Images that cannot be read, and regions that cannot be used (without the form that is asked for, outside of their
    image, too long for the model), are left out and listed.

    Attributes:
        lengths: Characters of the longest turn of each sample, (N,): for grouping by length without opening a picture.
        skipped: What was left out.
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
        # millions of samples: arrays, no lists
        self._groups = [group_rows(index.rows(split, kinds), index.image_rows, regions_per_sample) for index in indexes]
        self._first = np.cumsum([0, *(len(bounds) - 1 for _, bounds in self._groups)])
        longest = [
            np.maximum.reduceat(index.lengths[rows], bounds[:-1])
            for index, (rows, bounds) in zip(indexes, self._groups, strict=True)
            if len(rows)
        ]
        self.lengths = np.concatenate(longest) if longest else np.zeros(0, np.int32)
        pairs = [(index, rows) for index, (rows, _) in zip(indexes, self._groups, strict=True)]
        images = sum(len(np.unique(index.image_rows[rows])) for index, rows in pairs)
        self.skipped = SkippedItems(skipped, split, max_missing, images, sum(len(rows) for _, rows in pairs))

    def __len__(self) -> int:
        return int(self._first[-1])

    def rows_of(self, sample: int) -> tuple[RegionIndex, np.ndarray]:
        """The index of a sample, and the rows of its regions in it."""
        number = int(np.searchsorted(self._first, sample, side="right")) - 1
        rows, bounds = self._groups[number]
        group = sample - self._first[number]
        return self.indexes[number], rows[bounds[group] : bounds[group + 1]]

    def __getitem__(self, position: int) -> Any:
        """A sample; where its image cannot be read, or none of its regions can be used, the next one.

        Raises:
            ValueError: If more were left out than `max_missing` allows.
        """
        epoch, first = divmod(position, len(self))
        for step in range(len(self)):
            sample = (first + step) % len(self)
            index, rows = self.rows_of(sample)
            rng = np.random.default_rng([self.seed, epoch, sample])
            facts = index.read(self.drawn_rows(index, rows, rng))
            source = describe_source(facts[0].sample.image)
            try:
                image = facts[0].sample.open_image()
            except ValueError as error:
                self.skipped.add(position, source, None, error)
                continue
            made = []
            for entry in facts:
                try:
                    made.append(self.made_of(entry, image, rng))
                except ValueError as error:
                    self.skipped.add(position, source, entry.sample.id, error)
            if made:
                return self.sample_of(facts[0].sample.id, image, made)
        raise ValueError(f"no sample of the data can be used; all are {self.skipped.listed}")

    def drawn_rows(self, index: RegionIndex, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Those of a sample's rows that are used this time: all."""
        return rows

    def made_of(self, facts: IndexedRegion, image: Image.Image, rng: np.random.Generator) -> Any:
        """What a region of an opened image gives.

        Raises:
            ValueError: If the region cannot be used.
        """
        raise NotImplementedError

    def sample_of(self, name: str, image: Image.Image, made: list) -> Any:
        """What the collator takes, of what the regions gave."""
        return made


class ConversationDataset(PictureDataset):
    """Conversations about regions: a sample is one for each of up to `regions_per_image` regions of a picture.

    `check` raises ValueError for a conversation that cannot be trained on: `ConversationCollator.check`.
    """

    def __init__(
        self,
        indexes: Sequence[RegionIndex],
        data_args: DataArguments,
        split: str,
        wordings: Sequence[str],
        seed: int,
        skipped: Path | None,
        check: Callable[[Conversation], None] | None = None,
    ) -> None:
        kinds, regions = data_args.turn_kinds, data_args.regions_per_image
        super().__init__(indexes, split, kinds, regions, seed, data_args.max_missing, skipped)
        self.data_args = data_args
        self.weight_of_kind = data_args.weight_of_kind()
        self.wordings = wordings
        self.check = check

    def made_of(self, facts: IndexedRegion, image: Image.Image, rng: np.random.Generator) -> Conversation:
        """A conversation about the region."""
        conversation = self._conversation(facts, image, rng)
        if self.check is not None:
            self.check(conversation)
        return conversation

    def _conversation(self, facts: IndexedRegion, image, rng: np.random.Generator) -> Conversation:
        """One conversation of 1 to `max_turns` different turns about a region, in a form and with a wording drawn for
        it, as `apply_chat_template` takes it.
        """
        args = self.data_args
        region = draw_region(facts, image.size, args, rng)
        turns = [turn for turn in facts.turns if not args.turn_kinds or _is_kind(turn[0], args.turn_kinds)]
        weights = np.array([self.weight_of_kind.get(kind, 1.0) for kind, _, _ in turns])
        count = min(int(rng.integers(1, args.max_turns + 1)), len(turns))
        messages: list[Message] = []
        for position, turn in enumerate(rng.choice(len(turns), count, replace=False, p=weights / weights.sum())):
            _, question, answer = turns[turn]
            if question is None:
                question = self.wordings[rng.integers(len(self.wordings))]
            elif args.question_suffix:
                question = f"{question}\n{args.question_suffix}"
            content: list[dict[str, Any]] = [{"type": "text", "text": question}]
            if position == 0:
                content.insert(0, {"type": "image", "image": image, "region": region})
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return messages


def group_rows(rows: np.ndarray, picture_of: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Split rows into groups of at most `size` rows of one picture, as equal as can be; each row once.

    A group's regions lie apart in the picture's list, where annotators' repetitions stand side by side.

    Args:
        rows: (M,), those of one picture side by side.
        picture_of: Picture by row.
        size: Most rows of a group.

    Returns:
        The rows in the order of the groups (M,), and where each group begins and the last ends (G + 1,).
    """
    pictures = picture_of[rows]
    starts = np.flatnonzero(np.diff(pictures, prepend=-1))
    counts = np.diff(starts, append=len(rows))
    groups = -(-counts // size)  # of each picture
    within = (np.arange(len(rows)) - np.repeat(starts, counts)) % np.repeat(groups, counts)
    group_of = np.repeat(np.cumsum(groups) - groups, counts) + within
    bounds = np.concatenate([[0], np.cumsum(np.bincount(group_of, minlength=groups.sum()))])
    return rows[np.argsort(group_of, kind="stable")], bounds


def draw_region(facts: IndexedRegion, size: tuple[int, int], args: RegionArguments, rng: np.random.Generator) -> Region:
    """A region in one of its forms, its box perhaps jittered, its strength perhaps below 1.

    Args:
        facts: The region.
        size: Width and height of the picture in pixels.
        args: `region_input`, `mask_share`, `box_jitter`, `min_strength`.
        rng: What is drawn from.

    Raises:
        ValueError: If a mask or a box is asked for and the region has none.
    """
    if facts.geometries[0].is_whole:
        return facts.geometries[0]
    wanted = args.region_input
    if wanted == "mixed":
        wanted = "mask" if rng.random() < args.mask_share else "box"
    region = facts.as_type(wanted)
    if args.box_jitter and region.kind == "box":
        region = Region.from_box(*jittered(region.data, size, args.box_jitter, rng))
    if args.min_strength < 1:
        region = dataclasses.replace(region, strength=float(rng.uniform(args.min_strength, 1)))
    return region


def jittered(box: Sequence[float], size: tuple[int, int], share: float, rng: np.random.Generator) -> list[float]:
    """A box x0, y0, x1, y1 with each edge moved by up to `share` (below 0.5) of its width or height, inside the
    picture; the box keeps an area.
    """
    x0, y0, x1, y1 = box
    extent = np.array([x1 - x0, y1 - y0] * 2)
    moved = np.array(box) + rng.uniform(-share, share, 4) * extent
    return [float(value) for value in np.clip(moved, 0, [*size, *size])]


class EpochSampler(Sampler[int]):
    """A permutation an epoch, drawn from the seed and the epoch; with `lengths`, samples of like length come together.

    Gives `epoch * N + sample`. `TellEpoch` and Trainer call `set_epoch`.
    """

    def __init__(self, count: int, seed: int, lengths: np.ndarray | None = None, batch_size: int = 1) -> None:
        self.count = count
        self.seed = seed
        self.lengths = None if lengths is None else lengths.tolist()
        self.batch_size = batch_size  # samples of one step, over all processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Tell which epoch comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.lengths is None:
            order = torch.randperm(self.count, generator=generator).tolist()
        else:
            order = LengthGroupedSampler(self.batch_size, lengths=self.lengths, generator=generator)
        return (self.epoch * self.count + sample for sample in order)


def _is_kind(kind: str, wanted: Sequence[str]) -> bool:
    """Whether a turn is of the kinds; "question" stands for every kind of question."""
    return kind in wanted or ("question" in wanted and kind != "description")
