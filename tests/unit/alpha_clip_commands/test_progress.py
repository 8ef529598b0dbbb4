"""Steps are named while they last, the innermost of them, and by one process."""

import io
import time
from types import SimpleNamespace

import pytest

from alpha_clip_commands import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def stderr(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.02)
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=io.StringIO()))
    return progress.sys


def test_a_long_step_is_named_again_and_again(stderr):
    with progress.step("reading"):
        time.sleep(0.1)
    lines = stderr.stderr.getvalue().splitlines()
    assert len(lines) >= 2 and set(lines) == {"reading ... 0 s"}


def test_a_short_step_is_not(stderr, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 4)
    with progress.step("reading"):
        pass
    assert stderr.stderr.getvalue() == ""


def test_the_innermost_step_is_named(stderr):
    @progress.step("outer")
    def run():
        with progress.step("inner"):
            time.sleep(0.1)

    run()
    assert set(stderr.stderr.getvalue().splitlines()) == {"inner ... 0 s"}


def test_a_terminal_is_left_clean(stderr, monkeypatch):
    monkeypatch.setattr(stderr, "stderr", Terminal())
    with progress.step("reading"):
        time.sleep(0.1)
    text = stderr.stderr.getvalue()
    assert "reading ... 0 s" in text and text.endswith("\r\033[K") and "\n" not in text


def test_other_ranks_are_silent(stderr, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with progress.step("reading"):
        time.sleep(0.05)
    assert stderr.stderr.getvalue() == ""


def test_an_error_ends_the_step(stderr):
    with pytest.raises(ValueError), progress.step("reading"):
        raise ValueError
    assert progress._running == []


def test_a_full_disk_ends_nothing(stderr, monkeypatch):
    def fail(text):
        raise OSError

    monkeypatch.setattr(stderr.stderr, "write", fail)
    with progress.step("reading"):
        time.sleep(0.05)
