"""Batch files: requests in, answers out, one JSON object a line. An interrupted run resumes to the same bytes, and an
edited file keeps the answers of its unchanged requests.
"""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from tqdm.auto import tqdm

from alpha_clip_commands.command_line import one_line
from alpha_clip_commands.error_limit import MAX_ERRORS, too_many_errors
from mllm.data.readers.jsonl import region_in
from mllm.data.schemas import checked
from mllm.fingerprints import model_fingerprint
from mllm.inference import Asked, RegionChat
from mllm.region_chat.batch_output import BatchOutput, Entry


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    """What a line of a request file must be; what is wrong with its region shows when it meets its image."""

    id: str | int
    image: str
    region: dict[str, Any]
    question: str | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """One line of a request file.

    Attributes:
        id: Its own, or "line N" where it has none.
        record: The JSON object; empty where there is none.
        digest: Of the content: a line that is edited becomes another request.
        problem: Why it cannot be answered, or None.
    """

    id: str | int
    record: dict[str, Any]
    digest: str
    problem: str | None = None

    def files(self, folder: Path) -> Iterator[Path]:
        """The image and mask that it names, relative to the folder of the request file."""
        if self.problem is None:
            image = _image_source(folder, self.record["image"])
            if isinstance(image, Path):
                yield image
            mask = self.record["region"].get("mask")
            if isinstance(mask, str) and not mask.startswith("data:"):
                yield folder / mask


def run_batch(
    chat: RegionChat,
    requests_path: str,
    requests: Sequence[Request],
    output: BatchOutput,
    *,
    model_name: str,
    batch_size: int,
    max_new_tokens: int,
    retry_failed: bool = False,
    max_errors: float = MAX_ERRORS,
) -> int:
    """Answer a file of requests; returns how many of them failed.

    A line of the output is `{"id", "answer"}` or `{"id", "error"}`, in the order of the requests. Batches are formed
    over the requests that are not answered yet, so that a resumed run forms the same batches as an uninterrupted one;
    an interrupted batch is answered again. The output holds what is answered also after an error.

    Args:
        chat: The model.
        requests_path: The request file; its paths are relative to its folder.
        requests: What `read_requests` gave for it.
        output: Where the answers are kept; the caller holds its lock.
        model_name: What the model is called in the run's settings.
        batch_size: Answers made at once.
        max_new_tokens: Longest answer, in tokens.
        retry_failed: Answer requests again that failed in an earlier run.
        max_errors: The run stops when more than this share of the requests (and at least 20) failed.

    Raises:
        ValueError: If the output belongs to another run, its journal is damaged, or too many requests failed.
        OSError: If the answers cannot be written.
    """
    folder = Path(requests_path).resolve().parent
    record = _run_record(chat, requests_path, output.path, model_name, batch_size, max_new_tokens)

    def failed() -> int:
        answers = (output.answered.get(request.digest) for request in requests)
        return sum(answer is not None and answer.error is not None for answer in answers)

    with output.opened(record, retry_failed=retry_failed):
        left = [request for request in requests if request.digest not in output.answered]
        failures = failed()
        try:
            with tqdm(
                total=len(requests), initial=len(requests) - len(left), desc="answers", unit="answer"
            ) as progress:
                for start in range(0, len(left), batch_size):
                    if too_many_errors(failures, len(requests), max_errors):
                        break
                    batch = left[start : start + batch_size]
                    answers = _answer(chat, batch, folder, max_new_tokens)
                    output.add(answers)
                    failures += sum(entry.error is not None for entry in answers.values())
                    progress.update(len(batch))
        finally:
            output.write(request.digest for request in requests)
        output.end()
    if too_many_errors(failures, len(requests), max_errors):
        raise ValueError(_too_many(output, requests, failures, max_errors))
    return failures


