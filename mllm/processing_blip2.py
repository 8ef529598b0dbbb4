"""Processor of BLIP-2 with an alpha tower: its prompt format and its query tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import BatchFeature, Blip2Processor
from transformers.image_utils import ImageInput

from mllm.processing import Message, as_region, check_messages, image_items
from mllm.remote_code import SavedWithSources
from vision_tower import Region
from vision_tower.image_processing_alpha_clip import check_processor_call


class AlphaBlip2Processor(SavedWithSources, Blip2Processor):
    """BLIP-2's text with its query tokens, and `AlphaCLIPImageProcessor` (geometry "stretch") behind one call.

    Two ways in:

    - `processor(images=..., regions=..., text="Question: What is this? Answer:")`: `text` is the complete prompt, as
      for `Blip2Processor`; "" asks for a caption.
    - `processor.apply_chat_template(conversation, tokenize=True, ...)`: questions and answers about one image, written
      as BLIP-2's authors do.
    """

    # A pretrained BLIP-2 captions after an empty prompt.
    # Source: `prompt` in salesforce/LAVIS, lavis/configs/models/blip2/blip2_pretrain_flant5xl_vitL.yaml at 506965b.
    description_wordings = ("",)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        regions: Region | str | list | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Prepare images with their regions and prompts.

        Args:
            images: One image or a list.
            text: One prompt or a list: "" to describe, "Question: What is this? Answer:" to ask. "<image>" in it is
                plain text.
            regions: One `Region`, its text, or None (the whole image) for each image.
            **kwargs: As in `Blip2Processor`.

        Returns:
            `pixel_values` (B, 4, S, S), and `input_ids` and `attention_mask` (B, T) where there is text, which begins
            with the image's query tokens.

        Raises:
            ValueError: If there are regions without images, or a region does not fit its image.
        """
        if images is not None:
            check_processor_call(self.image_processor, kwargs)
        if regions is not None:
            if images is None:
                raise ValueError("got regions without images; pass the images that they lie in")
            kwargs["regions"] = regions
        if text is None:
            return super().__call__(images=images, **kwargs)
        texts = [text] if isinstance(text, str) else text
        settings = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)["text_kwargs"]
        inputs = self._encode(texts, [] if images is None else self._query_ids, **settings)
        if images is not None:
            inputs["pixel_values"] = super().__call__(images=images, **kwargs)["pixel_values"]
        return inputs

    def _encode(
        self,
        texts: list[str],
        before: list[int],
        return_tensors: str | None = None,
        max_length: int | None = None,
        padding: bool | str = False,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        **settings,
    ) -> BatchFeature:
        """Texts behind the query tokens. In `Blip2Processor` "<image>" in a question is one query token more, and
        padding stands between query tokens and text, where it is the last token of a row without text.
        """
        length = None if max_length is None else max_length - len(before)
        rows = self.tokenizer(texts, split_special_tokens=True, max_length=length, **settings)["input_ids"]
        padded = self.tokenizer.pad(
            {"input_ids": [before + row for row in rows]},
            padding=padding,
            max_length=max_length,
            padding_side=padding_side,
            pad_to_multiple_of=pad_to_multiple_of,
            return_tensors=return_tensors,
        )
        return BatchFeature(dict(padded))

    def apply_chat_template(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str | None = None,
    ) -> str | list[str] | BatchFeature:
        """A conversation about one image, or a batch of them, as prompts (`tokenize` False) or as the model's inputs.

        A message is Transformers' `{"role", "content"}`; the first holds the image item, which takes a `region`:
        `{"type": "image", "image": picture, "region": Region.from_box(...)}`.

        Raises:
            ValueError: If a message is malformed, there is not exactly one image, or the inputs are asked for as
                something else than a dict.
        """
        batched = bool(conversation) and not isinstance(conversation[0], Mapping)
        conversations = [check_messages(turns) for turns in (conversation if batched else [conversation])]
        prompts = [conversation_prompt(turns, add_generation_prompt) for turns in conversations]
        if not tokenize:
            return prompts if batched else prompts[0]
        if not return_dict:
            raise ValueError("BLIP-2's inputs are a dict (pixel_values, input_ids, ...): expected return_dict=True")
        items = [_only_image(turns) for turns in conversations]
        return self(
            images=[item["image"] for item in items],
            text=prompts,
            regions=[as_region(item.get("region")) for item in items],
            padding=True,
            padding_side="left",  # whatever the tokenizer says: answers begin where the prompt ends
            return_tensors=return_tensors,
        )

    def encode_conversation(self, conversation: Sequence[Message], add_generation_prompt: bool = False) -> list[int]:
        """Token ids of a conversation with its query tokens, without preparing the image: for labels and for counting.

        A conversation that ends with an answer gets the end-of-sequence token.

        Raises:
            ValueError: If it ends with an answer and has several: BLIP-2 ends a sequence once, not after each answer.
        """
        messages = check_messages(conversation)
        answers = sum(message["role"] == "assistant" for message in messages)
        finished = messages[-1]["role"] == "assistant"
        if finished and answers > 1:
            raise ValueError(
                f"BLIP-2 learns one answer a sample, got a conversation with {answers}; set max_turns to 1"
            )
        text = conversation_prompt(messages, add_generation_prompt)
        ids = self.tokenizer(text, split_special_tokens=True)["input_ids"]
        return self._query_ids + ids + [self.tokenizer.eos_token_id] * finished

    @property
    def _query_ids(self) -> list[int]:
        token = getattr(self.image_token, "content", self.image_token)
        return [self.tokenizer.convert_tokens_to_ids(token)] * self.num_query_tokens


def conversation_prompt(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
    """BLIP-2's prompt: "Question: {} Answer: {}. Question: {} Answer:"; a first turn without text asks for a caption.

    Source: the instructed generation of salesforce/LAVIS, projects/blip2/README.md at 506965b.
    """
    parts = []
    for position, message in enumerate(messages):
        text = "".join(item["text"] for item in message["content"] if item["type"] == "text")
        if message["role"] == "user":
            answer_follows = add_generation_prompt or position + 1 < len(messages)
            parts += [f"Question: {text}"] * bool(text) + ["Answer:"] * bool(text and answer_follows)
        else:
            parts.append(text if position + 1 == len(messages) else f"{text}.")
    return " ".join(parts)


def _only_image(messages: Sequence[Mapping]) -> Mapping:
    items = image_items(messages)
    if len(items) != 1 or "image" not in items[0]:
        raise ValueError(f"BLIP-2 reads one image a conversation, given as 'image'; got {len(items)} image items")
    return items[0]
