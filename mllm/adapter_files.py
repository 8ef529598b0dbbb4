"""Validation of the files of a LoRA adapter before PEFT reads them, which builds anything that its config states."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from peft import LoraConfig

from mllm.data.schemas import validate
from vision_tower.weight_files import StateDict, read_tensors, shown

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 4096

_Rank = Annotated[int, msgspec.Meta(ge=1, le=MAX_RANK)]
_Names = str | list[str] | None
_Numbers = int | list[int] | None


class _Lora(msgspec.Struct, forbid_unknown_fields=True):
    """The settings of PEFT's `LoraConfig` that change a loaded adapter."""

    r: _Rank
    target_modules: str | list[str]
    peft_type: Literal["LORA"] = "LORA"
    lora_alpha: float = 8
    lora_dropout: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    modules_to_save: list[str] | None = None
    exclude_modules: _Names = None
    layers_to_transform: _Numbers = None
    layers_pattern: _Names = None
    bias: Literal["none", "all", "lora_only"] = "none"
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | Literal["gaussian"] = True  # others change the model's weights, too


def read_adapter_config(folder: str | os.PathLike) -> LoraConfig:
    """The configuration of an adapter, without the fields that only state its origin.

    Raises:
        ValueError: If the file is not found, damaged, has values of other types, or is not a plain LoRA config.
    """
    path = Path(folder) / CONFIG
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(record).__name__}")
    known = {name: record[name] for name in _Lora.__struct_fields__ if name in record}
    for name, value in record.items():
        if name not in known and name not in _ABOUT and value and value != _DEFAULTS.get(name):
            raise ValueError(f"{path}: {shown(name)} {shown(value)} is not supported; expected a plain LoRA adapter")
    try:
        fields = msgspec.to_builtins(validate(known, _Lora, path))
    except OverflowError as error:
        raise ValueError(f"{path}: {error}") from error
    patterns = {name: fields[name] or {} for name in ("rank_pattern", "alpha_pattern")}
    try:
        return LoraConfig(**{**fields, **patterns}, inference_mode=True)
    except ValueError as error:  # mutually exclusive settings
        raise ValueError(f"{path}: {error}") from error


def read_adapter_weights(folder: str | os.PathLike, config: LoraConfig) -> StateDict:
    """The tensors of an adapter.

    Raises:
        ValueError: If the file is not found or damaged, a tensor contains NaN or Inf or is not floating point, or the
            ranks differ from the configuration.
    """
    path = Path(folder) / WEIGHTS
    tensors = read_tensors(path)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.element_size() == 1:
            raise ValueError(f"{path}: expected {shown(name)} as floats of 16 or 32 bits, got {tensor.dtype}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {shown(name)} contains NaN or Inf: the adapter is damaged")
    stored = {
        len(tensor) for name, tensor in tensors.items() if re.search(r"\.lora_(embedding_)?A\b", name) and tensor.ndim
    }
    stated = {config.r, *config.rank_pattern.values()}
    if not stored <= stated or max(stored, default=0) < max(stated):  # PEFT would allocate the stated size
        raise ValueError(f"{path} contains matrices of rank {sorted(stored)}, but {CONFIG} states {sorted(stated)}")
    return tensors


_ABOUT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "task_type",
}
_DEFAULTS: dict[str, Any] = LoraConfig().to_dict()
