"""Batch files: bad requests fail alone, a killed run continues to the same bytes, another run is refused."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

import mllm
from mllm import chat
from mllm.answering import RegionChat
from mllm.batch import read_requests, run_batch
from mllm.batch_output import BatchOutput
from mllm.data.samples import load_image
from mllm.files import locked
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
    return [json.loads(line) for line in (folder / output).read_text().removesuffix("\n").split("\n")]


@pytest.fixture
def asked(monkeypatch):
    """The batches that the model is asked: the boxes of each."""
    batches = []
    real = RegionChat.answers

    def spy(self, requests, **options):
        batches.append([region.data for _, region, _ in requests])
        return real(self, requests, **options)

    monkeypatch.setattr(RegionChat, "answers", spy)
    return batches


def batch(tiny_llava, folder, output="answers.jsonl", **options):
    """A batch run in this process, without loading the model again."""
    requests = folder / "requests.jsonl"
    place = BatchOutput(str(folder / output))
    read = read_requests(str(requests))
    place.check([requests])
    settings = {"model_name": "tiny", "batch_size": 4, "max_new_tokens": 3, **options}
    return run_batch(RegionChat(*tiny_llava), str(requests), read, place, **settings)


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


@pytest.mark.parametrize("kept", ["mid line", "whole lines", "nothing", "all", "no file"])
def test_the_output_is_written_again_from_the_journal(tiny_llava_dir, folder, kept, asked):
    write(folder, good(10))
    assert chat.main(arguments(tiny_llava_dir, folder)) == 0
    output = folder / "answers.jsonl"
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    cut = {"mid line": b"".join(lines[:5]) + lines[5][:9], "whole lines": b"".join(lines[:6]), "nothing": b""}
    output.write_bytes(cut.get(kept, whole))
    if kept == "no file":
        output.unlink()
    asked.clear()
    assert chat.main(arguments(tiny_llava_dir, folder)) == 0
    assert output.read_bytes() == whole and not asked


def test_another_run_is_refused(tiny_llava_dir, folder, capsys):
    write(folder, good(4))
    assert chat.main(arguments(tiny_llava_dir, folder)) == 0
    before = (folder / "answers.jsonl").read_bytes()
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


@pytest.mark.parametrize("record", ["[]", "{", "\0", "{}", "", '{"made_by": "somebody", "run": {}}', "[" * 9999])
def test_a_damaged_journal_is_refused(tiny_llava_dir, folder, record, capsys):
    write(folder, good(1))
    assert chat.main(arguments(tiny_llava_dir, folder)) == 0
    (folder / "answers.jsonl.journal.jsonl").write_text(record + "\n")
    assert chat.main(arguments(tiny_llava_dir, folder)) == 2
    assert "answers.jsonl.journal.jsonl is" in capsys.readouterr().err


def test_failed_requests_are_retried_only_when_asked(tiny_llava_dir, folder, capsys):
    write(folder, [*good(3), {"id": "late", "image": "late.png", "region": BOX}])
    assert chat.main(arguments(tiny_llava_dir, folder)) == 1
    assert "--retry-failed" in capsys.readouterr().err
    before = answers(folder)
    noise_picture(60, 40).save(folder / "late.png")
    assert chat.main(arguments(tiny_llava_dir, folder)) == 1
    assert answers(folder) == before and "error" in before[-1]
    assert chat.main([*arguments(tiny_llava_dir, folder), "--retry-failed"]) == 0
    assert answers(folder)[:-1] == before[:-1] and "answer" in answers(folder)[-1]


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
    assert chat.main([*arguments(tiny_llava_dir, folder), "--adapter", str(folder / "one")]) == 0
    assert chat.main([*arguments(tiny_llava_dir, folder), "--adapter", str(folder / "two")]) == 2
    assert "other alpha and adapter" in capsys.readouterr().err
    assert chat.main([*arguments(tiny_llava_dir, folder), "--adapter", str(folder / "one")]) == 0


def test_an_edited_file_keeps_the_answers_of_unchanged_requests(tiny_llava, folder, asked):
    records = good(10)
    write(folder, [*records, "{not json"])
    assert batch(tiny_llava, folder) == 1
    before = answers(folder)
    changed = {**records[1], "region": {"box": [0, 0, 20, 20]}}
    new = {"id": "new", "image": "b.png", "region": {"box": [1, 1, 9, 9]}}
    edited = [new, changed, json.dumps(records[9], indent=None).replace(": ", " :  "), *records[2:5]]
    write(folder, edited)
    asked.clear()
    assert batch(tiny_llava, folder) == 0
    assert asked == [[(1, 1, 9, 9), (0, 0, 20, 20)]]
    assert [a["id"] for a in answers(folder)] == ["new", 1, 9, 2, 3, 4]
    assert answers(folder)[2:] == [before[9], *before[2:5]]
    asked.clear()
    write(folder, [*records, "{not json"])  # undone
    assert batch(tiny_llava, folder) == 1 and not asked and answers(folder) == before
    write(folder, [*records, "{still not json"])
    assert batch(tiny_llava, folder) == 1 and answers(folder)[:-1] == before[:-1]


def test_an_edited_request_in_another_folder_is_another_run(tiny_llava, folder):
    """Its paths would mean other images."""
    write(folder, good(2))
    batch(tiny_llava, folder)
    shutil.copytree(folder, folder / "copy")
    place = BatchOutput(str(folder / "answers.jsonl"))
    requests = str(folder / "copy" / "requests.jsonl")
    with pytest.raises(ValueError, match="other request file"):
        run_batch(
            RegionChat(*tiny_llava),
            requests,
            read_requests(requests),
            place,
            model_name="tiny",
            batch_size=4,
            max_new_tokens=3,
        )
    assert batch(tiny_llava, folder / "copy") == 0  # moved together, it is the same run


def test_a_last_line_without_newline_is_a_request(tiny_llava, folder):
    write(folder, good(3))
    batch(tiny_llava, folder)
    path = folder / "requests.jsonl"
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    assert batch(tiny_llava, folder, "b.jsonl") == 0
    assert (folder / "b.jsonl").read_bytes() == (folder / "answers.jsonl").read_bytes()
    assert [a["id"] for a in answers(folder, "b.jsonl")] == [0, 1, 2]


@pytest.mark.parametrize("kept", range(0, 300, 13))
def test_half_a_batch_is_never_kept(tiny_llava, folder, kept, asked):
    """The journal cut anywhere after its first line: whole batches stay, and the others are formed as before."""
    write(folder, good(10))
    batch(tiny_llava, folder)
    whole, batches = (folder / "answers.jsonl").read_bytes(), list(asked)
    journal = folder / "answers.jsonl.journal.jsonl"
    content = journal.read_bytes()
    start = content.index(b"\n") + 1
    kept = start + kept * (len(content) - start) // 300
    journal.write_bytes(content[:kept])
    (folder / "answers.jsonl").unlink()
    asked.clear()
    assert batch(tiny_llava, folder) == 0
    assert (folder / "answers.jsonl").read_bytes() == whole
    assert asked == batches[content[start:kept].count(b"\n") :]


@pytest.mark.parametrize("line", ['{"answered": {"a": {"id": 1}}}', "[1]", '{"retry": 3}', '{"unknown": 1}', "\0\0"])
def test_a_damaged_line_of_the_journal_is_named(tiny_llava, folder, line):
    write(folder, good(6))
    batch(tiny_llava, folder)
    journal = folder / "answers.jsonl.journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([*lines[:1], line + "\n", *lines[1:]]))
    before = (folder / "answers.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"answers\.jsonl\.journal\.jsonl is damaged \(line 2"):
        batch(tiny_llava, folder)
    assert (folder / "answers.jsonl").read_bytes() == before


class Killed(BaseException):
    """What the process does not survive."""


class Machine:
    """Stops at the n-th system call that writes: from then on every one fails, and a write leaves half of its bytes."""

    def __init__(self, monkeypatch, at, error):
        self.calls, self.at, self.error = 0, at, error
        for name in ("write", "fsync", "replace", "ftruncate", "rename"):
            monkeypatch.setattr(os, name, self.failing(name, getattr(os, name)))

    def failing(self, name, real):
        def call(*arguments):
            if name == "ftruncate" and not isinstance(self.error, Killed):  # a full disk can be cut
                return real(*arguments)
            self.calls += 1
            if self.at is None or self.calls < self.at:
                return real(*arguments)
            if name == "write" and self.calls == self.at:
                real(arguments[0], arguments[1][: len(arguments[1]) // 2])
            raise self.error

        return call


ERRORS = {"killed": Killed(), "full disk": OSError(errno.ENOSPC, "No space left on device")}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("retry", [False, True], ids=["", "--retry-failed"])
def test_stopped_at_any_moment_and_rerun_it_gives_the_same_bytes(tiny_llava, folder, asked, retry, error):
    """At every system call, of a first run and of a retry after an edit; the batches are the same ones, too."""
    missing = [{"id": f"late {n}", "image": "late.png", "region": BOX} for n in range(3)]
    write(folder, [*missing, *good(7)])
    if retry:
        batch(tiny_llava, folder)
        shutil.copy(folder / "a.png", folder / "late.png")
        write(folder, [*missing, *good(9), {"id": "gone", "image": "gone.png", "region": BOX}])

    place = folder.with_name(f"{folder.name} copy")  # always one: errors name it

    def run(at=None):
        with pytest.MonkeyPatch.context() as patch:
            machine = Machine(patch, at, error)
            return batch(tiny_llava, place, retry_failed=retry), machine

    shutil.copytree(folder, place)
    asked.clear()
    failed, machine = run()
    whole, batches = (place / "answers.jsonl").read_bytes(), list(asked)
    assert machine.calls > 10
    for number in range(1, machine.calls + 1):
        shutil.rmtree(place)
        shutil.copytree(folder, place)
        asked.clear()
        with pytest.raises(type(error)):
            run(number)
        before = len(asked)
        assert batch(tiny_llava, place, retry_failed=retry) == failed
        assert (place / "answers.jsonl").read_bytes() == whole
        assert asked[:before] == batches[:before] and asked[before:] == batches[len(batches) - len(asked[before:]) :]
        assert not [file.name for file in place.iterdir() if file.name.endswith(".tmp")]


def test_a_full_disk_is_one_line_and_exit_code_2(tiny_llava_dir, folder, capsys, monkeypatch):
    write(folder, good(4))
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: (_ for _ in ()).throw(ERRORS["full disk"]))
    assert chat.main(arguments(tiny_llava_dir, folder)) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("region-chat: error: ")
    monkeypatch.setattr(os, "write", real)
    assert chat.main(arguments(tiny_llava_dir, folder)) == 0


def test_a_second_process_is_refused_and_named(tiny_llava_dir, folder, capsys):
    write(folder, good(2))
    (folder / "link.jsonl").symlink_to(folder / "answers.jsonl")
    with locked(folder / "answers.jsonl"):
        for name in ("answers.jsonl", "link.jsonl"):
            assert chat.main(arguments(tiny_llava_dir, folder, name)) == 2
            assert f"is being written by process {os.getpid()} on " in capsys.readouterr().err
    assert not (folder / "answers.jsonl").exists()
    assert chat.main(arguments(tiny_llava_dir, folder, "link.jsonl")) == 0
    assert (folder / "link.jsonl").is_symlink() and len(answers(folder)) == 2


@pytest.mark.parametrize("output", ["requests.jsonl", "a.png", "mask.png"])
def test_what_the_command_reads_is_never_its_output(tiny_llava_dir, folder, output, capsys):
    Image.new("L", (60, 40), 255).save(folder / "mask.png")
    write(folder, [*good(2), {"id": "m", "image": "a.png", "region": {"mask": "mask.png"}}])
    for journal in (False, True):  # not even where it seems to be ours
        if journal:
            (folder / f"{output}.journal.jsonl").write_text('{"made_by": "alpha-clip-mllm", "run": {}}\n')
        before = (folder / output).read_bytes()
        assert chat.main(arguments(tiny_llava_dir, folder, output)) == 2
        assert "is read by this command" in capsys.readouterr().err
        assert (folder / output).read_bytes() == before


def test_what_others_wrote_is_never_replaced(tiny_llava, folder):
    write(folder, good(4))
    batch(tiny_llava, folder)
    output = folder / "answers.jsonl"
    whole = output.read_bytes()
    output.write_bytes(whole + b"my notes\n")
    with pytest.raises(ValueError, match="line 5, was not written by this run"):
        batch(tiny_llava, folder)
    output.write_bytes(whole + b"my not")
    with pytest.raises(ValueError, match="line 5, was not written by this run"):
        batch(tiny_llava, folder)
    output.write_bytes(whole)
    batch(tiny_llava, folder)
    (folder / "answers.jsonl.journal.jsonl").unlink()
    (folder / "answers.jsonl.run.json").write_text("{}")
    with pytest.raises(ValueError, match="an earlier version"):
        batch(tiny_llava, folder)
    assert output.read_bytes() == whole


def test_an_error_of_ours_ends_the_run_and_keeps_the_answers(tiny_llava_dir, folder, monkeypatch, asked):
    write(folder, good(8))
    assert chat.main(arguments(tiny_llava_dir, folder, "undisturbed.jsonl")) == 0

    def wrong(path):
        if asked:  # in the second batch
            raise TypeError("ours")
        return load_image(path)

    asked.clear()
    with monkeypatch.context() as patch, pytest.raises(TypeError, match="ours"):
        patch.setattr("mllm.batch.load_image", wrong)
        chat.main(arguments(tiny_llava_dir, folder))
    assert len(answers(folder)) == 4
    assert chat.main(arguments(tiny_llava_dir, folder)) == 0
    assert (folder / "answers.jsonl").read_bytes() == (folder / "undisturbed.jsonl").read_bytes() and len(asked) == 2


def test_an_image_deleted_in_the_middle_is_the_error_of_its_requests(tiny_llava, folder, monkeypatch):
    write(folder, good(10))
    real = RegionChat.answers

    def deleting(self, requests, **options):
        (folder / "b.png").unlink(missing_ok=True)
        return real(self, requests, **options)

    monkeypatch.setattr(RegionChat, "answers", deleting)
    assert batch(tiny_llava, folder) == 3
    assert [a["id"] for a in answers(folder) if "error" in a] == [5, 7, 9]
    assert all("b.png" in a["error"] for a in answers(folder) if "error" in a)


def test_a_run_of_errors_stops(tiny_llava_dir, folder, capsys, asked):
    bad = [{"id": f"bad {n}", "image": "none.png", "region": BOX} for n in range(21)]
    write(folder, [*good(4), *bad, *good(20)[4:]])
    assert chat.main(arguments(tiny_llava_dir, folder)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "21 of 41 requests failed" in error and "bad 0" in error and "none.png" in error
    assert len(asked) == 2 and len(answers(folder)) == 28  # up to the batch of the 21st
    assert chat.main(arguments(tiny_llava_dir, folder)) == 2 and len(asked) == 2
    assert chat.main([*arguments(tiny_llava_dir, folder), "--max-errors", "0.6"]) == 1
    assert len(answers(folder)) == 41
    shutil.copy(folder / "a.png", folder / "none.png")
    for _ in range(2):
        assert chat.main([*arguments(tiny_llava_dir, folder), "--retry-failed"]) == 0


def test_few_errors_never_stop_a_run(tiny_llava, folder):
    write(folder, [{"id": f"bad {n}", "image": "none.png", "region": BOX} for n in range(19)])
    assert batch(tiny_llava, folder) == 19
