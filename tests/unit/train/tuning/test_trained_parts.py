"""LoRA: exactly which parameters move, what the adapter holds, that it loads where it was trained and nowhere else."""

import pytest
import torch
from safetensors.torch import load_file

import mllm
from alpha_clip_commands import region_tune
from alpha_clip_commands.training.tuning_arguments import ModelArguments
from mllm.data.shapes import visual_genome_layout
from mllm.loading import load_adapter
from tests.files import read_json
from tests.tensors import changed_tensors
from tests.tiny import build_tiny_blip2, build_tiny_llava, prompt, save_model
from tests.training import train, write_splits
from train import finetune
from train.parts import linear_layers, original_name, parameter_table, part_of
from train.tuning.trained_parts import parts_of, prepare_model

LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_splits(visual_genome_layout, tmp_path_factory.mktemp("shapes"), 4)


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    folders = {}
    for name, (model, processor) in {
        "llava": build_tiny_llava(),
        "opt": build_tiny_blip2("opt"),
        "t5": build_tiny_blip2("t5"),
    }.items():
        folders[name] = tmp_path_factory.mktemp(name)
        save_model(folders[name], model, processor)
    return folders


def tune(start, data, out, *flags):
    splits = (data / "train", data / "val")
    return train(region_tune.main, start, splits, out, "--lora_r", 2, "--learning_rate", "1e-2", *flags)


def weights(start, adapter=None):
    """Every weight as it is used: adapters merged."""
    model, _ = mllm.load(start, device="cpu", dtype="float32")
    if adapter is not None:
        model = load_adapter(model, adapter).merge_and_unload()
    return model.state_dict()


def moved(start, out):
    return changed_tensors(weights(start), weights(start, out))


def adapted(start, prefixes):
    model, _ = mllm.load(start, device="cpu")
    return {f"{name}.weight" for name in linear_layers(model, prefixes)}


