"""Parser, exit codes, one-line errors and terminal output, shared by all commands."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

FAILED, BAD_INPUT, INTERRUPTED, CLOSED_PIPE = 1, 2, 128 + 2, 128 + 13  # the last two as shells report the signals
LAUNCHER_FLAGS = ("--local_rank=", "--local-rank=")  # arguments that launchers add in front
_MAX_ERROR = 1500  # characters of an error message
# a word of a region's numbers, such as "24,", "-5,3,60,39", ";" or "10,20@6", but not an option
_NUMBERS = re.compile(r"\s*(?:[-+.]?[.\d]|[,;@*])[-+.\d,;@*eE\s]*")
_INVALID_CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)")  # argparse's message
# C0 without tab and newline, DEL, C1 (which starts 8-bit escape sequences), and marks that change the text direction
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class ArgumentParser(argparse.ArgumentParser):
    """A parser with one-line errors. Options marked `takes_numbers` accept several words ("--box 24 3 60 39") and
    values that begin with a minus.
    """

    def parse_known_args(self, args=None, namespace=None):
        """As in `ArgumentParser`."""
        words = sys.argv[1:] if args is None else list(args)
        actions = self._option_string_actions
        options = {option for option, action in actions.items() if getattr(action, "takes_numbers", False)}
        return super().parse_known_args(_with_numbers_joined(words, options) if options else words, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the error with a hint, and exit with code 2."""
        commands = next((action for action in self._actions if isinstance(action, argparse._SubParsersAction)), None)
        if commands is not None and message.endswith(f"required: {commands.metavar}"):
            message = f"expected a command, one of {', '.join(commands.choices)}"
        if found := _INVALID_CHOICE.search(message):
            near = difflib.get_close_matches(found[1], re.findall(r"[\w-]+", found[2]), 1)
            message += f"; did you mean {near[0]!r}" if near else ""
        if "expected one argument" in message:
            option = message.removeprefix("argument ").split(":")[0].split("/")[-1]
            message += f" (write a value that begins with a minus with an equals sign: {option}=-...)"
        say_error(self.prog, f"{message}; see --help")
        sys.exit(BAD_INPUT)


