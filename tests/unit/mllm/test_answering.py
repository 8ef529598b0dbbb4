"""`RegionChat`: greedy, by region, within the model's context."""

import logging

import pytest
import torch
from transformers.utils import logging as transformers_logging

from mllm.answering import RegionChat, check_alpha
from mllm.data.templates import DESCRIBE_REGION
from tests.tiny import noise_picture, prompt
from vision_tower import Region

IMAGE = noise_picture(60, 40)
LEFT, RIGHT = Region.from_box(0, 0, 25, 40), Region.from_box(35, 0, 60, 40)


@pytest.fixture
def chat(tiny_llava):
    return RegionChat(*tiny_llava)


def test_answers_equal_generate_called_by_hand(chat, tiny_llava):
    model, processor = tiny_llava
    inputs = processor(images=IMAGE, regions=LEFT, text=prompt("What?"), return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    expected = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert chat.answer(IMAGE, LEFT, "What?", max_new_tokens=6) == expected


def test_the_region_decides_and_swapping_swaps(chat):
    answers = chat.answer_batch([(IMAGE, LEFT, "What?"), (IMAGE, RIGHT, "What?")], max_new_tokens=8)
    assert answers[0] != answers[1]
    assert chat.answer_batch([(IMAGE, RIGHT, "What?"), (IMAGE, LEFT, "What?")], max_new_tokens=8) == answers[::-1]
    assert chat.answer(IMAGE, LEFT, "What?", max_new_tokens=8) == answers[0]


def test_sampling_settings_of_a_checkpoint_are_ignored(chat, tiny_llava):
    model, processor = tiny_llava
    expected = chat.answer(IMAGE, LEFT, max_new_tokens=6)
    saved = model.generation_config
    try:
        model.generation_config = type(saved)(
            do_sample=True, temperature=5.0, top_p=0.9, eos_token_id=2, pad_token_id=2
        )
        sampling = RegionChat(model, processor)
        assert [sampling.answer(IMAGE, LEFT, max_new_tokens=6) for _ in range(3)] == [expected] * 3
    finally:
        model.generation_config = saved


def test_conversations_put_the_image_first_and_keep_the_history(chat):
    messages = chat.conversation(IMAGE, LEFT, None, [("a", "b")])
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert messages[0]["content"][0] == {"type": "image", "image": IMAGE, "region": LEFT}
    assert messages[2]["content"] == [{"type": "text", "text": DESCRIBE_REGION}]


def test_too_long_is_an_error(chat):
    with pytest.raises(ValueError, match="the model reads 512"):
        chat.answer(IMAGE, LEFT, "x" * 600, max_new_tokens=4)


def test_one_bad_request_of_a_batch_is_one_error(chat):
    good = [(IMAGE, LEFT, "What?"), (IMAGE, RIGHT, None)]
    unreadable = ValueError("cannot read")
    bad = [
        unreadable,
        (IMAGE, LEFT, "x" * 600),
        (IMAGE, Region.from_box(500, 500, 600, 600), None),
        (IMAGE, LEFT, "\ud800"),
    ]
    answers = chat.answer_each([good[0], *bad, good[1]], max_new_tokens=4)
    assert [answers[0], answers[-1]] == chat.answers(good, max_new_tokens=4) == chat.answer_each(good, max_new_tokens=4)
    assert all(isinstance(answer, ValueError) for answer in answers[1:-1]) and answers[1] is unreadable
    assert chat.answer_each([unreadable]) == [unreadable]


def test_three_channels_are_refused():
    check_alpha({"pixel_values": torch.zeros(1, 4, 2, 2)})
    with pytest.raises(ValueError, match="the region is lost"):
        check_alpha({"pixel_values": torch.zeros(1, 3, 2, 2)})


def test_beams_and_sampling_of_a_checkpoint_neither_fail_nor_warn(chat, tiny_llava, caplog, recwarn, monkeypatch):
    model, processor = tiny_llava
    transformers_logging.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.WARNING)  # the command silences it
    expected = chat.answer(IMAGE, LEFT, max_new_tokens=6)
    saved = model.generation_config
    settings = {"num_return_sequences": 2, "num_beams": 3, "early_stopping": True, "length_penalty": 2.0}
    sampling = {"do_sample": True, "temperature": 5.0, "top_k": 7, "min_p": 0.05, "typical_p": 0.9, "max_length": 20}
    try:
        model.generation_config = type(saved)(**settings, **sampling, eos_token_id=2, pad_token_id=2)
        assert RegionChat(model, processor).answer(IMAGE, LEFT, max_new_tokens=6) == expected
    finally:
        model.generation_config = saved
    assert [record.message for record in caplog.records] == [] and [str(w.message) for w in recwarn] == []


def test_broken_unicode_is_a_value_error(chat):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        chat.answer(IMAGE, LEFT, "what\udc80", max_new_tokens=2)
