"""Batch runs: a JSONL file of requests -> a JSONL file of answers. Interrupted runs resume with identical output."""

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

from tqdm.auto import tqdm

from alpha_clip_commands.command_line import one_line
from alpha_clip_commands.error_limit import MAX_ERRORS, too_many_errors
from mllm.data.readers.jsonl import region_from_record
from mllm.data.schemas import validate
from mllm.fingerprints import model_fingerprint
from mllm.inference import ChatRequest, RegionChat
from mllm.region_chat.batch_output import BatchOutput
from mllm.region_chat.records import AnswerLine, BatchConfig, RequestLine


@dataclasses.dataclass(frozen=True)
class Request:
    """One line of a request file.

    Attributes:
        id: The request's id, or "line N" if it has none.
        record: The JSON object, empty if the line is damaged.
        digest: Hash of the content: an edited line is a new request.
        problem: Why it cannot be answered, or None.
    """

    id: str | int
    record: dict[str, Any]
    digest: str
    problem: str | None = None

    def files(self, folder: Path) -> Iterator[Path]:
        """The image and mask files of the request; `folder` is that of the request file."""
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
    """Answer a file of requests.

    Batches consist of the requests that have no answer yet, so a resumed run forms the same batches as an uninterrupted
    one; an interrupted batch is generated again. The output is also written after an error.

    Args:
        chat: The model.
        requests_path: The request file; paths in it are relative to its folder.
        requests: The result of `read_requests`.
        output: Where the answers are stored; the caller holds its lock.
        model_name: Name of the model in the settings of the run.
        batch_size: Requests per batch.
        max_new_tokens: Maximum length of an answer, in tokens.
        retry_failed: Answer requests again that failed in an earlier run.
        max_errors: The run stops if more than this share of the requests (and at least 20) failed.

    Returns:
        The number of failed requests.

    Raises:
        ValueError: If the output belongs to another run, its journal is damaged, or too many requests failed.
        OSError: If the answers cannot be written.
    """
    folder = Path(requests_path).resolve().parent
    config = _batch_config(chat, requests_path, output.path, model_name, batch_size, max_new_tokens)
    with output.opened(config, retry_failed=retry_failed):
        pending = [request for request in requests if request.digest not in output.answered]
        failures = len(_failed(output, requests))
        try:
            done = len(requests) - len(pending)
            with tqdm(total=len(requests), initial=done, desc="answers", unit="answer") as progress:
                for start in range(0, len(pending), batch_size):
                    if too_many_errors(failures, len(requests), max_errors):
                        break
                    batch = pending[start : start + batch_size]
                    answers = _answer(chat, batch, folder, max_new_tokens)
                    output.add(answers)
                    failures += sum(answer.error is not None for answer in answers.values())
                    progress.update(len(batch))
        finally:
            output.write(request.digest for request in requests)
        output.end()
    if too_many_errors(failures, len(requests), max_errors):
        raise _too_many(failures, output, requests, max_errors)
    return failures


def _too_many(failures: int, output: BatchOutput, requests: Sequence[Request], max_errors: float) -> ValueError:
    first = _failed(output, requests)[0]
    return ValueError(
        f"{failures} of {len(requests)} requests failed, more than --max-errors {max_errors:g} allows (first: "
        f"{first.id}: {first.error}); the answers so far are in {output.path}. Fix the requests and rerun, with "
        "--retry-failed for those that did not change"
    )


def _failed(output: BatchOutput, requests: Sequence[Request]) -> list[AnswerLine]:
    answers = (output.answered.get(request.digest) for request in requests)
    return [answer for answer in answers if answer is not None and answer.error is not None]


def read_requests(path: str) -> list[Request]:
    """Read a request file. A damaged line becomes a request with a problem, identified by its line number.

    Raises:
        ValueError: If the file is not found or empty, or an id occurs twice.
    """
    try:
        lines = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise ValueError(f"cannot read the requests {path}: {one_line(error)}") from error
    requests = [_read_request(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not requests:
        raise ValueError(f"{path} contains no requests")
    counts = Counter(request.id for request in requests)
    if repeated := [str(name) for name, count in counts.items() if count > 1]:
        raise ValueError(f"{path}: expected unique ids, but {', '.join(sorted(repeated)[:5])} occur(s) more than once")
    return requests


def _read_request(number: int, line: bytes) -> Request:
    name = f"line {number}"
    try:
        record = json.loads(line.decode())
        # "\ud800" is valid JSON, but cannot be encoded as UTF-8 in the output
        content = json.dumps(record, ensure_ascii=False, sort_keys=True).encode()
    except (ValueError, RecursionError) as error:
        return Request(name, {}, _digest(name, line), f"not JSON: {one_line(error)}")
    problem = None
    try:
        request = validate(record, RequestLine)
        if request.question is not None and not request.question.strip():
            problem = "the question is empty; omit it to get a description of the region"
    except (ValueError, RecursionError) as error:
        problem = (
            f'{one_line(error)}; expected an id (string or integer), "image": path, "region": {{...}} '
            '({"whole": true} for the whole image) and optionally a question (string)'
        )
    own_id = record.get("id") if isinstance(record, dict) else None
    if isinstance(own_id, str | int) and not isinstance(own_id, bool):
        return Request(own_id, record, _digest("", content), problem)
    return Request(name, record if isinstance(record, dict) else {}, _digest(name, content), problem)


def _digest(name: str, content: bytes) -> str:
    return hashlib.sha256(name.encode() + b"\n" + content).hexdigest()


def _answer(chat: RegionChat, batch: Sequence[Request], folder: Path, max_new_tokens: int) -> dict[str, AnswerLine]:
    """The answers of a batch by the digests of its requests. An invalid request does not affect the others."""
    prepared: list[ChatRequest | ValueError] = []
    for request in batch:
        try:
            prepared.append(_prepare(request, folder))
        except (ValueError, OSError) as error:
            prepared.append(ValueError(one_line(error)))
    answers = chat.answer_each(prepared, max_new_tokens=max_new_tokens)
    return {
        request.digest: AnswerLine(request.id, error=one_line(answer))
        if isinstance(answer, ValueError)
        else AnswerLine(request.id, answer.text)
        for request, answer in zip(batch, answers, strict=True)
    }


def _prepare(request: Request, folder: Path) -> ChatRequest:
    if request.problem:
        raise ValueError(request.problem)
    image = _image_source(folder, request.record["image"])
    return image, region_from_record(folder, request.record["region"]), request.record.get("question")


def _image_source(folder: Path, image: str) -> str | Path:
    return image if image.startswith(("http://", "https://", "data:")) else folder / image


def _batch_config(
    chat: RegionChat, requests_path: str, output: Path, model_name: str, batch_size: int, max_new_tokens: int
) -> BatchConfig:
    request_file = Path(requests_path).resolve()
    try:
        request_file = Path(os.path.relpath(request_file, output.parent))
    except ValueError:  # on another drive
        pass
    return BatchConfig(
        **model_fingerprint(chat.model, model_name, output),
        request_file=request_file.as_posix(),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        version=version("alpha-clip-mllm"),
    )
