"""The records that `region-chat` reads and writes: requests, answers, the journal of a batch run, and conversations.

Keys are snake_case. Journals of earlier versions are still read (`BatchConfig.from_json`).
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from mllm.files import made_by
from mllm.fingerprints import FORMER_KEYS

CONVERSATION = "conversation"  # kind of a saved conversation, in its marker
_FORMER_KEYS = {**FORMER_KEYS, "request file": "request_file"}


class RequestLine(msgspec.Struct, forbid_unknown_fields=True):
    """A line of a request file. Its region is validated when its image is opened."""

    id: str | int
    image: str
    region: dict[str, Any]
    question: str | None = None


class AnswerLine(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """A line of the output of a batch run: the answer to a request, or its error."""

    id: str | int
    answer: str | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError unless there is either an answer or an error."""
        if (self.answer is None) == (self.error is None):
            raise ValueError("expected an answer or an error")

    def to_line(self) -> str:
        """JSON in one line."""
        return json.dumps(msgspec.to_builtins(self), ensure_ascii=False) + "\n"


class BatchConfig(msgspec.Struct):
    """The settings of a batch run, which must be equal for the run to be resumed.

    Attributes:
        model: Name of the model.
        weights: See `mllm.fingerprints.model_fingerprint`, as for the next three.
        quantized: Quantization method, or "None".
        alpha_and_adapter: Hash of the tower's and the adapter's weights.
        dtype: Of the language model.
        request_file: Relative to the folder of the output, since both may be moved together.
        batch_size: Requests per batch.
        max_new_tokens: Maximum length of an answer, in tokens.
        version: Of this package.
    """

    model: str
    weights: str
    quantized: str
    alpha_and_adapter: str
    dtype: str
    request_file: str
    batch_size: int
    max_new_tokens: int
    version: str

    @staticmethod
    def from_json(record: dict[str, Any]) -> dict[str, Any]:
        """The settings in a journal, with the keys of this version; not validated, as they are only compared."""
        return {_FORMER_KEYS.get(key, key): value for key, value in record.items()}


class JournalLine(msgspec.Struct, forbid_unknown_fields=True):
    """A line of the journal of a batch run. The first has `made_by` and `run`, each other line one of the other fields.

    Attributes:
        made_by: The marker of this package.
        run: A `BatchConfig`, in the keys of the version that wrote it.
        answered: The answers of a batch, by the digest of the request.
        retry: Digests of failed requests that are answered again.
        ended: Whether the run ended here.
    """

    made_by: str | None = None
    run: dict[str, Any] | None = None
    answered: dict[str, AnswerLine] = {}
    retry: list[str] | None = None
    ended: bool = False


class SingleAnswer(msgspec.Struct):
    """What `region-chat --json` prints."""

    image: str
    region: dict[str, Any]
    question: str | None
    answer: str
    model: str


class SavedTurn(msgspec.Struct):
    """A question, its answer, and the strength of the region when it was asked."""

    question: str
    answer: str
    strength: float


class SavedConversation(msgspec.Struct):
    """What `/save` writes: an image, a region of it (None: not given yet) and the turns about them."""

    image: str
    region: dict[str, Any] | None
    turns: list[SavedTurn]

    def to_json(self) -> dict[str, Any]:
        """As JSON values, with the marker by which `/save` recognizes a file that it may replace."""
        return {"made_by": made_by(CONVERSATION), **msgspec.to_builtins(self)}
