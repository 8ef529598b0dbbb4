"""The prompt's one home: slots, regions in every place where they may stand, text that must stay text, errors."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor

from mllm.processing_llava import _FORMER_CHAT_TEMPLATE, CHAT_TEMPLATE, VICUNA_V1_SYSTEM
from tests.alpha_maps import alpha_map, iou
from tests.tensors import same_tensors
from tests.tiny import build_tiny_llava, noise_image, prompt
from train.tuning.collators import IGNORE_INDEX, encode_with_labels
from vision_tower import Region

PROCESSOR = build_tiny_llava()[1]
IMAGE = noise_image(40, 40)
OTHER = noise_image(40, 40, seed=1)
BOX, FAR = Region.from_box(4, 4, 20, 20), Region.from_box(22, 22, 38, 38)
CHAT = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


def ask(*items, question="What?", **kwargs):
    """A chat of one question."""
    return [{"role": "user", "content": [*items, {"type": "text", "text": question}], **kwargs}]


def item(region=None, image=IMAGE, **kwargs):
    """An image item."""
    return {"type": "image", "image": image, **kwargs} | ({} if region is None else {"region": region})


def encoded(conversation, **kwargs):
    return PROCESSOR.apply_chat_template(conversation, **CHAT, **kwargs)


def drawn(pixel_values):
    """The regions that the model gets, as masks of the 40 x 40 image."""
    alpha = alpha_map(pixel_values)[:, None]
    return torch.nn.functional.interpolate(alpha, (40, 40), mode="bilinear")[:, 0] > 0.5


def overlap(mask, region):
    return iou(mask, torch.from_numpy(region.mask(40, 40)) > 0.5)


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.sampled_from(["<image>", "</s>", "USER:", "<pad>", "<s>", ""]),
)
@settings(deadline=None, max_examples=60)
def test_user_text_adds_neither_image_tokens_nor_turns(text, control):
    tokens = encoded(ask(item(BOX), question=text + control + text))["input_ids"][0]
    assert (tokens == PROCESSOR.image_token_id).sum() == PROCESSOR.num_image_tokens == 16
    assert (tokens == PROCESSOR.tokenizer.eos_token_id).sum() == 0
    assert (tokens == PROCESSOR.tokenizer.bos_token_id).sum() == 1
    assert (tokens == PROCESSOR.tokenizer.pad_token_id).sum() == 0


def test_control_words_are_readable_text_for_the_model():
    text = PROCESSOR.decode(encoded(ask(item(BOX), question="what is <image> and </s>?"))["input_ids"][0])
    assert text.endswith("\nwhat is <image> and </s>? ASSISTANT:")


def test_text_is_the_whole_prompt():
    chat = ask(item(BOX))
    text = PROCESSOR.apply_chat_template(chat, add_generation_prompt=True)
    assert text == prompt("What?")
    assert same_tensors(PROCESSOR(IMAGE, text, BOX, return_tensors="pt"), encoded(chat))


def test_a_prompt_with_bos_gets_no_second_one(monkeypatch):
    """Llama's own tokenizer adds BOS to any text."""
    from tokenizers import processors

    processor = build_tiny_llava()[1]
    processor.tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    assert processor.tokenizer("a")["input_ids"][0] == 1
    whole = processor(IMAGE, prompt("What?"), return_tensors="pt")
    assert (whole["input_ids"] == 1).sum() == 1
    assert same_tensors(whole, processor.apply_chat_template(ask(item()), **CHAT))
    bare = processor(IMAGE, prompt("What?").removeprefix("<s>"), return_tensors="pt")
    assert (bare["input_ids"] == 1).sum() == 1


@pytest.mark.parametrize(
    ("images", "regions"),
    [
        ([IMAGE, OTHER], [BOX, FAR]),
        ([IMAGE, OTHER], [[BOX], [FAR]]),
        ([[IMAGE, OTHER]], [[BOX, FAR]]),
        ([[IMAGE, OTHER]], [BOX, FAR]),
        ((IMAGE, OTHER), ("box:4,4,20,20", {"box": [22, 22, 38, 38]})),
        (np.stack([np.asarray(IMAGE), np.asarray(OTHER)]), [BOX, FAR]),
    ],
)
def test_several_images_each_with_its_region(images, regions):
    inputs = PROCESSOR(images, "<image><image> Which is larger?", regions, return_tensors="pt")
    assert (inputs["input_ids"] == PROCESSOR.image_token_id).sum() == 32
    single = [
        PROCESSOR.image_processor(image, region, return_tensors="pt")["pixel_values"]
        for image, region in ((IMAGE, BOX), (OTHER, FAR))
    ]
    assert torch.equal(inputs["pixel_values"], torch.cat(single))
    assert all(
        overlap(mask, region) >= 0.95 for mask, region in zip(drawn(inputs["pixel_values"]), (BOX, FAR), strict=True)
    )


