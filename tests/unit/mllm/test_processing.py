"""The conversation format's one home: turns, images with regions, text that must stay text, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor

from mllm.processing import VICUNA_V1_SYSTEM
from tests.tiny import build_tiny_llava, noise_picture
from vision_tower import Region

PROCESSOR = build_tiny_llava()[1]
IMAGE = noise_picture(40, 40)
BOX = Region.from_box(4, 4, 20, 20)


def ids(question, **kwargs):
    return PROCESSOR(images=IMAGE, regions=BOX, text=question, return_tensors="pt", **kwargs)["input_ids"][0]


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.sampled_from(["<image>", "</s>", "USER:", "<pad>", "<s>", ""]),
)
@settings(deadline=None, max_examples=60)
def test_user_text_adds_neither_image_tokens_nor_turns(text, control):
    question = text + control + text
    tokens = ids(question)
    assert (tokens == PROCESSOR.image_token_id).sum() == PROCESSOR.num_image_tokens == 16
    assert (tokens == PROCESSOR.tokenizer.eos_token_id).sum() == 0
    assert (tokens == PROCESSOR.tokenizer.bos_token_id).sum() == 1
    assert (tokens == PROCESSOR.tokenizer.pad_token_id).sum() == 0


def test_control_words_are_readable_text_for_the_model():
    text = PROCESSOR.decode(ids("what is <image> and </s>?"))
    assert text.endswith("\nwhat is <image> and </s>? ASSISTANT:")


def test_several_images_each_with_its_region():
    other = noise_picture(40, 40, seed=1)
    regions = [BOX, Region.from_box(10, 10, 40, 40)]
    inputs = PROCESSOR(images=[IMAGE, other], regions=regions, text="Which is larger?", return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 4, 32, 32)
    assert (inputs["input_ids"] == PROCESSOR.image_token_id).sum() == 32
    single = [
        PROCESSOR.image_processor(i, r, return_tensors="pt")["pixel_values"]
        for i, r in zip([IMAGE, other], regions, strict=True)
    ]
    assert torch.equal(inputs["pixel_values"], torch.cat(single))


def test_chat_template_takes_a_region_in_every_spelling():
    spellings = [BOX, BOX.to_json(), "box:4,4,20,20"]
    outputs = [
        PROCESSOR.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": IMAGE, "region": region}, {"type": "text", "text": "What?"}],
                }
            ],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        for region in spellings
    ]
    expected = PROCESSOR(images=IMAGE, regions=BOX, text="What?", return_tensors="pt")
    whole = PROCESSOR(images=IMAGE, text="What?", return_tensors="pt")
    for output in outputs:
        assert all(torch.equal(output[key], expected[key]) for key in expected)
    assert not torch.equal(expected["pixel_values"], whole["pixel_values"])


def test_swapped_regions_are_swapped_inputs():
    regions = [BOX, Region.from_box(22, 22, 38, 38)]
    images, questions = [IMAGE, IMAGE], ["What?", "What?"]
    straight = PROCESSOR(images=images, regions=regions, text=questions, return_tensors="pt")["pixel_values"]
    swapped = PROCESSOR(images=images, regions=regions[::-1], text=questions, return_tensors="pt")["pixel_values"]
    assert torch.equal(straight, swapped.flip(0)) and not torch.equal(straight, swapped)


def test_a_batch_with_and_without_images_is_padded_on_the_left():
    inputs = PROCESSOR(images=[IMAGE, None], regions=[BOX, None], text=["What is in it?", "Hi"], return_tensors="pt")
    assert inputs["pixel_values"].shape[0] == 1
    assert inputs["attention_mask"][1, 0] == 0 and inputs["attention_mask"][1, -1] == 1


def test_the_system_sentence_is_saved(tmp_path):
    processor = build_tiny_llava()[1]
    processor.system = VICUNA_V1_SYSTEM
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.system == VICUNA_V1_SYSTEM
    text = again.decode(again(images=IMAGE, text="Hi", return_tensors="pt")["input_ids"][0])
    assert text.startswith(f"<s>{VICUNA_V1_SYSTEM} USER: <image>")


def test_complete_prompts_are_taken_when_said_so():
    prompt = "<s>USER: <image>\nWhat? ASSISTANT:"
    got = PROCESSOR(images=IMAGE, regions=BOX, text=prompt, text_is_prompt=True, return_tensors="pt")
    expected = PROCESSOR(images=IMAGE, regions=BOX, text="What?", return_tensors="pt")
    assert torch.equal(got["input_ids"], expected["input_ids"])


def test_encode_conversation_counts_what_the_model_gets():
    turns = [
        {
            "role": "user",
            "content": [{"type": "image", "image": IMAGE, "region": BOX}, {"type": "text", "text": "What?"}],
        },
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "Sure?"},
    ]
    encoded = PROCESSOR.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert PROCESSOR.encode_conversation(turns, add_generation_prompt=True) == encoded["input_ids"][0].tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PROCESSOR(images=IMAGE), "expected text"),
        (lambda: PROCESSOR(images=[IMAGE], regions=[BOX], text=["a", "b"]), "one entry for each of 2 questions"),
        (lambda: PROCESSOR(images=[IMAGE, IMAGE], regions=[BOX], text="a"), "one region for each of 2 images"),
        (lambda: PROCESSOR(images=IMAGE, regions=Region.from_box(90, 90, 99, 99), text="a"), "outside the picture"),
        (lambda: PROCESSOR.apply_chat_template([{"role": "narrator", "content": "x"}]), "role out of"),
        (
            lambda: PROCESSOR.apply_chat_template(
                [{"role": "user", "content": [{"type": "image", "image": IMAGE, "mask": 1}]}]
            ),
            "unknown \\['mask'\\]",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_keys_that_datasets_fills_with_none_are_as_if_they_were_not_there():
    row = [
        {"type": "image", "image": IMAGE, "region": BOX, "text": None},
        {"type": "text", "text": "What?", "image": None, "region": None},
    ]
    plain = [{"type": "image", "image": IMAGE, "region": BOX}, {"type": "text", "text": "What?"}]
    filled, bare = (
        PROCESSOR.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
        )
        for content in (row, plain)
    )
    assert filled.keys() == bare.keys() and all(torch.equal(filled[key], bare[key]) for key in bare)


@pytest.mark.parametrize("item", [{"text": None}, {}, {"text": 5}, {"text": ["a"]}])
def test_a_missing_text_is_no_word(item):
    content = [{"type": "image", "image": IMAGE}, {"type": "text", **item}]
    for call in (PROCESSOR.apply_chat_template, PROCESSOR.encode_conversation):
        with pytest.raises(ValueError, match="expected a string as the text of a text item"):
            call([{"role": "user", "content": content}])
