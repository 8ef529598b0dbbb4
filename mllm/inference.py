"""`RegionChat`: from an image, a region and a question to an answer; used by chat, batch runs and evaluation."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, PreTrainedModel, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from mllm.loading import AlphaProcessor, load
from vision_tower import Region
from vision_tower.image_decoding import decode_image
from vision_tower.region_arguments import as_region

Turn = tuple[str, str]  # question, answer
RegionLike = Region | str | Mapping  # a region, its text form, its JSON
ChatRequest = tuple[Any, RegionLike | None, str | None]  # image, region, question
# Overrides the checkpoint's generation config. Passed as arguments of `generate`: `None` fields of a `GenerationConfig`
# would be filled from the checkpoint's, and passing both is deprecated. `max_length` and `max_new_tokens` together
# would log a warning.
_GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "max_length": None}

# T5's relative positions have no end; this is the length it was trained with (arXiv 1910.10683, section 3.1.2)
_T5_LENGTH = 512


class Answer(NamedTuple):
    """A text, and whether it was truncated at `max_new_tokens`."""

    text: str
    truncated: bool


class RegionChat:
    """A LLaVA (1.5 or NeXT) or BLIP-2 that answers questions about regions of images, greedily.

    An image is anything that the image processor accepts (a path, URL, base64 text, the bytes of a file, an array,
    tensor or PIL image); it is decoded once. A region is a `Region`, its JSON or its text ("box:40,60,220,200"), in
    pixels of the image as displayed.

        chat = RegionChat.from_pretrained()
        chat.ask("scene.png", Region.from_box(22, 8, 48, 42), "What is this?")
    """

    def __init__(self, model: PreTrainedModel, processor: AlphaProcessor) -> None:
        """Create from the model and processor that `mllm.load` returns.

        Raises:
            ValueError: If the processor is a stock one, which would ignore regions.
        """
        if not hasattr(processor, "description_wordings"):
            raise ValueError(
                f"expected a processor that takes regions (mllm.load returns one), got {type(processor).__name__}"
            )
        self.model = model
        self.processor = processor

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike | None = None, **kwargs: Any) -> RegionChat:
        """Load a directory or hub id; without a name, the embedded model (synthetic scenes only).

        Args:
            name: As `model` of `mllm.load`.
            **kwargs: As in `mllm.load` (`device`, `dtype`, `adapter`, ...).

        Raises:
            ValueError: As `mllm.load`.
        """
        return cls(*load(name, **kwargs))

    def ask(
        self,
        image: Any,
        region: RegionLike,
        question: str | None,
        *,
        history: Sequence[Turn] = (),
        max_new_tokens: int = 128,
        streamer: BaseStreamer | None = None,
    ) -> str:
        """Answer a question about a region.

        Args:
            image: The image.
            region: In pixels of the image; `Region.whole()` is the whole image.
            question: None asks for a description, as `describe` does.
            history: Earlier turns about the same image and region.
            max_new_tokens: Maximum length of an answer, in tokens.
            streamer: Receives the tokens as they are generated, such as Transformers' `TextStreamer`.

        Raises:
            ValueError: If the image cannot be read, the region does not fit it, or the conversation exceeds the model's
                context.
        """
        inputs = self._inputs((_required(image), region, question), max_new_tokens, history)
        return self._generate(inputs, max_new_tokens, streamer=streamer)[0].text

    def describe(
        self, image: Any, region: RegionLike, *, max_new_tokens: int = 128, streamer: BaseStreamer | None = None
    ) -> str:
        """Describe a region; arguments and errors as in `ask`."""
        return self.ask(image, region, None, max_new_tokens=max_new_tokens, streamer=streamer)

    def stream(
        self,
        image: Any,
        region: RegionLike,
        question: str | None,
        *,
        history: Sequence[Turn] = (),
        max_new_tokens: int = 128,
    ) -> Iterator[str]:
        """Yield the answer in pieces as they are generated; joined, they equal the result of `ask`.

        Invalid input raises here, before the first piece. Closing or dropping the iterator stops the generation.

        Raises:
            ValueError: As `ask`.
        """
        inputs = self._inputs((_required(image), region, question), max_new_tokens, history)
        return self._pieces(inputs, max_new_tokens)

    def ask_batch(
        self,
        images: Sequence[Any],
        regions: Sequence[RegionLike],
        questions: Sequence[str | None] | str | None,
        *,
        max_new_tokens: int = 128,
    ) -> list[str]:
        """Answer several questions in one batch.

        Args:
            images: One per answer; an image that occurs several times is decoded once.
            regions: One per image.
            questions: One per image, or one for all (None: descriptions).
            max_new_tokens: Maximum length of an answer, in tokens.

        Raises:
            ValueError: If any request is invalid, as in `ask` (the message includes its index), or if the lists differ
                in length. See `answer_each` to answer the others.
        """
        if isinstance(images, str | bytes | os.PathLike | Image.Image) or isinstance(regions, RegionLike):
            raise ValueError("expected lists of images and regions; `ask` takes one of each")
        if isinstance(questions, str) or questions is None:
            questions = [questions] * len(images)
        if not len(images) == len(regions) == len(questions):
            raise ValueError(
                f"expected as many images as regions and questions, got {len(images)} images, {len(regions)} regions, "
                f"{len(questions)} questions"
            )
        requests = [(_required(image), *rest) for image, *rest in zip(images, regions, questions, strict=True)]
        return [answer.text for answer in self.answers(requests, max_new_tokens=max_new_tokens)]

    def answers(self, requests: Sequence[ChatRequest], *, max_new_tokens: int = 128) -> list[Answer]:
        """Answer several (image, region, question) in one batch.

        Image and region may both be None, to ask the question without an image; then no request of the batch may have
        one.

        Raises:
            ValueError: If any request is invalid, as in `ask`; if an image has no region; or if the model cannot answer
                without an image.
        """
        answers = []
        for place, answer in enumerate(self.answer_each(requests, max_new_tokens=max_new_tokens)):
            if isinstance(answer, ValueError):
                raise ValueError(f"request {place}: {answer}" if len(requests) > 1 else str(answer)) from answer
            answers.append(answer)
        return answers

    def answer_each(
        self, requests: Sequence[ChatRequest | ValueError], *, max_new_tokens: int = 128
    ) -> list[Answer | ValueError]:
        """As `answers`, but an invalid request yields its error, and the others are answered in one batch.

        Args:
            requests: A request that is already an error yields that error.
            max_new_tokens: Maximum length of an answer, in tokens.

        Raises:
            ValueError: If only some of the requests have an image.
        """
        asked = [request for request in requests if not isinstance(request, ValueError)]
        if len({image is None for image, _, _ in asked}) > 1:
            raise ValueError("expected images for all requests of a batch, or for none")
        results: list = list(requests)
        decoded: dict = {}
        good: dict[int, BatchFeature] = {}
        for place, request in enumerate(requests):
            if not isinstance(request, ValueError):
                try:
                    good[place] = self._inputs(request, max_new_tokens, decoded=decoded)
                except ValueError as error:
                    results[place] = error
        if good:
            answers = self._generate(self._batched([*good.values()]), max_new_tokens)
            for place, answer in zip(good, answers, strict=True):
                results[place] = answer
        return results

    def open_image(self, image: Any) -> Image.Image:
        """Decode an image with the limits of the image processor, so that several questions do not decode it again.

        Returns:
            The image as displayed, RGB.

        Raises:
            ValueError: If it cannot be read, or is a list.
        """
        if isinstance(image, list | tuple):
            raise ValueError(f"expected one image, got a {type(image).__name__} of {len(image)}; see ask_batch")
        image_processor = self.processor.image_processor
        return decode_image(image_processor.fetch_images(image), max_pixels=image_processor.max_pixels)

    def prompt(self, question: str | None, *, with_image: bool = True) -> str:
        """The prompt of a question; None requests a description."""
        conversation = self.conversation(None, Region.whole() if with_image else None, question)
        prompt: Any = self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        return prompt

    def conversation(
        self, image: Image.Image | None, region: Region | None, question: str | None, history: Sequence[Turn] = ()
    ) -> list[dict]:
        """The messages of a question; None requests a description.

        The image item with its region is in the first turn. Without a region there is no image item.

        Raises:
            ValueError: If the question is not a string, empty, or not valid Unicode (undecodable bytes of a terminal
                arrive as lone surrogates), or a turn of the history is not a (question, answer) pair.
        """
        if question is not None:
            _check_question(question)
        question = self.processor.description_wordings[0] if question is None else question
        messages: list[dict[str, Any]] = []
        for asked, answered in map(_turn, history):
            messages.append({"role": "user", "content": [{"type": "text", "text": asked}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answered}]})
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        if region is not None:
            messages[0]["content"].insert(0, {"type": "image", "image": image, "region": region})
        return messages

    def _check_tokens(self, tokens: int, max_new_tokens: int) -> None:
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"expected max_new_tokens as an integer of at least 1, got {max_new_tokens!r}")
        config = self.model.config.get_text_config()
        if config.is_encoder_decoder:  # prompt and answer are separate sequences
            limit, needed = _T5_LENGTH, max(tokens, max_new_tokens)
        else:
            limit, needed = config.max_position_embeddings, tokens + max_new_tokens
        if needed > limit:
            raise ValueError(
                f"the conversation has {tokens} tokens and the answer up to {max_new_tokens}, but the model's "
                f"context is {limit} tokens; ask a shorter question or start a new conversation"
            )

    def _end_tokens(self) -> list[int]:
        """Tokens that end an answer; BLIP-2's language model has a separate generation config."""
        language_model = getattr(self.model, "language_model", self.model)
        settings = language_model.generation_config if hasattr(language_model, "generation_config") else None
        ends = (settings or self.model.generation_config).eos_token_id
        return ends if isinstance(ends, list) else [] if ends is None else [ends]

    def _inputs(
        self, request: ChatRequest, max_new_tokens: int, history: Sequence[Turn] = (), decoded: dict | None = None
    ) -> BatchFeature:
        """The inputs of `generate` for one request. All validation happens here.

        `decoded` caches the images of a batch, by path or identity.
        """
        image, region, question = request
        if image is not None:
            region = _region(region)
            key = image if isinstance(image, str | os.PathLike) else id(image)
            decoded = {} if decoded is None else decoded
            if key not in decoded:
                decoded[key] = self.open_image(image)
            image = decoded[key]
        elif region is not None:
            raise ValueError("expected an image with the region, got none")
        inputs = self.processor.apply_chat_template(
            [self.conversation(image, region, question, history)],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        self._check_tokens(inputs["input_ids"].shape[1], max_new_tokens)
        if image is not None:
            check_alpha(inputs)
        return inputs

    def _batched(self, rows: list[BatchFeature]) -> BatchFeature:
        """Combine prepared requests into one batch, padded on the left as by the processor."""
        padding = {"input_ids": self.processor.tokenizer.pad_token_id, "attention_mask": 0}
        batch = {}
        for name in rows[0]:
            tensors = [row[name] for row in rows]
            if name in padding and len({tensor.shape[1] for tensor in tensors}) > 1:
                sequences = [tensor[0] for tensor in tensors]
                batch[name] = pad_sequence(sequences, True, padding[name], padding_side="left")
            elif tensors[0].ndim == 5:  # tiles of LLaVA-NeXT, whose number depends on the image
                batch[name] = pad_sequence([tensor[0] for tensor in tensors], True)
            else:
                batch[name] = torch.cat(tensors)
        return BatchFeature(batch)

    @torch.inference_mode()
    def _generate(self, inputs: BatchFeature, max_new_tokens: int, **options: Any) -> list[Answer]:
        prompt_length = inputs["input_ids"].shape[1]
        inputs = inputs.to(self.model.device, self.model.dtype)
        output = self.model.generate(**inputs, **_GREEDY, max_new_tokens=max_new_tokens, **options)
        prompt_returned = not self.model.config.get_text_config().is_encoder_decoder
        answers = output[:, prompt_length:] if prompt_returned else output
        texts = self.processor.batch_decode(answers, skip_special_tokens=True)
        ended = torch.isin(answers.cpu(), torch.tensor(self._end_tokens(), dtype=answers.dtype)).any(1)
        return [Answer(text.strip(), truncated=not end) for text, end in zip(texts, ended.tolist(), strict=True)]

    def _pieces(self, inputs: BatchFeature, max_new_tokens: int) -> Iterator[str]:
        """The text of an answer, generated in a thread that ends no later than this generator."""
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        closed = threading.Event()

        def stop(input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), closed.is_set(), device=input_ids.device)

        def generate() -> None:
            try:
                self._generate(inputs, max_new_tokens, streamer=streamer, stopping_criteria=[stop])
            finally:  # also after an error; else the loop below would wait forever
                streamer.text_queue.put(streamer.stop_signal)

        with ThreadPoolExecutor(1) as executor:  # waits for the thread on exit
            running = executor.submit(generate)
            try:
                begun, space = False, ""
                for piece in streamer:
                    text = space + piece if begun else piece.lstrip()
                    space = text[len(text.rstrip()) :]  # not yet yielded: the answer has no trailing space
                    if text := text.rstrip():
                        begun = True
                        yield text
            finally:
                closed.set()
            running.result()  # raises the thread's exception, if any


