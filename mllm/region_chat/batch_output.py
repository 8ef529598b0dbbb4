"""The answers of a batch file: the output, written whole at the end of a run, and its journal.

The journal (`OUTPUT.journal.jsonl`) holds every answer under the digest of its request, as soon as its batch is
answered. From it an interrupted run resumes, and an edited batch file keeps the answers of its unchanged requests. Its
lines, in the order of events: the settings of the run; `answered`, a batch; `retry`, failed requests that are to be
answered again; `ended`, the end of a run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from mllm.files import MADE_BY, check_file, write_file, write_json
from mllm.fingerprints import with_current_keys
from mllm.resume import expect_same_run, journal, read_journal


class Entry(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """A line of the output: the answer to a request, or why it failed."""

    id: str | int
    answer: str | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError unless there is an answer or an error."""
        if (self.answer is None) == (self.error is None):
            raise ValueError("expected an answer or an error")

    def to_line(self) -> str:
        """As JSON in one line."""
        return json.dumps(msgspec.to_builtins(self), ensure_ascii=False) + "\n"


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    """A line of the journal; one of its fields is set."""

    made_by: str | None = None
    run: dict[str, Any] | None = None
    answered: dict[str, Entry] = {}
    retry: list[str] | None = None
    ended: bool = False


class BatchOutput:
    """An output file and its journal.

    Attributes:
        path: The output, links followed.
        journal_path: The journal.
        answered: What is answered so far, by the digest of the request.

    Raises:
        ValueError: If no file can be at `path`.
    """

    def __init__(self, path: str) -> None:
        self.path = check_file(path)
        self.journal_path = self.path.with_name(f"{self.path.name}.journal.jsonl")
        self.answered: dict[str, Entry] = {}
        self._append: Callable[[Mapping[str, Any]], None]

    def check(self, reads: Iterable[Path]) -> None:
        """Raise ValueError if writing would replace a file that the command reads."""
        written = {_identity(path): path for path in (self.path, self.journal_path)}
        for source in reads:
            if (identity := _identity(source)) is not None and identity in written:
                raise ValueError(
                    f"{written[identity]} is read by this command and would be overwritten; choose another --output"
                )
        if self.journal_path.exists() or not self.path.exists() or not self.path.stat().st_size:
            return
        if Path(f"{self.path}.run.json").exists():
            raise ValueError(f"{self.path} was written by an earlier version; choose another --output")
        raise ValueError(f"{self.path} exists and was not written by a batch run; choose another --output")

    @contextlib.contextmanager
    def opened(self, run: Mapping[str, Any], *, retry_failed: bool) -> Iterator[None]:
        """Read the journal, or begin one, and keep it open for `add` and `end`.

        Args:
            run: Settings, which must be those of the earlier run.
            retry_failed: Forget the errors of earlier runs. A retry that was interrupted is resumed instead, so that it
                answers the same batches.

        Raises:
            ValueError: If the journal is damaged or of other settings, or the output holds what this run did not write.
            OSError: If a file cannot be read or written.
        """
        if not self.journal_path.exists():
            write_json(self.journal_path, {"made_by": MADE_BY, "run": run}, indent=None)
        written, retrying = self._replay(run)
        self._expect_own_output(written)
        with journal(self.journal_path) as self._append:
            if retry_failed and not retrying:
                failed = [digest for digest, entry in self.answered.items() if entry.error is not None]
                self._append({"retry": failed})
                self._forget(failed)
            yield

    def add(self, answered: Mapping[str, Entry]) -> None:
        """Keep the answers of a batch, by the digests of its requests."""
        self._append({"answered": {digest: msgspec.to_builtins(entry) for digest, entry in answered.items()}})
        self.answered |= answered

    def write(self, digests: Iterable[str]) -> None:
        """Write the output: what is answered of these requests, in their order."""
        write_file(self.path, "".join(self.answered[digest].to_line() for digest in digests if digest in self.answered))

    def end(self) -> None:
        """Note that a run has come to its end, so that the next --retry-failed begins a new retry."""
        self._append({"ended": True})

    def _replay(self, run: Mapping[str, Any]) -> tuple[set[bytes], bool]:
        """Read the journal into `answered`; returns all output lines it ever held, and whether a retry is open.

        Raises:
            ValueError: If the journal is damaged, or its run has other settings.
        """
        remedy = f"choose another --output, or delete {self.path} and {self.journal_path}"
        try:
            header, *lines = read_journal(self.journal_path, _Line) or [_Line()]
        except ValueError as error:
            raise ValueError(f"{error}; {remedy}") from error
        if header.made_by != MADE_BY or header.run is None:
            raise ValueError(f"{self.journal_path} is not the journal of a batch run; {remedy}")
        expect_same_run(with_current_keys(header.run), json.loads(json.dumps(run)), str(self.path), remedy)
        written, retrying = set(), False
        for line in lines:
            self.answered |= line.answered
            written |= {entry.to_line().encode() for entry in line.answered.values()}
            retrying = (retrying or line.retry is not None) and not line.ended
            self._forget(line.retry or ())
        return written, retrying

    def _forget(self, digests: Iterable[str]) -> None:
        for digest in digests:
            self.answered.pop(digest, None)

    def _expect_own_output(self, written: set[bytes]) -> None:
        """Raise ValueError if the output holds a line that no run of this journal has written."""
        content = self.path.read_bytes() if self.path.exists() else b""
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            whole = line.endswith(b"\n")
            if line not in written if whole else not any(other.startswith(line) for other in written):
                raise ValueError(
                    f"{self.path}, line {number}, was not written by this run and would be lost; move the file away"
                )


def _identity(path: Path) -> tuple[int, int] | None:
    """What two names of one file share; None without a file."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # not found, or no name of a file
        return None
    return status.st_dev, status.st_ino
