"""Batch files: requests in, answers out, one JSON object a line; a killed run continues where it stopped."""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from mllm.answering import RegionChat
from mllm.data.jsonl import region_in
from mllm.data.samples import load_image
from mllm.overlay import check_folder
from vision_tower import Region

logger = logging.getLogger(__name__)

_HASH_WHOLE_FILES_UP_TO = 200_000_000  # bytes; larger weights are told apart by name, size and time
_REQUEST_KEYS = {"id", "image", "region", "question"}


@dataclasses.dataclass(frozen=True)
class Request:
    """One line of a request file; `problem` says why it cannot be answered."""

    id: str | int
    record: dict[str, Any]
    problem: str | None = None


def run_batch(
    chat: RegionChat, requests_path: str, output_path: str, *, model_name: str, batch_size: int, max_new_tokens: int
) -> int:
    """Answer a file of requests; returns how many of them failed.

    A line of the output is `{"id", "answer"}` or `{"id", "error"}`, in the order of the requests. Batches are formed
    over the whole file, so that a continued run writes the same file as an undisturbed one; a batch that was not
    finished is done again.

    Raises:
        ValueError: If the request file is no list of requests with different ids, or the output belongs to another run.
    """
    requests = read_requests(requests_path)
    done = _prepare_output(
        output_path, _run_record(chat, requests_path, model_name, batch_size, max_new_tokens), requests, batch_size
    )
    failed = sum("error" in answer for answer in done)
    folder = Path(requests_path).resolve().parent
    with (
        open(output_path, "a", encoding="utf-8") as output,
        tqdm(total=len(requests), initial=len(done), desc="answers", unit="answer") as progress,
    ):
        for start in range(len(done), len(requests), batch_size):
            batch = requests[start : start + batch_size]
            answers = _answer(chat, batch, folder, max_new_tokens)
            output.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
            output.flush()
            os.fsync(output.fileno())
            failed += sum("error" in answer for answer in answers)
            progress.update(len(batch))
    return failed


