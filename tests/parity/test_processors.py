"""What is typed with the stock LLaVA and BLIP-2 processors works with ours: equal ids and pixels. The judges are
Transformers' own processors, with the image processors that PIL does the work of.
"""

import base64

import numpy as np
import pytest
import torch
from transformers import Blip2Processor, BlipImageProcessorPil, CLIPImageProcessorPil, LlavaProcessor, pipeline

from mllm.processing_llava import CHAT_TEMPLATE
from tests.serving import serve
from tests.tiny import build_tiny_blip2, build_tiny_llava, noise_image, prompt
from vision_tower import Region
from vision_tower.alpha_embedding import ALPHA_MEAN, ALPHA_STD

ONE, TWO = noise_image(60, 40), noise_image(30, 50, seed=1)
PIXELS = np.asarray(ONE)
LEFT, RIGHT = Region.from_box(12, 4, 28, 36), Region.from_box(32, 4, 48, 36)
NONE = dict.fromkeys(("text", "image", "url", "path"))
CHAT = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}
BLIP2_TEXT = "Question: What is this? Answer:"


def chat(*sources, **fields):
    """A question about images; `fields` are further keys of every item."""
    items = [fields | {"type": "image"} | source for source in sources]
    return [{"role": "user", "content": [*items, fields | {"type": "text", "text": "What?"}]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    ONE.save(folder / "one.png")
    ONE.save(folder / "an image.png")
    return folder


@pytest.fixture(scope="module")
def sources(folder):
    """The first image in every form that the stock processors take."""
    with serve(folder) as address:
        text = base64.b64encode((folder / "one.png").read_bytes()).decode()
        yield {
            "PIL image": ONE,
            "path": str(folder / "one.png"),
            "URL": f"{address}/one.png",
            "URL with a space": f"{address}/an image.png",
            "data: URL": f"data:image/png;base64,{text}",
            "base64 text": text,
            "base64 text in lines": base64.encodebytes((folder / "one.png").read_bytes()).decode(),
            "array": PIXELS,
            "array, channels first": PIXELS.transpose(2, 0, 1),
            "tensor": torch.from_numpy(PIXELS.copy()).permute(2, 0, 1),
        }


SOURCES = ["PIL image", "path", "URL", "URL with a space", "data: URL", "base64 text", "base64 text in lines"]
SOURCES += ["array", "array, channels first", "tensor"]


@pytest.fixture(scope="module")
def llava():
    """The model, our processor and the stock one."""
    model, ours = build_tiny_llava("crop", alpha_std=3)
    return model, ours, stock_llava(ours)


def stock_llava(ours):
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    settings = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(images, ours.tokenizer, chat_template=CHAT_TEMPLATE, **settings)


@pytest.fixture(scope="module")
def blip2():
    model, ours = build_tiny_blip2("opt")
    images = BlipImageProcessorPil(size={"height": 32, "width": 32})
    return model, ours, Blip2Processor(images, ours.tokenizer, num_query_tokens=4)


def check(ours, stock):
    """Equal ids, masks and RGB; alpha is that of the whole image."""
    assert ours.keys() == stock.keys()
    for name in stock.keys() - {"pixel_values", "text"}:
        assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(stock[name])), name
    if "pixel_values" in stock:
        rgb, alpha = torch.as_tensor(np.array(ours["pixel_values"])).split([3, 1], dim=1)
        assert torch.equal(rgb, torch.as_tensor(np.array(stock["pixel_values"])))
        assert torch.equal(alpha, torch.full_like(alpha, (1 - ALPHA_MEAN) / ALPHA_STD))


def rows(system, calls):
    """Parameters of a test, with a row of docs/compatibility.md for each."""
    return [
        pytest.param(call, marks=pytest.mark.compatibility(f"transformers {system}", run, "equal"), id=run)
        for run, call in calls.items()
    ]


TENSORS = {"return_tensors": "pt"}
PADDED = {"padding": True, "return_tensors": "pt"}
LLAVA_CALLS = {
    "prompt and image": lambda p: p(images=ONE, text=prompt("What?"), **TENSORS),
    "prompt and image by position, lists of arrays": lambda p: p(ONE, prompt("What?")),
    "prompt alone": lambda p: p(text="USER: What? ASSISTANT:", **TENSORS),
    "image alone": lambda p: p(images=ONE, **TENSORS),
    "prompt with two images": lambda p: p(images=[ONE, TWO], text="USER: <image>\n<image>\nWhat?", **TENSORS),
    "batch, padded": lambda p: p(images=[ONE, TWO], text=[prompt("What?"), prompt("What is this?")], **PADDED),
    "batch with several images per prompt, and one without": lambda p: p(
        images=[[ONE, TWO], [], [TWO]], text=["<image> or <image>?", "Why?", prompt("a")], **PADDED
    ),
    "batch, padded on the right by text_kwargs": lambda p: p(
        text=["a", "abc"], text_kwargs={"padding": True, "padding_side": "right"}, **TENSORS
    ),
    "array of images (N, H, W, 3)": lambda p: p(images=np.stack([PIXELS] * 2), text="<image><image>", **TENSORS),
    "chat template, text": lambda p: {"text": p.apply_chat_template([*chat({}), ANSWER])},
    "chat template, tokenized": lambda p: p.apply_chat_template(chat({"image": ONE}), **CHAT),
    "chat template, several turns, return_assistant_tokens_mask": lambda p: p.apply_chat_template(
        [*chat({"image": ONE}), ANSWER], **CHAT | {"add_generation_prompt": False}, return_assistant_tokens_mask=True
    ),
    "chat template, batch": lambda p: p.apply_chat_template(
        [chat({"image": ONE}), [*chat({"image": TWO}), ANSWER, *chat()]], processor_kwargs={"padding": True}, **CHAT
    ),
    "chat template, images in processor_kwargs": lambda p: p.apply_chat_template(
        chat({}), processor_kwargs={"images": [ONE]}, **CHAT
    ),
    "chat template, content None": lambda p: p.apply_chat_template(
        [*chat({"image": ONE}), {"role": "assistant", "content": None}], **CHAT
    ),
    "prompt of the chat template": lambda p: p(
        images=ONE, text=p.apply_chat_template(chat({}), add_generation_prompt=True), **TENSORS
    ),
}


@pytest.mark.parametrize("call", rows("LlavaProcessor", LLAVA_CALLS))
def test_llava_calls(llava, call):
    _, ours, stock = llava
    check(call(ours), call(stock))


@pytest.mark.compatibility("transformers LlavaProcessor", "chat template, None fields of datasets", "equal")
def test_llava_none_fields(llava):
    _, ours, stock = llava
    filled = ours.apply_chat_template(chat({"image": ONE}, **NONE), **CHAT)
    check(filled, stock.apply_chat_template(chat({"image": ONE}), **CHAT))


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(s, marks=pytest.mark.compatibility("transformers LlavaProcessor", f"image as {s}", "equal"))
        for s in SOURCES
    ],
)
def test_llava_sources(llava, sources, source, folder):
    _, ours, stock = llava
    image = sources[source]
    check(ours(image, prompt("a"), **TENSORS), stock(image, prompt("a"), **TENSORS))
    keys = {"path": ["path"], "URL": ["url"], "base64 text": ["base64"]}.get(source, [])
    for key in ["image", *keys]:
        check(
            ours.apply_chat_template(chat({key: image}), **CHAT), stock.apply_chat_template(chat({key: image}), **CHAT)
        )
    if isinstance(image, str):
        item = {"type": "image_url", "image_url": {"url": image}}
        check(ours.apply_chat_template(chat(item), **CHAT), stock.apply_chat_template(chat(item), **CHAT))
    path = ours(folder / "one.png", prompt("a"), **TENSORS)  # stock takes no pathlib.Path
    assert torch.equal(path["pixel_values"], ours(image, prompt("a"), **TENSORS)["pixel_values"])


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(s, marks=pytest.mark.compatibility("transformers Blip2Processor", f"image as {s}", "equal"))
        for s in SOURCES
    ],
)
def test_blip2_sources(blip2, sources, source):
    """Stock BLIP-2 takes arrays and PIL images alone; of other sources its pixels are those of the PIL image."""
    _, ours, stock = blip2
    image = sources[source]
    expected = stock(ONE if isinstance(image, str) else image, BLIP2_TEXT, **TENSORS)
    check(ours(image, BLIP2_TEXT, **TENSORS), expected)


