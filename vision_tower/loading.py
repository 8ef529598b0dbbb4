"""`from_pretrained` with a check of its report: no weight stays random, and no alpha channel is left behind."""

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
    """Call a `from_pretrained` and check that every weight came from the checkpoint and all of it was used.

    The alpha weight may be missing (it is then zero) unless the config.json in `source` is one of ours. Transformers'
    report is logged only if there is something to report besides that.

    Args:
        load: The `from_pretrained`.
        source: Directory or hub id; None with `state_dict=`.
        *args: Further arguments of `load`.
        ignored: Beginnings of keys that the checkpoint may hold and the model does not have.
        alpha_required: Whether a checkpoint without alpha weight is refused whatever its config.json says.
        output_loading_info: As in `from_pretrained`.
        ignore_mismatched_sizes: As in `from_pretrained`.
        **kwargs: Further arguments of `load`.

    Raises:
        ValueError: If a weight is missing, left over, or of another shape: it would stay random (or unused) and the
            answers would still read well.
    """
    with _held_reports() as reports:
        # mismatches are let through to the info, which names them; Transformers' own error does not
        model, info = load(source, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
        alphas = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, AlphaConv2d)}
        missing = info["missing_keys"] - alphas
        unexpected = {key for key in info["unexpected_keys"] if not key.startswith(ignored)}
        unexpected = {key for key in unexpected if not key.endswith("position_ids")}  # an index buffer of old files
        mismatched = set() if ignore_mismatched_sizes else {str(key) for key in info["mismatched_keys"]}
        where = "the given state_dict" if source is None else _weights_file(source, **kwargs)
        _raise_if_different(type(model).__name__, where, missing, unexpected, mismatched)
        lost = sorted(info["missing_keys"] & alphas)
        # one report is the info's; another one is about the model below an adapter, which the info omits
        if len(reports) > bool(info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]):
            load_checked(load, model.config.name_or_path, *args, ignored=ignored, **kwargs)
        if not info["mismatched_keys"]:
            reports.clear()
    if lost and alpha_required:
        raise ValueError(
            f"{where} has no alpha weight ({lost[0]}): every region would be ignored. To begin with a stock model, "
            "load it with from_pretrained and give it to add_alpha_channel"
        )
    if lost and source is not None and _alpha_promised(source, kwargs):
        raise ValueError(
            f"{where} lacks the alpha weight {lost[0]}, which its config.json promises: every region would be ignored. "
            "Was the checkpoint saved or converted by something that dropped it?"
        )
    _check_finite(model, where)
    return (model, info) if output_loading_info else model


def _check_finite(model: PreTrainedModel, where: object) -> None:
    """Raise ValueError if an alpha weight has NaN or Inf: of the region, nothing would be left."""
    for name, module in model.named_modules():
        weight = module.weight if isinstance(module, AlphaConv2d) else None
        # on `meta`, or in pieces (DeepSpeed's ZeRO-3), a weight cannot be looked at
        if weight is not None and not (weight.is_meta or hasattr(weight, "ds_id") or weight.isfinite().all()):
            raise ValueError(f"the alpha weight {name}.weight in {where} contains NaN or Inf: the file is damaged")


def _raise_if_different(name: str, where: object, missing: set, unexpected: set, mismatched: set) -> None:
    problems = [
        f"{len(keys)} {what} (first: {min(keys)})"
        for what, keys in (("missing", missing), ("not of this model", unexpected), ("of another shape", mismatched))
        if keys
    ]
    if problems:
        raise ValueError(
            f"the weights in {where} do not fit {name}: {', '.join(problems)}; only the alpha weight may be missing. "
            "Is it the checkpoint of another model or size?"
        )


@contextlib.contextmanager
def _held_reports() -> Iterator[list[logging.LogRecord]]:
    """Hold back the load reports that this thread logs, until the end; those removed from the list are not shown."""
    held: list[logging.LogRecord] = []
    thread = threading.get_ident()

    def shown(record: logging.LogRecord) -> bool:
        if record.thread == thread and " LOAD REPORT" in record.getMessage():
            held.append(record)
            return False
        return True

    _REPORTER.addFilter(shown)
    try:
        yield held
    finally:
        _REPORTER.removeFilter(shown)
        for record in held:
            _REPORTER.handle(record)


def _alpha_promised(source: str | os.PathLike, options: dict) -> bool:
    """Whether the config.json beside the weights is of one of our models; CLIP's and stock BLIP-2's is not."""
    path = cached_file(source, "config.json", _raise_exceptions_for_missing_entries=False, **hub_options(options))
    if path is None:
        return False
    config, _ = PreTrainedConfig.get_config_dict(path)
    kinds = (config.get("model_type"), (config.get("vision_config") or {}).get("model_type"))
    return any(str(kind).startswith("alpha_") for kind in kinds)


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that say where files are, and are given."""
    return {name: options[name] for name in _HUB_OPTIONS if options.get(name) is not None}


def _weights_file(source: str | os.PathLike, subfolder="", variant=None, use_safetensors=None, **_: Any) -> str:
    """The file in a directory that `from_pretrained` reads; a hub id is returned as it is."""
    for name in _PICKLES if use_safetensors is False else _SAFETENSORS + _PICKLES:
        stem, _, ending = name.rpartition(".")
        path = os.path.join(source, subfolder or "", f"{stem}.{variant}.{ending}" if variant else name)
        if os.path.isfile(path):
            return path
    return str(source)


def load_with_alpha(name: str | os.PathLike, model_class: Any = None, **kwargs: Any) -> PreTrainedModel:
    """Load a model that `add_alpha_channel` has changed and `save_pretrained` has saved. `from_pretrained` alone would
    drop the alpha weight: the stock class has no place for it.

    Args:
        name: Directory or hub id.
        model_class: Its class, or an Auto class; the one that its config names when not given.
        **kwargs: As in `from_pretrained`.

    Raises:
        ValueError: If there is no alpha weight, a weight is missing, of another shape, or left over; or as
            `add_alpha_channel`.
    """
    stock = _stock_class(name, model_class, kwargs)

    def __init__(self, *args: Any, **options: Any) -> None:  # noqa: N807
        stock.__init__(self, *args, **options)
        add_alpha_channel(self)

    # Under the stock class's name and module, since Transformers looks up the renaming of old keys by them.
    body = {"__init__": __init__, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    with_alpha: Any = type(stock.__name__, (stock,), body)
    loaded = load_checked(with_alpha.from_pretrained, name, alpha_required=True, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.__class__ = stock
    return loaded


def _stock_class(name: str | os.PathLike, model_class: Any, options: dict) -> type[PreTrainedModel]:
    """The class itself where None or an Auto class is given."""
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
        raise ValueError(f"expected a Transformers model class in {name}'s config, got {architecture}; give it")
    return found
