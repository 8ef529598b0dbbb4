"""BLIP-2 with an alpha tower: at zero alpha it is stock BLIP-2 bit for bit; with alpha it sees the region. The judge is
Transformers' own `Blip2ForConditionalGeneration`.
"""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from mllm.blip2 import (
    AlphaBlip2Config,
    AlphaBlip2ForConditionalGeneration,
    AlphaBlip2Processor,
    AlphaBlip2VisionModel,
    AlphaCLIPBlip2VisionConfig,
    AlphaCLIPBlip2VisionModel,
)
from tests.alpha_maps import iou
from tests.tiny import noise_image, tiny_vision_config
from vision_tower import AlphaCLIPImageProcessor, AlphaCLIPVisionModel, Region

ALPHA = "vision_model.embeddings.patch_embedding.alpha.weight"
LEFT, RIGHT = Region.from_box(0, 0, 30, 40), Region.from_box(30, 0, 60, 40)
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "Question", ":", "What", "is", "this", "?", "Answer", "<image>"]


def text_config(kind):
    if kind == "opt":
        sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return OPTConfig(vocab_size=40, word_embed_proj_dim=32, max_position_embeddings=64, **sizes, **ids)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5Config(vocab_size=40, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, **sizes)


def stock_config(kind):
    vision = Blip2VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        initializer_range=0.02,
    )
    qformer = Blip2QFormerConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    parts = {"vision_config": vision, "qformer_config": qformer, "text_config": text_config(kind)}
    return Blip2Config(**parts, num_query_tokens=4, image_token_index=WORDS.index("<image>"))


def processor_for(size=32):
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)
    images = AlphaCLIPImageProcessor.for_size(size, "stretch")
    return AlphaBlip2Processor(images, tokenizer, num_query_tokens=4)


@pytest.fixture(scope="module", params=["opt", "t5"])
def stock_dir(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(stock_config(request.param))
    nn.init.normal_(model.query_tokens)  # at zero, all queries are alike
    model.save_pretrained(folder)
    return folder


def clip_model(kind="opt"):
    config = stock_config(kind).to_dict()
    vision = AlphaCLIPBlip2VisionConfig(**tiny_vision_config())
    torch.manual_seed(0)
    parts = {"qformer_config": config["qformer_config"], "text_config": text_config(kind)}
    whole = AlphaBlip2Config(
        vision_config=vision, **parts, num_query_tokens=4, image_token_index=WORDS.index("<image>")
    )
    model = AlphaBlip2ForConditionalGeneration(whole).eval()
    nn.init.normal_(model.query_tokens)
    return model


def inputs_for(regions, processor=None):
    images = [noise_image(60, 40)] * len(regions)
    text = ["Question: What is this? Answer:"] * len(regions)
    return (processor or processor_for())(images=images, text=text, regions=regions, return_tensors="pt")


def forward(model, inputs):
    extra = {} if model.config.use_decoder_only_language_model else {"decoder_input_ids": inputs["input_ids"][:, -4:]}
    with torch.no_grad():
        return model(**inputs, **extra).logits


@pytest.mark.compatibility(
    "transformers BLIP-2 (EVA; OPT and T5)", "logits, greedy and 3-beam ids at zero alpha", "equal"
)
def test_stock_checkpoint_at_zero_alpha_is_stock_blip2(stock_dir):
    stock = Blip2ForConditionalGeneration.from_pretrained(stock_dir).eval()
    ours, report = AlphaBlip2ForConditionalGeneration.from_pretrained(stock_dir, output_loading_info=True)
    ours.eval()
    assert set(report["missing_keys"]) == {ALPHA} and not report["unexpected_keys"]
    assert torch.count_nonzero(ours.state_dict()[ALPHA]) == 0
    inputs = inputs_for([LEFT, None])
    assert inputs["pixel_values"].shape == (2, 4, 32, 32)
    plain = {**inputs, "pixel_values": inputs["pixel_values"][:, :3]}
    assert torch.equal(forward(ours, inputs), forward(stock, plain))
    assert torch.equal(forward(ours, plain), forward(stock, plain))
    for beams in (1, 3):
        settings = {"max_new_tokens": 6, "num_beams": beams}
        assert torch.equal(ours.generate(**inputs, **settings), stock.generate(**plain, **settings))


def with_alpha(model):
    torch.manual_seed(2)
    nn.init.normal_(model.vision_model.embeddings.patch_embedding.alpha.weight, std=0.3)
    return model.eval()


@pytest.fixture(params=["eva", "clip"])
def tuned(request, stock_dir):
    kind = "opt" if "opt" in stock_dir.name else "t5"
    eva = request.param == "eva"
    return with_alpha(AlphaBlip2ForConditionalGeneration.from_pretrained(stock_dir) if eva else clip_model(kind))


def test_each_row_of_a_batch_uses_its_region(tuned):
    both = forward(tuned, inputs_for([LEFT, RIGHT]))
    assert (both[0] - both[1]).abs().max() > 1e-4
    for row, region in enumerate((LEFT, RIGHT)):
        torch.testing.assert_close(forward(tuned, inputs_for([region]))[0], both[row], rtol=1e-4, atol=1e-5)


def test_save_and_load_keep_class_and_alpha(tuned, tmp_path):
    inputs = inputs_for([LEFT, RIGHT])
    expected = forward(tuned, inputs)
    tuned.save_pretrained(tmp_path)
    processor_for().save_pretrained(tmp_path)
    for loader in (AlphaBlip2ForConditionalGeneration, AutoModelForImageTextToText):
        model = loader.from_pretrained(tmp_path).eval()
        assert type(model.vision_model) is type(tuned.vision_model)
        assert torch.equal(forward(model, inputs), expected)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, AlphaBlip2Processor)
    assert torch.equal(inputs_for([LEFT, RIGHT], processor)["pixel_values"], inputs["pixel_values"])
    half = AlphaBlip2ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    torch.testing.assert_close(forward(half, inputs).float(), expected, rtol=0.1, atol=0.1)


