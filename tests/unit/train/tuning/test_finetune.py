"""The training entry point: what moves and what does not, what comes out, what is refused."""

import copy
from types import SimpleNamespace

import pytest
import torch

import mllm
from alpha_clip_commands import region_tune
from mllm.data.shapes import visual_genome_layout
from mllm.loading import EMBEDDED_MODEL
from tests.files import read_json
from tests.tensors import changed_tensors
from tests.tiny import build_tiny_blip2, build_tiny_llava, save_model
from tests.training import train, write_splits
from train import finetune
from train.optimizers import MuonWithAdamW

ALPHA = "model.vision_tower.embeddings.patch_embedding.alpha.weight"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_splits(visual_genome_layout, tmp_path_factory.mktemp("shapes"), 4, ("train", "test", "val"))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    return save_model(folder, *build_tiny_llava())


def run(start, data, out, *flags):
    return train(region_tune.main, start, [data], out, "--report_to", "none", *flags)


def moved(start, out):
    before, after = (mllm.load(folder, device="cpu", dtype=torch.float32)[0].state_dict() for folder in (start, out))
    return changed_tensors(before, after)


@pytest.mark.parametrize("optimizer", ["trainer", pytest.param("muon", marks=pytest.mark.slow)])
def test_training_moves_all_that_reaches_the_loss(start, data, tmp_path, optimizer):
    assert run(start, data / "train", tmp_path / "out", "--optimizer", optimizer, "--learning_rate", "1e-2") == 0
    names = moved(start, tmp_path / "out")
    assert ALPHA in names and "lm_head.weight" in names
    everything = mllm.load(start, device="cpu")[0].state_dict().keys()
    # LLaVA reads the last but one layer: what comes after it has no gradient, and weight decay is off by default
    unread = {n for n in everything if "vision_tower.encoder.layers.2." in n or "vision_tower.post_layernorm" in n}
    # softmax ignores what is added to all keys alike, so a key bias has no gradient but rounding
    key_bias = {n for n in everything if n.endswith("k_proj.bias")}
    assert not names & unread
    assert everything - unread - key_bias <= names
    record = read_json(tmp_path / "out" / "training_record.json")
    assert record["run_config"]["optimizer"] == optimizer
    assert record["run_config"]["max_steps"] == 2 and record["run_config"]["data"][0].endswith("train")


def test_only_the_named_parts_move(start, data, tmp_path):
    assert (
        run(
            start, data / "train", tmp_path / "out", "--train_parts", "multi_modal_projector", "--learning_rate", "1e-2"
        )
        == 0
    )
    names = moved(start, tmp_path / "out")
    assert names and all(name.startswith("model.multi_modal_projector.") for name in names)


def test_unknown_parts_are_refused(start, data, tmp_path, capsys):
    assert run(start, data / "train", tmp_path / "out", "--train_parts", "tower") == 2
    assert "train_parts: expected one of vision_tower" in capsys.readouterr().err


def test_blip2_trains_its_parts(data, tmp_path):
    model, processor = build_tiny_blip2("opt")
    model.config.text_config.eos_token_id = 13  # released ones end at a newline
    save_model(tmp_path / "start", model, processor)
    flags = "--train_parts", "query_tokens", "qformer", "--learning_rate", "1e-2"
    assert run(tmp_path / "start", data / "train", tmp_path / "out", *flags) == 0
    names = moved(tmp_path / "start", tmp_path / "out")
    assert "query_tokens" in names and any(name.startswith("qformer.") for name in names)
    assert all(name.startswith(("query_tokens", "qformer.")) for name in names)
    tuned, _ = mllm.load(tmp_path / "out", device="cpu")
    assert tuned.language_model.generation_config.eos_token_id == [13, processor.tokenizer.eos_token_id]


def test_same_seed_same_model(start, data, tmp_path):
    for name in ("a", "b"):
        assert (
            run(start, data / "train", tmp_path / name, "--seed", 3, "--region_input", "mixed", "--max_turns", 2) == 0
        )
    assert not moved(tmp_path / "a", tmp_path / "b")


