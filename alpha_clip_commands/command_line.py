"""What all commands share: exit codes, one-line errors, and text that cannot change a terminal."""

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

FAILED, BAD_INPUT, INTERRUPTED, CLOSED_PIPE = 1, 2, 128 + 2, 128 + 13  # the last two as a shell reports the signals
LAUNCHER_FLAGS = ("--local_rank=", "--local-rank=")  # what a launcher may put before all other arguments
_LONGEST = 1500  # characters of an error
# a word of a region's numbers: "24,", "-5,3,60,39", ";", "10,20@6"; no option
_NUMBERS = re.compile(r"\s*(?:[-+.]?[.\d]|[,;@*])[-+.\d,;@*eE\s]*")
_INVALID_CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)")  # argparse's words
# C0 without tab and newline, DEL, C1 (an 8-bit escape sequence begins with one), and marks that turn the direction of
# text around
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose options for numbers (`takes_numbers`) take them as they come: in
    several words ("--box 24 3 60 39"), and beginning with a minus.
    """

    def parse_known_args(self, args=None, namespace=None):
        """As in `ArgumentParser`."""
        words = sys.argv[1:] if args is None else list(args)
        actions = self._option_string_actions
        options = {option for option, action in actions.items() if getattr(action, "takes_numbers", False)}
        return super().parse_known_args(_with_numbers_joined(words, options) if options else words, namespace)

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and end with exit code 2; explain how to write values that look like options or lists."""
        commands = next((action for action in self._actions if isinstance(action, argparse._SubParsersAction)), None)
        if commands is not None and message.endswith(f"required: {commands.metavar}"):
            message = f"expected a command, one of {', '.join(commands.choices)}"
        if found := _INVALID_CHOICE.search(message):
            near = difflib.get_close_matches(found[1], re.findall(r"[\w-]+", found[2]), 1)
            message += f"; did you mean {near[0]!r}" if near else ""
        if "expected one argument" in message:
            option = message.removeprefix("argument ").split(":")[0].split("/")[-1]
            message += f" (one that begins with a minus is written with an equals sign: {option}=-...)"
        say_error(self.prog, f"{message}; see --help")
        sys.exit(BAD_INPUT)


def add_command(commands, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """A subcommand whose help shows an example."""
    return commands.add_parser(
        name,
        help=summary,
        description=summary[:1].upper() + summary[1:] + ".",
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _with_numbers_joined(words: list[str], options: set[str]) -> list[str]:
    """The words of a command line; words of numbers after one of `options` become one value, joined to it by "="."""
    joined: list[str] = []
    open_value = False  # whether the last of `joined` takes words of numbers
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
    """What a command returns: its own code, 2 after a one-line message for bad input, 130 after Ctrl-C, 141 (quietly)
    when whoever reads its output has closed the pipe.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # file names may hold bytes that are not text
            stream.reconfigure(errors="backslashreplace")
    if hasattr(sys.stdin, "reconfigure"):  # a line that is not text is an error of that line
        sys.stdin.reconfigure(errors="surrogateescape")
    log_to_terminal(logging.WARNING)
    try:
        try:
            return _exit_code(program, run)
        finally:  # also after argparse's --help, which leaves by SystemExit
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        _forget_output()
        return CLOSED_PIPE
    except OSError as error:  # of the flush: what was printed went to a full disk, say
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
    """Let a stream that the caller has closed lead nowhere. Python has None for it; and the file that is opened next
    would get its number, and with it what libraries in C print.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def check_found(what: str, *paths: str | os.PathLike) -> None:
    """Raise ValueError unless there is something at each of these paths."""
    for path in paths:
        if "\0" in os.fspath(path) or not os.path.exists(path):
            raise ValueError(f"{what} not found: {os.fspath(path)}")


def check_model(name: str | os.PathLike) -> None:
    """Raise ValueError for what can be neither a model directory nor a hub id (NAME or OWNER/NAME)."""
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
    """Let Transformers draw no bars while it reads or writes weights: a `step` names it."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def leave_current_folder() -> None:
    """Take the current folder off the places where Python looks for modules, unless our packages are there: it may have
    a `train.py` of its own. Console scripts do not look there, but DeepSpeed puts it into PYTHONPATH on other nodes.
    """
    try:
        here = os.path.realpath(os.getcwd())
    except FileNotFoundError:  # the folder has been deleted
        return
    if here != os.path.realpath(os.path.join(os.path.dirname(__file__), os.pardir)):
        sys.path[:] = [place for place in sys.path if os.path.realpath(place or os.curdir) != here]


def one_line(error: BaseException) -> str:
    """What an error says, in one line; of a file the system's words without its number."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    # a file name may hold bytes that are not text; as surrogates they could not be written anywhere
    return " ".join(text.split()).encode("utf-8", "backslashreplace").decode() or type(error).__name__


def say_error(program: str, message: str) -> None:
    """Print an error as one line to stderr."""
    message = " ".join(message.split())
    shortened = message[:_LONGEST] + (" ..." if len(message) > _LONGEST else "")
    try:
        print(f"{program}: error: {printable(shortened)}", file=sys.stderr)
    except OSError:  # closed too, or the disk of a log is full; the exit code says what happened
        _forget_output()


def say(text: object = "", file: TextIO | None = None) -> None:
    """Print text that may hold names and words from other people's files."""
    print(printable(str(text)), file=file)


def json_line(record: Any) -> str:
    """JSON in one line that a terminal can show: control characters are escaped, which means the same to a reader."""
    text = json.dumps(record, ensure_ascii=False)
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def printable(text: str) -> str:
    """Text without the control characters that a terminal would obey; newlines and tabs stay."""
    return _CONTROL.sub("", text)


class PrintableFormatter(logging.Formatter):
    """Log records as text that a terminal can show."""

    def format(self, record: logging.LogRecord) -> str:
        """The message, without control characters."""
        return printable(super().format(record))


def log_to_terminal(level: int) -> None:
    """Log to stderr, the message alone. Called again it changes the level; somebody else's logging stays as it is."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler])
    root = logging.getLogger()
    if any(isinstance(other.formatter, PrintableFormatter) for other in root.handlers):
        root.setLevel(level)


def _forget_output() -> None:
    """Discard what is left to print, so that the interpreter's last flush cannot fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            except (OSError, ValueError, AttributeError):  # closed, or no file
                pass


def stopping_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask a run to save and end; SIGHUP only where the system has it."""
    names = ("SIGTERM", "SIGINT", "SIGHUP")
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))
