"""Batch files: bad requests fail alone, a killed run continues to the same bytes, another run is refused."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import mllm
from mllm import chat
from tests.tiny import noise_picture

BOX = {"box": [2, 2, 30, 30]}


@pytest.fixture
def folder(tmp_path):
    noise_picture(60, 40).save(tmp_path / "a.png")
    noise_picture(40, 60, seed=1).save(tmp_path / "b.png")
    return tmp_path


def good(count):
    pictures = ("a.png", "b.png")
    return [{"id": i, "image": pictures[i % 2], "region": {"box": [i % 9, 2, 30, 30 - i % 5]}} for i in range(count)]


def write(folder, records):
    path = folder / "requests.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def arguments(model, folder, output="answers.jsonl", size=4, tokens=3):
    flags = ["--model", model, "--batch", folder / "requests.jsonl", "--output", folder / output]
    return [str(flag) for flag in [*flags, "--batch-size", size, "--max-new-tokens", tokens]]


def answers(folder, output="answers.jsonl"):
    return [json.loads(line) for line in (folder / output).read_text().splitlines()]


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
    assert chat.main(arguments(tiny_llava_dir, folder)) == 1
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
    assert chat.main(arguments(tiny_llava_dir, folder, tokens=24)) == 0
    texts = [a["answer"] for a in answers(folder)]
    assert texts[0] == texts[3] and len(set(texts)) == 3


@pytest.mark.parametrize("cut", ["mid line", "mid batch", "torn utf-8", "nothing", "after the end"])
def test_a_stopped_run_continues_to_the_same_bytes(tiny_llava_dir, folder, cut):
    write(folder, good(10))
    assert chat.main(arguments(tiny_llava_dir, folder)) == 0
    whole = (folder / "answers.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    torn = {
        "mid line": b"".join(lines[:5]) + lines[5][:9],
        "mid batch": b"".join(lines[:6]),
        "torn utf-8": b"".join(lines[:4]) + b'{"id": 4, "answer": "\xc3',
        "nothing": b"",
        "after the end": whole,
    }[cut]
    (folder / "answers.jsonl").write_bytes(torn)
    assert chat.main(arguments(tiny_llava_dir, folder)) == 0
    assert (folder / "answers.jsonl").read_bytes() == whole


def test_a_killed_process_continues(tiny_llava_dir, folder):
    write(folder, good(60))
    command = [sys.executable, "-m", "mllm.chat", *arguments(tiny_llava_dir, folder, size=2)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "answers.jsonl").exists() or not (folder / "answers.jsonl").stat().st_size:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len((folder / "answers.jsonl").read_bytes().splitlines()) < 60
    assert chat.main(arguments(tiny_llava_dir, folder, size=2)) == 0
    assert chat.main(arguments(tiny_llava_dir, folder, "undisturbed.jsonl", size=2)) == 0
    assert (folder / "answers.jsonl").read_bytes() == (folder / "undisturbed.jsonl").read_bytes()


def test_another_run_is_refused(tiny_llava_dir, folder, capsys):
    write(folder, good(4))
    assert chat.main(arguments(tiny_llava_dir, folder)) == 0
    before = (folder / "answers.jsonl").read_bytes()
    write(folder, good(5))
    assert chat.main(arguments(tiny_llava_dir, folder)) == 2
    assert "other requests" in capsys.readouterr().err
    write(folder, good(4))
    assert chat.main(arguments(tiny_llava_dir, folder, size=2)) == 2
    assert "other batch_size" in capsys.readouterr().err
    config = tiny_llava_dir / "generation_config.json"
    saved = config.read_text()
    try:
        config.write_text(saved.replace("{", '{"x_changed": 1,', 1))
        assert chat.main(arguments(tiny_llava_dir, folder)) == 2
        assert "other weights" in capsys.readouterr().err
    finally:
        config.write_text(saved)
    (folder / "foreign.jsonl").write_text("mine\n")
    assert chat.main(arguments(tiny_llava_dir, folder, "foreign.jsonl")) == 2
    assert (folder / "foreign.jsonl").read_text() == "mine\n" and (folder / "answers.jsonl").read_bytes() == before


def test_duplicate_ids_are_refused_before_anything_runs(tiny_llava_dir, folder, capsys):
    write(folder, [*good(3), {"id": 1, "image": "a.png", "region": BOX}])
    assert chat.main(arguments(tiny_llava_dir, folder)) == 2
    assert "ids must differ, but 1" in capsys.readouterr().err
    assert not (folder / "answers.jsonl").exists()


def test_lines_end_at_line_feeds_alone(tiny_llava_dir, folder):
    text = json.dumps({**good(1)[0], "question": "a\u2028b\x85c"}, ensure_ascii=False)
    (folder / "requests.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n")
    assert chat.main(arguments(tiny_llava_dir, folder)) == 0
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
    assert chat.main(arguments(tiny_llava_dir, folder)) == 1
    written = answers(folder)
    assert [a["id"] for a in written] == [0, "line 2", 1]
    assert ["error" in a for a in written] == [False, True, False]


@pytest.mark.parametrize("record", ["[]", "{", "\0"])
def test_a_damaged_run_record_is_refused(tiny_llava_dir, folder, record, capsys):
    write(folder, good(1))
    assert chat.main(arguments(tiny_llava_dir, folder)) == 0
    (folder / "answers.jsonl.run.json").write_text(record)
    assert chat.main(arguments(tiny_llava_dir, folder)) == 2
    assert "answers.jsonl.run.json is damaged" in capsys.readouterr().err


def test_a_failed_request_is_not_asked_again(tiny_llava_dir, folder):
    write(folder, [*good(1), {"id": "late", "image": "late.png", "region": BOX}])
    assert chat.main(arguments(tiny_llava_dir, folder)) == 1
    before = (folder / "answers.jsonl").read_bytes()
    noise_picture(60, 40).save(folder / "late.png")
    assert chat.main(arguments(tiny_llava_dir, folder)) == 1
    assert (folder / "answers.jsonl").read_bytes() == before


def test_masks_lie_beside_the_request_file(tiny_llava_dir, folder, tmp_path_factory, monkeypatch):
    mask = np.zeros((40, 60), np.uint8)
    mask[5:20, 10:30] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    regions = [{"mask": "mask.png"}, {"mask": str(folder / "mask.png")}]
    write(folder, [{"id": i, "image": "a.png", "region": region} for i, region in enumerate(regions)])
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert chat.main(arguments(tiny_llava_dir, folder)) == 0
    assert answers(folder)[0]["answer"] == answers(folder)[1]["answer"]


def test_other_alpha_weights_are_another_run(tiny_llava_dir, folder, capsys):
    write(folder, good(2))
    assert chat.main(arguments(tiny_llava_dir, folder)) == 0
    tower = mllm.load(tiny_llava_dir, device="cpu")[0].model.vision_tower
    torch.nn.init.normal_(tower.embeddings.patch_embedding.alpha.weight, std=0.3)
    tower.save_pretrained(folder / "tower")
    flags = ["--alpha-weights", str(folder / "tower")]
    assert chat.main([*arguments(tiny_llava_dir, folder), *flags]) == 2
    assert "other alpha and adapter" in capsys.readouterr().err
    assert chat.main([*arguments(tiny_llava_dir, folder, "b.jsonl"), *flags]) == 0
