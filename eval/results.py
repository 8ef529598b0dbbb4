"""The settings of a run (`run.json`) and its results (`metrics.json`), also of files that earlier versions wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from alpha_clip_commands.task_names import METRICS
from eval.metrics.intervals import Difference
from eval.published import PublishedResult
from mllm.data.schemas import validate
from mllm.files import write_json
from mllm.fingerprints import FORMER_KEYS

RUN_FILE, METRICS_FILE = "run.json", "metrics.json"
DOCUMENT_FREQUENCIES_OF_ALL = "cider_df_of_all_items"
LABELS = {**METRICS, DOCUMENT_FREQUENCIES_OF_ALL: "CIDEr (df of all items)"}
T = TypeVar("T")


class Protocol(Struct, kw_only=True, omit_defaults=True):
    """Which samples and references are scored.

    Attributes:
        items: Number of samples.
        item: What a sample is: "expression", "region", "question" or "line".
        references: How many references a sample has, and where they come from.
        region_form: "box" or "mask".
        limit: Number of samples that the run was limited to.
        predictions: The scored file, for predictions of another system.
    """

    items: int | None = None
    item: str | None = None
    references: str | None = None
    region_form: str | None = None
    limit: int | None = None
    predictions: str | None = None


class RunConfig(Struct, kw_only=True):
    """The settings of a run. Two runs can use the same folder only if all of them are equal.

    For predictions of another system, only `task`, `protocol` and `model` are known.

    Attributes:
        task: Name of the protocol.
        protocol: Which samples and references are scored.
        data: Folder that images are relative to.
        samples: Hash of the samples.
        model: Directory or hub id of the model, or the file of predictions.
        weights: Hash of the model's directory.
        quantized: Quantization method.
        alpha_and_adapter: Hash of the weights of the vision tower and of an adapter.
        dtype: Of the language model's embeddings.
        view: One of `eval.views.VIEWS`.
        strength: Of the regions, 0 to 1.
        geometry: Of the image processor.
        prompt: The complete prompt of the first sample.
        prompt_template: The prompt set for the task or with --prompt; None for the sample's question.
        decoding: "greedy".
        max_new_tokens: Maximum length of an answer, in tokens.
        batch_size: Samples per batch.
        version: Version of this package.
    """

    task: str | None = None
    protocol: Protocol = msgspec.field(default_factory=Protocol)
    data: str | None = None
    samples: str | None = None
    model: str | None = None
    weights: str | None = None
    quantized: str | None = None
    alpha_and_adapter: str | None = None
    dtype: str | None = None
    view: str | None = None
    strength: float | None = None
    geometry: str | None = None
    prompt: str | None = None
    prompt_template: str | None = None
    decoding: str | None = None
    max_new_tokens: int | None = None
    batch_size: int | None = None
    version: str | None = None


class MetricValue(Struct):
    """The value of a metric as the reference scorers return it (METEOR .195), with its 95% interval if computed.

    `interval` states how the interval was computed.
    """

    value: float
    low: float | None = None
    high: float | None = None
    interval: str | None = None


class Scores(Struct, kw_only=True):
    """The scores of a list of predictions.

    Attributes:
        items: Number of predictions.
        metrics: By metric id.
        by: Property of the samples -> group -> "items" and metric values.
        length: Mean number of words of predictions and references.
        counts: Number of empty, truncated and long predictions.
        notes: What a reader has to know to interpret the values.
    """

    items: int
    metrics: dict[str, MetricValue]
    by: dict[str, dict[str, dict[str, int | float]]] = {}
    length: dict[str, float] = {}
    counts: dict[str, int] = {}
    notes: list[str] = []


class ViewResult(Struct, kw_only=True, omit_defaults=True):
    """The scores of one view.

    Attributes:
        items: Number of predictions.
        metrics: By metric id.
        notes: As `Scores`.
        difference: Paired difference to the main view, by metric id; None for the main view or without intervals.
        shown_region_metrics: For "other_region": scores against the references of the region that was shown.
    """

    items: int
    metrics: dict[str, MetricValue]
    notes: list[str] = []
    difference: dict[str, Difference] | None = None
    shown_region_metrics: dict[str, MetricValue] | None = None


class Result(Scores, kw_only=True):
    """The content of `metrics.json`: the scores of the main view, and what is needed to interpret and reproduce them.

    Attributes:
        task: Name of the protocol, None if unknown.
        protocol: Which samples and references were scored.
        views: Scores by view, the main view first; empty for predictions of another system.
        published: Published results of the same protocol.
        command: The command line.
        versions: Versions of the packages that affect the values.
        seed: Of the bootstrap.
    """

    task: str | None
    protocol: Protocol
    views: dict[str, ViewResult] = {}
    published: list[PublishedResult] = []
    command: str | None = None
    versions: dict[str, str] = {}
    seed: int | None = None


def label(metric: str) -> str:
    """The label of a metric in tables and reports."""
    return LABELS.get(metric, metric)


def upgrade_run_config(settings: dict[str, Any]) -> dict[str, Any]:
    """The content of a run.json, also of version 0.1.0, as `RunConfig` writes it."""
    return msgspec.to_builtins(validate(_with_current_keys(settings), RunConfig, "run.json"))


def read_run_config(file: Path) -> RunConfig:
    """Read a run.json.

    Raises:
        ValueError: If it cannot be read.
    """
    return _read(file, RunConfig)


def write_result(folder: Path, result: Result) -> None:
    """Write metrics.json."""
    write_json(folder / METRICS_FILE, msgspec.to_builtins(result))


def read_result(file: Path) -> Result:
    """Read a metrics.json.

    Raises:
        ValueError: If it cannot be read.
    """
    return _read(file, Result)


def json_object(file: Path) -> dict[str, Any]:
    """The content of a file if it is a JSON object, else {}: to recognize folders without a marker."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _read(file: Path, kind: type[T]) -> T:
    try:
        return validate(_with_current_keys(json.loads(file.read_bytes())), kind)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {file}: {error}; write it again with region-eval") from error


FORMER_VIEWS = {"wrong": "other_region", "blind": "no_image", "red-box": "red_box"}
# Keys of run.json and metrics.json in version 0.1.0 -> current keys
_FORMER_KEYS = {
    **FORMER_VIEWS,
    **FORMER_KEYS,
    "exactly right": "literal_match",
    **{text: metric for metric, text in LABELS.items()},
    "region form": "region_form",
    "limited to": "limit",
    "region_input": "view",
    "wording": "prompt_template",
    "inputs": "views",
    "shown": "shown_region_metrics",
    "same class": "same_class",
    "question word": "question_word",
    "words a prediction": "words_per_prediction",
    "words a reference": "words_per_reference",
    "empty predictions": "empty_predictions",
    "predictions cut at the token limit": "truncated_predictions",
    "predictions of over 100 words": "long_predictions",
}


def _with_current_keys(content: Any) -> Any:
    """The content of a run.json or metrics.json of version 0.1.0 with the current keys and names of views."""
    if isinstance(content, list):
        return [_with_current_keys(value) for value in content]
    if not isinstance(content, dict):
        return content
    found = {_FORMER_KEYS.get(key, key): _with_current_keys(value) for key, value in content.items()}
    if isinstance(view := found.get("view"), str):
        found["view"] = FORMER_VIEWS.get(view, view)
    return found