@pytest.mark.parametrize(
    "parts",
    [
        *(pytest.param(parts, marks=pytest.mark.slow) for parts in [(), ("multi_modal_projector",)]),
        ("alpha", "multi_modal_projector"),
    ],
)
def test_exactly_these_weights_of_llava_move(starts, data, tmp_path, parts):
    flags = ["--train_parts", *parts] if parts else []
    assert tune(starts["llava"], data, tmp_path, *flags) == 0
    expected = adapted(starts["llava"], ["model.language_model"])
    if "multi_modal_projector" in parts:
        expected |= {f"model.multi_modal_projector.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
    if "alpha" in parts:
        expected |= {"model.vision_tower.embeddings.patch_embedding.alpha.weight"}
    assert {name.split(".")[-2] for name in adapted(starts["llava"], ["model.language_model"])} == LLAMA
    assert moved(starts["llava"], tmp_path) == expected


@pytest.mark.parametrize("family", [pytest.param("opt", marks=pytest.mark.slow), "t5"])
def test_exactly_the_language_model_of_blip2_moves(starts, data, tmp_path, family):
    assert tune(starts[family], data, tmp_path) == 0
    names = adapted(starts[family], ["language_model"])
    assert names and not any("lm_head" in name for name in names)
    assert moved(starts[family], tmp_path) == names


def test_chosen_layers_and_the_tower(starts, data, tmp_path):
    flags = "--lora_targets", "q_proj", "v_proj", "--lora_tower", "true"
    assert tune(starts["llava"], data, tmp_path, *flags) == 0
    both = adapted(starts["llava"], ["model.language_model", "model.vision_tower"])
    wanted = {name for name in both if name.endswith(("q_proj.weight", "v_proj.weight"))}
    # LLaVA reads the last but one layer: the tower's last one has no gradient
    assert moved(starts["llava"], tmp_path) == {n for n in wanted if "vision_tower.encoder.layers.2." not in n}


def test_the_adapter_is_complete_small_and_answers_by_region(starts, data, tmp_path):
    assert tune(starts["llava"], data, tmp_path, "--train_parts", "alpha") == 0
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("lora_A" in name for name in stored) == sum("lora_B" in name for name in stored) == 14
    assert sum(name.endswith("patch_embedding.alpha.weight") for name in stored) == 1 and len(stored) == 29
    model, processor = mllm.load(starts["llava"], adapter=tmp_path, device="cpu")
    assert (tmp_path / "processor_config.json").exists()
    record = read_json(tmp_path / "training_record.json")
    assert record["run_config"]["lora_r"] == 2 and record["skipped_images"] == []
    from mllm.data.readers.visual_genome import read_regions

    one, two = list(read_regions(data / "val"))[:2]
    inputs = [processor(one.open_image(), prompt("What?"), s.regions[0], return_tensors="pt") for s in (one, two)]
    with torch.no_grad():
        logits = [model(**batch).logits for batch in inputs]
    assert not torch.equal(*logits)


def test_parts_have_their_own_learning_rate(starts, data, tmp_path, monkeypatch):
    seen = {}
    original = finetune.ConversationTrainer.create_optimizer

    def spy(self, model=None):
        optimizer = original(self, model)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                seen[names[id(parameter)]] = group["initial_lr"] if "initial_lr" in group else group["lr"]
        return optimizer

    monkeypatch.setattr(finetune.ConversationTrainer, "create_optimizer", spy)
    flags = "--train_parts", "alpha", "multi_modal_projector", "--learning_rates", "alpha=3e-3"
    assert tune(starts["llava"], data, tmp_path, *flags) == 0
    assert {rate for name, rate in seen.items() if "patch_embedding.alpha" in name} == {3e-3}
    assert {rate for name, rate in seen.items() if "patch_embedding.alpha" not in name} == {1e-2}
    assert any("multi_modal_projector" in name for name in seen)


def test_names_and_table():
    model, _ = build_tiny_llava()
    parts = parts_of(model)
    count = sum(parameter.numel() for parameter in model.parameters())
    tuned = prepare_model(model, ModelArguments(lora_r=2, train_parts=["multi_modal_projector", "alpha"]))
    of_part = {}
    for name, parameter in tuned.named_parameters():
        assert "lora_A" not in name or len(parameter) == 2
        if parameter.requires_grad:
            of_part.setdefault(part_of(name, parts), set()).add(original_name(name))
    assert set(of_part) == {"language_model", "multi_modal_projector", "alpha"}
    assert of_part["alpha"] == {"model.vision_tower.embeddings.patch_embedding.alpha.weight"}
    table = parameter_table(tuned, parts).splitlines()
    assert [line.split()[0] for line in table] == ["part", *parts, "all"]
    frozen, lora, trained = (int(number.replace(",", "")) for number in table[-1].split()[1:])
    assert frozen + trained == count
    assert lora == sum(p.numel() for n, p in tuned.named_parameters() if "lora_" in n)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lora_targets": ["query"]}, "lora_targets: expected one of down_proj"),
        ({"train_parts": ["language_model"]}, "cannot be fully trained together with LoRA"),
        ({"train_parts": ["tower"]}, "train_parts: expected one of"),
        ({"learning_rates": ["tower=1e-3"]}, "learning_rates: expected one of"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare_model(build_tiny_llava()[0], ModelArguments(lora_r=2, **arguments))


def test_nf4_trains_and_the_adapter_loads(starts, data, tmp_path):
    pytest.importorskip("bitsandbytes")
    flags = "--load_in", "4bit", "--train_parts", "multi_modal_projector"
    assert tune(starts["llava"], data, tmp_path, *flags) == 0
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in stored.items() if "lora_B" in name)
    model, _ = mllm.load(starts["llava"], adapter=tmp_path, device="cpu")
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 14


@pytest.mark.slow
def test_t5_with_qformer_checkpointed(starts, data, tmp_path):
    """As in the recipe blip2_flant5xl_lora."""
    flags = "--train_parts", "qformer", "language_projection", "--lora_targets", "q", "v", "--gradient_checkpointing"
    assert tune(starts["t5"], data, tmp_path, *flags, "true") == 0
    names = moved(starts["t5"], tmp_path)
    expected = {n for n in adapted(starts["t5"], ["language_model"]) if n.endswith((".q.weight", ".v.weight"))}
    assert expected <= names
    assert {name.split(".")[0] for name in names} == {"language_model", "qformer", "language_projection"}
