"""Conversations -> padded batches with labels on the answers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mllm.loading import AlphaProcessor
from mllm.messages import Message, image_items
from train.region_dataset import check_region_fits
from vision_tower.region_arguments import region_list

IGNORE_INDEX = -100  # the loss skips these labels: torch's and Transformers' default


class ConversationCollator:
    """Builds a training batch from samples, each a list of conversations.

    Returns a dict with `input_ids`, `attention_mask` (B, T) and `labels` (B, L), padded on the right, and
    `pixel_values` (N, 4, S, S) of all images in order (for LLaVA-NeXT (N, tiles, 4, S, S) and `image_sizes`). Labels
    are the tokens of answers and their end-of-sequence tokens, and `IGNORE_INDEX` elsewhere. For an encoder-decoder
    (T5), the input is the prompt and the labels are the answer.

    Args:
        processor: The processor of the model.
        encoder_decoder: Whether the language model is an encoder-decoder.
        max_length: Maximum number of tokens per conversation, or None.
    """

    def __init__(self, processor: AlphaProcessor, encoder_decoder: bool = False, max_length: int | None = None) -> None:
        self.processor = processor
        self.encode = encode_prompt_and_answer if encoder_decoder else encode_with_labels
        self.max_length = max_length

    def __call__(self, samples: Sequence[Sequence[Sequence[Message]]]) -> dict[str, torch.Tensor]:
        """Build the batch.

        Raises:
            ValueError: If the tokens of a turn are not a prefix of those of the conversation, so that labels cannot be
                assigned, or a conversation is longer than `max_length`.
        """
        conversations = [conversation for sample in samples for conversation in sample]
        batch = self.tokens(conversations)
        if items := [item for conversation in conversations for item in image_items(conversation)]:
            batch |= self.pixels(items)
        return batch

    def check(self, conversation: Sequence[Message]) -> None:
        """Raise ValueError if a conversation is too long, or a region does not fit its image."""
        self._check_length(self.encode(self.processor, conversation))
        for item in image_items(conversation):
            for region in region_list(item.get("region")):
                check_region_fits(region, item["image"].size, self.processor.image_processor)

    def _check_length(self, encoded: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, encoded))
        if self.max_length is not None and longest > self.max_length:
            raise ValueError(
                f"a conversation has {longest} tokens, more than the {self.max_length} of the model; lower max_turns, "
                "or remove long answers from the data"
            )

    def tokens(self, conversations: Sequence[Sequence[Message]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels` of a batch."""
        encoded = [self.encode(self.processor, conversation) for conversation in conversations]
        for pair in encoded:
            self._check_length(pair)
        batch = self.processor.tokenizer.pad(
            {"input_ids": [ids for ids, _ in encoded]}, padding_side="right", return_tensors="pt"
        )
        labels = torch.full((len(encoded), max(len(row) for _, row in encoded)), IGNORE_INDEX)
        for row, (_, row_labels) in enumerate(encoded):
            labels[row, : len(row_labels)] = torch.tensor(row_labels)
        return {**batch, "labels": labels}

    def pixels(self, items: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        """`pixel_values` (and `image_sizes`) of image items, in order, one image for each region."""
        images, regions = [item["image"] for item in items], [item.get("region") for item in items]
        return dict(self.processor.image_processor(images, regions, return_tensors="pt"))


def encode_prompt_and_answer(processor: AlphaProcessor, conversation: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Token IDs of a question, and of its answer with the end-of-sequence token, for an encoder-decoder.

    Raises:
        ValueError: If the conversation has more than one turn.
    """
    if len(conversation) != 2:
        raise ValueError(
            f"expected one question and its answer for T5, got {len(conversation)} messages; set max_turns: 1"
        )
    prompt = processor.encode_conversation(conversation[:1], add_generation_prompt=True)
    answer = "".join(item["text"] for item in conversation[1]["content"])
    # split_special_tokens: "</s>" in an answer is text
    ids = processor.tokenizer(answer, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return prompt, [*ids, processor.tokenizer.eos_token_id]


def encode_with_labels(processor: AlphaProcessor, conversation: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Token IDs of a conversation and their labels, of the same length.

    The position of an answer is found by encoding the conversation before it, rather than by searching for
    "ASSISTANT:", which can also be part of a question.

    Raises:
        ValueError: If the tokens before an answer are not a prefix of all tokens, or it has no end-of-sequence token.
    """
    ids = processor.encode_conversation(conversation)
    labels = [IGNORE_INDEX] * len(ids)
    for index, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        before = processor.encode_conversation(conversation[:index], add_generation_prompt=True)
        if ids[: len(before)] != before:
            raise ValueError(
                f"the tokens before turn {index} are not a prefix of the conversation's tokens; cannot assign labels"
            )
        # texts cannot contain this token: the processor encodes "</s>" in a text as plain text
        eos = processor.tokenizer.eos_token_id
        if eos not in ids[len(before) :]:
            raise ValueError(
                f"the chat template has no {processor.tokenizer.eos_token} after an answer, so a tuned model would not "
                "stop; add it to chat_template.jinja of the model"
            )
        end = ids.index(eos, len(before)) + 1
        labels[len(before) : end] = ids[len(before) : end]
    return ids, labels
