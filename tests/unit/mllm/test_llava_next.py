"""LLaVA-NeXT with an alpha tower: chat, conversations, training labels, and what is refused by name."""

import shutil

import pytest
import torch
from transformers import AutoConfig, CLIPVisionConfig

import mllm
from alpha_clip_commands.training.tuning_arguments import ModelArguments
from mllm import llava_next
from mllm.convert.export import export
from mllm.inference import RegionChat
from mllm.model_card import model_card
from mllm.processing_llava_next import AlphaLlavaNextProcessor
from tests.files import read_json, write_json
from tests.tiny import noise_image, tiny_llava_next_config, tiny_tokenizer, tiny_vision_config
from train.tuning.collators import IGNORE_INDEX, ConversationCollator
from train.tuning.memory_estimate import meta_model
from train.tuning.trained_parts import parts_of
from vision_tower import Region

LEFT, RIGHT = Region.from_box(2, 2, 16, 26), Region.from_box(17, 3, 20, 28)
IMAGES = [noise_image(60, 40), noise_image(100, 30), noise_image(20, 90)]  # four, two and two tiles
# As those of the hub's repositories llava-v1.6-mistral-7b-hf and llava-v1.6-vicuna-7b-hf: BOS is the tokenizer's
MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] if content['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}{{ content['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] if content['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def processor_with(template, like):
    tokenizer = tiny_tokenizer()
    tokenizer.add_bos_token = True
    return AlphaLlavaNextProcessor(
        like.image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def turns(image, region, answer="a cat"):
    items = [{"type": "image", "image": image, "region": region}, {"type": "text", "text": "What?"}]
    return [{"role": "user", "content": items}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def test_chat_answers_in_batches_as_alone(tiny_llava_next):
    chat = RegionChat(*tiny_llava_next)
    questions = ["What?", "What is this?", None]
    together = chat.ask_batch(IMAGES, [LEFT] * 3, questions, max_new_tokens=6)
    asked = zip(IMAGES, questions, strict=True)
    assert together == [chat.ask(image, LEFT, question, max_new_tokens=6) for image, question in asked]


def test_chat_feeds_the_region_to_every_tile(tiny_llava_next, fed):
    chat = RegionChat(*tiny_llava_next)
    for region in (LEFT, RIGHT):
        chat.ask(IMAGES[0], region, "What?", max_new_tokens=1)
    tiles = chat.processor.image_processor(IMAGES[0], [LEFT, RIGHT], return_tensors="pt")["pixel_values"]
    assert torch.equal(torch.stack(fed), tiles.flatten(0, 1))


@pytest.mark.parametrize("template", [None, MISTRAL, VICUNA])
def test_a_conversation_is_encoded_as_the_model_reads_it(tiny_llava_next, template):
    """In training, too, an image has as many tokens as its tiles give."""
    processor = processor_with(template, tiny_llava_next[1])
    for image in IMAGES:
        conversation = turns(image, [LEFT, RIGHT])[:1]
        inputs = processor.apply_chat_template(
            conversation, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        assert (
            processor.encode_conversation(conversation, add_generation_prompt=True) == inputs["input_ids"][0].tolist()
        )


@pytest.mark.parametrize("template", [None, MISTRAL])
def test_labels_are_the_answer_and_its_end(tiny_llava_next, template):
    model, like = tiny_llava_next
    processor = processor_with(template, like)
    collate = ConversationCollator(processor)
    batch = collate([[turns(IMAGES[0], LEFT, "a cat")], [turns(IMAGES[1], LEFT, "dog")]])
    assert batch["pixel_values"].shape == (2, 5, 4, 32, 32) and batch["image_sizes"].tolist() == [[40, 60], [30, 100]]
    for row, image in zip(batch["pixel_values"], IMAGES[:2], strict=True):  # each with its own region
        tiles = like.image_processor(image, LEFT, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(row[: len(tiles)], tiles) and tiles[:, 3].unique().numel() > 1
    learned = [row[row != IGNORE_INDEX] for row in batch["labels"]]
    assert [processor.decode(row).strip() for row in learned] == ["a cat</s>", "dog</s>"]
    assert model(**batch).loss > 0


def test_a_template_without_an_end_of_answers_is_not_tuned(tiny_llava_next):
    collate = ConversationCollator(processor_with(VICUNA, tiny_llava_next[1]))
    with pytest.raises(ValueError, match="the chat template has no </s> after an answer"):
        collate.check(turns(IMAGES[0], LEFT))


def test_every_parameter_is_of_a_part(tiny_llava_next):
    parts = parts_of(tiny_llava_next[0])
    names = [name for name, _ in tiny_llava_next[0].named_parameters()]
    assert all(any(name == prefix or name.startswith(prefix + ".") for prefix in parts.values()) for name in names)


def test_export_and_plan_are_refused_by_name(tiny_llava_next, tiny_llava_next_dir, tmp_path):
    with pytest.raises(ValueError, match="expected a LLaVA-1.5 or BLIP-2 .*, got LlavaNextForConditionalGeneration"):
        export(*tiny_llava_next, tmp_path / "out")
    with pytest.raises(ValueError, match="--plan supports LLaVA-1.5 only, got model_type 'llava_next'"):
        meta_model(ModelArguments(model=str(tiny_llava_next_dir)))


def test_a_fused_tower_is_refused_by_name(tmp_path):
    config = tiny_llava_next_config(tiny_tokenizer(), CLIPVisionConfig(**tiny_vision_config(), num_channels=4))
    with pytest.raises(ValueError, match="exports of LLaVA-NeXT are not supported"):
        llava_next.load_model(tmp_path, config)


def stock_processor(saved, folder, **image_settings):
    """A directory whose processor files are a stock LLaVA-NeXT's."""
    shutil.copytree(saved, folder)
    file = folder / "processor_config.json"
    stored = read_json(file)
    stored["image_processor"].pop("auto_map")
    stored["image_processor"] |= {"image_processor_type": "LlavaNextImageProcessorPil", **image_settings}
    write_json(file, {**stored, "processor_class": "LlavaNextProcessor", "auto_map": {}})
    tokenizer = folder / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text().replace("AlphaLlavaNextProcessor", "LlavaNextProcessor"))
    return folder


def test_a_stock_directory_needs_a_template_and_the_models_tiles(tiny_llava_next_dir, tmp_path):
    folder = stock_processor(tiny_llava_next_dir, tmp_path / "stock")
    config = AutoConfig.from_pretrained(folder)
    assert type(mllm.loading.load_processor(folder)) is AlphaLlavaNextProcessor
    other = stock_processor(tiny_llava_next_dir, tmp_path / "other", image_grid_pinpoints=[[32, 64]])
    with pytest.raises(
        ValueError, match=r"image_grid_pinpoints are \[\[32, 64\]\], those of config.json \[\[32, 64\], "
    ):
        llava_next.load_processor(other, config)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        llava_next.load_processor(folder, config)


def test_the_model_card_tells_the_tiles(tiny_llava_next_dir):
    card = model_card(tiny_llava_next_dir, "lab/next")
    assert "LLaVA-NeXT with an Alpha-CLIP tower" in card.text and "(B, tiles, 4, H, W)" in card.text
    assert (
        "| tiles | the whole image, and those of the best fit of 64 x 32, 32 x 64, 64 x 64, 32 x 32 pixels" in card.text
    )
