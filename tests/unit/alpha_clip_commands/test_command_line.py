"""What all commands share: exit codes, errors of one line, and text that a terminal can show."""

import contextlib
import errno
import io
import json
import logging
import os

import pytest

from alpha_clip_commands import command_line
from alpha_clip_commands.command_line import ArgumentParser, exit_code, json_line, printable, say, say_error
from alpha_clip_commands.region_chat import main as region_chat
from alpha_clip_commands.region_eval import main as region_eval

EVIL = "a\x1b[31mb\x07\x9b2Jc\x7f\u202ed\rz"


def raiser(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "code", "said"),
    [
        (lambda: 0, 0, ""),
        (lambda: 1, 1, ""),
        (raiser(ValueError("bad\n  thing")), 2, "p: error: bad thing\n"),
        (
            raiser(FileNotFoundError(errno.ENOENT, "No such file", f"x{EVIL}")),
            2,
            "p: error: xa[31mb2Jcd z: No such file\n",
        ),
        (raiser(KeyboardInterrupt()), 130, ""),
        (raiser(BrokenPipeError()), 141, ""),
    ],
)
def test_exit_codes(run, code, said, capsys):
    assert exit_code("p", run) == code
    assert capsys.readouterr().err.replace("z:", " z:").replace("  ", " ") == said


def test_programming_errors_keep_their_traceback():
    with pytest.raises(TypeError):
        exit_code("p", raiser(TypeError("ours")))


@pytest.mark.parametrize(("error", "code"), [(BrokenPipeError(), 141), (OSError(errno.ENOSPC, "full"), 2)])
@pytest.mark.parametrize("run", [lambda: command_line.say("x") or 0, lambda: region_chat(["--help"])])
def test_output_that_cannot_be_flushed(monkeypatch, error, code, run):
    class Closed(io.StringIO):
        def flush(self):
            raise error

    monkeypatch.setattr(command_line.sys, "stdout", Closed())
    monkeypatch.setattr(command_line, "_forget_output", lambda: None)
    assert exit_code("p", run) == code


def test_a_process_without_stdout(monkeypatch):
    monkeypatch.setattr(command_line.sys, "stdout", None)
    assert exit_code("p", lambda: 0) == 0


def test_a_closed_pipe_is_quiet_up_to_the_end(capfd):
    """Python's own flush at the end must find something open."""
    read, write = os.pipe()
    os.close(read)
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 1)
        stdout = os.fdopen(1, "w", closefd=False)
        command_line.sys.stdout = stdout
        code = exit_code("p", lambda: say("x" * 100_000) or 0)
        try:
            stdout.flush()
        finally:
            os._exit(code)
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 141
    assert capfd.readouterr().err == ""


def test_control_characters_reach_no_terminal(capsys):
    say(EVIL)
    say_error("p", EVIL)
    captured = capsys.readouterr()
    assert not {*"\x1b\x07\x9b\x7f\u202e\r"} & {*captured.out, *captured.err}
    assert printable("line\n\ttab, größer") == "line\n\ttab, größer"
    record = logging.LogRecord("x", logging.WARNING, "x", 1, "%s", (EVIL,), None)
    assert "\x1b" not in command_line.PrintableFormatter("%(message)s").format(record)


def test_json_says_the_same_without_control_characters():
    line = json_line({"id": EVIL, "word": "größer"})
    assert json.loads(line) == {"id": EVIL, "word": "größer"} and "größer" in line
    assert line == printable(line) and "\\u009b" in line and "\\u007f" in line


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (region_chat, ["--image", "x", "--box", "--ask", "x"], "argument --box: expected one argument"),
        (region_chat, ["--image", "x", "--ask", "-what"], "with an equals sign: --ask=-..."),
        (region_chat, ["--image", "x", "--strength", "0.5", "0.6"], "unrecognized arguments: 0.6"),
        (region_chat, ["--box", "1", "2", "3", "4", "--point", "1,2@3"], "not allowed with argument"),
        (region_chat, ["--nonsense"], "unrecognized arguments: --nonsense; see --help"),
        (region_chat, ["--batch-size", "x"], "expected an integer of up to 32 bits, got 'x'"),
        (region_chat, ["--dtype", EVIL], "invalid choice"),
        (region_eval, [], "expected a command"),
        (region_eval, ["nonsense"], "invalid choice"),
        (region_eval, ["run"], "required: --task"),
        (region_eval, ["compare", "a", "--seed", "x"], "invalid int"),
    ],
)
def test_usage_errors_are_one_line(main, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    assert message in captured.err and ": error: " in captured.err and "\x1b" not in captured.err


def test_other_parsers_get_no_hint_about_boxes(capsys):
    with pytest.raises(SystemExit):
        ArgumentParser(prog="p").parse_args(["3", "4"])
    assert capsys.readouterr().err == "p: error: unrecognized arguments: 3 4; see --help\n"


def test_the_level_of_our_own_logging_can_be_changed(monkeypatch, capsys):
    """A training command begins as every command does, then logs what it does."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    command_line.log_to_terminal(logging.WARNING)
    logging.getLogger("of.a.test").info("not yet")
    command_line.log_to_terminal(logging.INFO)
    logging.getLogger("of.a.test").info("seen")
    root.setLevel(logging.WARNING)  # forgets which levels were enabled
    assert capsys.readouterr().err == "seen\n"


def test_closed_streams_lead_nowhere(processes):
    """A file that is opened next must not get the number of a closed stream."""
    close = "import os, sys; sys.stdin = sys.stdout = sys.stderr = None; [os.close(n) for n in range(3)]"
    source = """
import os, sys
from alpha_clip_commands.command_line import exit_code, say
def run():
    say("x"), print("y", file=sys.stderr)
    return 7 if os.open(os.devnull, os.O_RDONLY) > 2 and sys.stdin.read() == "" else 1
sys.exit(exit_code("p", run))
"""
    process = processes.start(source, before=close)
    assert process.wait() == 7


def test_an_error_that_cannot_be_printed_is_still_exit_code_2(monkeypatch):
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(command_line.sys, "stderr", full)
        monkeypatch.setattr(command_line, "_forget_output", lambda: None)
        say_error("p", "x")
        monkeypatch.undo()
        with pytest.raises(OSError):
            full.flush()
        with contextlib.suppress(OSError):
            full.close()
