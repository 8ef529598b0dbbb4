"""`alpha-clip convert-lavis`: the result loads, keeps the language model, and uses the region."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import mllm
from alpha_clip_commands import alpha_clip
from mllm.blip2 import AlphaBlip2ForConditionalGeneration, AlphaBlip2Processor, AlphaCLIPBlip2VisionModel
from tests.alpha_maps import iou
from tests.files import read_json, write_json
from tests.tensors import fixture_tensors, same_tensors
from tests.tiny import noise_image
from vision_tower import AlphaCLIPVisionModel, Region
from vision_tower.conversion import read_tower

IMAGE = noise_image(60, 40)
LEFT, RIGHT = Region.from_box(0, 0, 30, 40), Region.from_box(30, 0, 60, 40)
WORDS = ["<pad>", "</s>", "<unk>", "\n", "Question", ":", "What", "is", "this", "?", "Answer"]
LOADERS = {"t5": AutoModelForSeq2SeqLM, "opt": AutoModelForCausalLM}


def save_language_model(folder, kind, vocab_size=16, width=64):
    """A tiny T5 or OPT, with untied output embedding like Flan-T5, and a tokenizer without <image>."""
    torch.manual_seed(3)
    ids = {"vocab_size": vocab_size, "pad_token_id": 0, "eos_token_id": 1}
    if kind == "t5":
        sizes = {"d_model": width, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        config = T5Config(**sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0, **ids)
        T5ForConditionalGeneration(config).save_pretrained(folder)
        file = folder / "model.safetensors"
        save_file(
            {**load_file(file), "lm_head.weight": torch.randn(vocab_size, width)}, file, metadata={"format": "pt"}
        )
        fields = read_json(folder / "config.json")
        del fields["scale_decoder_outputs"]
        write_json(folder / "config.json", {**fields, "tie_word_embeddings": False})
    elif kind == "opt":
        sizes = {"ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": width}
        config = OPTConfig(hidden_size=width, max_position_embeddings=64, bos_token_id=1, **sizes, **ids)
        OPTForCausalLM(config).half().save_pretrained(folder)
    else:
        sizes = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        LlamaForCausalLM(LlamaConfig(**sizes, **ids)).save_pretrained(folder)
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = Split(Regex(r"\n|\w+|[^\w\s]"), behavior="removed", invert=True)
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """LAVIS' checkpoint for a T5 and for an OPT, with its own tower, without projection; an Alpha-CLIP of two blocks;
    the language models.
    """
    folder = tmp_path_factory.mktemp("sources")
    lavis, alpha = (
        fixture_tensors("lavis_blip2.safetensors", "checkpoint."),
        fixture_tensors("alpha_clip_original.safetensors", "checkpoint."),
    )
    plain = {k: t for k, t in alpha.items() if not k.startswith(("conv1_alpha.", "ln_post.", "proj"))}
    files = {
        "t5": lavis,
        "opt": {key.replace("t5_proj.", "opt_proj."): tensor for key, tensor in lavis.items()},
        "whole": lavis | {f"visual_encoder.{k.replace('in_proj.', 'in_proj_')}": t for k, t in plain.items()},
        "stage_1": {key: tensor for key, tensor in lavis.items() if not key.startswith("t5_proj.")},
    }
    for name, tensors in files.items():
        torch.save({"model": tensors}, folder / f"{name}.pth")
    torch.save(alpha, folder / "alpha.pth")
    for kind in LOADERS:
        save_language_model(folder / f"{kind}_model", kind)
    return folder


def convert(sources, name, out, language="t5", *more, tower="alpha.pth", blocks=1):
    given = [] if tower is None else ["--vision-tower", sources / tower]
    args = [sources / f"{name}.pth", out, "--language-model", sources / f"{language}_model", "--blocks", blocks]
    return alpha_clip.main(["convert-lavis", *map(str, [*args, *given, *more])])


@pytest.fixture(scope="module", params=["t5", "opt"])
def converted(request, sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / request.param
    assert convert(sources, request.param, out, request.param) == 0
    return request.param, out


def logits(model, inputs):
    extra = {} if model.config.use_decoder_only_language_model else {"decoder_input_ids": inputs["input_ids"][:, :1]}
    with torch.no_grad():
        return model(**inputs, **extra).logits


def inputs_for(processor, regions):
    text = ["Question: What is this? Answer:"] * len(regions)
    return processor(images=[IMAGE] * len(regions), text=text, regions=regions, return_tensors="pt")


def test_it_loads_everywhere_and_sees_the_region(converted):
    _, out = converted
    processor = AutoProcessor.from_pretrained(out)
    assert isinstance(processor, AlphaBlip2Processor) and processor.num_query_tokens == 5
    inputs = inputs_for(processor, [LEFT, RIGHT])
    expected = None
    for load in (AlphaBlip2ForConditionalGeneration, AutoModelForImageTextToText):
        model = load.from_pretrained(out, dtype=torch.float32).eval()
        assert isinstance(model.vision_model, AlphaCLIPBlip2VisionModel)
        assert (inputs["input_ids"] == model.config.image_token_index).sum(1).tolist() == [5, 5]
        found = logits(model, inputs)
        assert (found[0] - found[1]).abs().max() > 1e-3
        assert expected is None or torch.equal(found, expected)
        expected = found
    model, processor = mllm.load(out, device="cpu", dtype=torch.float32)
    assert torch.equal(logits(model, inputs_for(processor, [LEFT, RIGHT])), expected)
    assert model.generate(**inputs, max_new_tokens=4, num_beams=2).shape[0] == 2


def test_pictures_are_stretched_and_alpha_lies_where_the_region_is(converted):
    processor = AutoProcessor.from_pretrained(converted[1])
    assert (processor.image_processor.geometry, processor.image_processor.size["shortest_edge"]) == ("stretch", 32)
    drawn = inputs_for(processor, [LEFT])["pixel_values"][0, 3] > 0
    expected = torch.zeros_like(drawn)
    expected[:, :16] = True
    assert iou(drawn, expected) >= 0.95


def test_the_language_model_is_its_own(converted, sources):
    """Every weight, Flan-T5's output embedding too (which is not the input's), and what LAVIS changes in it."""
    kind, out = converted
    theirs = LOADERS[kind].from_pretrained(sources / f"{kind}_model")
    model = AlphaBlip2ForConditionalGeneration.from_pretrained(out)
    ours = model.language_model
    assert model.vision_model.dtype == model.language_projection.weight.dtype == ours.dtype
    assert model.qformer.dtype == model.query_tokens.dtype == torch.float32
    assert ours.dtype == theirs.dtype == (torch.float32 if kind == "t5" else torch.float16)
    expected = theirs.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in ours.state_dict().items())
    if kind == "t5":
        assert not torch.equal(ours.lm_head.weight, ours.shared.weight)
        assert (theirs.config.dense_act_fn, ours.config.dense_act_fn) == ("gelu_new", "gelu")
        assert theirs.config.scale_decoder_outputs is ours.config.scale_decoder_outputs is False
    else:
        assert (theirs.generation_config.eos_token_id, ours.generation_config.eos_token_id) == (1, WORDS.index("\n"))


def test_the_tower_is_alpha_clip_without_its_last_block(converted, sources):
    _, weights = read_tower(sources / "alpha.pth")
    tower = AlphaBlip2ForConditionalGeneration.from_pretrained(converted[1], dtype=torch.float32).vision_model
    own = {key: t for key, t in tower.state_dict().items() if not key.startswith("post_layernorm.")}
    assert len(own) == len(weights) - 16 - 2 and all(torch.equal(t, weights[key].float()) for key, t in own.items())
    ln_vision = fixture_tensors("lavis_blip2.safetensors", "checkpoint.ln_vision.")
    assert all(torch.equal(getattr(tower.post_layernorm, key), t.float()) for key, t in ln_vision.items())


def test_a_directory_of_ours_is_taken_as_tower(converted, sources, tmp_path):
    kind, out = converted
    config, weights = read_tower(sources / "alpha.pth")
    tower = AlphaCLIPVisionModel(config)
    tower.load_state_dict(weights)
    tower.save_pretrained(tmp_path / "tower")
    assert convert(sources, kind, tmp_path / "out", kind, tower=tmp_path / "tower") == 0
    first, second = (
        AlphaBlip2ForConditionalGeneration.from_pretrained(f).state_dict() for f in (out, tmp_path / "out")
    )
    assert same_tensors(first, second)


def test_the_checkpoints_own_tower_ignores_regions_and_says_so(sources, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert convert(sources, "whole", tmp_path / "out", tower=None, blocks=2) == 0
    assert "alpha weight is zero" in caplog.text
    model, processor = mllm.load(tmp_path / "out", device="cpu")
    inputs = inputs_for(processor, [LEFT, None])
    plain = {**inputs, "pixel_values": inputs["pixel_values"][:, :3]}
    assert torch.equal(logits(model, inputs), logits(model, plain))
    torch.testing.assert_close(*logits(model, inputs))  # rows of a batch may round differently


def test_a_stage_1_checkpoint_begins_its_projection_when_asked(sources, tmp_path, capsys, caplog):
    assert convert(sources, "stage_1", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "stage-1 checkpoint" in error and "--new-projection" in error and error.count("\n") == 1
    with caplog.at_level(logging.WARNING):
        assert convert(sources, "stage_1", tmp_path / "out", "t5", "--new-projection") == 0
    assert "projection is random" in caplog.text
    model = AlphaBlip2ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.language_projection.weight.shape == (64, 64) and model.language_projection.weight.any()
    assert convert(sources, "t5", tmp_path / "again", "t5", "--new-projection") == 2
    assert "this one has t5_proj" in capsys.readouterr().err


def test_errors_leave_nothing_behind(sources, tmp_path, capsys):
    def error_of(*args, **kwargs):
        assert convert(*args, **kwargs) == 2
        error = capsys.readouterr().err.splitlines()[-1]  # after progress bars
        assert error.startswith("alpha-clip convert-lavis: error: ")
        return error

    def broken(name, **tensors):
        content = torch.load(sources / "t5.pth")["model"]
        torch.save({"model": content | tensors}, tmp_path / f"{name}.pth")
        return tmp_path / name

    out = tmp_path / "out"
    vit_g = {f"Qformer.bert.encoder.layer.{i}.crossattention.self.key.weight": torch.zeros(64, 1408) for i in (0, 2)}
    assert "1408 wide" in error_of(sources, broken("vit_g", **vit_g), out)
    assert "holds more" in error_of(sources, broken("more", extra=torch.zeros(1)), out)
    assert "checkpoint not found" in error_of(sources, tmp_path / "absent", out)
    assert "at least 23 blocks" in error_of(sources, "t5", out, blocks=23)
    assert "holds no tower" in error_of(sources, "t5", out, tower=None)
    assert "leads into a t5 64 wide" in error_of(sources, "t5", out, "opt")
    languages = tmp_path / "languages"
    languages.mkdir()
    for name, kind, changes in (
        ("full", "t5", {"vocab_size": 11}),
        ("wide", "t5", {"width": 32}),
        ("llama", "llama", {}),
    ):
        save_language_model(languages / f"{name}_model", kind, **changes)
    assert "expected room for the token <image>" in error_of(sources, "t5", out, languages / "full")
    assert "is a t5 32 wide" in error_of(sources, "t5", out, languages / "wide")
    assert "expected a T5 or OPT language model, got model_type 'llama'" in error_of(
        sources, "t5", out, languages / "llama"
    )
    assert "directory not found" in error_of(sources, "t5", out, languages / "absent")
    file = save_language_model(languages / "cut_model", "t5") / "model.safetensors"
    weights = load_file(file)
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    assert "encoder.final_layer_norm.weight" in error_of(sources, "t5", out, languages / "cut")
    file.write_bytes(file.read_bytes()[:1000])
    assert "cut_model are damaged" in error_of(sources, "t5", out, languages / "cut")
    (tmp_path / "there").mkdir()
    assert "exists" in error_of(sources, "t5", tmp_path / "there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["languages", "more.pth", "there", "vit_g.pth"]
