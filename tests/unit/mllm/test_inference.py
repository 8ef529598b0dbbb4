"""`RegionChat`: greedy, by region, within the model's context; every way in reaches the same model with the region."""

import base64
import logging
import threading
import time

import numpy as np
import pytest
import torch
from transformers import LlavaProcessor
from transformers.utils import logging as transformers_logging

import mllm
from mllm.data.templates import DESCRIBE_REGION
from mllm.inference import RegionChat, check_alpha
from mllm.loading import EMBEDDED_MODEL
from tests.alpha_maps import overlap
from tests.files import encoded_image
from tests.tiny import build_tiny_blip2, build_tiny_llava, noise_image, prompt
from vision_tower import Region

IMAGE = noise_image(60, 40)
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
    assert chat.ask(IMAGE, LEFT, "What?", max_new_tokens=6) == expected


def test_the_region_decides_and_swapping_swaps(chat):
    answers = chat.ask_batch([IMAGE, IMAGE], [LEFT, RIGHT], "What?", max_new_tokens=8)
    assert answers[0] != answers[1]
    assert chat.ask_batch([IMAGE, IMAGE], [RIGHT, LEFT], "What?", max_new_tokens=8) == answers[::-1]
    assert chat.ask(IMAGE, LEFT, "What?", max_new_tokens=8) == answers[0]


def test_sampling_settings_of_a_checkpoint_are_ignored(chat, tiny_llava):
    model, processor = tiny_llava
    expected = chat.describe(IMAGE, LEFT, max_new_tokens=6)
    saved = model.generation_config
    try:
        model.generation_config = type(saved)(
            do_sample=True, temperature=5.0, top_p=0.9, eos_token_id=2, pad_token_id=2
        )
        sampling = RegionChat(model, processor)
        assert [sampling.describe(IMAGE, LEFT, max_new_tokens=6) for _ in range(3)] == [expected] * 3
    finally:
        model.generation_config = saved


def test_conversations_put_the_image_first_and_keep_the_history(chat):
    messages = chat.conversation(IMAGE, LEFT, None, [("a", "b")])
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert messages[0]["content"][0] == {"type": "image", "image": IMAGE, "region": LEFT}
    assert messages[2]["content"] == [{"type": "text", "text": DESCRIBE_REGION}]


def test_too_long_is_an_error(chat):
    with pytest.raises(ValueError, match="context is 512"):
        chat.ask(IMAGE, LEFT, "x" * 600, max_new_tokens=4)


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
    expected = chat.describe(IMAGE, LEFT, max_new_tokens=6)
    saved = model.generation_config
    settings = {"num_return_sequences": 2, "num_beams": 3, "early_stopping": True, "length_penalty": 2.0}
    sampling = {"do_sample": True, "temperature": 5.0, "top_k": 7, "min_p": 0.05, "typical_p": 0.9, "max_length": 20}
    try:
        model.generation_config = type(saved)(**settings, **sampling, eos_token_id=2, pad_token_id=2)
        assert RegionChat(model, processor).describe(IMAGE, LEFT, max_new_tokens=6) == expected
    finally:
        model.generation_config = saved
    assert [record.message for record in caplog.records] == [] and [str(w.message) for w in recwarn] == []


def test_broken_unicode_is_a_value_error(chat):
    for tokens in ("8", 2.5, 0):
        with pytest.raises(ValueError, match="max_new_tokens as an integer of at least 1, got"):
            chat.ask(IMAGE, LEFT, "What?", max_new_tokens=tokens)
    with pytest.raises(ValueError, match="surrogates not allowed"):
        chat.ask(IMAGE, LEFT, "what\udc80", max_new_tokens=2)


WIDE = noise_image(64, 32)  # whole pixels of it are whole pixels of the tower's input
SCENE, BOX = EMBEDDED_MODEL.parent / "scenes" / "scene_2.png", mllm.Region.from_box(22, 8, 48, 42)
ENDS = Region.from_box(0, 0, 24, 32), Region.from_box(40, 8, 64, 32)
# name -> the answer about a region of `WIDE`
WAYS = {
    "ask": lambda chat, region: chat.ask(WIDE, region, "What?", max_new_tokens=6),
    "JSON": lambda chat, region: chat.ask(WIDE, region.to_json(), "What?", max_new_tokens=6),
    "text": lambda chat, region: chat.ask(WIDE, str(region), "What?", max_new_tokens=6),
    "history": lambda chat, region: chat.ask(WIDE, region, "And?", history=[("What?", "a")], max_new_tokens=6),
    "describe": lambda chat, region: chat.describe(WIDE, region, max_new_tokens=6),
    "stream": lambda chat, region: "".join(chat.stream(WIDE, region, "What?", max_new_tokens=6)),
    "ask_batch": lambda chat, region: chat.ask_batch([WIDE], [region], ["What?"], max_new_tokens=6)[0],
    "answers": lambda chat, region: chat.answers([(WIDE, region, "What?")], max_new_tokens=6)[0].text,
    "answer_each": lambda chat, region: chat.answer_each([(WIDE, region, "What?")], max_new_tokens=6)[0].text,
}


