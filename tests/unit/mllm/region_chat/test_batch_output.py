"""The journal of a batch run: an interruption at any moment changes no byte, and nobody's file is lost."""

import errno
import json
import os
import shutil

import msgspec
import pytest
from PIL import Image

from alpha_clip_commands.region_chat import main as region_chat
from mllm.data.readers.jsonl import region_in
from mllm.inference import RegionChat
from mllm.locks import locked
from mllm.region_chat.batch import read_requests, run_batch
from mllm.region_chat.batch_output import BatchOutput
from mllm.region_chat.records import BatchConfig
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
from tests.processes import Killed


@pytest.mark.parametrize("kept", ["mid line", "whole lines", "nothing", "all", "no file"])
def test_the_output_is_written_again_from_the_journal(tiny_llava_dir, folder, kept, asked):
    write(folder, good(10))
    assert region_chat(arguments(tiny_llava_dir, folder)) == 0
    output = folder / "answers.jsonl"
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    cut = {"mid line": b"".join(lines[:5]) + lines[5][:9], "whole lines": b"".join(lines[:6]), "nothing": b""}
    output.write_bytes(cut.get(kept, whole))
    if kept == "no file":
        output.unlink()
    asked.clear()
    assert region_chat(arguments(tiny_llava_dir, folder)) == 0
    assert output.read_bytes() == whole and not asked


@pytest.mark.parametrize("record", ["[]", "{", "\0", "{}", "", '{"made_by": "somebody", "run": {}}', "[" * 9999])
def test_a_damaged_journal_is_refused(tiny_llava_dir, folder, record, capsys):
    write(folder, good(1))
    assert region_chat(arguments(tiny_llava_dir, folder)) == 0
    (folder / "answers.jsonl.journal.jsonl").write_text(record + "\n")
    assert region_chat(arguments(tiny_llava_dir, folder)) == 2
    assert "answers.jsonl.journal.jsonl is" in capsys.readouterr().err


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
    with pytest.raises(ValueError, match="other request_file"):
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
@pytest.mark.parametrize("retry", [pytest.param(False, marks=pytest.mark.slow), True], ids=["", "--retry-failed"])
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
    assert region_chat(arguments(tiny_llava_dir, folder)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("region-chat: error: ") and "answers.jsonl.journal.jsonl: No space left" in error
    monkeypatch.setattr(os, "write", real)
    assert region_chat(arguments(tiny_llava_dir, folder)) == 0


def test_a_second_process_is_refused_and_named(tiny_llava_dir, folder, capsys):
    write(folder, good(2))
    (folder / "link.jsonl").symlink_to(folder / "answers.jsonl")
    with locked(folder / "answers.jsonl"):
        for name in ("answers.jsonl", "link.jsonl"):
            assert region_chat(arguments(tiny_llava_dir, folder, name)) == 2
            assert f"is being written by process {os.getpid()} on " in capsys.readouterr().err
    assert not (folder / "answers.jsonl").exists()
    assert region_chat(arguments(tiny_llava_dir, folder, "link.jsonl")) == 0
    assert (folder / "link.jsonl").is_symlink() and len(answers(folder)) == 2


@pytest.mark.parametrize("output", ["requests.jsonl", "a.png", "mask.png"])
def test_what_the_command_reads_is_never_its_output(tiny_llava_dir, folder, output, capsys):
    Image.new("L", (60, 40), 255).save(folder / "mask.png")
    write(folder, [*good(2), {"id": "m", "image": "a.png", "region": {"mask": "mask.png"}}])
    for journal in (False, True):  # not even where it seems to be ours
        if journal:
            (folder / f"{output}.journal.jsonl").write_text('{"made_by": "alpha-clip-mllm", "run": {}}\n')
        before = (folder / output).read_bytes()
        assert region_chat(arguments(tiny_llava_dir, folder, output)) == 2
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
    assert region_chat(arguments(tiny_llava_dir, folder, "undisturbed.jsonl")) == 0

    def wrong(*arguments):
        if asked:  # in the second batch
            raise TypeError("ours")
        return region_in(*arguments)

    asked.clear()
    with monkeypatch.context() as patch, pytest.raises(TypeError, match="ours"):
        patch.setattr("mllm.region_chat.batch.region_in", wrong)
        region_chat(arguments(tiny_llava_dir, folder))
    assert len(answers(folder)) == 4
    assert region_chat(arguments(tiny_llava_dir, folder)) == 0
    assert (folder / "answers.jsonl").read_bytes() == (folder / "undisturbed.jsonl").read_bytes() and len(asked) == 2


def test_the_settings_in_a_journal_of_an_earlier_version_are_read():
    earlier = {
        "model": "embedded",
        "weights": "0a1b",
        "quantised": "None",
        "alpha and adapter": "2c3d",
        "dtype": "torch.float32",
        "request file": "requests.jsonl",
        "batch_size": 16,
        "max_new_tokens": 128,
        "version": "0.9.0",
    }
    now = BatchConfig("embedded", "0a1b", "None", "2c3d", "torch.float32", "requests.jsonl", 16, 128, "0.9.0")
    assert BatchConfig.from_json(earlier) == BatchConfig.from_json(msgspec.to_builtins(now)) == msgspec.to_builtins(now)


def test_a_journal_of_an_earlier_version_is_resumed(tiny_llava, folder, asked):
    write(folder, good(3))
    batch(tiny_llava, folder)
    journal, before = folder / "answers.jsonl.journal.jsonl", len(asked)
    text = journal.read_text()
    for new, old in (("quantized", "quantised"), ("alpha_and_adapter", "alpha and adapter"), ("request_", "request ")):
        assert f'"{new}' in text
        text = text.replace(f'"{new}', f'"{old}', 1)
    journal.write_text(text)
    assert batch(tiny_llava, folder) == 0 and len(asked) == before
