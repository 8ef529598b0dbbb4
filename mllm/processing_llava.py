"""Processors of LLaVA with an alpha tower: the one home of the conversation format and of the image-token count."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from itertools import accumulate, repeat
from typing import Any

from transformers import (
    BatchFeature,
    LlavaProcessor,
    ProcessorMixin,
    TokenizersBackend,
)
from transformers.image_utils import ImageInput

from mllm.data.templates import DESCRIBE_REGION_WORDINGS
from mllm.messages import (
    Message,
    as_batch,
    check_messages,
    give_regions,
    image_items,
    image_slots,
    image_source,
    set_default,
)
from mllm.pipeline_inputs import check_pipeline_inputs
from mllm.remote_code import SavedWithSources
from vision_tower.region_arguments import check_call, check_names, flatten_pairs, match_regions, take_regions

# Source: `conv_vicuna_v1` in haotian-liu/LLaVA, llava/conversation.py at c121f04.
VICUNA_V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# LLaVA-1.5: "USER: <image>\n{question} ASSISTANT: {answer}</s>USER: ..."; equal to `conv_vicuna_v1` with its system
# sentence, and for one turn to the template of llava-hf/llava-1.5-7b-hf. The template writes BOS and EOS itself: user
# text is then encoded with control tokens off (`sanitize_control_tokens`), so that "<image>" or "</s>" in a question
# stays text. What `generation` encloses are the tokens that training has labels for.
_IMAGES = "{% for content in message['content'] if content['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
_TEXTS = "{% for content in message['content'] if content['type'] == 'text' %}{{ content['text'] }}{% endfor %}"
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'ASSISTANT:' }}{% generation %}{{ ' ' }}" + _IMAGES + _TEXTS + "{{ eos_token }}{% endgeneration %}"
    "{% else %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    + _IMAGES
    + _TEXTS
    + "{{ ' ' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# What earlier versions saved: the same text, without `generation`.
_FORMER_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    + _IMAGES
    + _TEXTS
    + "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_STOCK_ARGUMENTS = inspect.signature(ProcessorMixin.apply_chat_template).parameters.keys()


class RegionPrompts(SavedWithSources, ProcessorMixin):
    """Text + images + regions, for a processor of the LLaVA kind: what `AlphaLlavaProcessor` and
    `AlphaLlavaNextProcessor` have in common. Mixed into Transformers' own, which it calls.
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
        if isinstance(tokenizer, TokenizersBackend):
            # the argument of `AutoProcessor.from_pretrained(..., backend="pil")` lands, and is saved, here too
            tokenizer.backend = tokenizer.init_kwargs["backend"] = "tokenizers"
        tokenizer.padding_side = "left"  # answers begin where the prompt ends; a pipeline's batches too
        # every argument by name: `from_pretrained` drops saved ones that the signature does not show
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=CHAT_TEMPLATE if chat_template in (None, _FORMER_CHAT_TEMPLATE) else chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )
        self.system = system

    def slot_tokens(self, messages: Sequence[Message]) -> Iterable[int]:
        """The tokens of each image slot of checked messages, in order."""
        raise NotImplementedError

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        regions: Any = None,
        **kwargs,
    ) -> BatchFeature:
        """Prepare a prompt, or a batch of them.

        Args:
            images: As in `LlavaProcessor`: one image, a list of the images of all prompts, or a list of lists, one for
                each prompt.
            text: The whole prompt, or a list of them, with one `<image>` for each slot, as `apply_chat_template` writes
                it.
            regions: An entry for each image, nested as `images` are: a region, a list of N regions, which makes N slots
                of an image that is decoded and resized once, or None, the whole image.
            **kwargs: As in `LlavaProcessor` (`return_tensors`, `padding`, ...). Where tensors are asked for, padding is
                on.

        Returns:
            `input_ids` and `attention_mask` (B, T) where there is text, and `pixel_values` (N, 4, S, S) where there are
            images, one for each slot.

        Raises:
            ValueError: If prompts, images and regions do not match, a region does not fit its image, or an argument
                would be ignored.
        """
        check_pipeline_inputs(inspect.currentframe().f_back)  # type: ignore[union-attr]
        for name in ("videos", "audio"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"LLaVA reads images and text, got {name}")
        regions = take_regions(regions, kwargs)
        check_call(self, images, regions, kwargs)
        if images is not None:
            images, kwargs["regions"] = self._slots(images, regions, text)
            if not any(kwargs["regions"]):  # prompts without images, in lists
                images = None
                del kwargs["regions"]
        if text is not None and self._begins_with_bos(text):  # as for the prompts that `apply_chat_template` tokenizes
            set_default(kwargs, "add_special_tokens", False)
        if kwargs.get("return_tensors") is not None:
            set_default(kwargs, "padding", True)
        return super().__call__(images=images, text=text, **kwargs)

    def _begins_with_bos(self, text: str | list[str]) -> bool:
        bos = self.tokenizer.bos_token
        prompts = [text] if isinstance(text, str) else text
        return bos is not None and all(isinstance(prompt, str) and prompt.startswith(bos) for prompt in prompts)

    def _slots(self, images: ImageInput, regions: Any, text: Any) -> tuple[list, list]:
        """Images and regions, one for each slot, in a list for each prompt where `images` are.

        Raises:
            ValueError: As `match_regions`, or if the slots of one of several images belong to two prompts.
        """
        pairs = match_regions(images, regions)
        nested = isinstance(pairs, list) and any(isinstance(part, list) for part in pairs)
        if not nested and isinstance(pairs, list) and isinstance(text, list | tuple):
            self._check_images_stay_whole([len(entry) for _, entry in pairs], text)
        slots: list[tuple[list, list]] = []
        for group in pairs if nested else [pairs]:
            slots.append(([], []))
            for image, entry in flatten_pairs(group):
                slots[-1][0].extend([self.image_processor.fetch_images(image)] * len(entry))
                slots[-1][1].extend(entry)
        if not nested:
            return slots[0]
        return [images for images, _ in slots], [entries for _, entries in slots]

    def _check_images_stay_whole(self, slots: list[int], prompts: Sequence[Any]) -> None:
        """Raise ValueError if the slots of an image end in another prompt than they begin."""
        ends = {0, *accumulate(slots)}
        found = [prompt.count(self.image_token) for prompt in prompts if isinstance(prompt, str)]
        if len(slots) > 1 and sum(found) == sum(slots) and not ends.issuperset(accumulate(found)):
            raise ValueError(
                f"expected the {self.image_token} of an image in one prompt, got images with {_numbers(slots)} slots "
                f"for prompts with {_numbers(found)}; pass images and regions in a list for each prompt"
            )

    def validate_inputs(self, images: ImageInput | None = None, text: list[str] | None = None, **kwargs) -> None:
        """As in `ProcessorMixin`; also, each prompt has the `<image>` of its own images.

        Raises:
            ValueError: If it has not.
        """
        if text is not None and all(isinstance(prompt, str) for prompt in text):
            found = [prompt.count(self.image_token) for prompt in text]
            slots = [len(group) for group in images] if images and isinstance(images[0], list) else [len(images or [])]
            if len(slots) != len(found):
                slots, found = [sum(slots)], [sum(found)]
            if slots != found:
                raise ValueError(
                    f"expected {_numbers(slots)} {self.image_token} in text, one for each image slot, got "
                    f"{_numbers(found)}; text is the whole prompt, as processor.apply_chat_template writes it"
                )
        super().validate_inputs(images=images, text=text, **kwargs)

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        *,
        regions: Any = None,
        tokenize: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ):
        """As in `ProcessorMixin`; image items take a `region`, and control tokens in message texts are plain text.

        Args:
            conversation: A list of messages, or a list of these.
            chat_template: As in `ProcessorMixin`.
            regions: In place of the regions in image items, here or in `processor_kwargs`: an entry for each image of
                the conversation, in order; in a batch, a list of these.
            tokenize: Whether to return the model's inputs, not the prompt.
            processor_kwargs: Arguments of `__call__`.
            **kwargs: As in `ProcessorMixin`.

        Raises:
            ValueError: If a message is malformed, images and regions do not match, or an argument or a key of an item
                would be ignored; with `return_assistant_tokens_mask`, if a text has a control token.
        """
        conversations, batched = as_batch(conversation)
        conversations = [self._checked(messages) for messages in conversations]
        template = str(self.chat_template if chat_template is None else chat_template)
        # what neither Transformers nor the template takes is for `__call__`
        moved = kwargs.keys() - _STOCK_ARGUMENTS - set(re.findall(r"\w+", _QUOTED.sub("", template)))
        processor_kwargs = {**(processor_kwargs or {}), **{name: kwargs.pop(name) for name in moved}}
        images = processor_kwargs.pop("images", None)
        regions = take_regions(regions, processor_kwargs)
        check_names(self, processor_kwargs)
        if regions is not None:
            give_regions(conversations, regions, batched)
        slots, entries = map(list, zip(*map(image_slots, conversations), strict=True))
        if tokenize:
            if any(entries):
                images = _images(conversations, images, batched)
                processor_kwargs |= {"images": images if batched else images[0], "regions": entries}
            elif images is not None:  # for a template that places them by itself
                processor_kwargs["images"] = images
            # not possible together with a mask, nor with a template that leaves BOS to the tokenizer
            if kwargs.get("return_assistant_tokens_mask") or "bos_token" not in template:
                self._refuse_control_tokens(conversations)
            else:
                kwargs.setdefault("sanitize_control_tokens", True)
        return super().apply_chat_template(
            slots if batched else slots[0],
            chat_template,
            tokenize=tokenize,
            processor_kwargs=processor_kwargs,
            **kwargs,
        )

    def _refuse_control_tokens(self, conversations: Sequence[Sequence[dict]]) -> None:
        controls = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        texts = (
            item["text"]
            for messages in conversations
            for message in messages
            for item in message["content"]
            if item["type"] == "text"
        )
        for text in texts:
            if found := sorted(token for token in controls if token in text):
                raise ValueError(
                    f"expected texts without control tokens, got {', '.join(found)} in {text!r:.80}; they are plain "
                    "text only in the processor's own chat template, without return_assistant_tokens_mask"
                )

    def encode_conversation(self, conversation: Sequence[Message], add_generation_prompt: bool = False) -> list[int]:
        """Token ids of a conversation with its image tokens, without preparing the images: for labels and for
        counting.

        Raises:
            ValueError: If a text has a control token, and the chat template leaves BOS to the tokenizer.
        """
        messages = self._checked(conversation)
        slots, _ = image_slots(messages)
        settings = {"chat_template": self.chat_template, "add_generation_prompt": add_generation_prompt}
        if "bos_token" in str(self.chat_template):
            ids = self.tokenizer.apply_chat_template(
                slots, tokenize=True, return_dict=False, sanitize_control_tokens=True, **settings
            )
        else:  # as in `apply_chat_template`
            self._refuse_control_tokens([messages])
            text = self.tokenizer.apply_chat_template(slots, tokenize=False, **settings)
            ids = self.tokenizer(text, add_special_tokens=not self._begins_with_bos(text))["input_ids"]
        counts = iter(self.slot_tokens(messages))
        return [token for token in ids for _ in range(next(counts) if token == self.image_token_id else 1)]

    def _checked(self, conversation: Sequence[Message]) -> list[dict]:
        """A checked copy with the system sentence in place."""
        messages = check_messages(conversation)
        if self.system and messages and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system}]})
        return messages


