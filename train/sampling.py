"""Records of a data set -> training conversations: what is known about a region, in a new selection each time it is
drawn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from mllm.data.samples import RegionSample
from mllm.data.templates import DESCRIBE_REGION_WORDINGS
from vision_tower import Region


@dataclasses.dataclass(frozen=True, slots=True)
class RegionFacts:
    """A region with all that can be asked about it.

    `sample` is the first record of it, which opens and checks the picture. `forms` are the same region in several forms
    (box, mask), one of which is drawn for a conversation; `turns` are (kind, question, answer), where the question None
    stands for a description. A turn's kind is what the data set calls its questions' type, or "description" or
    "question".
    """

    sample: RegionSample
    forms: tuple[Region, ...]
    turns: tuple[tuple[str, str | None, str], ...]


def group_by_region(*readings: Iterable[RegionSample]) -> list[RegionFacts]:
    """Collect samples by region. A region that is read in several forms (box, then mask) gets all of them.

    Args:
        *readings: Samples whose meta has `image_id`, and `region_id` where a sample is about a region; each of one
            region.
    """
    samples: dict[tuple, RegionSample] = {}
    forms: dict[tuple, dict[Region, None]] = {}  # a dict keeps the order
    turns: dict[tuple, dict[tuple, None]] = {}
    for sample in (sample for reading in readings for sample in reading):
        key = (sample.meta["image_id"], sample.meta.get("region_id"))
        (region,) = sample.regions
        samples.setdefault(key, sample)
        forms.setdefault(key, {})[region] = None
        kind = "description" if sample.question is None else sample.meta.get("type", "question")
        turns.setdefault(key, {})[kind, sample.question, sample.references[0]] = None
    return [RegionFacts(samples[key], tuple(forms[key]), tuple(turns[key])) for key in samples]


class ConversationDataset(Dataset):
    """One conversation an index: a region in one of its forms, and 1 to `max_turns` different questions about it.

    The choice is drawn anew each time from torch's generator, which a DataLoader seeds by epoch and worker: the same
    seed and number of workers give the same run.
    """

    def __init__(
        self,
        facts: list[RegionFacts],
        max_turns: int = 1,
        turn_weights: Mapping[str, float] | None = None,
        mask_share: float = 0.5,
        description_wordings: Sequence[str] = DESCRIBE_REGION_WORDINGS,
    ) -> None:
        self.facts = facts
        self.mask_share = mask_share  # of a region that is known as box and as mask
        self.max_turns = max_turns
        self.turn_weights = dict(turn_weights or {})  # by kind of turn; 1 for the others
        self.description_wordings = description_wordings  # the processor's

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, index: int) -> list[dict]:
        """A conversation as `apply_chat_template` takes it, with the opened picture in its first turn."""
        facts = self.facts[index]
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        region = facts.forms[-1 if rng.random() < self.mask_share else 0]
        weights = np.array([self.turn_weights.get(kind, 1.0) for kind, _, _ in facts.turns])
        count = min(int(rng.integers(1, self.max_turns + 1)), len(facts.turns))
        chosen = rng.choice(len(facts.turns), count, replace=False, p=weights / weights.sum())
        messages = []
        for position, turn in enumerate(chosen):
            _, question, answer = facts.turns[turn]
            if question is None:
                question = self.description_wordings[rng.integers(len(self.description_wordings))]
            content = [{"type": "text", "text": question}]
            if position == 0:
                content.insert(0, {"type": "image", "image": facts.sample.open_image(), "region": region})
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return messages
