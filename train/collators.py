"""Conversations -> padded batches with labels on the answers only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mllm.loading import AlphaProcessor
from mllm.processing import Message, image_items

IGNORE_INDEX = -100  # the loss skips these labels: torch's and Transformers' default


class ConversationCollator:
    """Makes a training batch of conversations.

    Returns `input_ids`, `attention_mask` and `labels` (B, T), padded on the right, and `pixel_values` (N, 4, S, S) for
    all images in order. A label is the token itself inside an answer and its end-of-sequence token, `IGNORE_INDEX`
    elsewhere.
    """

    def __init__(self, processor: AlphaProcessor) -> None:
        self.processor = processor

    def __call__(self, conversations: Sequence[Sequence[Message]]) -> dict[str, torch.Tensor]:
        """Build the batch.

        Raises:
            ValueError: If a turn's tokens are not a prefix of the conversation's, so that labels could not be placed.
        """
        encoded = [encode_with_labels(self.processor, conversation) for conversation in conversations]
        batch = self.processor.tokenizer.pad(
            {"input_ids": [ids for ids, _ in encoded]}, padding_side="right", return_tensors="pt"
        )
        labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        for row, (_, row_labels) in enumerate(encoded):
            labels[row, : len(row_labels)] = torch.tensor(row_labels)
        images = [item for conversation in conversations for item in image_items(conversation)]
        if images:
            batch["pixel_values"] = self.processor.image_processor(
                [item["image"] for item in images], [item.get("region") for item in images], return_tensors="pt"
            )["pixel_values"]
        return {**batch, "labels": labels}


def encode_with_labels(processor: AlphaProcessor, conversation: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and their labels, equally long.

    The answer's place is found by encoding the conversation up to it: no search for "ASSISTANT:", which a user may
    write too.

    Raises:
        ValueError: If the tokens up to an answer are not a prefix of the whole.
    """
    ids = processor.encode_conversation(conversation)
    labels = [IGNORE_INDEX] * len(ids)
    for index, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        before = processor.encode_conversation(conversation[:index], add_generation_prompt=True)
        if ids[: len(before)] != before:
            raise ValueError(
                f"turn {index} is encoded in another way alone than inside its conversation; cannot place labels"
            )
        # nobody's text can hold the end-of-sequence token: the processor encodes it as plain text there
        end = ids.index(processor.tokenizer.eos_token_id, len(before)) + 1
        labels[len(before) : end] = ids[len(before) : end]
    return ids, labels