def test_loss_reaches_the_alpha_weight(tuned):
    inputs = inputs_for([LEFT, RIGHT])
    labels = inputs["input_ids"].clone()
    tuned.train()
    tuned(**inputs, labels=labels).loss.backward()
    assert tuned.vision_model.embeddings.patch_embedding.alpha.weight.grad.abs().max() > 0


def test_alpha_is_at_the_region():
    """Stretched, not cropped: the left half of a wide picture is the left half of its alpha."""
    alpha = inputs_for([LEFT])["pixel_values"][0, 3]
    drawn = alpha > 0
    expected = torch.zeros_like(drawn)
    expected[:, :16] = True
    assert iou(drawn, expected) >= 0.95


def test_the_clip_tower_ends_at_the_normalized_penultimate_block():
    """LAVIS drops CLIP's last block: 2 of 3 blocks here, and `ln_vision` over all tokens."""
    torch.manual_seed(0)
    whole = AlphaCLIPVisionModel(AlphaCLIPBlip2VisionConfig(**tiny_vision_config())).eval()
    short = AlphaCLIPBlip2VisionModel(AlphaCLIPBlip2VisionConfig(**tiny_vision_config(num_hidden_layers=2))).eval()
    short.load_state_dict(whole.state_dict(), strict=False)
    pixels = torch.randn(2, 4, 32, 32)
    with torch.no_grad():
        expected = whole.post_layernorm(whole(pixels, output_hidden_states=True).hidden_states[-2])
        assert torch.equal(short(pixels).last_hidden_state, expected)


def test_directories_of_other_models_are_an_error(stock_dir, tiny_llava_dir, tmp_path):
    with pytest.raises(ValueError, match="expected a BLIP-2 directory, got model_type 'llava'"):
        AlphaBlip2ForConditionalGeneration.from_pretrained(tiny_llava_dir)
    with pytest.raises(ValueError, match="expected a vision tower"):
        AlphaBlip2Config(vision_config={"model_type": "siglip_vision_model"})
    config = AlphaBlip2Config.from_pretrained(stock_dir)
    config.vision_config = AlphaCLIPBlip2VisionConfig(**tiny_vision_config(hidden_size=64))
    with pytest.raises(ValueError, match="do not match"):
        AlphaBlip2ForConditionalGeneration.from_pretrained(stock_dir, config=config)


def test_tower_alone_loads_by_auto_model(stock_dir, tmp_path):
    tower = with_alpha(AlphaBlip2ForConditionalGeneration.from_pretrained(stock_dir)).vision_model
    tower.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, AlphaBlip2VisionModel)
    assert all(torch.equal(tensor, tower.state_dict()[key]) for key, tensor in loaded.state_dict().items())
