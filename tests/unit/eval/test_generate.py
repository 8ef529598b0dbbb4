"""Evaluation runs: what is fed, what is written, and that neither processes nor kills change a byte."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import mllm
from eval.evaluate import supports_no_image
from eval.generate import GenerationSettings, Processes, generate, run
from eval.views import with_other_region
from mllm.data.readers.visual_genome import read_region_questions, read_regions
from mllm.data.shapes import visual_genome_layout
from mllm.inference import RegionChat
from tests.alpha_maps import alpha_map, iou
from tests.files import read_json_lines
from tests.tiny import build_tiny_blip2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    visual_genome_layout.write(folder, 4, 5, "test", progress=False)
    return folder


@pytest.fixture(scope="module")
def samples(data):
    return list(read_regions(data))


@pytest.fixture(scope="module")
def chat():
    return RegionChat(*mllm.load(device="cpu"))


def predictions(folder):
    return read_json_lines(folder / "predictions.jsonl")


def test_the_region_reaches_the_model_with_every_view(chat, samples, data, tmp_path, monkeypatch):
    fed = []
    real = chat.model.generate

    def spy(**inputs):
        fed.append(inputs.get("pixel_values"))
        return real(**inputs)

    monkeypatch.setattr(chat.model, "generate", spy)
    sample = samples[0]
    mask = sample.regions[0].mask(96, 96)
    for name in ("box", "other_region", "whole", "crop", "blur", "red_box", "no_image"):
        fed.clear()
        chosen = with_other_region(samples)[:1] if name == "other_region" else [sample]
        run(chat, chosen, tmp_path / name, GenerationSettings(name), data=data)
        if name == "no_image":
            assert fed[-1] is None
            continue
        alpha = alpha_map(fed[-1][0]).float().numpy() > 0.5
        wanted = {"box": mask, "other_region": samples[1].regions[0].mask(96, 96)}.get(name, np.ones((96, 96))) > 0.5
        assert iou(alpha, wanted) >= 0.95


def test_blip_2_has_no_view_without_an_image(data, samples, tmp_path):
    """Its prompt requires an image: an error before the run for the main view, else the view is omitted."""
    blip2 = RegionChat(*build_tiny_blip2("opt"))
    assert not supports_no_image(blip2) and not (tmp_path / "parts" / "0.jsonl").exists()
    with pytest.raises(ValueError, match="one image per conversation"):
        run(blip2, samples, tmp_path, GenerationSettings("no_image"), data=data)


def test_llava_has_one(chat):
    assert supports_no_image(chat)


def test_records(chat, samples, data, tmp_path):
    settings = GenerationSettings("box", "Name it: {question}", batch_size=4, max_new_tokens=2)
    questions = list(read_region_questions(data))[:5]
    assert run(chat, questions, tmp_path, settings, data=data) == 0
    records = predictions(tmp_path)
    assert [record["id"] for record in records] == [sample.id for sample in questions]
    first = records[0]
    assert first["image"] == "VG_100K/1.png" and first["region"] == questions[0].regions[0].to_json()
    assert first["prompt"] == chat.prompt(f"Name it: {questions[0].question}") and first["references"]
    assert first["meta"]["type"] == "size"


def test_answers_are_those_of_region_chat(chat, samples, data, tmp_path):
    run(chat, samples, tmp_path, GenerationSettings("box", None, batch_size=7), data=data)
    found = [record["prediction"] for record in predictions(tmp_path)]
    assert found == generate(chat, samples, batch_size=7)
    right = sum(p == s.references[0] for p, s in zip(found, samples, strict=True))
    assert right / len(samples) > 0.8


def test_a_cut_answer_says_so(chat, samples, data, tmp_path):
    run(chat, samples[:2], tmp_path / "short", GenerationSettings(max_new_tokens=3), data=data)
    assert all(record["truncated"] for record in predictions(tmp_path / "short"))
    run(chat, samples[:2], tmp_path / "long", GenerationSettings(max_new_tokens=30), data=data)
    assert not any("truncated" in record for record in predictions(tmp_path / "long"))


def test_a_killed_run_goes_on_and_gives_the_same_bytes(chat, samples, data, tmp_path, monkeypatch):
    settings = GenerationSettings("box", None, batch_size=4)
    run(chat, samples, tmp_path / "whole", settings, data=data)
    asked = []
    real = RegionChat.answer_each

    def dying(self, requests, **kwargs):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(requests))
        return real(self, requests, **kwargs)

    monkeypatch.setattr(RegionChat, "answer_each", dying)
    with pytest.raises(KeyboardInterrupt):
        run(chat, samples, tmp_path / "killed", settings, data=data)
    part = tmp_path / "killed" / "parts" / "0.jsonl"
    part.write_bytes(part.read_bytes() + b'{"batch": 2, "answ')  # torn by the kill
    asked.append(None)  # lives from here on
    run(chat, samples, tmp_path / "killed", settings, data=data)
    assert sum(n for n in asked if n) == len(samples)  # nothing twice
    assert (tmp_path / "killed" / "predictions.jsonl").read_bytes() == (
        tmp_path / "whole" / "predictions.jsonl"
    ).read_bytes()


def test_one_unreadable_picture_is_named_and_mended_later(chat, samples, data, tmp_path):
    settings = GenerationSettings("box", None, batch_size=4)
    run(chat, samples, tmp_path / "good", settings, data=data)
    picture = Path(samples[0].image)
    content = picture.read_bytes()
    try:
        picture.write_bytes(content[:200])
        failed = run(chat, samples, tmp_path / "bad", settings, data=data)
        of_picture = [sample.id for sample in samples if sample.image == str(picture)]
        wrong = [record for record in predictions(tmp_path / "bad") if "error" in record]
        assert failed == len(of_picture) and [record["id"] for record in wrong] == of_picture
        assert all("1.png" in record["error"] and "prediction" not in record for record in wrong)
    finally:
        picture.write_bytes(content)
    assert run(chat, samples, tmp_path / "bad", settings, data=data) == 0
    assert (tmp_path / "bad" / "predictions.jsonl").read_bytes() == (
        tmp_path / "good" / "predictions.jsonl"
    ).read_bytes()


def lines_of(part):
    return part.read_text().splitlines(keepends=True)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda lines: [lines[0], lines[1][:20] + "\n", *lines[2:]], "0.jsonl is damaged .line 2"),
        (lambda lines: [*lines, "{}\n"], "0.jsonl is damaged"),
        (lambda lines: ["[1]\n"], "0.jsonl is damaged .line 1"),
        (lambda lines: [lines[0].replace('"prediction"', '"predicted"')], "0.jsonl is damaged"),
        (lambda lines: [lines[0].replace('{"batch": 0', '{"batch": 1')], "another run"),
        (lambda lines: [lines[0].replace('{"batch": 0', '{"batch": 99')], "another run"),
        (lambda lines: [lines[0].replace('{"batch": 0', '{"batch": -1')], "another run"),
        (lambda lines: [json.dumps({**json.loads(lines[0]), "answers": []}) + "\n"], "another run"),
    ],
)
def test_damaged_parts_are_named(chat, samples, data, tmp_path, damage, message):
    settings = GenerationSettings("box", None, batch_size=2, max_new_tokens=2)
    run(chat, samples[:6], tmp_path, settings, data=data)
    part = tmp_path / "parts" / "0.jsonl"
    part.write_text("".join(damage(lines_of(part))))
    before = (tmp_path / "predictions.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message):
        run(chat, samples[:6], tmp_path, settings, data=data)
    assert (tmp_path / "predictions.jsonl").read_bytes() == before


def test_parts_of_another_run_are_refused(chat, samples, data, tmp_path):
    run(chat, samples[:4], tmp_path, GenerationSettings(batch_size=2, max_new_tokens=2), data=data)
    with pytest.raises(ValueError, match="another run"):
        run(chat, samples[:4], tmp_path, GenerationSettings(batch_size=2, max_new_tokens=3), data=data)
    with pytest.raises(ValueError, match="another run"):
        run(chat, samples[4:8], tmp_path, GenerationSettings(batch_size=2, max_new_tokens=2), data=data)


def test_parts_of_a_renamed_view_are_read(chat, samples, data, tmp_path):
    asked = GenerationSettings("wrong", batch_size=2).question(samples[0])
    content = json.dumps([["wrong", None, 2, 64], [[sample.id, asked] for sample in samples[:2]]])
    part = {"batch": 0, "samples": hashlib.sha256(content.encode()).hexdigest()}
    (tmp_path / "parts").mkdir()
    line = json.dumps({**part, "answers": [{"prediction": "first"}, {"prediction": "second", "cut": True}]})
    (tmp_path / "parts" / "0.jsonl").write_text(line + "\n")
    run(chat, samples[:2], tmp_path, GenerationSettings("other_region", batch_size=2), data=data)
    assert [record["prediction"] for record in predictions(tmp_path)] == ["first", "second"]


def test_a_torn_part_of_another_process_is_no_damage(chat, samples, data, tmp_path):
    settings = GenerationSettings(batch_size=2, max_new_tokens=2)
    run(chat, samples[:6], tmp_path, settings, data=data)
    whole = (tmp_path / "predictions.jsonl").read_bytes()
    first, *others = lines_of(tmp_path / "parts" / "0.jsonl")
    (tmp_path / "parts" / "1.jsonl").write_text(first + others[0][:30])
    (tmp_path / "parts" / "0.jsonl").write_text(others[1])
    run(chat, samples[:6], tmp_path, settings, data=data)
    assert (tmp_path / "predictions.jsonl").read_bytes() == whole


def test_an_image_deleted_in_the_middle_is_the_error_of_its_samples(chat, samples, data, tmp_path, monkeypatch):
    gone = Path(samples[-1].image)
    content, real = gone.read_bytes(), RegionChat.answer_each

    def deleting(self, requests, **options):
        gone.unlink(missing_ok=True)
        return real(self, requests, **options)

    monkeypatch.setattr(RegionChat, "answer_each", deleting)
    try:
        failed = run(chat, samples, tmp_path, GenerationSettings(batch_size=4, max_new_tokens=2), data=data)
    finally:
        gone.write_bytes(content)
    wrong = [record for record in predictions(tmp_path) if "error" in record]
    assert failed == len(wrong) == sum(sample.image == str(gone) for sample in samples)
    assert all(gone.name in record["error"] for record in wrong)


def test_an_error_of_ours_is_no_unreadable_image(chat, samples, data, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.generate.apply_view", lambda *arguments: len(None))
    with pytest.raises(TypeError):
        run(chat, samples[:2], tmp_path, GenerationSettings(), data=data)


def lose_a_process():
    """One of two processes dies without a word; the other one waits for it."""
    from alpha_clip_commands.command_line import exit_code

    def body():
        processes = Processes.start()
        if processes.rank == 1:
            os._exit(9)
        with processes.together():
            pass
        return 0

    return exit_code("region-eval", body)


def test_a_killed_process_is_one_line_for_the_others(processes):
    first, second = processes.start_ranks("tests.unit.eval.test_generate:lose_a_process", [])
    assert second.wait() == 9, second.output()
    assert first.wait() == 2, first.output()
    assert "region-eval: error: another process of the run failed; see its error" in first.output()
    assert "rerun the same command to resume" in first.output() and "Traceback" not in first.output()


def test_an_own_failure_comes_before_a_lost_process(monkeypatch):
    def gone(*_):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")

    monkeypatch.setattr(torch.distributed, "all_gather_object", gone)
    with pytest.raises(ValueError, match="own"), Processes(0, 2).together():
        raise ValueError("own")
    with pytest.raises(OSError, match="another process of the run failed"), Processes(0, 2).together():
        pass
