"""Processor of LLaVA with an alpha tower: the one home of the conversation format and the image-token count."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import BatchFeature, LlavaProcessor
from transformers.image_utils import ImageInput

from mllm.data.templates import DESCRIBE_REGION_WORDINGS
from mllm.remote_code import SavedWithSources
from vision_tower import Region
from vision_tower.image_processing_alpha_clip import check_processor_call, flat_list

# Source: `conv_vicuna_v1` in haotian-liu/LLaVA, llava/conversation.py at c121f04.
VICUNA_V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# LLaVA-1.5: "USER: <image>\n{question} ASSISTANT: {answer}</s>USER: ..."; equal to `conv_vicuna_v1` with its system
# sentence, and for one turn to the template of llava-hf/llava-1.5-7b-hf. The template writes BOS and EOS itself: user
# text is then encoded with control tokens off (`sanitize_control_tokens`), so that "<image>" or "</s>" in a question
# stays text.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] if content['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}{{ content['text'] }}{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_SOURCE_KEYS = {"image", "url", "path", "base64"}
_IMAGE_KEYS = _SOURCE_KEYS | {"type", "region"}
_ROLES = ("system", "user", "assistant")

Message = Mapping[str, Any]


class AlphaLlavaProcessor(SavedWithSources, LlavaProcessor):
    """Text + images + regions -> inputs of LLaVA with an alpha tower.

    Two ways in, one format:

    - `processor(images=..., regions=..., text="What is this?")`: `text` is the user's question, never a prompt.
    - `processor.apply_chat_template(conversation, tokenize=True, return_dict=True, ...)`: several turns and images; an
      image item takes a region: `{"type": "image", "image": picture, "region": Region.from_box(...)}` (also as JSON or
      as command-line text).

    An image without a region is looked at as a whole. `system` is a sentence put before every conversation that has
    none of its own: None (the Hugging Face LLaVA-1.5 format) or `VICUNA_V1_SYSTEM` (the original code's).
    """

    description_wordings = DESCRIBE_REGION_WORDINGS  # how a description is asked for; chat uses the first

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        system: str | None = None,
        **kwargs,
    ) -> None:
        # every argument by name: `from_pretrained` drops saved ones that the signature does not show
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template or CHAT_TEMPLATE,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )
        self.system = system

    @property
    def num_image_tokens(self) -> int:
        """Tokens an image takes: 576 at 336 pixels and patch 14."""
        side = self.image_processor.crop_size.height // self.patch_size
        without_cls = self.vision_feature_select_strategy == "default"
        return side * side + self.num_additional_image_tokens - without_cls

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """As in `LlavaProcessor`, which fails on four channels."""
        return self.image_token * self.num_image_tokens

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        regions: Region | str | list | None = None,
        *,
        text_is_prompt: bool = False,
        **kwargs,
    ) -> BatchFeature:
        """Prepare one question, or a batch.

        Args:
            images: For one question: an image or a list of images. For a list of questions: a list with an entry each
                (an image, a list of images, or None).
            text: The user's question, or a list of questions. "<image>" or "USER:" in it is plain text.
            regions: As `images`, with a `Region`, its text, or None (the whole image) for each image.
            text_is_prompt: True when `text` is a complete prompt with a placeholder for each image, as `LlavaProcessor`
                takes it; images and regions are then flat lists.
            **kwargs: As in `LlavaProcessor` (`return_tensors`, `padding`, ...).

        Returns:
            `input_ids` and `attention_mask` (B, T), padded on the left, and `pixel_values` (N, 4, S, S) where there are
            images.

        Raises:
            ValueError: If questions, images and regions do not match, or a region does not fit its image.
        """
        if images is not None:
            check_processor_call(self.image_processor, kwargs)
        if text is None:
            raise ValueError("expected text: a question, or a list of questions")
        kwargs.setdefault("padding", True)
        kwargs.setdefault("padding_side", "left")  # whatever the tokenizer says: answers begin where the prompt ends
        if text_is_prompt:
            if images is not None:
                images, regions = _flatten(images, regions)
                kwargs["regions"] = regions
            return super().__call__(images=images, text=text, **kwargs)
        single = isinstance(text, str)
        conversations = [
            [_user_message(*turn)] for turn in _match_turns([text] if single else text, images, regions, single)
        ]
        tensors = kwargs.pop("return_tensors", None)
        return self.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors=tensors,
            processor_kwargs=kwargs,
        )

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """As in `ProcessorMixin`; image items take a `region`, and control tokens in anybody's text are plain text.

        Raises:
            ValueError: If a message is malformed, or an image item has a key that would be dropped silently.
        """
        batched = bool(conversation) and not isinstance(conversation[0], Mapping)
        conversations = [self._checked(turns) for turns in (conversation if batched else [conversation])]
        if kwargs.get("tokenize"):
            kwargs.setdefault("sanitize_control_tokens", True)
            kwargs["processor_kwargs"] = {"text_is_prompt": True, **(kwargs.get("processor_kwargs") or {})}
        return super().apply_chat_template(conversations if batched else conversations[0], chat_template, **kwargs)

    def encode_conversation(self, conversation: Sequence[Message], add_generation_prompt: bool = False) -> list[int]:
        """Token ids of a conversation with its image tokens, without preparing the images: for labels and for
        counting.
        """
        ids = self.tokenizer.apply_chat_template(
            [
                {**message, "content": [_without_pixels(item) for item in message["content"]]}
                for message in self._checked(conversation)
            ],
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=False,
            sanitize_control_tokens=True,
        )
        return [token for token in ids for _ in range(self.num_image_tokens if token == self.image_token_id else 1)]

    def _checked(self, conversation: Sequence[Message]) -> list[dict]:
        """A checked copy with the system sentence in place."""
        messages = check_messages(conversation)
        if self.system and messages and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system}]})
        return messages

    def _multimodal_inputs_from_conversations(self, conversations, *args, **kwargs):
        images, videos, audios, extra = super()._multimodal_inputs_from_conversations(conversations, *args, **kwargs)
        regions = [
            [as_region(item.get("region")) for item in image_items(conversation) if item.keys() & _SOURCE_KEYS]
            for conversation in conversations
        ]
        return images, videos, audios, {**extra, "regions": regions if any(images) else None}


def check_messages(conversation: Sequence[Message]) -> list[dict]:
    """A copy of the messages with their content as lists. A key whose value is None is left out: `datasets` gives every
    item of a column the keys of all.

    Raises:
        ValueError: If a message is malformed, a text is missing, or an item has a key that would be dropped silently.
    """
    messages = []
    for message in conversation:
        content = message.get("content")
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if message.get("role") not in _ROLES or not isinstance(items, list | tuple):
            raise ValueError(f"expected messages with a role out of {_ROLES} and content, got {dict(message)!r}")
        items = [{key: value for key, value in item.items() if value is not None} for item in items]
        for item in items:
            if item.get("type") == "text" and not isinstance(item.get("text"), str):
                raise ValueError(f"expected a string as the text of a text item, got {item.get('text')!r}")
            if unknown := item.keys() - (_IMAGE_KEYS if item.get("type") == "image" else {"type", "text"}):
                raise ValueError(f"unknown {sorted(unknown)} in a {item.get('type')} item: it would be ignored")
        messages.append({"role": message["role"], "content": items})
    return messages


def image_items(conversation: Sequence[Message]) -> list[Mapping]:
    """The image items of a conversation, in order."""
    return [
        item
        for message in conversation
        if not isinstance(message["content"], str)
        for item in message["content"]
        if item["type"] == "image"
    ]


def _flatten(images: ImageInput, regions: Any) -> tuple[list, list]:
    """Flat lists of images and of their regions."""
    flat_images = flat_list(images)
    flat_regions: list = []
    for entry in regions if isinstance(regions, list | tuple) else [regions]:
        flat_regions.extend(entry if isinstance(entry, list | tuple) else [entry])
    if regions is None:
        flat_regions = [None] * len(flat_images)
    if len(flat_images) != len(flat_regions):
        raise ValueError(f"expected a region (or None) for each of {len(flat_images)} images, got {len(flat_regions)}")
    return flat_images, flat_regions


def _match_turns(questions: Sequence[str], images: Any, regions: Any, single: bool) -> list[tuple[str, list, list]]:
    """(question, its images, their regions) for each question."""
    if not all(isinstance(question, str) for question in questions):
        raise ValueError("expected text: a question, or a list of questions")
    rows = []
    for name, value in (("images", images), ("regions", regions)):
        entries = [value] if single else [None] * len(questions) if value is None else value
        if not isinstance(entries, list | tuple) or len(entries) != len(questions):
            raise ValueError(f"expected {name} with one entry for each of {len(questions)} questions")
        rows.append([_as_list(entry) for entry in entries])
    turns = []
    for question, turn_images, turn_regions in zip(questions, *rows, strict=True):
        turn_regions = turn_regions or [None] * len(turn_images)
        if len(turn_images) != len(turn_regions):
            raise ValueError(
                f"expected one region for each of {len(turn_images)} images of a question, got {len(turn_regions)}"
            )
        turns.append((question, turn_images, turn_regions))
    return turns


def _as_list(entry: Any) -> list:
    if entry is None:
        return []
    return list(entry) if isinstance(entry, list | tuple) else [entry]


def _user_message(question: str, images: Sequence, regions: Sequence) -> dict:
    items = [{"type": "image", "image": image, "region": r} for image, r in zip(images, regions, strict=True)]
    return {"role": "user", "content": [*items, {"type": "text", "text": question}]}


def _without_pixels(item: Mapping) -> dict:
    return {"type": "image"} if item["type"] == "image" else dict(item)


_REGION_FIELDS = {field.name for field in dataclasses.fields(Region)}


def as_region(value: Any) -> Region | None:
    """A region of a chat message: a `Region`, its JSON, its command-line text, or None."""
    if isinstance(value, Mapping):
        # Transformers 5.24 takes a dataclass inside a message apart into its fields
        return _from_fields(**value) if value.keys() == _REGION_FIELDS else Region.from_json(dict(value))
    return Region.parse(value) if isinstance(value, str) else value


def _from_fields(kind: Any, data: Any, strength: Any) -> Region:
    """A region from its own fields, which need not be those of any.

    Raises:
        ValueError: If they are not.
    """
    parts = list(data) if isinstance(data, list | tuple) else []
    if kind in ("box", "nbox", "polygon"):
        return Region.from_json({kind: parts, "strength": strength})
    if kind in ("points", "stroke") and len(parts) == 2:
        size = "radius" if kind == "points" else "width"
        return Region.from_json({kind: parts[0], size: parts[1], "strength": strength})
    if kind == "whole" and not parts:
        return Region("whole", strength=strength)
    if kind == "mask" and len(parts) == 4 and isinstance(parts[3], bytes):  # bytes come from a Region, never from JSON
        return Region("mask", tuple(parts), strength)
    raise ValueError(f"expected the fields of a Region, got kind {kind!r:.80} and data {data!r:.80}")