class AlphaLlavaProcessor(RegionPrompts, LlavaProcessor):
    """Text + images + regions -> inputs of LLaVA with an alpha tower.

    Called as `LlavaProcessor` is, with `regions` in addition:

    - `processor(images=..., text=prompt, regions=...)`: `text` is the whole prompt, with one `<image>` for each slot.
      An image has one slot, an image with a list of N regions has N.
    - `processor.apply_chat_template(conversation, tokenize=True, return_dict=True, ...)`: an image item takes a region
      or a list of them, `{"type": "image", "image": image, "region": Region.from_box(...)}`.

    A region is a `Region`, its JSON or its text; an image without a region is seen as a whole. `system` is a sentence
    put before every conversation that has none of its own: None (the Hugging Face LLaVA-1.5 format) or
    `VICUNA_V1_SYSTEM` (the original code's).
    """

    @property
    def num_image_tokens(self) -> int:
        """Tokens an image takes: 576 at 336 pixels and patch 14."""
        side = self.image_processor.crop_size.height // self.patch_size
        without_cls = self.vision_feature_select_strategy == "default"
        return side * side + self.num_additional_image_tokens - without_cls

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """As in `LlavaProcessor`, which fails on four channels."""
        return self.image_token * self.num_image_tokens

    def slot_tokens(self, messages: Sequence[Message]) -> Iterable[int]:
        """As in `RegionPrompts`; each has as many."""
        return repeat(self.num_image_tokens)


def _images(conversations: Sequence[Sequence[dict]], given: Any, batched: bool) -> list[list]:
    """The images of each conversation: those of its image items, or those `given` in `processor_kwargs`."""
    items = [image_items(messages) for messages in conversations]
    if given is None:
        return [[image_source(item) for item in group] for group in items]
    if any(item.keys() - {"type", "region"} for group in items for item in group):
        raise ValueError("got images both in image items and in processor_kwargs; pass them in one of the two ways")
    groups = given if batched else [given]
    return [list(group) if isinstance(group, list | tuple) else [group] for group in groups]


def _numbers(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts))
