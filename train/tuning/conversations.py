"""Index -> training conversations: which turns are asked about a region, and with which wording."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alpha_clip_commands.training.tuning_arguments import DataArguments
from mllm.data.index import RegionFacts, RegionIndex
from mllm.messages import Message
from train.region_dataset import RegionDataset, sample_region

Conversation = list[Message]


class ConversationDataset(RegionDataset):
    """Conversations about regions: a sample has one for each of up to `regions_per_image` regions of an image.

    Args:
        indexes: Indexed data.
        data_args: Which turns, how many, and how regions are given.
        split: Split of the data.
        wordings: Requests for a description; one is chosen at random.
        seed: Seed of the run.
        skipped: File that lists skipped items, or None.
        check: Raises ValueError for a conversation that cannot be used: `ConversationCollator.check`.
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

    def build_item(self, facts: RegionFacts, image: Image.Image, rng: np.random.Generator) -> Conversation:
        """A conversation about the region."""
        conversation = self._conversation(facts, image, rng)
        if self.check is not None:
            self.check(conversation)
        return conversation

    def _conversation(self, facts: RegionFacts, image: Image.Image, rng: np.random.Generator) -> Conversation:
        """A conversation of 1 to `max_turns` different turns, in the format of `apply_chat_template`."""
        args = self.data_args
        region = sample_region(facts, image.size, args, rng)
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


def _is_kind(kind: str, requested: Sequence[str]) -> bool:
    """Whether a turn is of a requested kind; "question" includes all types of questions."""
    return kind in requested or ("question" in requested and kind != "description")
