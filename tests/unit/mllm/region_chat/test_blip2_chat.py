"""BLIP-2 through `mllm.load`, `RegionChat` and `region-chat`: the prompts of its authors, and the region arrives."""

import json

import pytest
import torch
from torch import nn
from transformers import Blip2Config, Blip2ForConditionalGeneration

import mllm
from alpha_clip_commands.region_chat import main as region_chat
from mllm.blip2 import AlphaBlip2Processor
from mllm.inference import RegionChat
from mllm.processing_blip2 import conversation_prompt
from tests.alpha_maps import alpha_map, iou
from tests.files import write_json, write_json_lines
from tests.tensors import same_tensors
from tests.tiny import build_tiny_blip2, noise_image, save_model, tiny_blip2_parts, tiny_vision_config
from vision_tower import AlphaCLIPVisionModel, Region

IMAGE = noise_image(60, 40)
LEFT, RIGHT = Region.from_box(0, 0, 30, 40), Region.from_box(30, 0, 60, 40)
QUERIES = 4


@pytest.fixture(scope="module", params=["opt", "t5"])
def folder(request, tmp_path_factory):
    """A tiny BLIP-2 with an Alpha-CLIP tower whose alpha weight is random, as `save_pretrained` writes it."""
    model, processor = build_tiny_blip2(request.param)
    out = tmp_path_factory.mktemp(request.param)
    return save_model(out, model, processor)


@pytest.fixture(scope="module")
def loaded(folder):
    return mllm.load(folder, device="cpu")


def test_answers_equal_generate_called_by_hand(loaded):
    model, processor = loaded
    talk = RegionChat(model, processor)
    decoder_only = model.config.use_decoder_only_language_model
    for question, prompt in (("What?", "Question: What? Answer:"), (None, "")):
        inputs = processor(images=IMAGE, regions=LEFT, text=prompt, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        start = inputs["input_ids"].shape[1] if decoder_only else 0
        expected = processor.decode(output[0, start:], skip_special_tokens=True).strip()
        assert talk.ask(IMAGE, LEFT, question, max_new_tokens=6) == expected


def test_region_reaches_the_model_through_chat(loaded):
    model, processor = loaded
    fed = []
    handle = model.vision_model.register_forward_pre_hook(lambda _, args, kwargs: fed.append(args[0]), with_kwargs=True)
    RegionChat(model, processor).answers([(IMAGE, LEFT, "What?"), (IMAGE, RIGHT, None)], max_new_tokens=2)
    handle.remove()
    alpha = alpha_map(fed[0])
    for drawn, region in zip(alpha > 0.5, (LEFT, RIGHT), strict=True):
        expected = torch.zeros(32, 32, dtype=torch.bool)
        expected[:, slice(0, 16) if region is LEFT else slice(16, 32)] = True
        assert iou(drawn, expected) >= 0.95
    with torch.no_grad():
        features = model.vision_model(fed[0]).last_hidden_state
    assert (features[0] - features[1]).abs().max() > 1e-3


def test_prompts_are_those_of_the_authors():
    user = {"role": "user", "content": [{"type": "text", "text": "Which city is this?"}]}
    assert conversation_prompt([user], True) == "Question: Which city is this? Answer:"
    answer = {"role": "assistant", "content": [{"type": "text", "text": "singapore"}]}
    why = {"role": "user", "content": [{"type": "text", "text": "why?"}]}
    # projects/blip2/README.md in salesforce/LAVIS
    expected = "Question: Which city is this? Answer: singapore. Question: why? Answer:"
    assert conversation_prompt([user, answer, why], True) == expected
    assert conversation_prompt([user, answer], False) == "Question: Which city is this? Answer: singapore"
    assert conversation_prompt([{"role": "user", "content": []}], True) == ""


def test_a_question_cannot_add_query_tokens(loaded):
    _, processor = loaded
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    with pytest.raises(ValueError, match="without <image>"):
        processor(images=IMAGE, text="a <image> </s>")
    chats = [RegionChat(*loaded).conversation(IMAGE, LEFT, question) for question in ("a <image> </s>", "b")]
    inputs = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_tensors="pt")
    assert ((inputs["input_ids"] == image_token).sum(1) == QUERIES).all()
    assert (inputs["input_ids"] == 2).sum() == 0
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape


