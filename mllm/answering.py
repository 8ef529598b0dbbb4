"""From a picture, a region and a question to an answer: the one place where that happens, for chat, batch files and
evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedModel

from mllm.loading import AlphaProcessor
from mllm.messages import image_items
from vision_tower import Region

Turn = tuple[str, str]  # question, answer
Asked = tuple[Image.Image | None, Region | None, str | None]  # image, region, question
# Whatever the checkpoint says. As arguments of `generate`, not as a `GenerationConfig`: what is None in that would be
# filled from the checkpoint's again, and giving both is deprecated. `max_length` beside `max_new_tokens` would warn.
_GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "max_length": None}

# T5's relative positions have no end; this is the length it was trained with (arXiv 1910.10683, section 3.1.2)
_T5_LENGTH = 512


class Answer(NamedTuple):
    """A text, and whether it was cut at the longest length allowed instead of ending by itself."""

    text: str
    cut: bool


class RegionChat:
    """A LLaVA or BLIP-2 and its processor, answering greedily."""

    def __init__(self, model: PreTrainedModel, processor: AlphaProcessor) -> None:
        self.model = model
        self.processor = processor

    def answer(
        self,
        image: Image.Image,
        region: Region,
        question: str | None = None,
        *,
        history: Sequence[Turn] = (),
        max_new_tokens: int = 128,
        streamer: Any = None,
    ) -> str:
        """Answer a question about a region.

        Args:
            image: The picture, RGB, as displayed.
            region: In pixels of the picture.
            question: None asks for a description.
            history: Earlier turns about the same picture and region.
            max_new_tokens: Longest answer, in tokens.
            streamer: Gets the tokens as they come (transformers' `TextStreamer`).

        Raises:
            ValueError: If the region does not fit the picture, or the conversation is longer than the model's context.
        """
        conversation = self.conversation(image, region, question, history)
        return self._generate([conversation], max_new_tokens, streamer)[0].text

    def answer_batch(
        self, requests: Sequence[tuple[Image.Image, Region, str | None]], *, max_new_tokens: int = 128
    ) -> list[str]:
        """Answer several (image, region, question) at once, in order.

        Raises:
            ValueError: As `answer`, for any of them.
        """
        return [answer.text for answer in self.answers(requests, max_new_tokens=max_new_tokens)]

    def answers(
        self,
        requests: Sequence[Asked],
        *,
        max_new_tokens: int = 128,
    ) -> list[Answer]:
        """As `answer_batch`, telling which answers were cut. Neither image nor region: the question alone, which shows
        what a model knows without looking; then none of the batch may have one.

        Raises:
            ValueError: As `answer`; or if an image has no region, or the model cannot answer without an image.
        """
        for image, region, _ in requests:
            if (image is None) != (region is None):
                raise ValueError("expected an image with its region (Region.whole() for all of it), or neither")
        if len({image is None for image, _, _ in requests}) > 1:
            raise ValueError("expected images for all requests of a batch, or for none")
        return self._generate([self.conversation(*request) for request in requests], max_new_tokens)

    def answer_each(
        self, requests: Sequence[Asked | ValueError], *, max_new_tokens: int = 128
    ) -> list[Answer | ValueError]:
        """As `answers`, but a request that cannot be answered gets its error, and the others are answered in one batch.

        Args:
            requests: A request that is an error already (its image cannot be read) keeps it.
            max_new_tokens: Longest answer, in tokens.

        Raises:
            ValueError: If the requests can be answered one by one, but not together.
        """
        results: list = list(requests)

        def answer(places: list[int]) -> None:
            texts = self.answers([requests[place] for place in places], max_new_tokens=max_new_tokens) if places else []
            for place, text in zip(places, texts, strict=True):
                results[place] = text

        places = [place for place, request in enumerate(requests) if not isinstance(request, ValueError)]
        try:
            answer(places)
        except ValueError:
            good = []
            for place in places:
                try:
                    self._inputs([self.conversation(*requests[place])], max_new_tokens)
                    good.append(place)
                except ValueError as error:
                    results[place] = error
            if len(good) == len(places):
                raise
            answer(good)
        return results

    def prompt(self, question: str | None, *, with_image: bool = True) -> str:
        """The text that the model gets for a question, None asking for a description."""
        conversation = self.conversation(None, Region.whole() if with_image else None, question)
        return self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)

    def conversation(
        self, image: Image.Image | None, region: Region | None, question: str | None, history: Sequence[Turn] = ()
    ) -> list[dict]:
        """The conversation of a question, None asking for a description: the image item, with its region, stands in
        the first turn. Without a region there is no image item.

        Raises:
            ValueError: If the question is not valid Unicode (a terminal's broken bytes arrive as lone surrogates).
        """
        question = self.processor.description_wordings[0] if question is None else question
        question.encode()  # UnicodeEncodeError is a ValueError; the tokenizer would raise a TypeError
        messages = []
        for asked, answered in history:
            messages.append({"role": "user", "content": [{"type": "text", "text": asked}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answered}]})
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        if region is not None:
            messages[0]["content"].insert(0, {"type": "image", "image": image, "region": region})
        return messages

    def _check_tokens(self, tokens: int, max_new_tokens: int) -> None:
        config = self.model.config.get_text_config()
        if config.is_encoder_decoder:  # prompt and answer are sequences of their own
            limit, needed = _T5_LENGTH, max(tokens, max_new_tokens)
        else:
            limit, needed = config.max_position_embeddings, tokens + max_new_tokens
        if needed > limit:
            raise ValueError(
                f"the conversation takes {tokens} tokens and the answer up to {max_new_tokens}, the model reads "
                f"{limit}; ask a shorter question or start anew"
            )

    def _end_tokens(self) -> list[int]:
        """Tokens that end an answer; BLIP-2's language model generates by settings of its own."""
        language_model = getattr(self.model, "language_model", self.model)
        settings = language_model.generation_config if hasattr(language_model, "generation_config") else None
        ends = (settings or self.model.generation_config).eos_token_id
        return ends if isinstance(ends, list) else [] if ends is None else [ends]

    def _inputs(self, conversations: list[list[dict]], max_new_tokens: int) -> BatchFeature:
        """What `generate` takes; whatever is wrong with a request is found here."""
        inputs = self.processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        self._check_tokens(inputs["input_ids"].shape[1], max_new_tokens)
        if any(image_items(conversation) for conversation in conversations):
            check_alpha(inputs)
        return inputs

    @torch.inference_mode()
    def _generate(self, conversations: list[list[dict]], max_new_tokens: int, streamer: Any = None) -> list[Answer]:
        inputs = self._inputs(conversations, max_new_tokens)
        prompt_length = inputs["input_ids"].shape[1]
        inputs = inputs.to(self.model.device, self.model.dtype)
        output = self.model.generate(**inputs, **_GREEDY, max_new_tokens=max_new_tokens, streamer=streamer)
        prompt_returned = not self.model.config.get_text_config().is_encoder_decoder
        answers = output[:, prompt_length:] if prompt_returned else output
        texts = self.processor.batch_decode(answers, skip_special_tokens=True)
        ended = torch.isin(answers.cpu(), torch.tensor(self._end_tokens(), dtype=answers.dtype)).any(1)
        return [Answer(text.strip(), cut=not end) for text, end in zip(texts, ended.tolist(), strict=True)]


def check_alpha(inputs: BatchFeature) -> None:
    """Raise ValueError unless the images carry an alpha channel: without it every answer would be about the whole
    image.
    """
    channels = inputs["pixel_values"].shape[1]
    if channels != 4:
        raise ValueError(f"expected pixel_values with 4 channels (RGB + alpha), got {channels}; the region is lost")
