"""Batch files: bad requests fail alone, a killed run continues to the same bytes, another run is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

import mllm
from alpha_clip_commands.region_chat import main as region_chat
from mllm.inference import RegionChat
from tests.batch_files import (  # noqa: F401, pytest finds the fixtures here
    BOX,
    answers,
    arguments,
    asked_batches,
    batch,
    good,
    request_folder,
    write,
)
from tests.tiny import noise_image


def test_one_bad_request_never_stops_the_others(tiny_llava_dir, folder, capsys):
    bad = {
        "no image": {"id": "no image", "image": "missing.png", "region": BOX},
        "outside": {"id": "outside", "image": "a.png", "region": {"box": [100, 100, 120, 120]}},
        "no region": {"id": "no region", "image": "a.png"},
        "two regions": {"id": "two regions", "image": "a.png", "region": {**BOX, "whole": True}},
        "long": {"id": "long", "image": "a.png", "region": BOX, "question": "x" * 100_000},
        "typo": {"id": "typo", "image": "a.png", "region": BOX, "questoin": "what?"},
        "number": {"id": "number", "image": "a.png", "region": BOX, "question": 3},
    }
    records = [
        *good(3),
        *bad.values(),
        "{not json",
        "[1]",
        {"id": "whole", "image": "b.png", "region": {"whole": True}},
    ]
    write(folder, records)
    assert region_chat(arguments(tiny_llava_dir, folder)) == 1
    written = answers(folder)
    expected = [0, 1, 2, *bad, "line 11", "line 12", "whole"]
    assert [a["id"] for a in written] == expected
    failed = {a["id"] for a in written if "error" in a}
    assert failed == {*bad, "line 11", "line 12"}
    assert all(set(a) == {"id", "answer"} for a in written if a["id"] not in failed)
    assert "9 request(s) failed" in capsys.readouterr().err


def test_each_request_gets_its_own_region(tiny_llava_dir, folder):
    records = [
        {"id": i, "image": "a.png", "region": r}
        for i, r in enumerate([BOX, {"box": [40, 10, 60, 40]}, {"whole": True}, BOX])
    ]
    write(folder, records)
    assert region_chat(arguments(tiny_llava_dir, folder, tokens=24)) == 0
    texts = [a["answer"] for a in answers(folder)]
    assert texts[0] == texts[3] and len(set(texts)) == 3


def test_another_run_is_refused(tiny_llava_dir, folder, capsys):
    write(folder, good(4))
    assert region_chat(arguments(tiny_llava_dir, folder)) == 0
    before = (folder / "answers.jsonl").read_bytes()
    assert region_chat(arguments(tiny_llava_dir, folder, size=2)) == 2
    assert "other batch_size" in capsys.readouterr().err
    config = tiny_llava_dir / "generation_config.json"
    saved = config.read_text()
    try:
        config.write_text(saved.replace("{", '{"x_changed": 1,', 1))
        assert region_chat(arguments(tiny_llava_dir, folder)) == 2
        assert "other weights" in capsys.readouterr().err
    finally:
        config.write_text(saved)
    (folder / "foreign.jsonl").write_text("mine\n")
    assert region_chat(arguments(tiny_llava_dir, folder, "foreign.jsonl")) == 2
    assert (folder / "foreign.jsonl").read_text() == "mine\n" and (folder / "answers.jsonl").read_bytes() == before


def test_duplicate_ids_are_refused_before_anything_runs(tiny_llava_dir, folder, capsys):
    write(folder, [*good(3), {"id": 1, "image": "a.png", "region": BOX}])
    assert region_chat(arguments(tiny_llava_dir, folder)) == 2
    assert "expected unique ids, but 1" in capsys.readouterr().err
    assert not (folder / "answers.jsonl").exists()


def test_lines_end_at_line_feeds_alone(tiny_llava_dir, folder):
    text = json.dumps({**good(1)[0], "question": "a\u2028b\x85c"}, ensure_ascii=False)
    (folder / "requests.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n")
    assert region_chat(arguments(tiny_llava_dir, folder)) == 0
    assert [a["id"] for a in answers(folder)] == [0]


BROKEN_LINES = {
    "deep": b"[" * 200_000,
    "surrogate in the id": b'{"id": "\\ud800", "image": "a.png", "region": {"whole": true}}',
    "surrogate in the path": b'{"id": 7, "image": "\\ud800.png", "region": {"whole": true}}',
    "surrogate in the question": b'{"id": 7, "image": "a.png", "region": {"whole": true}, "question": "\\ud800"}',
    "no UTF-8": b'{"id": 7, "image": "\xff.png", "region": {"whole": true}}',
    "id of another kind": b'{"id": true, "image": "a.png", "region": {"whole": true}}',
}


@pytest.mark.parametrize("line", BROKEN_LINES.values(), ids=BROKEN_LINES)
def test_a_line_that_cannot_be_read_fails_alone(tiny_llava_dir, folder, line):
    first, last = (json.dumps(record).encode() for record in good(2))
    (folder / "requests.jsonl").write_bytes(b"\n".join([first, line, last]))
    assert region_chat(arguments(tiny_llava_dir, folder)) == 1
    written = answers(folder)
    assert [a["id"] for a in written] == [0, "line 2", 1]
    assert ["error" in a for a in written] == [False, True, False]


def test_whatever_json_a_request_is_it_gets_an_answer_or_an_error(tiny_llava, folder):
    def nested(depth):
        return "[" * depth + "]" * depth

    regions = {
        "nan": '{"box": [NaN, 2, 30, 30]}',
        "infinite": '{"box": [-Infinity, 2, 1e400, 30]}',
        "huge": '{"box": [0, 0, 1, 1' + "0" * 400 + "]}",
        "text": '{"box": ["0", 0, 1, 1]}',
        "nested": '{"box": ' + nested(900) + "}",
        "null": "null",
        "list": "[0, 0, 9, 9]",
        "number": '{"whole": 1}',
        "mask": '{"mask": "missing.png"}',
        "mask of zero": '{"mask": "a\\u0000.png"}',
        "rle": '{"rle": {"size": [40, "60"], "counts": 5}}',
        "strength": '{"whole": true, "strength": "1"}',
        "empty": "{}",
    }
    lines = [f'{{"id": "{name}", "image": "a.png", "region": {region}}}' for name, region in regions.items()]
    images = {
        "image null": "null",
        "image 5": "5",
        "image zero": '"a\\u0000.png"',
        "image long": '"' + "x" * 9999 + '"',
    }
    images |= {"image empty": '""', "image folder": '"."', "image list": '["a.png"]'}
    lines += [f'{{"id": "{name}", "image": {image}, "region": {{"whole": true}}}}' for name, image in images.items()]
    ids = [json.loads(line)["id"] for line in lines if "nested" not in line]
    ids.insert(list(regions).index("nested"), "nested")
    strange = ["\x1b[31mred", "", 10**300, -1, "\u2028"]
    good_ones = [{"id": name, "image": "a.png", "region": BOX, "question": None} for name in strange]
    write(folder, [*lines, *good_ones])
    assert batch(tiny_llava, folder, max_errors=1) == len(lines)
    assert [a["id"] for a in answers(folder)] == [*ids, *strange]
    assert ["answer" in a for a in answers(folder)] == [False] * len(lines) + [True] * len(strange)
    assert all("\n" not in a["error"] for a in answers(folder)[: len(lines)])


def test_failed_requests_are_retried_only_when_asked(tiny_llava_dir, folder, capsys):
    write(folder, [*good(3), {"id": "late", "image": "late.png", "region": BOX}])
    assert region_chat(arguments(tiny_llava_dir, folder)) == 1
    assert "--retry-failed" in capsys.readouterr().err
    before = answers(folder)
    noise_image(60, 40).save(folder / "late.png")
    assert region_chat(arguments(tiny_llava_dir, folder)) == 1
    assert answers(folder) == before and "error" in before[-1]
    assert region_chat([*arguments(tiny_llava_dir, folder), "--retry-failed"]) == 0
    assert answers(folder)[:-1] == before[:-1] and "answer" in answers(folder)[-1]


def test_masks_lie_beside_the_request_file(tiny_llava_dir, folder, tmp_path_factory, monkeypatch):
    mask = np.zeros((40, 60), np.uint8)
    mask[5:20, 10:30] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    regions = [{"mask": "mask.png"}, {"mask": str(folder / "mask.png")}]
    write(folder, [{"id": i, "image": "a.png", "region": region} for i, region in enumerate(regions)])
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert region_chat(arguments(tiny_llava_dir, folder)) == 0
    assert answers(folder)[0]["answer"] == answers(folder)[1]["answer"]


def test_other_alpha_weights_are_another_run(tiny_llava_dir, folder, capsys):
    write(folder, good(2))
    assert region_chat(arguments(tiny_llava_dir, folder)) == 0
    tower = mllm.load(tiny_llava_dir, device="cpu")[0].model.vision_tower
    torch.nn.init.normal_(tower.embeddings.patch_embedding.alpha.weight, std=0.3)
    tower.save_pretrained(folder / "tower")
    flags = ["--alpha-weights", str(folder / "tower")]
    assert region_chat([*arguments(tiny_llava_dir, folder), *flags]) == 2
    assert "other alpha_and_adapter" in capsys.readouterr().err
    assert region_chat([*arguments(tiny_llava_dir, folder, "b.jsonl"), *flags]) == 0


@pytest.mark.parametrize("saved", [None, ["multi_modal_projector"]], ids=["LoRA", "a whole module"])
def test_another_adapter_is_another_run(tiny_llava_dir, folder, capsys, saved):
    write(folder, good(2))
    config = LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=saved)
    torch.manual_seed(1)
    tuned = get_peft_model(mllm.load(tiny_llava_dir, device="cpu")[0], config)
    tuned.save_pretrained(folder / "one")
    with torch.no_grad():  # of the second adapter nothing differs but one tensor
        changed = [p for n, p in tuned.named_parameters() if (".modules_to_save." if saved else ".lora_A.") in n][-1]
        changed += 1
    tuned.save_pretrained(folder / "two")
    assert region_chat([*arguments(tiny_llava_dir, folder), "--adapter", str(folder / "one")]) == 0
    assert region_chat([*arguments(tiny_llava_dir, folder), "--adapter", str(folder / "two")]) == 2
    assert "other alpha_and_adapter" in capsys.readouterr().err
    assert region_chat([*arguments(tiny_llava_dir, folder), "--adapter", str(folder / "one")]) == 0


def test_a_last_line_without_newline_is_a_request(tiny_llava, folder):
    write(folder, good(3))
    batch(tiny_llava, folder)
    path = folder / "requests.jsonl"
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    assert batch(tiny_llava, folder, "b.jsonl") == 0
    assert (folder / "b.jsonl").read_bytes() == (folder / "answers.jsonl").read_bytes()
    assert [a["id"] for a in answers(folder, "b.jsonl")] == [0, 1, 2]


def test_an_image_deleted_in_the_middle_is_the_error_of_its_requests(tiny_llava, folder, monkeypatch):
    write(folder, good(10))
    real = RegionChat.answer_each

    def deleting(self, requests, **options):
        given = real(self, requests, **options)
        (folder / "b.png").unlink(missing_ok=True)
        return given

    monkeypatch.setattr(RegionChat, "answer_each", deleting)
    assert batch(tiny_llava, folder) == 3
    assert [a["id"] for a in answers(folder) if "error" in a] == [5, 7, 9]
    assert all("b.png" in a["error"] for a in answers(folder) if "error" in a)


def test_a_run_of_errors_stops(tiny_llava_dir, folder, capsys, asked):
    bad = [{"id": f"bad {n}", "image": "none.png", "region": BOX} for n in range(21)]
    write(folder, [*good(4), *bad, *good(20)[4:]])
    assert region_chat(arguments(tiny_llava_dir, folder)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "21 of 41 requests failed" in error and "bad 0" in error and "none.png" in error
    assert len(asked) == 2 and len(answers(folder)) == 28  # up to the batch of the 21st
    assert region_chat(arguments(tiny_llava_dir, folder)) == 2 and len(asked) == 2
    assert region_chat([*arguments(tiny_llava_dir, folder), "--max-errors", "0.6"]) == 1
    assert len(answers(folder)) == 41
    shutil.copy(folder / "a.png", folder / "none.png")
    for _ in range(2):
        assert region_chat([*arguments(tiny_llava_dir, folder), "--retry-failed"]) == 0


def test_few_errors_never_stop_a_run(tiny_llava, folder):
    write(folder, [{"id": f"bad {n}", "image": "none.png", "region": BOX} for n in range(19)])
    assert batch(tiny_llava, folder) == 19


def test_an_output_in_the_model_folder_does_not_change_the_model(tmp_path):
    from mllm.fingerprints import directory_fingerprint

    (tmp_path / "config.json").write_text("{}")
    before = directory_fingerprint(str(tmp_path), None)
    (tmp_path / ".answers.json.lock.json").write_text("{}")
    (tmp_path / "run.json").mkdir()
    (tmp_path / "answers.json").write_text("x")
    assert directory_fingerprint(str(tmp_path), None, exclude=(tmp_path / "answers.json").resolve()) == before
    assert directory_fingerprint(str(tmp_path), None) != before
