"""mllm/model_card.py: what the card says of licence, scores, training and files; the hub's own classes read it."""

import shutil

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import CLIPVisionConfig

from mllm.loading import EMBEDDED_MODEL
from mllm.model_card import LICENSES, check_base_model, model_card
from tests.files import read_json, write_json
from tests.tiny import tiny_llava_config, tiny_tokenizer, tiny_vision_config
from vision_tower import AlphaCLIPImageProcessor, AlphaCLIPVisionConfig

SCORE = {"score": 0.5, "of": 4}


@pytest.fixture
def tower(tmp_path):
    """A tower's settings; a card needs no weights."""
    AlphaCLIPVisionConfig(**tiny_vision_config(), architectures=["AlphaCLIPVisionModel"]).save_pretrained(tmp_path)
    AlphaCLIPImageProcessor.for_size(32, "stretch").save_pretrained(tmp_path)
    return tmp_path


def metadata(card):
    """The metadata as a plain YAML reader sees it."""
    return yaml.safe_load(card.content.split("---\n")[1])


def row(card, name):
    """The cells of the only table row of this name."""
    (line,) = [line for line in card.text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_the_metadata_is_the_hubs(tower):
    card = model_card(tower, "lab/tower", base_model="openai/clip-vit-large-patch14", language=["en", "de"])
    assert metadata(card) == {
        "base_model": "openai/clip-vit-large-patch14",
        "language": ["en", "de"],
        "library_name": "transformers",
        "license": "unknown",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["alpha-clip", "region"],
    }
    assert ModelCard(card.content).data.to_dict() == card.data.to_dict()


@pytest.mark.parametrize(
    ("given", "fields", "words"),
    [
        ({}, {"license": "unknown"}, "did not state"),
        ({"license": "bsd-3-clause"}, {"license": "bsd-3-clause"}, "as stated by its publisher"),
        ({"built_from": ["clip"]}, {"license": "mit"}, "CLIP: MIT"),
        ({"built_from": ["clip", "blip-2"]}, {"license": "mit"}, "language model has another license: unknown"),
        (
            {"built_from": ["alpha-clip"]},
            {"license": "other", "license_name": "alpha-clip-research-only"},
            "research use only",
        ),
        (
            {"built_from": ["llava-1.5", "alpha-clip"]},
            {"license": "other", "license_name": "alpha-clip-research-only-and-llama2"},
            "LLAMA 2 community license",
        ),
    ],
)
def test_the_licence_is_that_of_the_parts(tower, given, fields, words):
    card = model_card(tower, "lab/tower", **given)
    assert {key: value for key, value in metadata(card).items() if key.startswith("license")} == fields
    assert words in card.text.split("## License")[1]
    assert all(LICENSES[part][1] in card.text for part in given.get("built_from", []))


def test_who_knows_only_shapes_says_so(tower):
    assert "not work on photographs" in model_card(tower, "lab/tower", built_from=["shapes"]).text
    assert "not work on photographs" not in model_card(tower, "lab/tower", built_from=["clip"]).text


def test_sizes_geometry_and_files(tower):
    (tower / "regions.py").write_text("")
    card = model_card(tower, "lab/tower")
    assert row(card, "class") == ["`AlphaCLIPVisionModel`"] and row(card, "geometry") == ["`stretch`"]
    assert row(card, "image size") == ["32 pixels, 4 x 4 patches of 8"]
    assert "trust_remote_code" in row(card, "`*.py`")[0] and "`tokenizer*`" not in card.text


@pytest.mark.parametrize(("strategy", "tokens"), [("default", 16), ("full", 17)])
def test_image_tokens_of_a_llava(tower, strategy, tokens):
    config = tiny_llava_config(tiny_tokenizer(), AlphaCLIPVisionConfig(**tiny_vision_config()))
    config.vision_feature_select_strategy = strategy
    config.save_pretrained(tower)
    assert row(model_card(tower, "lab/llava"), "image tokens") == [f"{tokens}, from hidden state -2"]


@pytest.mark.parametrize("key", ["run_config", "run"])
def test_the_record_without_this_machines_folders(tower, key):
    settings = {"data": ["/home/somebody/vg", "C:\\somebody\\a"], "lora_r": 4, "output_dir": "/home/somebody/x"}
    settings |= {"learning_rate": 2e-5, "max_steps": 9, "num_train_epochs": 3.0, "warmup_steps": "None", "bf16": False}
    settings |= {"fp16": True, "run_name": "somebody"}
    log = [{"loss": 1.5}, {"loss": "0.25"}, {"train_runtime": 3}]
    write_json(tower / "training_record.json", {key: settings, "log": log})
    card = model_card(tower, "lab/tower")
    assert "somebody" not in card.content
    assert row(card, "data") == ["vg, a"] and row(card, "lora_r") == ["4"]
    assert row(card, "learning_rate") == ["2e-05"] and row(card, "max_steps") == ["9"] and row(card, "fp16") == ["True"]
    assert row(card, "loss, first and last logged") == ["1.5, 0.25"]
    assert not any(name in card.text for name in ("num_train_epochs", "warmup_steps", "bf16"))  # ignored, or not set


def test_the_card_has_the_settings_of_a_real_record(tower):
    shutil.copy(EMBEDDED_MODEL / "training_record.json", tower)
    card = model_card(tower, "lab/tower")
    settings = read_json(EMBEDDED_MODEL / "training_record.json")["run"]
    assert row(card, "learning_rate") == [str(settings["learning_rate"])]
    assert row(card, "max_steps") == [str(settings["max_steps"])]


def test_the_embedded_models_scores_are_its_readmes(tower):
    """The judge is the table of the shipped card, which scripts/shapes/score_embedded_model.py printed."""
    (tower / "scores.json").write_text((EMBEDDED_MODEL / "scores.json").read_text())
    card = model_card(tower, "lab/tower")
    shipped = ModelCard.load(EMBEDDED_MODEL / "README.md")
    for measure in next(iter(read_json(EMBEDDED_MODEL / "scores.json").values())):
        assert row(card, measure) == row(shipped, measure)
    results = {result.dataset_config: result.metric_value for result in card.data.eval_results}
    assert "description, box" in results and "description, whole image" not in results
    for measure, value in results.items():
        assert f"{value:.1%}" == row(shipped, measure)[0]
    assert {result.metric_type for result in card.data.eval_results} == {"literal_match"}


def test_scores_of_one_run_and_of_runs_that_differ(tower):
    write_json(tower / "scores.json", {"size": {**SCORE, "blind": 0.25}})  # as --json writes it
    assert row(model_card(tower, "lab/tower"), "size") == ["50.0%", "4", "25.0%"]
    write_json(tower / "scores.json", {"a": {"size": SCORE}, "b": {"size": SCORE, "colour": SCORE}})
    card = model_card(tower, "lab/tower")
    assert row(card, "size") == ["50.0%", "50.0%", "4", ""] and row(card, "colour") == ["", "50.0%", "4", ""]


@pytest.mark.parametrize(
    ("trained", "title"),
    [("LlavaForConditionalGeneration", "LLaVA-1.5"), ("AlphaBlip2ForConditionalGeneration", "BLIP-2")],
)
def test_an_adapter_is_used_as_its_model_is(tmp_path, trained, title):
    adapter = {"base_model_name_or_path": "lab/base", "r": 3, "modules_to_save": None}
    adapter["auto_mapping"] = {"base_model_class": trained}
    write_json(tmp_path / "adapter_config.json", adapter)
    card = model_card(tmp_path, "lab/lora")
    assert card.data.base_model == "lab/base" and card.data.library_name == "peft" and "lora" in card.data.tags
    assert f"A LoRA adapter for {title}" in card.text and "What is this?" in card.text
    assert row(card, "rank") == ["`3`"] and "trained in full" not in card.text


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("scores.json", '{"meteor": 0.3}', "score_embedded_model.py"),
        ("scores.json", '{"a": {"size": {"score": "high", "of": 3}}}', "score_embedded_model.py"),
        ("scores.json", '{"a": {"si', "damaged"),
        ("training_record.json", "[1]", "a JSON object"),
        ("config.json", '{"model_type": "llama"}', "'llama'"),
        ("config.json", '{"model_type": "nothing_known"}', "cannot read"),
        ("config.json", '{"model_type', "cannot read"),
        ("adapter_config.json", '{"r": 3}', "base_model"),
    ],
)
def test_a_file_that_says_something_else(tower, file, text, message):
    (tower / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        model_card(tower, "lab/tower")


def test_what_cannot_be_used_as_the_card_says(tower):
    tiny_llava_config(tiny_tokenizer(), CLIPVisionConfig(**tiny_vision_config())).save_pretrained(tower)
    with pytest.raises(ValueError, match="tower 'clip_vision_model'"):
        model_card(tower, "lab/llava")
    (tower / "preprocessor_config.json").unlink()
    AlphaCLIPVisionConfig(**tiny_vision_config()).save_pretrained(tower)
    with pytest.raises(ValueError, match="no processor"):
        model_card(tower, "lab/tower")


@pytest.mark.parametrize("given", [{"built_from": ["eva"]}, {"built_from": ["clip"], "license": "mit"}])
def test_a_licence_that_says_two_things_or_nothing_known(tower, given):
    with pytest.raises(ValueError, match="eva|one of both"):
        model_card(tower, "lab/tower", **given)


@pytest.mark.parametrize("name", [None, "", "/home/somebody/model", "../model", "a/b/c"])
def test_a_base_model_is_a_hub_id(name, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="hub id"):
        check_base_model(name)
    (tmp_path / "build" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="hub id"):
        check_base_model("build/model")  # reads like one, and is a folder here
    assert check_base_model("lab/model") == "lab/model"