def _check_question(question: Any) -> None:
    if not isinstance(question, str) or not question.strip():
        got = repr(question) if isinstance(question, str) else type(question).__name__
        raise ValueError(f"expected a question as a string, or None for a description, got {got}")
    question.encode()  # UnicodeEncodeError is a ValueError; the tokenizer would raise a TypeError


def _turn(turn: Any) -> Turn:
    """A validated turn of a history: a message ({"role": ..., "content": ...}) would unpack as one, too."""
    if not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
        raise ValueError(f"expected the history as (question, answer) pairs of strings, got {turn!r:.80}")
    return turn[0], turn[1]


def _required(image: Any) -> Any:
    if image is None:
        raise ValueError("expected an image, got None")
    return image


def _region(region: RegionLike | None) -> Region:
    """A region, validated. None, which is the whole image in the processors, is an error here."""
    if region is None:
        raise ValueError("expected a region, got None; Region.whole() is the whole image")
    return as_region(region)


def check_alpha(inputs: BatchFeature) -> None:
    """Raise ValueError unless the images have an alpha channel: without it, every answer is about the whole image."""
    channels = inputs["pixel_values"].shape[-3]
    if channels != 4:
        raise ValueError(f"expected pixel_values with 4 channels (RGB + alpha), got {channels}; the region is lost")
