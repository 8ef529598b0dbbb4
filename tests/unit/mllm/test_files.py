"""Writing: whole or not at all, only over what this project wrote, one process at a time."""

import errno
import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import filelock
import pytest
import torch
from filelock import SoftFileLock
from safetensors.torch import save_file

from mllm import files, folders
from mllm.files import check_file, check_replaceable, made_by, replacing_file, write_file, write_json
from mllm.folders import MARKER, check_folder, check_new, claim_folder, replacing_folder
from mllm.locks import locked
from tests.files import read_json

LOOP = "circular"


def build(path, content="new", kind="test", **kwargs):
    with replacing_folder(path, kind, **kwargs) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text(content)


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture
def foreign(tmp_path):
    folder = tmp_path / "thesis"
    (folder / "chapters").mkdir(parents=True)
    (folder / "chapters" / "1.tex").write_text("years of work")
    return folder


# files


def test_a_file_is_written_whole_and_keeps_its_mode(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"made_by": made_by("x"), "name": "half a pair: \ud800", "word": "größer"})
    assert read_json(path)["name"] == "half a pair: \ud800" and "größer" in path.read_text("utf-8")
    assert path.stat().st_mode & 0o777 == 0o666 & ~files.umask()
    path.chmod(0o600)
    assert path.read_text("utf-8").count("\n") == 5  # to be read by people, too
    write_json(path, {})
    assert path.stat().st_mode & 0o777 == 0o600 and [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError) as raised:
        with replacing_file(path) as partial:
            partial.write_text("new")
            if call == "write":
                full()
            monkeypatch.setattr(os, call, full)
    monkeypatch.undo()
    assert files.one_line(raised.value) == f"{path}: No space left on device"
    assert tree(tmp_path) == {"a.txt": b"old"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "got an empty one"),
        (".", "is a folder"),
        ("..", "is a folder"),
        ("/", "is a folder"),
        ("folder", "is a folder"),
        ("folder/", "is a folder"),
        ("new/", "expected a file name"),
        ("no/such/file", "folder not found"),
        ("file/below", "folder not found"),
        (LOOP, "cannot write"),
        (f"{LOOP}/below", "cannot write"),
        ("read_only", "read-only"),
        ("/dev/null", "not a regular file"),
        ("pipe", "not a regular file"),
        ("a\0b", "cannot write"),
        ("x" * 300, "cannot write"),
    ],
)
def test_where_no_file_can_be(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "read_only").touch(mode=0o444)
    (tmp_path / LOOP).symlink_to(LOOP)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=message) as raised:
        check_file(name)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError):
        write_file(name, "x")
    assert (tmp_path / LOOP).is_symlink() and Path("/dev/null").is_char_device()


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127, os.fsdecode(b"caf\xe9"), "with space", "-x", "[a]*?"])
def test_every_name_that_a_system_takes(tmp_path, name):
    write_file(tmp_path / name, "new")
    write_file(tmp_path / name, "newer")
    build(tmp_path / "folders" / name)
    build(tmp_path / "folders" / name, "newer")
    with locked(tmp_path / name):
        pass
    assert tree(tmp_path)[name] == b"newer"
    assert sorted(os.listdir(tmp_path)) == sorted([name, "folders"]) and os.listdir(tmp_path / "folders") == [name]