def test_the_test_split_is_refused(start, data, tmp_path, capsys):
    assert run(start, data / "test", tmp_path / "out") == 2
    assert "expected regions in the split 'train', got data with the splits test" in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_what_the_run_reads_is_not_written_over(start, data, capsys):
    for folder in (start, data / "train"):
        assert run(start, data / "train", folder) == 2
        assert f"{folder} is or contains {folder}, which this command reads" in capsys.readouterr().err
    assert region_tune.main(["--data", str(data / "train"), "--output_dir", str(EMBEDDED_MODEL)]) == 2
    assert "which this command reads" in capsys.readouterr().err


def test_missing_data_is_one_line(start, tmp_path, capsys):
    assert run(start, tmp_path / "nothing", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("region-tune: error:") and "data not found" in error


def muon_step(module, optimizer):
    module(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def small_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4))


def test_muon_state_round_trip():
    model = small_net()
    optimizer = MuonWithAdamW(model, lr=0.01, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    muon_step(model, optimizer)
    assert {group["lr"] for part in optimizer.parts for group in part.param_groups} == {0.005}
    assert scheduler.get_last_lr() == [0.005] * 3  # other weights (none), biases and norms, matrices
    twin = copy.deepcopy(model)
    again = MuonWithAdamW(twin, lr=0.01, weight_decay=0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    muon_step(model, optimizer), muon_step(twin, again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_muon_has_a_learning_rate_for_each_part():
    slow, fast, both = small_net(), small_net(), small_net()
    muon_step(slow, MuonWithAdamW(slow, lr=0.001, weight_decay=0.1))
    muon_step(fast, MuonWithAdamW(fast, lr=0.01, weight_decay=0.1))
    muon_step(both, MuonWithAdamW(both, lr=0.01, weight_decay=0.1, rates={"2.weight": 0.001, "2.bias": 0.001}))
    for name, weight in both.named_parameters():
        expected = slow if name.startswith("2.") else fast
        assert torch.equal(weight, expected.get_parameter(name)), name
    assert not torch.equal(slow[2].weight, fast[2].weight)


@pytest.mark.parametrize("kind", ["matrices alone, as LoRA's", "no matrix"])
def test_muon_trains_what_there_is(kind):
    net = small_net()
    for name, weight in net.named_parameters():
        weight.requires_grad_((name in ("0.weight", "2.weight")) == (kind != "no matrix"))
    before = {name: weight.clone() for name, weight in net.named_parameters()}
    optimizer = MuonWithAdamW(net, lr=0.01)
    muon_step(net, optimizer)
    assert {n for n, w in net.named_parameters() if not torch.equal(w, before[n])} == {
        name for name, weight in net.named_parameters() if weight.requires_grad
    }
    MuonWithAdamW(net, lr=0.01).load_state_dict(optimizer.state_dict())


@pytest.mark.slow
def test_muon_takes_the_recipes_learning_rates(start, data, tmp_path):
    for name, rates in (("slow", ["multi_modal_projector=1e-12"]), ("fast", [])):
        flags = "--optimizer", "muon", "--learning_rate", "1e-2", *(["--learning_rates", *rates] if rates else [])
        assert run(start, data / "train", tmp_path / name, *flags) == 0
    projector = next(name for name in moved(start, tmp_path / "fast") if "projector" in name and "weight" in name)
    before, slow, fast = (
        mllm.load(folder, device="cpu", dtype=torch.float32)[0].state_dict()[projector]
        for folder in (start, tmp_path / "slow", tmp_path / "fast")
    )
    assert (slow - before).abs().max() < 1e-6 < 1e-3 < (fast - before).abs().max()


def test_document_frequencies_are_those_of_the_held_out_split(monkeypatch):
    """CIDEr while training: frozen on the descriptions of val, of every data set; never on those of train."""

    class Index:
        def __init__(self, name):
            self.name = name

        def descriptions(self, split):
            return [f"{self.name} {split} {number}" for number in range(2)]

    counted = []
    monkeypatch.setattr(finetune, "freeze_document_frequency", lambda texts: counted.extend(texts) or "frequency")
    monkeypatch.setattr(finetune, "AnswerScorer", lambda *arguments: arguments)
    train = SimpleNamespace(wordings=["Describe it."], indexes=[Index("a"), Index("b")])
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe it."}]}]
    metrics = SimpleNamespace(eval_metrics=["cider"])
    _, conversations, described, frequency = finetune.build_scorer("processor", train, [[turns]], metrics)
    assert counted == [["a val 0"], ["a val 1"], ["b val 0"], ["b val 1"]]
    assert frequency == "frequency" and described == [True] and conversations == [turns]