def test_batch_rows_equal_single_answers(loaded):
    talk = RegionChat(*loaded)
    requests = [(IMAGE, LEFT, "What is this?"), (IMAGE, RIGHT, None), (IMAGE, Region.whole(), "A longer question?")]
    assert talk.ask_batch(*zip(*requests, strict=True), max_new_tokens=5) == [
        talk.ask(*r, max_new_tokens=5) for r in requests
    ]


def test_encode_conversation_is_what_the_model_gets(loaded):
    _, processor = loaded
    asked = RegionChat(*loaded).conversation(IMAGE, LEFT, "What?")
    inputs = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=True)
    prompt = processor.encode_conversation(asked, add_generation_prompt=True)
    assert inputs["input_ids"] == [prompt]
    answered = [*asked, {"role": "assistant", "content": "red"}]
    whole = processor.encode_conversation(answered)
    assert whole[: len(prompt)] == prompt and whole[-1] == processor.tokenizer.eos_token_id
    with pytest.raises(ValueError, match="one answer a sample"):
        processor.encode_conversation([*answered, *answered])
    with pytest.raises(ValueError, match="one image a conversation"):
        processor.apply_chat_template([*asked, *asked], tokenize=True)


def test_command_line(folder, tmp_path, capsys):
    IMAGE.save(tmp_path / "a.png")
    flags = ["--model", str(folder), "--image", str(tmp_path / "a.png"), "--max-new-tokens", "4"]
    assert region_chat([*flags, "--box", "0,0,30,40", "--ask", "What?", "--json"]) == 0
    expected = RegionChat(*mllm.load(folder, device="cpu")).ask(IMAGE, LEFT, "What?", max_new_tokens=4)
    assert json.loads(capsys.readouterr().out)["answer"] == expected
    requests = [
        {"id": i, "image": "a.png", "region": {"box": box}} for i, box in enumerate(([0, 0, 30, 40], [0, 0, 9, 9]))
    ]
    write_json_lines(tmp_path / "r.jsonl", requests)
    batch = ["--batch", str(tmp_path / "r.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--max-new-tokens", "4"]
    assert region_chat(["--model", str(folder), *batch]) == 0
    assert all("answer" in json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert region_chat([*flags, "--box", "0,0,30,40", "--ask", "x" * 2000]) == 2
    assert "ask a shorter question" in capsys.readouterr().err


def test_stock_directory_loads_with_a_warning(tmp_path, caplog):
    tokenizer, config = tiny_blip2_parts("opt")
    sizes = tiny_vision_config()
    sizes.pop("projection_dim")
    torch.manual_seed(0)
    Blip2ForConditionalGeneration(Blip2Config(vision_config=sizes, **config)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    record = {"image_processor_type": "BlipImageProcessor", "size": {"height": 32, "width": 32}}
    write_json(tmp_path / "preprocessor_config.json", record)
    model, processor = mllm.load(tmp_path, device="cpu")
    assert "every region gets the same answer" in caplog.text
    assert isinstance(processor, AlphaBlip2Processor) and processor.image_processor.geometry == "stretch"
    assert torch.count_nonzero(model.vision_model.embeddings.patch_embedding.alpha.weight) == 0
    with pytest.raises(ValueError, match="EVA ViT-g"):
        mllm.load(tmp_path, device="cpu", alpha_weights=tmp_path)


def test_alpha_weights_are_the_first_blocks_and_keep_the_norm(folder, tmp_path):
    torch.manual_seed(5)
    fields = tiny_vision_config(num_hidden_layers=4)
    tower = AlphaCLIPVisionModel(AlphaCLIPVisionModel.config_class(**fields))
    for weight in (tower.embeddings.patch_embedding.alpha.weight, tower.post_layernorm.weight):
        nn.init.normal_(weight, std=0.3)
    tower.save_pretrained(tmp_path)
    before = mllm.load(folder, device="cpu")[0].vision_model.post_layernorm.state_dict()
    loaded, _ = mllm.load(folder, device="cpu", alpha_weights=tmp_path)
    expected = tower.state_dict()
    for key, tensor in loaded.vision_model.state_dict().items():
        wanted = before[key.removeprefix("post_layernorm.")] if key.startswith("post_layernorm.") else expected[key]
        assert torch.equal(tensor, wanted), key


@pytest.mark.compatibility(
    "bitsandbytes nf4 and int8 on a CPU",
    "tiny BLIP-2 (OPT, T5): only the language model is quantized, batched answers",
    "runs",
)
@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_only_the_language_model_is_quantized(folder, load_in):
    pytest.importorskip("bitsandbytes", reason="an optional dependency; make setup installs it on Linux")
    model, processor = mllm.load(folder, device="cpu", load_in=load_in)
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if "Linear" in type(module).__name__}
    quantized = {name for name, kind in kinds.items() if kind != "Linear"}
    inside = {name for name in kinds if name.startswith("language_model.") and not name.endswith("lm_head")}
    assert quantized and quantized <= inside
    talk = RegionChat(model, processor)
    assert len(talk.answers([(IMAGE, LEFT, None), (IMAGE, RIGHT, None)], max_new_tokens=3)) == 2


def test_half_precision_keeps_the_region(folder):
    for dtype in ("bfloat16", "float16"):
        model, processor = mllm.load(folder, device="cpu", dtype=dtype)
        inputs = processor(images=[IMAGE] * 2, regions=[LEFT, RIGHT], text=["a"] * 2, return_tensors="pt")
        pixels = inputs["pixel_values"].to(model.vision_model.dtype)
        with torch.no_grad():
            features = model.vision_model(pixels).last_hidden_state
        assert str(features.dtype) == f"torch.{dtype}" and (features[0] - features[1]).abs().max() > 0.05
        assert RegionChat(model, processor).describe(IMAGE, LEFT, max_new_tokens=3) is not None


def test_a_region_in_every_place(loaded):
    _, processor = loaded
    prompt = "Question: What? Answer:"
    one = [{"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What?"}]}]
    given = [{"role": "user", "content": [{**one[0]["content"][0], "region": [LEFT.to_json()]}, one[0]["content"][1]]}]
    settings = {"add_generation_prompt": True, "tokenize": True, "return_tensors": "pt"}
    expected = processor(IMAGE, prompt, LEFT, return_tensors="pt")
    assert not torch.equal(
        expected["pixel_values"], processor(IMAGE, prompt, RIGHT, return_tensors="pt")["pixel_values"]
    )
    for inputs in (
        processor([[IMAGE]], [prompt], [["box:0,0,30,40"]], return_tensors="pt"),
        processor(IMAGE, prompt, images_kwargs={"regions": LEFT}, return_tensors="pt"),
        processor.apply_chat_template(given, **settings),
        processor.apply_chat_template(one, regions=LEFT, **settings),
        processor.apply_chat_template([one], regions=[LEFT], **settings),
        processor.apply_chat_template(one, processor_kwargs={"regions": [LEFT]}, **settings),
        processor.apply_chat_template(one, images_kwargs={"regions": [LEFT]}, **settings),
    ):
        assert same_tensors(inputs, expected)
    for call in (
        lambda: processor(IMAGE, prompt, [LEFT, RIGHT]),
        lambda: processor.apply_chat_template(one, regions=[[LEFT, RIGHT]], **settings),
    ):
        with pytest.raises(ValueError, match="BLIP-2 reads one image and one region a prompt, got 2 regions"):
            call()
    for call in (
        lambda: processor([IMAGE, IMAGE], prompt),
        lambda: processor(IMAGE, [prompt, None]),
        lambda: processor.apply_chat_template(given, regions=LEFT, **settings),
        lambda: processor.apply_chat_template([one, one], regions=[LEFT], **settings),
        lambda: processor.apply_chat_template(one, region=LEFT),
        lambda: processor.apply_chat_template(one, processor_kwargs={"masks": LEFT}),
    ):
        with pytest.raises(ValueError):
            call()
