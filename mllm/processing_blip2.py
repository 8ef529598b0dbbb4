"""Processor of BLIP-2 with an alpha tower: its prompt format and its query tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import BatchFeature, Blip2Processor
from transformers.image_utils import ImageInput

from mllm.messages import Message, as_batch, check_messages, give_regions, image_items, image_source, set_default
from mllm.pipeline_inputs import check_pipeline_inputs
from mllm.remote_code import SavedWithSources
from vision_tower.region_arguments import check_call, check_names, flatten_pairs, match_regions, take_regions


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
        regions: Any = None,
        **kwargs,
    ) -> BatchFeature:
        """Prepare images with their regions and prompts.

        Args:
            images: One image or a list, one for each prompt.
            text: The whole prompt, or a list of them: "" to describe, "Question: What is this? Answer:" to ask. Without
                `<image>`: as in `Blip2Processor`, the query tokens are put before it.
            regions: For each image a `Region`, its JSON, its text, or None, the whole image.
            **kwargs: As in `Blip2Processor`.

        Returns:
            `pixel_values` (B, 4, S, S), and `input_ids` and `attention_mask` (B, T) where there is text, which begins
            with the image's query tokens.

        Raises:
            ValueError: If prompts, images and regions do not match, an image has several regions, a region does not fit
                its image, or an argument would be ignored.
        """
        check_pipeline_inputs(inspect.currentframe().f_back)  # type: ignore[union-attr]
        regions = take_regions(regions, kwargs)
        check_call(self, images, regions, kwargs)
        if images is not None:
            pairs = list(flatten_pairs(match_regions(images, regions)))
            if most := max((len(entry) for _, entry in pairs if len(entry) > 1), default=0):
                raise ValueError(f"BLIP-2 reads one image and one region a prompt, got {most} regions of one image")
            images, kwargs["regions"] = [image for image, _ in pairs], [entry[0] for _, entry in pairs]
        if text is None:
            return super().__call__(images=images, **kwargs)
        texts = [text] if isinstance(text, str) else text
        self._check_texts(texts, images)
        settings = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)["text_kwargs"]
        inputs = self._encode(texts, [] if images is None else self._query_ids, **settings)
        if images is not None:
            inputs["pixel_values"] = super().__call__(images=images, **kwargs)["pixel_values"]
        return inputs

    def _check_texts(self, texts: Any, images: list | None) -> None:
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise ValueError("expected text as a string, or a list of strings")
        if images is not None and len(texts) != len(images):
            raise ValueError(f"BLIP-2 reads one image a prompt, got {len(images)} images for {len(texts)} prompts")

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
        """Texts behind the query tokens. In `Blip2Processor` padding on the left stands between query tokens and text,
        where it is the last token of a row without text.
        """
        length = None if max_length is None else max_length - len(before)
        rows = self.tokenizer(texts, max_length=length, **settings)["input_ids"]
        if any(token in row for row in rows for token in self._query_ids[:1]):
            raise ValueError(
                "expected text without <image>, since the processor puts the query tokens before it; what a user "
                "writes goes through processor.apply_chat_template"
            )
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
        regions: Any = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ) -> str | list[str] | BatchFeature:
        """A conversation about one image, or a batch of them, as prompts (`tokenize` False) or as the model's inputs.

        A message is Transformers' `{"role", "content"}`; one holds the image item, which takes a `region`: `{"type":
        "image", "image": image, "region": Region.from_box(...)}`. Control tokens in message texts are plain text.

        Args:
            conversation: A list of messages, or a list of these.
            regions: In place of the regions in image items, here or in `processor_kwargs`: that of the conversation's
                image; in a batch, a list of these.
            add_generation_prompt: Whether the prompt ends with "Answer:".
            continue_final_message: Whether the last message is an answer to be continued.
            tokenize: Whether to return the model's inputs, not the prompt.
            return_dict: BLIP-2's inputs are always a dict.
            return_tensors: "pt", "np" or None, lists.
            processor_kwargs: Arguments of `__call__`.
            **kwargs: More of these.

        Raises:
            ValueError: If a message is malformed, there is not exactly one image with one region, an argument or a key
                of an item would be ignored, or the inputs are asked for as something else than a dict.
        """
        conversations, batched = as_batch(conversation)
        conversations = [check_messages(messages) for messages in conversations]
        settings = {**(processor_kwargs or {}), **kwargs}
        regions = take_regions(regions, settings)
        if regions is not None:
            give_regions(conversations, regions, batched)
        check_names(self, settings)
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        prompts = [conversation_prompt(messages, add_generation_prompt) for messages in conversations]
        if not tokenize:
            return prompts if batched else prompts[0]
        if not return_dict:
            raise ValueError("BLIP-2's inputs are a dict (pixel_values, input_ids, ...): expected return_dict=True")
        items = [_only_image(messages) for messages in conversations]
        set_default(settings, "padding", True)
        # whatever the tokenizer says: answers begin where the prompt ends
        set_default(settings, "padding_side", "left")
        settings["text_kwargs"] = {"split_special_tokens": True, **settings.get("text_kwargs", {})}
        return self(
            images=[image_source(item) for item in items],
            text=prompts,
            regions=[item.get("region") for item in items],
            return_tensors=return_tensors,
            **settings,
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
    if len(items) != 1:
        raise ValueError(f"BLIP-2 reads one image a conversation, got {len(items)} image items")
    return items[0]
