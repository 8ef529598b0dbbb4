"""The output of a batch run and its journal.

The output is written when a run ends. The journal (`OUTPUT.journal.jsonl`) gets the answers of each batch as soon as
they are generated, by the digest of the request. An interrupted run resumes from it, and an edited request file keeps
the answers of its unchanged requests. `JournalLine` documents its lines, which are in the order of events.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from mllm.files import MADE_BY, check_file, write_file, write_json
from mllm.journal import expect_same_run, journal, read_journal
from mllm.region_chat.records import AnswerLine, BatchConfig, JournalLine


class BatchOutput:
    """An output file and its journal.

    Attributes:
        path: The output, with links resolved.
        journal_path: The journal.
        answered: The answers so far, by the digest of the request.

    Raises:
        ValueError: If `path` cannot be a file.
    """

    def __init__(self, path: str) -> None:
        self.path = check_file(path)
        self.journal_path = self.path.with_name(f"{self.path.name}.journal.jsonl")
        self.answered: dict[str, AnswerLine] = {}
        self._append: Callable[[Mapping[str, Any]], None]

    def check(self, reads: Iterable[Path]) -> None:
        """Raise ValueError if writing would replace a file that the command reads, or that it did not write."""
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
    def opened(self, config: BatchConfig, *, retry_failed: bool) -> Iterator[None]:
        """Read or start the journal, and keep it open for `add` and `end`.

        Args:
            config: The settings, which must be those of the earlier run.
            retry_failed: Discard the errors of earlier runs. An interrupted retry is resumed instead, so that it
                generates the same batches.

        Raises:
            ValueError: If the journal is damaged or has other settings, or the output contains lines of other origin.
            OSError: If a file cannot be read or written.
        """
        if not self.journal_path.exists():
            header = {"made_by": MADE_BY, "run": msgspec.to_builtins(config)}
            write_json(self.journal_path, header, indent=None)
        written, retrying = self._replay(config)
        self._check_output(written)
        with journal(self.journal_path) as self._append:
            if retry_failed and not retrying:
                failed = [digest for digest, answer in self.answered.items() if answer.error is not None]
                self._append({"retry": failed})
                self._forget(failed)
            yield

    def add(self, answered: Mapping[str, AnswerLine]) -> None:
        """Store the answers of a batch, by the digests of its requests."""
        self._append({"answered": {digest: msgspec.to_builtins(answer) for digest, answer in answered.items()}})
        self.answered |= answered

    def write(self, digests: Iterable[str]) -> None:
        """Write the output: the answers to these requests so far, in their order."""
        write_file(self.path, "".join(self.answered[digest].to_line() for digest in digests if digest in self.answered))

    def end(self) -> None:
        """Record that the run has ended, so that the next --retry-failed starts a new retry."""
        self._append({"ended": True})

    def _replay(self, config: BatchConfig) -> tuple[set[bytes], bool]:
        """Read the journal into `answered`.

        Returns:
            All output lines that the journal ever contained, and whether a retry was interrupted.

        Raises:
            ValueError: If the journal is damaged, or its run has other settings.
        """
        remedy = f"choose another --output, or delete {self.path} and {self.journal_path}"
        try:
            header, *lines = read_journal(self.journal_path, JournalLine) or [JournalLine()]
        except ValueError as error:
            raise ValueError(f"{error}; {remedy}") from error
        if header.made_by != MADE_BY or header.run is None:
            raise ValueError(f"{self.journal_path} is not the journal of a batch run; {remedy}")
        expect_same_run(BatchConfig.from_json(header.run), msgspec.to_builtins(config), str(self.path), remedy)
        written, retrying = set(), False
        for line in lines:
            self.answered |= line.answered
            written |= {answer.to_line().encode() for answer in line.answered.values()}
            retrying = (retrying or line.retry is not None) and not line.ended
            self._forget(line.retry or ())
        return written, retrying

    def _forget(self, digests: Iterable[str]) -> None:
        for digest in digests:
            self.answered.pop(digest, None)

    def _check_output(self, written: set[bytes]) -> None:
        """Raise ValueError if the output contains a line that is not in the journal."""
        content = self.path.read_bytes() if self.path.exists() else b""
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            complete = line.endswith(b"\n")
            if line not in written if complete else not any(other.startswith(line) for other in written):
                raise ValueError(
                    f"{self.path}, line {number}, was not written by this run and would be lost; move the file away"
                )


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file, which are equal for all its names; None if it does not exist."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: not a valid file name
        return None
    return status.st_dev, status.st_ino