@pytest.mark.parametrize("way", WAYS)
def test_two_regions_give_two_logits_and_the_alpha_is_theirs(chat, fed, way):
    logits, said = [], []
    hook = chat.model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output[0, -1]))
    firsts = []
    for region in ENDS:
        logits.clear()
        said.append(WAYS[way](chat, region))
        firsts.append(logits[0])
    hook.remove()
    assert not torch.allclose(*firsts) and len(fed) == 2
    assert all(overlap(pixels, region, 32, 64) >= 0.95 for pixels, region in zip(fed, ENDS, strict=True))
    if way not in ("history", "describe"):
        assert said == [WAYS["ask"](chat, region) for region in ENDS]


SOURCES = {
    "path": lambda path: str(path),
    "Path": lambda path: path,
    "bytes": lambda path: path.read_bytes(),
    "base64": lambda path: base64.b64encode(path.read_bytes()).decode(),
    "data URL": lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
    "array": lambda path: np.array(WIDE),
    "channels first": lambda path: np.array(WIDE).transpose(2, 0, 1),
    "tensor": lambda path: torch.from_numpy(np.array(WIDE)).permute(2, 0, 1),
    "floats": lambda path: np.array(WIDE) / 255,
    "RGBA": lambda path: WIDE.convert("RGBA"),
}


def test_every_kind_of_image_is_the_same_image(chat, fed, tmp_path):
    path = tmp_path / "wide.png"
    path.write_bytes(encoded_image(WIDE))
    chat.ask(WIDE, ENDS[0], "What?", max_new_tokens=1)
    for name, source in SOURCES.items():
        chat.ask(source(path), ENDS[0], "What?", max_new_tokens=1)
        assert torch.equal(fed[-1], fed[0]), name
    chat.ask_batch([source(path) for source in SOURCES.values()], [ENDS[0]] * len(SOURCES), None, max_new_tokens=1)
    assert all(torch.equal(pixels, fed[0]) for pixels in fed)


def test_an_image_of_several_requests_is_decoded_once(chat, tmp_path, monkeypatch):
    path = tmp_path / "wide.png"
    path.write_bytes(encoded_image(WIDE))
    decoded, decode = [], RegionChat.open_image
    monkeypatch.setattr(RegionChat, "open_image", lambda self, image: decoded.append(image) or decode(self, image))
    answers = chat.ask_batch([path, path, WIDE], [*ENDS, ENDS[0]], "What?", max_new_tokens=6)
    assert decoded == [path, WIDE] and answers[0] == answers[2] == chat.ask(WIDE, ENDS[0], "What?", max_new_tokens=6)


@pytest.mark.parametrize("family", ["llava", "opt", "t5"])
def test_requests_prepared_one_by_one_are_the_batch_that_the_processor_prepares(family):
    chat = RegionChat(*(build_tiny_llava() if family == "llava" else build_tiny_blip2(family)))
    requests = [(WIDE, ENDS[0], "What?"), (WIDE, ENDS[1], "A longer question?"), (WIDE, Region.whole(), None)]
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected = chat.processor.apply_chat_template([chat.conversation(*request) for request in requests], **settings)
    found = chat._batched([chat._inputs(request, 4) for request in requests])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_batch_prepares_each_request_once_also_where_one_fails(chat, monkeypatch):
    prepared, inputs = [], RegionChat._inputs
    monkeypatch.setattr(RegionChat, "_inputs", lambda self, *a, **k: prepared.append(a[0]) or inputs(self, *a, **k))
    outside = Region.from_box(500, 500, 600, 600)
    answers = chat.answer_each([(WIDE, ENDS[0], None), (WIDE, outside, None), (WIDE, ENDS[1], None)], max_new_tokens=2)
    assert len(prepared) == 3 and [isinstance(answer, ValueError) for answer in answers] == [False, True, False]


@pytest.mark.parametrize("family", ["embedded", "opt", "t5"])
def test_a_stream_is_the_answer_in_pieces(family, embedded):
    chat = RegionChat(*(embedded if family == "embedded" else build_tiny_blip2(family)))
    pieces = list(chat.stream(SCENE, BOX, "What is this?", max_new_tokens=20))
    assert all(pieces) and (len(pieces) > 3 or family != "embedded")
    assert "".join(pieces) == chat.ask(SCENE, BOX, "What is this?", max_new_tokens=20)