def test_a_link_stays_and_what_it_names_is_written(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    os.link(tmp_path / "real", tmp_path / "same")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    assert (tmp_path / "same").read_text() == "old"  # another name of the old content
    (tmp_path / "broken").symlink_to("later")
    write_file(tmp_path / "broken", "new")
    assert (tmp_path / "later").read_text() == "new"


@pytest.mark.parametrize(
    ("content", "kind", "ours"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR....tEXtSoftware\0" + made_by("a").encode(), "a", True),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR....tEXtSoftware\0" + made_by("b").encode(), "a", False),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR....tEXtSoftware\0GIMP", None, False),
        (f'<html><meta name="generator" content="{made_by("a")}">'.encode(), "a", True),
        (json.dumps({"made_by": made_by("a")}).encode(), "a", True),
        (json.dumps({"made_by": made_by("ab")}).encode(), "a", False),
        (json.dumps({"made_by": made_by("a")}).encode(), None, True),
        (json.dumps({"big": "x" * 9000, "made_by": made_by("a")}).encode(), "a", True),
        (b"alpha-clip-mllm==0.1.0\n", None, False),  # a list of packages
        (b'name = "alpha-clip-mllm"', None, False),
        (b"the story of made_by", None, False),
        (b"", "a", True),  # nothing can be lost
    ],
)
def test_only_a_file_with_the_marker_is_replaced(tmp_path, content, kind, ours):
    path = tmp_path / "file"
    path.write_bytes(content)
    if ours:
        check_replaceable(path, kind=kind)
    else:
        with pytest.raises(ValueError, match="was not written by this command"):
            check_replaceable(path, kind=kind)
    os.link(path, tmp_path / "source")
    with pytest.raises(ValueError, match="is read by this command"):
        check_replaceable(path, kind=kind, reads=[tmp_path / "no", tmp_path / "source"])


# folders


def test_a_folder_is_replaced_by_its_own_kind_alone(tmp_path):
    out = tmp_path / "new" / "out"
    build(out)
    first = tree(out)
    assert json.loads(first[MARKER]) == {"made_by": "alpha-clip-mllm", "kind": "test", "files": ["sub/a.txt"]}
    build(out)
    assert tree(out) == first and [path.name for path in out.parent.iterdir()] == ["out"]
    with pytest.raises(ValueError, match="was not written by this command"):
        build(out, kind="other")
    for added in ("sub/mine.txt", "mine/", "link"):
        path = out / added
        path.mkdir() if added.endswith("/") else path.symlink_to("/tmp") if added == "link" else path.touch()
        with pytest.raises(ValueError, match="contains files that this command did not write"):
            build(out, "newer")
        path.rmdir() if added.endswith("/") else path.unlink()
    assert tree(out) == first


@pytest.mark.parametrize("name", ["thesis", "thesis/", "thesis/.", ".", "..", "/", "", "link", "file", LOOP, "file/x"])
def test_what_is_not_ours_is_refused(tmp_path, foreign, monkeypatch, name):
    monkeypatch.chdir(foreign.parent)
    (tmp_path / "link").symlink_to(foreign)
    (tmp_path / "file").write_text("x")
    (tmp_path / LOOP).symlink_to(LOOP)
    (tmp_path / "thesis.partial").mkdir()
    (tmp_path / ".thesis.x.partial").mkdir()
    before = tree(tmp_path)
    with pytest.raises((ValueError, OSError)) as raised:
        build(name)
    assert "\n" not in str(raised.value) and tree(tmp_path) == before


def test_a_damaged_or_copied_marker_protects_nothing_else(tmp_path, foreign):
    build(tmp_path / "out")
    for content in ((tmp_path / "out" / MARKER).read_text(), "{", "[]", "[" * 100_000, '{"made_by": "somebody"}'):
        (foreign / MARKER).write_text(content)
        with pytest.raises(ValueError, match="wrote|written|write"):
            check_folder(foreign, "test")


def test_source_and_its_parents_are_refused(tmp_path):
    source = tmp_path / "a" / "data"
    build(source)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for out in (source, tmp_path / "a", tmp_path / "link", source / ".." / "data"):
        with pytest.raises(ValueError, match="is or contains"):
            check_folder(out, "test", reads=[source])
    build(source / "inside", reads=[source])
    assert (source / "sub").exists()


def test_empty_folders_and_those_of_earlier_versions(tmp_path, foreign):
    (tmp_path / "empty").mkdir()
    build(tmp_path / "empty")
    build(foreign, known=lambda folder: (folder / "chapters" / "1.tex").exists())
    assert sorted(tree(foreign)) == [MARKER, "sub", "sub/a.txt"]


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    build(out, "old")
    with pytest.raises(KeyError):
        with replacing_folder(out, "test") as folder:
            (folder / "half").touch()
            raise KeyError("x")
    assert (out / "sub" / "a.txt").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("killed_at", [0, 1, 2])
