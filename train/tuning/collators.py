"""Conversations -> padded batches with labels on the answers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mllm.loading import AlphaProcessor
from mllm.messages import Message, image_items
from vision_tower import AlphaCLIPImageProcessor, Region
from vision_tower.geometry import place_alpha
from vision_tower.region_arguments import region_list

IGNORE_INDEX = -100  # the loss skips these labels: torch's and Transformers' default


class ConversationCollator:
    """Makes a training batch of samples, each a list of conversations.

    Returns `input_ids`, `attention_mask` (B, T) and `labels` (B, L), padded on the right, and `pixel_values`
    (N, 4, S, S) for all images in order (of LLaVA-NeXT (N, tiles, 4, S, S), and `image_sizes`). A label is the token
    itself inside an answer and its end-of-sequence token, `IGNORE_INDEX` elsewhere; an encoder-decoder (T5) reads the
    prompt and has labels for the answer alone.

    Args:
        processor: Of the model.
        encoder_decoder: Whether the language model is one.
        max_length: Longest conversation in tokens, or None.
    """

    def __init__(self, processor: AlphaProcessor, encoder_decoder: bool = False, max_length: int | None = None) -> None:
        self.processor = processor
        self.encode = encode_prompt_and_answer if encoder_decoder else encode_with_labels
        self.max_length = max_length

    def __call__(self, samples: Sequence[Sequence[Sequence[Message]]]) -> dict[str, torch.Tensor]:
        """Build the batch.

        Raises:
            ValueError: If a turn's tokens are not a prefix of the conversation's, so that labels could not be placed,
                or a conversation is longer than `max_length`.
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
                check_region(region, item["image"].size, self.processor.image_processor)

    def _check_length(self, encoded: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, encoded))
        if self.max_length is not None and longest > self.max_length:
            raise ValueError(
                f"a conversation has {longest} tokens, the model reads {self.max_length}; lower max_turns, or leave "
                "long answers out of the data"
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
        """What the model takes of image items, in order, one for each region."""
        images, regions = [item["image"] for item in items], [item.get("region") for item in items]
        return dict(self.processor.image_processor(images, regions, return_tensors="pt"))


def check_region(region: Region, size: tuple[int, int], image_processor: AlphaCLIPImageProcessor) -> None:
    """Raise ValueError if a region does not fit its image, of `size` (W, H), or the centre crop cuts it away."""
    width, height = size
    if image_processor.geometry == "crop":
        place_alpha(region, height, width, image_processor.crop_size.height, "crop")
    else:  # without resizing, which costs as much as the batch itself
        region.mask(height, width)


def encode_prompt_and_answer(processor: AlphaProcessor, conversation: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Token ids of a question, and those of its answer with its end, for an encoder-decoder.

    Raises:
        ValueError: If the conversation has more than one turn.
    """
    if len(conversation) != 2:
        raise ValueError(f"expected one question and its answer for T5, got {len(conversation)} messages; max_turns: 1")
    prompt = processor.encode_conversation(conversation[:1], add_generation_prompt=True)
    answer = "".join(item["text"] for item in conversation[1]["content"])
    # split_special_tokens: "</s>" in an answer is text
    ids = processor.tokenizer(answer, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return prompt, [*ids, processor.tokenizer.eos_token_id]


def encode_with_labels(processor: AlphaProcessor, conversation: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and their labels, equally long.

    The answer's place is found by encoding the conversation up to it: no search for "ASSISTANT:", which a user may
    write too.

    Raises:
        ValueError: If the tokens up to an answer are not a prefix of the whole, or no end-of-sequence token follows it.
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
        eos = processor.tokenizer.eos_token_id
        if eos not in ids[len(before) :]:
            raise ValueError(
                f"the chat template writes no {processor.tokenizer.eos_token} after an answer, so that a tuned model "
                "would never stop; save the model's processor with one that does (chat_template.jinja)"
            )
        end = ids.index(eos, len(before)) + 1
        labels[len(before) : end] = ids[len(before) : end]
    return ids, labels