def test_a_stream_passes_errors_on_and_leaves_no_thread(embedded):
    chat, before, steps = RegionChat(*embedded), threading.active_count(), []
    with pytest.raises(ValueError, match="outside the image"):
        chat.stream(SCENE, "box:500,500,600,600", "What?")  # at once, not with the first piece
    hook = chat.model.register_forward_pre_hook(lambda *_: steps.append(time.sleep(0.01 * len(steps))))
    try:
        pieces = chat.stream(SCENE, BOX, "What is this?")
        assert not steps and next(pieces)
        pieces.close()  # as when a loop over it is left
        assert threading.active_count() == before
        closed_after = len(steps)
        steps.clear()
        assert list(chat.stream(SCENE, BOX, "What is this?"))
        assert threading.active_count() == before and closed_after < len(steps)
    finally:
        hook.remove()

    def fail(*_):
        raise RuntimeError("out of memory, say")

    hook = chat.model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            list(chat.stream(SCENE, BOX, "What?"))
    finally:
        hook.remove()
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((WIDE, None, "What?"), r"Region\.whole\(\) is the whole image"),
        ((None, ENDS[0], "What?"), "expected an image, got None"),
        (([WIDE], ENDS[0], "What?"), "expected one image, got a list of 1; see ask_batch"),
        ((WIDE, [1, 2, 3, 4], "What?"), "expected a Region.*got list"),
        ((WIDE, np.ones((32, 64)), "What?"), "expected a Region.*got ndarray"),
        ((WIDE, "24,3,60,39", "What?"), "expected a region box:"),
        ((WIDE, {"bbox": [1, 2, 3, 4]}, "What?"), "expected exactly one of box"),
        ((WIDE, ENDS[0], 5), "expected a question as a string"),
        ((WIDE, ENDS[0], ["What?"]), "expected a question as a string"),
        ((WIDE, ENDS[0], ""), "expected a question as a string, or None for a description, got ''"),
        ((WIDE, ENDS[0], " \n"), r"for a description, got ' \\n'"),
        (("http://127.0.0.1:9/a\nb", ENDS[0], "What?"), "cannot download the image http://127.0.0.1:9/a b: "),
        (("missing.png", ENDS[0], "What?"), "image file not found: missing.png"),
    ],
)
def test_mistakes_are_errors_of_one_line_everywhere(chat, arguments, message):
    image, region, question = arguments
    for call in (
        lambda: chat.ask(*arguments, max_new_tokens=1),
        lambda: chat.stream(*arguments, max_new_tokens=1),
        lambda: chat.ask_batch([image], [region], [question], max_new_tokens=1),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            call()
        assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    "turn", [{"role": "user", "content": "What?"}, "ab", ("a",), ("a", "b", "c"), ("a", None)], ids=str
)
def test_a_history_is_pairs_of_text(chat, turn):
    with pytest.raises(ValueError, match=r"expected the history as \(question, answer\) pairs of strings, got"):
        chat.ask(WIDE, ENDS[0], "What?", history=[turn])


def test_lists_of_a_batch_have_one_length_and_its_errors_a_place(chat):
    for images, regions in (("wide.png", [ENDS[0]]), (WIDE, ENDS), ([WIDE], ENDS[0]), ([WIDE], "whole")):
        with pytest.raises(ValueError, match="expected lists of images and regions"):
            chat.ask_batch(images, regions, "What?")
    with pytest.raises(ValueError, match="got 2 images, 1 regions, 2 questions"):
        chat.ask_batch([WIDE, WIDE], [ENDS[0]], "What?")
    with pytest.raises(ValueError, match="request 1: expected a region, got None"):
        chat.ask_batch([WIDE, WIDE], [ENDS[0], None], "What?")
    with pytest.raises(ValueError, match="for all requests of a batch, or for none"):
        chat.answers([(WIDE, ENDS[0], None), (None, None, "What?")])
    assert chat.ask_batch([], [], []) == []


def test_a_stock_processor_is_refused(tiny_llava):
    model, processor = tiny_llava
    with pytest.raises(ValueError, match="expected a processor that takes regions.*LlavaProcessor"):
        RegionChat(model, LlavaProcessor(processor.image_processor, processor.tokenizer, patch_size=8))


def test_from_pretrained_is_load(tiny_llava_dir, chat):
    loaded = mllm.RegionChat.from_pretrained(tiny_llava_dir, device="cpu", dtype="float32")
    assert loaded.describe(WIDE, ENDS[0], max_new_tokens=6) == chat.describe(WIDE, ENDS[0], max_new_tokens=6)
    embedded = mllm.RegionChat.from_pretrained(device="cpu")
    assert embedded.ask(SCENE, BOX, "What is this?") == "a large striped orange diamond"