def test_a_kill_while_folders_change_places(tmp_path, monkeypatch, killed_at):
    """After the old one is away the next command puts it back, even if it then fails."""
    out = tmp_path / "out"
    build(out, "old")
    rename, calls = os.rename, []

    def killing(source, target):
        calls.append(source)
        if len(calls) > killed_at:
            raise SystemExit  # as if the process ended here: what it would do next fails too
        rename(source, target)

    monkeypatch.setattr(os, "rename", killing)
    monkeypatch.setattr(folders.shutil, "rmtree", lambda *args, **kwargs: None)
    if killed_at < 2:
        with pytest.raises(SystemExit):
            build(out)
    else:
        build(out)
    monkeypatch.undo()
    with pytest.raises(KeyError), replacing_folder(out, "test"):
        raise KeyError
    assert (out / "sub" / "a.txt").read_text() == ("old" if killed_at < 2 else "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    out = tmp_path / "out"
    build(out, "old")
    rename = os.rename

    def fails_for_the_new_one(source, target):
        if str(source).endswith(".partial") and not str(source).endswith(".old.partial") and target == out:
            raise OSError(errno.EIO, "I/O error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails_for_the_new_one)
    with pytest.raises(OSError, match="I/O"):
        build(out)
    assert (out / "sub" / "a.txt").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_new_means_that_nothing_is_there(tmp_path):
    build(tmp_path / "model", new=True)
    assert sorted(tree(tmp_path / "model")) == ["sub", "sub/a.txt"]  # it is never replaced and needs no marker
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "empty").mkdir()
    for name in ("model", "broken", "empty"):
        with pytest.raises(ValueError, match="exists; choose a new name"):
            check_new(tmp_path / name)
        with pytest.raises(ValueError, match="exists; choose a new name"):
            build(tmp_path / name, new=True)


def test_a_folder_that_grows_is_claimed_once(tmp_path, foreign):
    claim_folder(tmp_path / "run", "run")
    (tmp_path / "run" / "checkpoint").mkdir()
    claim_folder(tmp_path / "run", "run")
    with pytest.raises(ValueError, match="was not written by this command"):
        claim_folder(tmp_path / "run", "other")
    with pytest.raises(ValueError, match="was not written by this command"):
        claim_folder(foreign, "run")
    claim_folder(foreign, "run", known=lambda folder: True)


def test_a_mount_point_and_a_read_only_folder_are_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir(mode=0o555)
    with pytest.raises(ValueError, match="read-only"):
        check_folder(tmp_path / "out", "test")
    (tmp_path / "out").chmod(0o755)
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(ValueError, match="mount point"):
        check_folder(tmp_path / "out", "test")


# locks


def test_the_second_process_is_told_who_writes(tmp_path):
    with locked(tmp_path / "out"):
        said = multiprocessing.get_context("fork").SimpleQueue()

        def second():
            try:
                with locked(tmp_path / "out"):
                    said.put("not refused")
            except ValueError as error:
                said.put(str(error))

        process = multiprocessing.get_context("fork").Process(target=second)
        process.start()
        process.join()
        assert f"is being written by process {os.getpid()} on {os.uname().nodename}" in said.get()
        for name in ("out", "./out", "out/"):
            with pytest.raises(ValueError, match=f"process {os.getpid()} on"), locked(f"{tmp_path}/{name}"):
                pass
        (tmp_path / "link").symlink_to("out")
        with pytest.raises(ValueError, match="is being written"), locked(tmp_path / "link"):
            pass
    (tmp_path / "link").unlink()
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "out"):
        pass


