"""`from_pretrained` with a check that all weights, including the alpha weight, were loaded."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from .alpha_embedding import AlphaConv2d, add_alpha_channel

_HUB_OPTIONS = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_REPORTER = logging.getLogger("transformers.modeling_utils")


def load_checked(
    load: Callable,
    source: str | os.PathLike | None,
    *args: Any,
    ignored: tuple[str, ...] = (),
    alpha_required: bool = False,
    output_loading_info: bool = False,
    ignore_mismatched_sizes: bool = False,
    **kwargs: Any,
) -> PreTrainedModel | tuple[PreTrainedModel, dict]:
    """Call a `from_pretrained`, and check that the weights of model and checkpoint match.

    Only an alpha weight may be missing, unless the config.json of `source` has a `model_type` of ours. It is then zero.
    The load report of Transformers is logged only if it lists other differences.

    Args:
        load: The `from_pretrained`.
        source: Directory or hub id; None with `state_dict=`.
        *args: Further arguments of `load`.
        ignored: Prefixes of keys that are allowed in the checkpoint although the model does not have them.
        alpha_required: Whether a missing alpha weight is always an error.
        output_loading_info: As in `from_pretrained`.
        ignore_mismatched_sizes: As in `from_pretrained`.
        **kwargs: Further arguments of `load`.

    Raises:
        ValueError: If a weight is missing, unexpected or of another shape, or an alpha weight contains NaN or Inf. A
            missing weight would be random, which is hard to notice in the output.
    """
    with _captured_reports() as reports:
        # With ignore_mismatched_sizes, mismatched keys are listed in the info. The error of Transformers omits them.
        model, info = load(source, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
        where = "the given state_dict" if source is None else _weights_file(source, **kwargs)
        alphas = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, AlphaConv2d)}
        missing = info["missing_keys"] - alphas
        unexpected = {key for key in info["unexpected_keys"] if not key.startswith(ignored)}
        unexpected = {key for key in unexpected if not key.endswith("position_ids")}  # a buffer in old files
        mismatched = set() if ignore_mismatched_sizes else {str(key) for key in info["mismatched_keys"]}
        _raise_if_different(type(model).__name__, where, missing, unexpected, mismatched)
        # One report describes the info. A second one is about the model below an adapter, which the info omits.
        if len(reports) > bool(info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]):
            load_checked(load, model.config.name_or_path, *args, ignored=ignored, **kwargs)
        if not info["mismatched_keys"]:
            reports.clear()
    if no_alpha := sorted(info["missing_keys"] & alphas):
        _check_may_lack_alpha(source, where, no_alpha[0], alpha_required, kwargs)
    _check_finite(model, where)
    return (model, info) if output_loading_info else model


def _check_may_lack_alpha(
    source: str | os.PathLike | None, where: str, key: str, alpha_required: bool, options: dict
) -> None:
    if alpha_required:
        raise ValueError(
            f"{where} has no alpha weight ({key}), so regions would have no effect; to start from a stock model, load "
            "it with from_pretrained and pass it to add_alpha_channel"
        )
    if source is not None and _is_alpha_config(source, options):
        raise ValueError(
            f"{where} lacks the alpha weight {key}, although its config.json is that of an Alpha-CLIP model; "
            "regions would have no effect. Was the weight dropped when the checkpoint was saved or converted?"
        )


def _check_finite(model: PreTrainedModel, where: str) -> None:
    """Raise ValueError if an alpha weight contains NaN or Inf."""
    for name, module in model.named_modules():
        weight = module.weight if isinstance(module, AlphaConv2d) else None
        # values are not available on `meta`, or if partitioned by DeepSpeed ZeRO-3
        if weight is not None and not (weight.is_meta or hasattr(weight, "ds_id") or weight.isfinite().all()):
            raise ValueError(f"the alpha weight {name}.weight in {where} contains NaN or Inf: the file is damaged")


def _raise_if_different(name: str, where: str, missing: set, unexpected: set, mismatched: set) -> None:
    problems = [
        f"{len(keys)} {problem} (first: {min(keys)})"
        for problem, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched))
        if keys
    ]
    if problems:
        raise ValueError(
            f"the weights in {where} do not match {name}: {', '.join(problems)}; only the alpha weight may be missing. "
            "Is this the checkpoint of another model or size?"
        )


@contextlib.contextmanager
def _captured_reports() -> Iterator[list[logging.LogRecord]]:
    """Collect the load reports that this thread logs. Those still in the list at the end are logged then."""
    captured: list[logging.LogRecord] = []
    thread = threading.get_ident()

    def capture(record: logging.LogRecord) -> bool:
        if record.thread == thread and " LOAD REPORT" in record.getMessage():
            captured.append(record)
            return False
        return True

    _REPORTER.addFilter(capture)
    try:
        yield captured
    finally:
        _REPORTER.removeFilter(capture)
        for record in captured:
            _REPORTER.handle(record)


def _is_alpha_config(source: str | os.PathLike, options: dict) -> bool:
    """Whether the config.json has a `model_type` of ours, not that of CLIP or stock BLIP-2."""
    path = cached_file(source, "config.json", _raise_exceptions_for_missing_entries=False, **hub_options(options))
    if path is None:
        return False
    config, _ = PreTrainedConfig.get_config_dict(path)
    kinds = (config.get("model_type"), (config.get("vision_config") or {}).get("model_type"))
    return any(str(kind).startswith("alpha_") for kind in kinds)


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained` that select files (`revision`, `subfolder`, ...) and are not None."""
    return {name: options[name] for name in _HUB_OPTIONS if options.get(name) is not None}


