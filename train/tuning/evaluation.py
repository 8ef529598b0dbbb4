"""Answers to held-out questions while a model is being trained, scored with the metrics of `eval`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from eval.metrics.captions import FROZEN, DocumentFrequency, score_captions
from eval.metrics.literal_match import literal_match
from mllm.inference import RegionChat
from mllm.loading import AlphaProcessor
from mllm.messages import image_items

_MAX_NEW_TOKENS = 64
_BATCH = 32


class HeldOut(NamedTuple):
    """A held-out question: a picture with its region (an image item), the question and its right answer."""

    item: dict
    question: str
    answer: str
    is_description: bool


class Answered(NamedTuple):
    """The place of a held-out question and what the model answered; what processes send each other."""

    place: int
    text: str


class AnswerScorer:
    """Answers the first turns of conversations and scores them.

    Args:
        conversations: Held-out ones, whose first turn is asked.
        described: Whether that turn asks for a description.
        frequency: Document frequencies of the whole held-out split, for CIDEr; None leaves CIDEr out.
    """

    def __init__(
        self,
        processor: AlphaProcessor,
        conversations: Sequence[list],
        described: Sequence[bool],
        frequency: DocumentFrequency | None = None,
    ) -> None:
        self.processor = processor
        self.frequency = frequency
        self.asked = [
            HeldOut(
                image_items(turns)[0],
                turns[0]["content"][-1]["text"],
                turns[1]["content"][0]["text"],
                description,
            )
            for turns, description in zip(conversations, described, strict=True)
        ]

    def answer(self, model: nn.Module, rank: int, world: int) -> list[Answered]:
        """This process's share of the answers. All processes make the same number of calls: under ZeRO-3 each call
        gathers weights from all of them.
        """
        chat = RegionChat(model, self.processor)
        places = list(range(rank, len(self.asked), world))
        calls = math.ceil(math.ceil(len(self.asked) / world) / _BATCH)
        training = model.training
        model.eval()
        answered = []
        for call in range(calls):
            batch = places[call * _BATCH : (call + 1) * _BATCH]
            asked = [self.asked[place] for place in batch or [0]]
            answers = chat.answers(
                [(held.item["image"], held.item["region"], held.question) for held in asked],
                max_new_tokens=_MAX_NEW_TOKENS,
            )
            answered += [Answered(place, answer.text) for place, answer in zip(batch, answers, strict=False)]
        model.train(training)
        return answered

    def score(self, answered: Sequence[Answered]) -> dict[str, float]:
        """Shares of exactly right answers: all, descriptions, questions; CIDEr of descriptions where asked for."""
        texts = [text for _, text in sorted(answered)]
        references = [(held.answer,) for held in self.asked]
        scores = {"exactly_right": literal_match(texts, references)}
        places: dict[str, list[int]] = {"descriptions": [], "questions": []}
        for place, held in enumerate(self.asked):
            places["descriptions" if held.is_description else "questions"].append(place)
        if all(places.values()):
            for kind, chosen in places.items():
                scores[f"exactly_right_{kind}"] = literal_match(
                    [texts[n] for n in chosen], [references[n] for n in chosen]
                )
        if self.frequency is not None and (chosen := places["descriptions"]):
            scored = score_captions(
                [texts[n] for n in chosen], [references[n] for n in chosen], ("cider",), frozen=self.frequency
            )
            scores["cider_frozen_df"] = scored.corpus[FROZEN]
        return scores