def _too_many(output: BatchOutput, requests: Sequence[Request], failures: int, max_errors: float) -> str:
    first = next(
        entry for r in requests if (entry := output.answered.get(r.digest)) is not None and entry.error is not None
    )
    return (
        f"{failures} of {len(requests)} requests failed, more than --max-errors {max_errors:g} allows (the first, "
        f"{first.id}: {first.error}); the answers so far are in {output.path}. Fix the requests and rerun, with "
        "--retry-failed for those that did not change"
    )


def read_requests(path: str) -> list[Request]:
    """Read a request file. A damaged line becomes a request with a problem, under its line number.

    Raises:
        ValueError: If the file is missing or empty, or an id occurs twice.
    """
    try:
        lines = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise ValueError(f"cannot read the requests {path}: {one_line(error)}") from error
    requests = [_read_request(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not requests:
        raise ValueError(f"{path} holds no request")
    counts = Counter(request.id for request in requests)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(
            f"{path}: ids must differ, but {', '.join(map(str, sorted(twice, key=str)[:5]))} occur(s) twice"
        )
    return requests


def _read_request(number: int, line: bytes) -> Request:
    name = f"line {number}"
    try:
        record = json.loads(line.decode())
        # "\ud800" is JSON, but no text that could be written back
        content = json.dumps(record, ensure_ascii=False, sort_keys=True).encode()
    except (ValueError, RecursionError) as error:
        return Request(name, {}, _digest(name, line), f"not JSON: {one_line(error)}")
    problem = None
    try:
        line = checked(record, _Line)
        if line.question is not None and not line.question.strip():
            problem = "the question is empty; leave it out to have the region described"
    except (ValueError, RecursionError) as error:
        problem = (
            f'{one_line(error)}; expected an id (text or whole number), "image": path, "region": {{...}} '
            '({"whole": true} for the whole image) and, if there is one, a question as text'
        )
    own = record.get("id") if isinstance(record, dict) else None
    if isinstance(own, str | int) and not isinstance(own, bool):
        return Request(own, record, _digest("", content), problem)
    return Request(name, record if isinstance(record, dict) else {}, _digest(name, content), problem)


def _digest(name: str, content: bytes) -> str:
    return hashlib.sha256(name.encode() + b"\n" + content).hexdigest()


def _answer(chat: RegionChat, batch: Sequence[Request], folder: Path, max_new_tokens: int) -> dict[str, Entry]:
    """The answers of a batch by the digests of its requests; a bad request fails alone."""
    asked: list[Asked | ValueError] = []
    for request in batch:
        try:
            asked.append(_prepare(request, folder))
        except (ValueError, OSError) as error:
            asked.append(ValueError(one_line(error)))
    answers = chat.answer_each(asked, max_new_tokens=max_new_tokens)
    return {
        request.digest: Entry(request.id, error=one_line(answer))
        if isinstance(answer, ValueError)
        else Entry(request.id, answer.text)
        for request, answer in zip(batch, answers, strict=True)
    }


def _prepare(request: Request, folder: Path) -> Asked:
    """What the model is asked; `RegionChat` opens the image."""
    if request.problem:
        raise ValueError(request.problem)
    image = _image_source(folder, request.record["image"])
    return image, region_in(folder, request.record["region"]), request.record.get("question")


def _image_source(folder: Path, image: str) -> str | Path:
    """A URL as it is, or a path relative to the folder of the request file."""
    return image if image.startswith(("http://", "https://", "data:")) else folder / image


def _run_record(
    chat: RegionChat, requests_path: str, output: Path, model_name: str, batch_size: int, max_new_tokens: int
) -> dict:
    """What must be the same for two runs to write one file."""
    requests = Path(requests_path).resolve()
    try:
        requests = Path(os.path.relpath(requests, output.parent))  # both may be moved together
    except ValueError:  # on another drive
        pass
    return {
        **model_fingerprint(chat.model, model_name, output),
        "request_file": requests.as_posix(),
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "version": version("alpha-clip-mllm"),
    }