@pytest.mark.parametrize("backend", [filelock.FileLock, SoftFileLock], ids=["fcntl", "no fcntl"])
def test_a_killed_process_holds_nothing(tmp_path, monkeypatch, backend):
    """Its children, as a loader's workers are, may live on."""
    monkeypatch.setattr(filelock, "FileLock", backend)
    context = multiprocessing.get_context("fork")
    ready = context.SimpleQueue()

    def worker():
        ready.put(os.getpid())
        time.sleep(20)

    def hold():
        lock = locked(tmp_path / "out")
        lock.__enter__()
        for _ in range(2):
            context.Process(target=worker).start()
        time.sleep(20)

    holder = context.Process(target=hold)
    holder.start()
    workers = [ready.get(), ready.get()]
    with pytest.raises(ValueError, match=f"process {holder.pid} on"), locked(tmp_path / "out"):
        pass
    holder.kill()
    holder.join()
    with locked(tmp_path / "out"):
        pass
    for pid in workers:
        os.kill(pid, signal.SIGKILL)  # they were alive
    assert not list(tmp_path.glob(".out*"))


def test_a_child_that_ends_does_not_release_its_parents_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    with locked(tmp_path / "out"):
        child = context.Process(target=lambda: None)
        child.start()
        child.join()
        with pytest.raises(ValueError, match=f"process {os.getpid()} on"), locked(tmp_path / "out"):
            pass


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / ".out.lock"))

    monkeypatch.setattr(filelock.FileLock, "acquire", denied)
    with (
        pytest.raises(ValueError, match=r"cannot write .*out: .*\.out\.lock: Permission denied"),
        locked(tmp_path / "out"),
    ):
        pass


@pytest.mark.parametrize("content", [None, "{", '{"pid": "x"}', "[]"])
def test_a_lock_whose_holder_cannot_be_read(tmp_path, content):
    with locked(tmp_path / "out"):
        holder = tmp_path / ".out.lock.json"
        holder.unlink() if content is None else holder.write_text(content)
        with pytest.raises(ValueError, match="another process"), locked(tmp_path / "out"):
            pass


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize("limit", [0, 4000, 5000])
def test_weights_on_a_full_disk_are_one_error_and_leave_nothing(tmp_path, name, limit):
    """torch and safetensors raise a RuntimeError and an error of their own there."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    tensors = {"a": torch.zeros(5000), "b": torch.zeros(10)}
    write = torch.save if name == "x.pt" else save_file
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    try:
        with pytest.raises(OSError, match=r"is the disk full\?|File too large"), replacing_file(tmp_path / name) as out:
            write(tensors, out)
        with (
            pytest.raises(OSError, match=r"is the disk full\?|File too large"),
            replacing_folder(tmp_path / "new", "model", new=True) as folder,
        ):
            write(tensors, folder / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert not list(tmp_path.iterdir())


def test_other_runtime_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="a mistake"), replacing_file(tmp_path / "x"):
        raise RuntimeError("a mistake")


def test_a_folder_killed_while_it_was_claimed_is_claimed_again(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "..made_by.json.0123abcd.tmp").write_text("{")
    claim_folder(out, "evaluation")
    (out / ".made_by.json").unlink()
    (out / ".mine.0123abcd.tmp").write_text("x")
    with pytest.raises(ValueError, match="not written by this command"):
        claim_folder(out, "evaluation")


def test_what_a_killed_writer_left_is_removed_under_the_lock_and_nothing_else(tmp_path):
    left = [".answers.jsonl.0123abcd.tmp", "..answers.jsonl.lock.json.0123abcd.tmp"]
    others = [".answers.jsonl.tmp", ".answers.0123abcd.tmp", ".other.jsonl.0123abcd.tmp", "answers.jsonl.0123abcd.tmp"]
    for name in [*left, *others]:
        (tmp_path / name).write_text("half")
    (tmp_path / ".answers.jsonl.89abcdef.tmp").mkdir()
    with locked(tmp_path / "answers.jsonl"):
        assert not any((tmp_path / name).exists() for name in left)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*others, ".answers.jsonl.89abcdef.tmp"])
    run = tmp_path / "run"
    run.mkdir()
    (run / "..lock.json.0123abcd.tmp").write_text("half")
    with locked(run, inside=True):
        assert sorted(file.name for file in run.iterdir()) == [".lock", ".lock.json"]