BLIP2_CALLS = {
    "prompt and image": lambda p: p(images=ONE, text=BLIP2_TEXT, **TENSORS),
    "prompt and image, lists": lambda p: p(ONE, BLIP2_TEXT),
    "empty prompt": lambda p: p(images=ONE, text="", **TENSORS),
    "prompt alone": lambda p: p(text=BLIP2_TEXT, **TENSORS),
    "image alone": lambda p: p(images=ONE, **TENSORS),
    "control token in a prompt": lambda p: p(images=ONE, text="a</s>", **TENSORS),
    "batch, padded on the right": lambda p: p(
        images=[ONE, TWO], text=["a", "abc"], padding=True, padding_side="right", **TENSORS
    ),
    "longest length": lambda p: p(images=ONE, text=BLIP2_TEXT, max_length=12, truncation=True, **TENSORS),
}


@pytest.mark.parametrize("call", rows("Blip2Processor", BLIP2_CALLS))
def test_blip2_calls(blip2, call):
    _, ours, stock = blip2
    check(call(ours), call(stock))


def fed(model, processor, *args, **kwargs):
    """What a pipeline feeds a model; it answers with the prompt."""
    batches = []

    def generate(input_ids, attention_mask, pixel_values, **_):
        batches.append({"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values})
        return input_ids

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "generate", generate)
        pipe = pipeline("image-text-to-text", model=model, processor=processor)
        pipe(*args, **kwargs)
    return batches


PIPELINE_CALLS = {
    "pipeline, messages": {"text": chat({"image": ONE})},
    "pipeline, messages with a path": {"text": lambda sources: chat({"path": sources["path"]})},
    "pipeline, messages with a URL": {"text": lambda sources: chat({"url": sources["URL"]})},
    "pipeline, a batch of messages": {
        "text": [chat({"image": ONE}), [*chat({"image": TWO}), ANSWER, *chat()]],
        "batch_size": 2,
    },
    "pipeline, continuing an answer": {"text": [*chat({"image": ONE}), ANSWER]},
    "pipeline, text + image": {"images": ONE, "text": prompt("What?")},
    "pipeline, text + image as URL": {"images": lambda sources: sources["URL"], "text": prompt("What?")},
    "pipeline, a batch of texts + images": {"images": [ONE, TWO], "text": [prompt("a"), prompt("What?")]},
}


@pytest.mark.parametrize("call", rows("LlavaProcessor", PIPELINE_CALLS))
def test_llava_pipelines(llava, sources, call):
    model, ours, stock = llava
    call = {name: value(sources) if callable(value) else value for name, value in call.items()}
    for got, expected in zip(fed(model, ours, **call), fed(model, stock, **call), strict=True):
        check(got, expected)


@pytest.mark.compatibility("transformers Blip2Processor", "pipeline, text + images", "equal")
def test_blip2_pipeline(blip2):
    model, ours, stock = blip2
    call = {"images": [ONE, TWO], "text": ["a", "b"]}
    check(fed(model, ours, **call)[0], fed(model, stock, **call)[0])


def question(region=None):
    return chat({"image": ONE} if region is None else {"image": ONE, "region": region})


PIPELINE_REGIONS = {
    "messages": {"text": [question(LEFT), question(RIGHT)]},
    "messages in one batch": {"text": [question("box:12,4,28,36"), question(RIGHT.to_json())], "batch_size": 2},
    "messages, two regions of an image": {"text": question([LEFT, RIGHT])},
    "messages + regions": {"text": question(), "regions": [[LEFT, RIGHT]]},
    "messages + processor_kwargs": {"text": question(), "processor_kwargs": {"regions": [[LEFT, RIGHT]]}},
    "texts + images + regions": {"images": [ONE] * 2, "text": ["TEXT"] * 2, "regions": [LEFT, RIGHT]},
    "texts + images + processor_kwargs": {
        "images": [ONE] * 2,
        "text": ["TEXT"] * 2,
        "processor_kwargs": {"regions": [LEFT, RIGHT]},
    },
}


@pytest.mark.parametrize("call", PIPELINE_REGIONS.values(), ids=PIPELINE_REGIONS)
@pytest.mark.parametrize("kind", ["llava", "blip2"])
def test_pipelines_pass_on_regions(request, kind, call):
    model, ours, _ = request.getfixturevalue(kind)
    if "TEXT" in call["text"]:
        call = call | {"text": [prompt("What?") if kind == "llava" else BLIP2_TEXT] * 2}
    elif kind == "blip2" and "text" in call and not isinstance(call["text"][0], list):
        with pytest.raises(ValueError, match="one region a prompt, got 2 regions"):
            fed(model, ours, **call)
        return
    pixels = torch.cat([batch["pixel_values"] for batch in fed(model, ours, **call)])
    expected = ours.image_processor([ONE, ONE], [LEFT, RIGHT], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, expected) and not torch.equal(pixels[0], pixels[1])


@pytest.mark.parametrize("kind", ["llava", "blip2"])
@pytest.mark.parametrize("name", ["region", "masks", "processing_kwargs", "mm_processor_kwargs"])
def test_pipeline_arguments_that_would_be_ignored_are_an_error(request, kind, name):
    model, ours, _ = request.getfixturevalue(kind)
    text = prompt("What?") if kind == "llava" else BLIP2_TEXT
    for call in ({"text": question()}, {"images": ONE, "text": text}):
        with pytest.raises(ValueError, match="pass regions as regions="):
            fed(model, ours, **call, **{name: LEFT})
    with pytest.raises(ValueError, match="each of 1 images, got 2"):  # a pipeline gives each chat all of its arguments
        fed(model, ours, text=[question(), question()], regions=[LEFT, RIGHT])


def test_settings_of_generate_raise_with_a_hint(llava):
    model, ours, _ = llava
    pipe = pipeline("image-text-to-text", model=model, processor=ours, max_new_tokens=1)
    with pytest.raises(ValueError, match="unknown argument do_sample.*generate_kwargs"):
        pipe(text=[question()], do_sample=False)


DROPPED = {
    "a dictionary": lambda pipe, item: pipe(item | {"regions": LEFT}),
    "a dictionary, another name": lambda pipe, item: pipe(item | {"region": LEFT}),
    "a generator": lambda pipe, item: list(pipe(row | {"regions": LEFT} for row in [item])),
    "beside processor_kwargs": lambda pipe, item: pipe(**item, regions=LEFT, processor_kwargs={"padding": True}),
}


@pytest.mark.parametrize("call", DROPPED.values(), ids=DROPPED)
@pytest.mark.parametrize("kind", ["llava", "blip2"])
def test_arguments_that_pipelines_drop_are_an_error(request, kind, call):
    model, ours, _ = request.getfixturevalue(kind)
    pipe = pipeline("image-text-to-text", model=model, processor=ours, max_new_tokens=1)
    item = {"images": ONE, "text": prompt("What?") if kind == "llava" else BLIP2_TEXT}
    with pytest.raises(ValueError, match="the pipeline ignores .*; pass regions="):
        call(pipe, item)
    for answer in (pipe(item | {"regions": None, "id": 3}), pipe(item, regions=LEFT), pipe(item, processor_kwargs={})):
        assert len(answer) == 1
