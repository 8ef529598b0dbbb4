"""Answers to validation questions during training, scored with the metrics of `eval`."""

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


class ValidationQuestion(NamedTuple):
    """A validation question: an image with its region (an image item), the question and the reference answer."""

    item: dict
    question: str
    answer: str
    is_description: bool


class Answered(NamedTuple):
    """The number of a validation question and the answer of the model."""

    number: int
    text: str


class AnswerScorer:
    """Answers the first turns of conversations and scores them.

    Args:
        processor: The processor of the model.
        conversations: Validation conversations; only their first turns are used.
        described: For each conversation, whether its first turn requests a description.
        frequency: Document frequencies of the validation split, for CIDEr; if None, CIDEr is not computed.
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
        self.questions = [
            ValidationQuestion(
                image_items(turns)[0],
                turns[0]["content"][-1]["text"],
                turns[1]["content"][0]["text"],
                description,
            )
            for turns, description in zip(conversations, described, strict=True)
        ]

    def answer(self, model: nn.Module, rank: int, world: int) -> list[Answered]:
        """This process's share of the answers. All processes make the same number of calls, because under ZeRO-3 each
        call gathers weights from all of them.
        """
        chat = RegionChat(model, self.processor)
        numbers = list(range(rank, len(self.questions), world))
        calls = math.ceil(math.ceil(len(self.questions) / world) / _BATCH)
        training = model.training
        model.eval()
        answered = []
        for call in range(calls):
            batch = numbers[call * _BATCH : (call + 1) * _BATCH]
            questions = [self.questions[number] for number in batch or [0]]
            answers = chat.answers(
                [(asked.item["image"], asked.item["region"], asked.question) for asked in questions],
                max_new_tokens=_MAX_NEW_TOKENS,
            )
            answered += [Answered(number, answer.text) for number, answer in zip(batch, answers, strict=False)]
        model.train(training)
        return answered

    def score(self, answered: Sequence[Answered]) -> dict[str, float]:
        """Literal match (0..1) of all answers, descriptions and questions; CIDEr of descriptions if requested."""
        texts = [text for _, text in sorted(answered)]
        references = [(asked.answer,) for asked in self.questions]
        scores = {"literal_match": literal_match(texts, references)}
        numbers: dict[str, list[int]] = {"descriptions": [], "questions": []}
        for number, asked in enumerate(self.questions):
            numbers["descriptions" if asked.is_description else "questions"].append(number)
        if all(numbers.values()):
            for kind, chosen in numbers.items():
                scores[f"literal_match_{kind}"] = literal_match(
                    [texts[n] for n in chosen], [references[n] for n in chosen]
                )
        if self.frequency is not None and (chosen := numbers["descriptions"]):
            scored = score_captions(
                [texts[n] for n in chosen], [references[n] for n in chosen], ("cider",), frozen=self.frequency
            )
            scores["cider_frozen_df"] = scored.corpus[FROZEN]
        return scores
