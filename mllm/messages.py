"""Chat messages as Transformers takes them: checked, and with the regions of their image items."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vision_tower import Region
from vision_tower.region_arguments import is_region_name, region_entries, region_list

_SOURCE_KEYS = ("image", "url", "path", "base64")
_ITEM_KEYS = {"text": {"type", "text"}, "image": {"type", "region", *_SOURCE_KEYS}}
_ROLES = ("system", "user", "assistant")

Message = Mapping[str, Any]


def as_batch(conversation: Sequence) -> tuple[list[Sequence[Message]], bool]:
    """A list of conversations, and whether it was one: `conversation` may be a single one.

    Raises:
        ValueError: If it is neither.
    """
    conversation = getattr(conversation, "messages", conversation)
    if not isinstance(conversation, list | tuple) or not conversation:
        raise ValueError(f"expected a list of messages or of conversations, got {conversation!r:.80}")
    batched = isinstance(conversation[0], list | tuple) or hasattr(conversation[0], "messages")
    conversations = conversation if batched else [conversation]
    return [getattr(messages, "messages", messages) for messages in conversations], batched


def check_messages(conversation: Sequence[Message]) -> list[dict]:
    """A copy of the messages, each with its role and a list of text and image items.

    A key whose value is None counts as missing: `datasets` gives every item of a column the keys of all. A message
    without content is an empty one, and other keys of a message stay, as in Transformers.

    Raises:
        ValueError: If a message is malformed, a text is missing, or a key of an item would be ignored.
    """
    messages = []
    for message in map(_as_dict, conversation):
        content = message.pop("content", [])
        role = message.pop("role", None)
        if role not in _ROLES or not isinstance(content, str | list | tuple):
            raise ValueError(
                f"expected messages with a role out of {_ROLES} and content, got {role!r}, {content!r:.80}"
            )
        if misplaced := sorted(filter(is_region_name, message)):
            raise ValueError(f"got {misplaced} in a message; a region is the key 'region' of an image item")
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        # other keys are the chat template's
        messages.append({**message, "role": role, "content": [_item(item) for item in items]})
    return messages


def _as_dict(value: Any) -> dict:
    """A message or item as a dict; it may be a dataclass or a pydantic model, as Transformers takes them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif callable(getattr(value, "model_dump", None)):
        value = value.model_dump()
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a message or an item of its content as a dict, got {value!r:.80}")
    return {key: part for key, part in value.items() if not _is_missing(part)}


def _is_missing(value: Any) -> bool:
    """Whether a value is None, or a struct of `datasets` without any."""
    return value is None or isinstance(value, Mapping) and {*map(type, value.values())} == {type(None)}


def _item(value: Any) -> dict:
    item = _as_dict(value)
    if item.get("type") == "image_url":
        item = _as_dict(_from_image_url(item))
    kind = item.get("type")
    if kind not in _ITEM_KEYS:
        raise ValueError(f"expected items of type text, image or image_url, got {kind!r:.80}")
    if kind == "text" and not isinstance(item.get("text"), str):
        raise ValueError(f"expected a string as the text of a text item, got {item.get('text')!r:.80}")
    if unknown := sorted(item.keys() - _ITEM_KEYS[kind]):
        raise ValueError(
            f"unknown {unknown} in an item of type {kind}: it would be ignored; a region is the key 'region' of images"
        )
    if kind == "image" and len(sources := [key for key in _SOURCE_KEYS if key in item]) > 1:
        raise ValueError(f"expected one image in an image item, got {sources}")
    return item


def _from_image_url(item: dict) -> dict:
    """OpenAI's image item as Transformers' own. Transformers keeps nothing but the URL."""
    outer = {key: value for key, value in item.items() if key not in ("type", "image_url")}
    inner = item.get("image_url")
    inner = _as_dict(inner) if isinstance(inner, Mapping) else {"url": inner}
    inner.pop("detail", None)  # which resolution OpenAI's models see
    if both := sorted(outer.keys() & inner.keys()):
        raise ValueError(f"got {both} twice, in an image_url item and in its image_url")
    return {"type": "image", **outer, **inner}


def image_items(conversation: Sequence[Message]) -> list[dict[str, Any]]:
    """The image items of a conversation, in order."""
    return [
        item
        for message in conversation
        if not isinstance(message["content"], str)
        for item in message["content"]
        if item["type"] == "image"
    ]


def give_regions(conversations: Sequence[Sequence[dict]], regions: Any, batched: bool) -> None:
    """Put the `regions` of a call into the image items of checked messages.

    Args:
        conversations: One or several; changed in place.
        regions: An entry for each image of a conversation, in order: a region, or a list of them. In a batch, a list of
            these, with one for each conversation.
        batched: Whether it is a batch.

    Raises:
        ValueError: If numbers differ, or an image item has a region of its own.
    """
    parts = region_entries(regions, len(conversations), "conversations") if batched else [regions]
    for messages, part in zip(conversations, parts, strict=True):
        items = image_items(messages)
        if any("region" in item for item in items):
            raise ValueError("got regions both in image items and as regions=; pass them in one of the two ways")
        for item, entry in zip(items, region_entries(part, len(items)), strict=True):
            item["region"] = entry


def image_slots(messages: Sequence[dict]) -> tuple[list[dict], list[list[Region]]]:
    """Checked messages with one image item, of its type alone, for each region; and the regions of each image.

    Raises:
        ValueError: If a region is invalid.
    """
    regions = []
    slots = []
    for message in messages:
        items = []
        for item in message["content"]:
            if item["type"] == "image":
                regions.append(region_list(item.get("region")))
                items += [{"type": "image"}] * len(regions[-1])
            else:
                items.append(item)
        slots.append({**message, "content": items})
    return slots, regions


def image_source(item: Mapping) -> Any:
    """The image of an image item: a path, URL, base64 text, array, tensor or PIL image.

    Raises:
        ValueError: If there is none.
    """
    for key in _SOURCE_KEYS:
        if key in item:
            return item[key]
    raise ValueError(f"expected an image in each image item, as {', '.join(_SOURCE_KEYS)}; got {[*item]}")


def set_default(settings: dict[str, Any], name: str, value: Any) -> None:
    """A setting of the tokenizer, unless the caller has it in one of the places that Transformers reads."""
    if not any(name in (settings.get(place) or {}) for place in ("text_kwargs", "common_kwargs")):
        settings.setdefault(name, value)