def test_swapped_regions_are_swapped_inputs():
    text = [prompt("What?")] * 2
    straight = PROCESSOR([IMAGE, IMAGE], text, [BOX, FAR], return_tensors="pt")["pixel_values"]
    swapped = PROCESSOR([IMAGE, IMAGE], text, [FAR, BOX], return_tensors="pt")["pixel_values"]
    assert torch.equal(straight, swapped.flip(0)) and not torch.equal(straight, swapped)


def test_a_list_of_regions_makes_slots_of_one_decoded_image(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    IMAGE.save(path)
    expected = PROCESSOR([IMAGE, IMAGE, OTHER], "<image>" * 3, [BOX, FAR, None], return_tensors="pt")
    decoded = []
    import vision_tower.image_processing_alpha_clip as module

    original = module.resize
    monkeypatch.setattr(module, "resize", lambda pixels, *args: decoded.append(pixels) or original(pixels, *args))
    for images, regions in (
        ([str(path), OTHER], [[BOX, FAR], None]),
        ([[path, OTHER]], [[["box:4,4,20,20", FAR], None]]),
    ):
        decoded.clear()
        assert same_tensors(PROCESSOR(images, "<image>" * 3, regions, return_tensors="pt"), expected)
        assert sum(not isinstance(pixels, np.ndarray) for pixels in decoded) == 2
    chat = ask({"type": "image", "path": str(path), "region": [BOX, FAR]}, item(image=OTHER))
    decoded.clear()
    assert torch.equal(encoded(chat)["pixel_values"], expected["pixel_values"])
    assert sum(not isinstance(pixels, np.ndarray) for pixels in decoded) == 2
    assert PROCESSOR.apply_chat_template(chat).count("<image>") == 3
    assert PROCESSOR.encode_conversation(chat, add_generation_prompt=True) == encoded(chat)["input_ids"][0].tolist()
    assert torch.equal(
        PROCESSOR(IMAGE, "<image>" * 2, [BOX, FAR], return_tensors="pt")["pixel_values"], expected["pixel_values"][:2]
    )


@dataclasses.dataclass(frozen=True)
class ForeignRegion:
    """As the class that `trust_remote_code` loads: the same fields, another class."""

    kind: str
    data: tuple
    strength: float


SPELLINGS = [
    BOX,
    "box:4,4,20,20",
    {"box": [4, 4, 20, 20]},
    '{"box": [4, 4, 20, 20]}',
    {"box": [4, 4, 20, 20], "nbox": None, "strength": None},  # as `datasets` writes a column of different regions
    dataclasses.asdict(BOX),
    ForeignRegion("box", (4.0, 4.0, 20.0, 20.0), 1.0),
]


@pytest.mark.parametrize("region", SPELLINGS, ids=lambda value: f"{type(value).__name__} {len(str(value))}")
def test_a_region_in_every_spelling_and_place(region):
    expected = PROCESSOR(IMAGE, prompt("What?"), BOX, return_tensors="pt")
    assert not torch.equal(
        expected["pixel_values"], PROCESSOR(IMAGE, prompt("What?"), return_tensors="pt")["pixel_values"]
    )
    url = {"type": "image_url", "image_url": {"url": IMAGE, "region": region, "detail": "auto"}}
    outer = {"type": "image_url", "image_url": IMAGE, "region": [region]}
    bare, empty = ask(item()), ask({"type": "image"})
    for output in (
        PROCESSOR(IMAGE, prompt("What?"), region, return_tensors="pt"),
        PROCESSOR([[IMAGE]], [prompt("What?")], [[region]], return_tensors="pt"),
        PROCESSOR(IMAGE, prompt("What?"), images_kwargs={"regions": region}, return_tensors="pt"),
        encoded(ask(item(region))),
        encoded(ask(url)),
        encoded(ask(outer)),
        encoded(bare, regions=region),
        encoded(bare, regions=[[region]]),
        encoded([bare], regions=[region]),
        encoded([bare], regions=[[region]]),
        encoded(bare, images_kwargs={"regions": region}),
        encoded(bare, processor_kwargs={"regions": [region]}),
        encoded(bare, processor_kwargs={"images_kwargs": {"regions": [region]}}),
        encoded(empty, processor_kwargs={"images": IMAGE, "regions": [region]}),
        encoded([empty], processor_kwargs={"images": [[IMAGE]], "regions": [[region]]}),
    ):
        assert same_tensors(output, expected)


def test_regions_beside_a_batch_of_conversations():
    chats = [ask(item(), item(image=OTHER)), ask(), ask(item(image=OTHER))]
    inputs = encoded(chats, regions=[[BOX, [FAR, BOX]], None, FAR])
    expected = encoded([ask(item(BOX), item([FAR, BOX], OTHER)), ask(), ask(item(FAR, OTHER))])
    assert same_tensors(inputs, expected) and len(inputs["pixel_values"]) == 4
    for mask, region in zip(drawn(inputs["pixel_values"]), (BOX, FAR, BOX, FAR), strict=True):
        assert overlap(mask, region) >= 0.95


def test_a_batch_with_and_without_images_is_padded_on_the_left():
    inputs = PROCESSOR([[IMAGE], []], [prompt("What is in it?"), "USER: Hi ASSISTANT:"], return_tensors="pt")
    assert inputs["pixel_values"].shape[0] == 1
    assert inputs["attention_mask"][1, 0] == 0 and inputs["attention_mask"][1, -1] == 1
    right = PROCESSOR(text=["a", "abc"], text_kwargs={"padding": True, "padding_side": "right"}, return_tensors="pt")
    assert right["attention_mask"][0, -1] == 0


def test_lists_without_images_are_prompts_alone():
    """As a collator makes them of samples without an image."""
    expected = PROCESSOR(text=["Why?", "a"], return_tensors="pt")
    assert same_tensors(PROCESSOR([[], []], ["Why?", "a"], return_tensors="pt"), expected)
    assert same_tensors(PROCESSOR([[], []], ["Why?", "a"], [[], []], return_tensors="pt"), expected)
    assert same_tensors(PROCESSOR([], ["Why?", "a"], return_tensors="pt"), expected)
    with pytest.raises(ValueError, match="expected 0 <image> in text.* got 1"):
        PROCESSOR([[], []], ["a", TEXT])


def test_an_image_of_several_prompts_has_a_region_for_each():
    batch = PROCESSOR(IMAGE, [TEXT, TEXT], [BOX, FAR], return_tensors="pt")["pixel_values"]
    assert all(overlap(mask, region) >= 0.95 for mask, region in zip(drawn(batch), (BOX, FAR), strict=True))


def test_the_system_sentence_is_saved(tmp_path):
    processor = build_tiny_llava()[1]
    processor.system = VICUNA_V1_SYSTEM
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.system == VICUNA_V1_SYSTEM
    text = again.decode(again.apply_chat_template(ask(item(), question="Hi"), **CHAT)["input_ids"][0])
    assert text.startswith(f"<s>{VICUNA_V1_SYSTEM} USER: <image>")


TURNS = [
    *ask(item([BOX, FAR])),
    {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    *ask(question="Sure?"),
    {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
]


@pytest.mark.parametrize("template", [None, _FORMER_CHAT_TEMPLATE])
@pytest.mark.parametrize("backend", ["pil", None])
def test_the_mask_of_answers_is_where_labels_are(tmp_path, template, backend):
    """Of a saved processor, as this and earlier versions write them, with a short conversation beside it."""
    processor = build_tiny_llava()[1]
    processor.chat_template = template or CHAT_TEMPLATE
    processor.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path, **({"backend": backend} if backend else {}))
    processor.save_pretrained(tmp_path / "again")
    processor = AutoProcessor.from_pretrained(tmp_path / "again")
    settings = CHAT | {"add_generation_prompt": False, "return_assistant_tokens_mask": True}
    batch = processor.apply_chat_template([TURNS, TURNS[2:]], **settings)
    assert torch.equal(
        batch["input_ids"],
        processor.apply_chat_template([TURNS, TURNS[2:]], tokenize=True, return_dict=True, return_tensors="pt")[
            "input_ids"
        ],
    )
    for row, turns in enumerate((TURNS, TURNS[2:])):
        ids, labels = encode_with_labels(processor, turns)
        assert batch["input_ids"][row, -len(ids) :].tolist() == ids
        assert torch.as_tensor(batch["assistant_masks"][row])[-len(ids) :].tolist() == [
            int(x != IGNORE_INDEX) for x in labels
        ]
    with pytest.raises(ValueError, match="without control tokens, got </s>"):
        processor.apply_chat_template(ask(item(), question="a</s>"), **settings)


def test_the_former_template_writes_the_same_text():
    for template in (CHAT_TEMPLATE, _FORMER_CHAT_TEMPLATE):
        text = PROCESSOR.apply_chat_template(TURNS, chat_template=template)
        assert text == "<s>USER: <image>\n<image>\nWhat? ASSISTANT: a cat</s>USER: Sure? ASSISTANT: yes</s>"


def test_an_answer_is_continued():
    turns = [*ask(item(BOX)), {"role": "assistant", "content": "a small"}]
    inputs = PROCESSOR.apply_chat_template(
        turns, **CHAT | {"add_generation_prompt": False}, continue_final_message=True
    )
    assert PROCESSOR.decode(inputs["input_ids"][0]).endswith("What? ASSISTANT: a small")


def test_images_alone_are_pixel_values():
    assert [*PROCESSOR(images=IMAGE, return_tensors="pt")] == ["pixel_values"]


TEXT = prompt("a")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PROCESSOR(), "at least one input"),
        (lambda: PROCESSOR(IMAGE, "What?", BOX), "expected 1 <image> in text.* got 0; .*processor.apply_chat_template"),
        (lambda: PROCESSOR(IMAGE, TEXT, [BOX, FAR]), "expected 2 <image> in text.* got 1"),
        (lambda: PROCESSOR(text=TEXT), "expected 0 <image> in text.* got 1"),
        (lambda: PROCESSOR([[IMAGE], [IMAGE]], [TEXT + "<image>", "b"]), "expected 1, 1 <image> in text.* got 2, 0"),
        (lambda: PROCESSOR([[IMAGE], [IMAGE]], [TEXT, TEXT], [[BOX, FAR], [BOX]]), "each of 1 images, got 2"),
        (lambda: PROCESSOR([IMAGE], TEXT, [BOX, FAR]), "each of 1 images, got 2"),
        (lambda: PROCESSOR([IMAGE, IMAGE], TEXT, BOX), "each of 2 images, got 1"),
        (
            lambda: PROCESSOR([IMAGE] * 2, [TEXT, TEXT + "<image>"], [[BOX, FAR], BOX]),
            "2, 1 slots .* 1, 2; pass images",
        ),
        (lambda: PROCESSOR(IMAGE, TEXT, []), "empty list of regions"),
        (lambda: PROCESSOR(IMAGE, TEXT, '{"box": '), "as JSON"),
        (lambda: PROCESSOR(IMAGE, TEXT, [4, 4, 20, 20]), "expected a Region, its JSON, its text"),
        (lambda: PROCESSOR(IMAGE, TEXT, np.ones((40, 40))), "expected a Region.*Region.from_mask"),
        (lambda: PROCESSOR(IMAGE, TEXT, Region.from_box(90, 90, 99, 99)), "outside the image"),
        (lambda: PROCESSOR(IMAGE, TEXT, BOX, images_kwargs={"regions": BOX}), "got regions twice"),
        (lambda: PROCESSOR(text="a", regions=BOX), "regions without images"),
        (lambda: PROCESSOR([None, IMAGE], TEXT), "got no image"),
        (lambda: PROCESSOR(IMAGE, [TEXT, None]), "string or list of strings"),
        (lambda: PROCESSOR(IMAGE, TEXT, videos=[IMAGE]), "LLaVA reads images and text"),
        (lambda: PROCESSOR.apply_chat_template([]), "expected a list of messages"),
        (lambda: PROCESSOR.apply_chat_template("a"), "expected a list of messages"),
        (lambda: PROCESSOR.apply_chat_template([{"role": "narrator", "content": "x"}]), "role out of"),
        (lambda: PROCESSOR.apply_chat_template([{"role": "user", "content": ["x"]}]), "item of its content as a dict"),
        (lambda: PROCESSOR.apply_chat_template(ask(item(), region=BOX)), "got \\['region'\\] in a message"),
        (lambda: PROCESSOR.apply_chat_template(ask(item(mask=1))), "unknown \\['mask'\\]"),
        (
            lambda: PROCESSOR.apply_chat_template(ask({"type": "text", "text": "a", "region": BOX})),
            "\\['region'\\] in an item of type text",
        ),
        (lambda: PROCESSOR.apply_chat_template(ask({"type": "video", "video": "a", "region": BOX})), "got 'video'"),
        (lambda: PROCESSOR.apply_chat_template(ask(item(path="a.png"))), "expected one image in an image item"),
        (
            lambda: PROCESSOR.apply_chat_template(
                ask({"type": "image_url", "image_url": {"url": "a", "region": BOX}, "region": BOX})
            ),
            "\\['region'\\] twice",
        ),
        (
            lambda: PROCESSOR.apply_chat_template(ask({"type": "image_url", "image_url": {"url": "a", "box": 1}})),
            "\\['box'\\]",
        ),
        (lambda: encoded(ask(item({}))), "expected exactly one of"),
        (lambda: encoded(ask({"type": "image"})), "expected an image in each image item"),
        (lambda: encoded(ask(item(BOX)), regions=BOX), "both in image items and as regions="),
        (lambda: encoded(ask(item()), regions=[BOX], processor_kwargs={"regions": [BOX]}), "got regions twice"),
        (lambda: encoded(ask(item()), regions=[BOX, FAR]), "each of 1 images, got 2"),
        (lambda: encoded([ask(item()), ask(item())], regions=[BOX]), "each of 2 conversations, got 1"),
        (lambda: encoded(ask(), regions=BOX), "each of 0 images, got 1"),
        (lambda: encoded(ask(item()), processor_kwargs={"images": [IMAGE]}), "images both in image items"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_other_keys_of_a_message_are_the_templates():
    template = "{% for message in messages %}{{ message.name }}{% endfor %}"
    assert PROCESSOR.apply_chat_template(ask(item(BOX), name="Ada"), chat_template=template) == "Ada"
    assert encoded(ask(item(BOX), name="Ada"))["input_ids"].equal(encoded(ask(item(BOX)))["input_ids"])


DROPPED = ["region", "masks", "bbox", "processing_kwargs", "mm_processor_kwargs", "image_kwargs", "alpha_values"]


@pytest.mark.parametrize("name", DROPPED)
def test_what_transformers_would_drop_is_an_error(name):
    value = {"regions": BOX} if name.endswith("kwargs") else BOX
    for call in (
        lambda: PROCESSOR(IMAGE, prompt("What?"), **{name: value}),
        lambda: PROCESSOR(IMAGE, prompt("What?"), images_kwargs={name: value}),
        lambda: PROCESSOR(IMAGE, prompt("What?"), text_kwargs={name: value}),
        lambda: PROCESSOR(IMAGE, prompt("What?"), common_kwargs={name: value}),
        lambda: PROCESSOR(IMAGE, prompt("What?"), videos_kwargs={name: value}),
        lambda: encoded(ask(item()), **{name: value}),
        lambda: encoded(ask(item()), processor_kwargs={name: value}),
        lambda: PROCESSOR.apply_chat_template(ask(item()), **{name: value}),
        lambda: PROCESSOR.apply_chat_template(ask(item()), processor_kwargs={name: value}),
    ):
        with pytest.raises(ValueError, match="would be ignored; pass regions as regions="):
            call()


def test_variables_of_a_template_of_ones_own_are_no_mistakes(caplog):
    template = "{{ greeting }}{% for m in messages %}{{ '<image>' }}{% endfor %}"
    with caplog.at_level(logging.WARNING):
        assert PROCESSOR.apply_chat_template(ask(item()), chat_template=template, greeting="Hi") == "Hi<image>"
        inputs = encoded(ask(item(BOX)), chat_template=template, greeting="Hi")
    assert torch.equal(inputs["pixel_values"], encoded(ask(item(BOX)))["pixel_values"])
    with pytest.raises(ValueError, match="without control tokens"):  # no BOS: the tokenizer cannot tell them apart
        encoded(ask(item(), question="</s>"), chat_template=template)


def test_keys_that_datasets_fills_with_none_are_as_if_they_were_not_there():
    none = {"image": None, "region": None, "text": None, "path": None}
    row = [none | item(BOX), none | {"type": "text", "text": "What?", "region": {"box": None, "strength": None}}]
    filled = encoded([{"role": "user", "content": row, "name": None}])
    assert same_tensors(filled, encoded(ask(item(BOX))))


@pytest.mark.parametrize("entry", [{"text": None}, {}, {"text": 5}, {"text": ["a"]}])
def test_a_missing_text_is_no_word(entry):
    content = [{"type": "image", "image": IMAGE}, {"type": "text", **entry}]
    for call in (PROCESSOR.apply_chat_template, PROCESSOR.encode_conversation):
        with pytest.raises(ValueError, match="expected a string as the text of a text item"):
            call([{"role": "user", "content": content}])


def test_images_inside_the_messages_of_datasets(tmp_path):
    IMAGE.save(tmp_path / "a.png")
    rows = [{"bytes": (tmp_path / "a.png").read_bytes(), "path": None}, {"bytes": None, "path": tmp_path / "a.png"}]
    for row in rows:
        assert same_tensors(encoded(ask(item(BOX, row))), encoded(ask(item(BOX))))


def test_messages_may_be_objects():
    @dataclasses.dataclass
    class Message:
        role: str
        content: list

    assert same_tensors(encoded([Message(**ask(item(BOX))[0])]), encoded(ask(item(BOX))))