def _weights_file(source: str | os.PathLike, subfolder="", variant=None, use_safetensors=None, **_: Any) -> str:
    """The file in a directory that `from_pretrained` reads; a hub id is returned unchanged."""
    for name in _PICKLES if use_safetensors is False else _SAFETENSORS + _PICKLES:
        stem, _, ending = name.rpartition(".")
        path = os.path.join(source, subfolder or "", f"{stem}.{variant}.{ending}" if variant else name)
        if os.path.isfile(path):
            return path
    return str(source)


def load_with_alpha(name: str | os.PathLike, model_class: Any = None, **kwargs: Any) -> PreTrainedModel:
    """Load a saved model to which `add_alpha_channel` was applied.

    `from_pretrained` alone would drop the alpha weight, which the stock class does not have.

    Args:
        name: Directory or hub id.
        model_class: Model class or Auto class; defaults to the class in `architectures` of the config.
        **kwargs: As in `from_pretrained`.

    Returns:
        An instance of the stock class with an alpha channel.

    Raises:
        ValueError: If a weight, the alpha weight included, is missing, unexpected or of another shape, or
            `add_alpha_channel` does not support the model.

    Example:
        >>> model = load_with_alpha("DIR", AutoModelForImageTextToText, dtype="auto")
    """
    stock = _stock_class(name, model_class, kwargs)

    def __init__(self, *args: Any, **options: Any) -> None:  # noqa: N807
        stock.__init__(self, *args, **options)
        add_alpha_channel(self)

    # With the name and module of the stock class, by which Transformers looks up the renaming of old keys.
    body = {"__init__": __init__, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    with_alpha: Any = type(stock.__name__, (stock,), body)
    loaded = load_checked(with_alpha.from_pretrained, name, alpha_required=True, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.__class__ = stock
    return loaded


def _stock_class(name: str | os.PathLike, model_class: Any, options: dict) -> type[PreTrainedModel]:
    """The model class, from a model class, an Auto class or None."""
    if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
        return model_class
    trusted = options.get("trust_remote_code")
    config = options.get("config") or AutoConfig.from_pretrained(
        name, trust_remote_code=trusted, **hub_options(options)
    )
    if model_class is not None:
        with torch.device("meta"):
            return type(model_class.from_config(config))
    architecture = str((config.architectures or [None])[0])
    found = getattr(transformers, architecture, None)
    if found is None:
        raise ValueError(
            f"expected a Transformers model class in the config of {name}, got {architecture}; pass model_class"
        )
    return found