def add_command(commands, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """Add a subcommand whose help ends with an example."""
    return commands.add_parser(
        name,
        help=summary,
        description=summary[:1].upper() + summary[1:] + ".",
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _with_numbers_joined(words: list[str], options: set[str]) -> list[str]:
    """Join the words of numbers after one of `options` into one value, "--option=value"."""
    joined: list[str] = []
    open_value = False  # whether the last of `joined` accepts further numbers
    for place, word in enumerate(words):
        if word == "--":
            return [*joined, *words[place:]]
        option, equals, value = word.partition("=")
        if open_value and _NUMBERS.fullmatch(word):
            joined[-1] += word if joined[-1].endswith("=") else f" {word}"
            continue
        open_value = option in options and bool(equals and _NUMBERS.fullmatch(value))
        if word in options and place + 1 < len(words) and _NUMBERS.fullmatch(words[place + 1]):
            word, open_value = f"{word}=", True
        joined.append(word)
    return joined


def exit_code(program: str, run: Callable[[], int]) -> int:
    """Run a command and return its exit code: that of `run`, 2 with a one-line message for invalid input, 130 after
    Ctrl-C, or 141 without a message if the reader of its output has closed the pipe.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # file names may contain undecodable bytes
            stream.reconfigure(errors="backslashreplace")
    if hasattr(sys.stdin, "reconfigure"):  # an undecodable line is an error of that line only
        sys.stdin.reconfigure(errors="surrogateescape")
    log_to_terminal(logging.WARNING)
    try:
        try:
            return _exit_code(program, run)
        finally:  # also after argparse's --help, which raises SystemExit
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        _forget_output()
        return CLOSED_PIPE
    except OSError as error:  # from the flush, such as output redirected to a full disk
        _forget_output()
        say_error(program, f"cannot print the output: {one_line(error)}")
        return BAD_INPUT


def _exit_code(program: str, run: Callable[[], int]) -> int:
    try:
        return run()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        say_error(program, one_line(error))
        return BAD_INPUT


def _open_closed_streams() -> None:
    """Redirect streams that the caller has closed to the null device. Python sets them to None, and the next file that
    is opened would get their descriptor, and with it the output of C libraries.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def check_found(what: str, *paths: str | os.PathLike) -> None:
    """Raise ValueError unless all of these paths exist."""
    for path in paths:
        if "\0" in os.fspath(path) or not os.path.exists(path):
            raise ValueError(f"{what} not found: {os.fspath(path)}")


def check_model(name: str | os.PathLike) -> None:
    """Raise ValueError unless `name` is a model directory or can be a hub id (NAME or OWNER/NAME)."""
    text = os.fspath(name)
    if os.path.isdir(text) and not os.path.isfile(os.path.join(text, "config.json")):
        raise ValueError(f"expected a model directory, got {text} without a config.json")
    if os.path.isdir(text):
        return
    if not text.strip() or "\0" in text:
        raise ValueError(f"expected a model directory or a hub id, got {text!r}")
    if os.path.exists(text):
        raise ValueError(f"expected a model directory or a hub id, got {text}, which is not a directory")
    if os.path.isabs(text) or text.startswith((".", "~")) or text.count("/") > 1 or "\\" in text:
        raise ValueError(f"expected a model directory or a hub id; directory not found: {text}")


def hide_loading_bars() -> None:
    """Turn off Transformers' progress bars for loading and saving weights; a `step` reports it instead."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def leave_current_folder() -> None:
    """Remove the current folder from `sys.path` unless it contains our packages: it may contain another `train.py`.
    Console scripts do not add it, but DeepSpeed puts it into PYTHONPATH on other nodes.
    """
    try:
        here = os.path.realpath(os.getcwd())
    except FileNotFoundError:  # the folder has been deleted
        return
    if here != os.path.realpath(os.path.join(os.path.dirname(__file__), os.pardir)):
        sys.path[:] = [place for place in sys.path if os.path.realpath(place or os.curdir) != here]


def one_line(error: BaseException) -> str:
    """The message of an error in one line; for a file, its name and the system's message without the error number."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    # undecodable bytes of a file name are surrogates, which cannot be encoded
    return " ".join(text.split()).encode("utf-8", "backslashreplace").decode() or type(error).__name__


def say_error(program: str, message: str) -> None:
    """Print an error as one line to stderr."""
    message = " ".join(message.split())
    shortened = message[:_MAX_ERROR] + (" ..." if len(message) > _MAX_ERROR else "")
    try:
        print(f"{program}: error: {printable(shortened)}", file=sys.stderr)
    except OSError:  # closed as well, or a log on a full disk; the exit code reports the failure
        _forget_output()


def say(text: object = "", file: TextIO | None = None) -> None:
    """Print text that may contain untrusted names or content, without control characters."""
    print(printable(str(text)), file=file)


def json_line(record: Any) -> str:
    """JSON in one line, with control characters escaped so that a terminal can show it."""
    text = json.dumps(record, ensure_ascii=False)
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def printable(text: str) -> str:
    """Text without control characters, except newlines and tabs."""
    return _CONTROL.sub("", text)


class PrintableFormatter(logging.Formatter):
    """Formats log records without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """The formatted message."""
        return printable(super().format(record))


def log_to_terminal(level: int) -> None:
    """Log messages to stderr. A second call changes the level; an existing logging configuration is not changed."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler])
    root = logging.getLogger()
    if any(isinstance(other.formatter, PrintableFormatter) for other in root.handlers):
        root.setLevel(level)


def _forget_output() -> None:
    """Discard unprinted output, so that the interpreter's final flush cannot fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            except (OSError, ValueError, AttributeError):  # closed, or not a file
                pass


def stopping_signals() -> tuple[signal.Signals, ...]:
    """The signals on which a run saves and exits; SIGHUP if the system has it."""
    names = ("SIGTERM", "SIGINT", "SIGHUP")
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))