def read_requests(path: str) -> list[Request]:
    """Read a request file. A damaged line becomes a request with a problem, under its line number.

    Raises:
        ValueError: If the file is missing or empty, or an id occurs twice.
    """
    try:
        lines = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise ValueError(f"cannot read the requests {path}: {error}") from error
    requests = [_read_request(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not requests:
        raise ValueError(f"{path} holds no request")
    seen: set = set()
    twice = {request.id for request in requests if request.id in seen or seen.add(request.id)}
    if twice:
        raise ValueError(
            f"{path}: ids must differ, but {', '.join(map(str, sorted(twice, key=str)[:5]))} occur(s) twice"
        )
    return requests


def _read_request(number: int, line: bytes) -> Request:
    try:
        record = json.loads(line.decode())
        json.dumps(record, ensure_ascii=False).encode()  # "\ud800" is JSON, but no text that could be written back
    except (ValueError, RecursionError) as error:
        return Request(f"line {number}", {}, f"not JSON: {error}")
    if not isinstance(record, dict) or not isinstance(record.get("id"), str | int) or isinstance(record["id"], bool):
        return Request(f"line {number}", {}, "expected an object with an id (text or number)")
    problem = None
    if unknown := record.keys() - _REQUEST_KEYS:
        problem = f"unknown keys {sorted(unknown)}; expected id, image, region and question"
    elif not isinstance(record.get("image"), str) or "region" not in record:
        problem = 'expected "image": path and "region": {...} ({"whole": true} for the whole image)'
    elif not isinstance(record.get("question", ""), str):
        problem = "expected the question as text"
    elif "question" in record and not record["question"].strip():
        problem = "the question is empty; leave it out to have the region described"
    return Request(record["id"], record, problem)


def _answer(chat: RegionChat, batch: Sequence[Request], folder: Path, max_new_tokens: int) -> list[dict]:
    """The output records of a batch: each request is prepared alone, so that a bad one fails alone."""
    prepared: dict[int, tuple[Image.Image, Region, str | None]] = {}
    pictures: dict[str, Image.Image] = {}
    answers: list[dict] = []
    for index, request in enumerate(batch):
        try:
            prepared[index] = _prepare(chat, request, folder, max_new_tokens, pictures)
            answers.append({"id": request.id})
        except ValueError as error:
            answers.append({"id": request.id, "error": str(error)})
    if prepared:
        texts = chat.answer_batch(list(prepared.values()), max_new_tokens=max_new_tokens)
        for index, text in zip(prepared, texts, strict=True):
            answers[index]["answer"] = text
    return answers


def _prepare(
    chat: RegionChat, request: Request, folder: Path, max_new_tokens: int, pictures: dict[str, Image.Image]
) -> tuple[Image.Image, Region, str | None]:
    """Everything that can be wrong with a request is found here; a picture is decoded once a batch."""
    if request.problem:
        raise ValueError(request.problem)
    path = str(folder / request.record["image"])
    if path not in pictures:
        pictures[path] = load_image(path)
    region = region_in(folder, request.record["region"])
    chat.processor.image_processor(pictures[path], region)  # does the region fit the picture?
    question = request.record.get("question")
    chat.check_length(question, max_new_tokens)
    return pictures[path], region, question


def _run_record(chat: RegionChat, requests_path: str, model_name: str, batch_size: int, max_new_tokens: int) -> dict:
    """What must be the same for two runs to write one file."""
    return {
        "model": model_name,
        "weights": fingerprint(chat.model.config._name_or_path, chat.model.config),
        "quantised": str(getattr(chat.model, "quantization_method", None)),
        "alpha and adapter": added_weights(chat.model),
        "dtype": str(chat.model.get_input_embeddings().weight.dtype),  # BLIP-2 keeps its Q-Former in float32
        "requests": hashlib.sha256(Path(requests_path).read_bytes()).hexdigest(),
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "version": version("alpha-clip-mllm"),
    }


def added_weights(model: PreTrainedModel) -> str:
    """A hash of the alpha weight and LoRA matrices as loaded: they may come from elsewhere than the model directory."""
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        if "patch_embedding.alpha." in name or ".lora_" in name:
            digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint(name: str, config: Any) -> str:
    """A hash of a model directory's config and weights, or the commit of a hub id."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{config._commit_hash}"
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix not in (".json", ".safetensors", ".bin", ".jinja", ".model", ".txt"):
            continue
        status = file.stat()
        small = status.st_size <= _HASH_WHOLE_FILES_UP_TO
        digest.update(file.name.encode())
        digest.update(file.read_bytes() if small else f"{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _prepare_output(path: str, record: dict, requests: Sequence[Request], batch_size: int) -> list[dict]:
    """The answers of whole batches that an earlier, equal run has written; what is torn or half is cut off the file."""
    check_folder(path)
    record_path = Path(f"{path}.run.json")
    output = Path(path)
    if not record_path.exists() and output.exists() and output.stat().st_size:
        raise ValueError(f"{path} exists and was not written by a batch run; choose another --output")
    if not claim_run(record_path, record, path):
        output.touch()
        return []
    return _whole_batches(output, requests, batch_size)


def claim_run(record_path: Path, record: dict, output: str) -> bool:
    """Write down what makes a run, or check that it is what made the earlier one; whether there was an earlier one.

    Args:
        record_path: JSON file of the record.
        record: Whatever must be the same for two runs to write one output.
        output: The output's name, for messages.

    Raises:
        ValueError: If the output belongs to another run, or its record is damaged.
    """
    if not record_path.exists():
        temporary = Path(f"{record_path}.tmp")
        temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
        os.replace(temporary, record_path)
        return False
    try:
        earlier = json.loads(record_path.read_text(encoding="utf-8"))
        damaged = not isinstance(earlier, dict)
    except ValueError:
        damaged = True
    if damaged:
        raise ValueError(f"{record_path} is damaged; choose another output, or delete it together with {output}")
    if changed := [name for name in record if record[name] != earlier.get(name)]:
        raise ValueError(
            f"{output} belongs to a run with other {', '.join(changed)}; choose another output, or delete "
            f"it and {record_path}"
        )
    return True


def _whole_batches(output: Path, requests: Sequence[Request], batch_size: int) -> list[dict]:
    lines = output.read_bytes().splitlines(keepends=True) if output.exists() else []
    answers: list[dict] = []
    for line, request in zip(lines, requests, strict=False):
        try:
            answer = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(answer, dict) or answer.get("id") != request.id:
            break
        answers.append(answer)
    if len(answers) < len(requests):
        answers = answers[: len(answers) - len(answers) % batch_size]
    with open(output, "ab") as file:
        file.truncate(sum(len(line) for line in lines[: len(answers)]))
    if answers:
        logger.info("continuing after %d answers", len(answers))
    return answers
