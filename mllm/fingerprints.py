"""Fingerprints of a model, its adapter and its weights: a run is resumed only with the model that started it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

_MAX_HASHED = 200_000_000  # bytes; larger files are identified by name, size and modification time
_HASHED_SUFFIXES = (".json", ".safetensors", ".bin", ".jinja", ".model", ".txt")
_ADDED = ("vision_tower.", "vision_model.", ".lora_", ".modules_to_save.")  # parts of names of such weights
FORMER_KEYS = {"quantised": "quantized", "alpha and adapter": "alpha_and_adapter"}  # keys in version 0.1.0 -> current


def model_fingerprint(model: PreTrainedModel, name: str, exclude: Path | None = None) -> dict[str, str]:
    """What identifies a loaded model in the settings of a run.

    Args:
        model: As `mllm.load` returns it.
        name: What the run calls it.
        exclude: The output of the run, which may be in the model's directory.
    """
    return {
        "model": name,
        "weights": directory_fingerprint(model.config._name_or_path, model.config, exclude),
        "quantized": str(getattr(model, "quantization_method", None)),
        "alpha_and_adapter": added_weights_fingerprint(model),
        "dtype": str(model.get_input_embeddings().weight.dtype),  # BLIP-2 keeps its Q-Former in float32
    }


def added_weights_fingerprint(model: PreTrainedModel) -> str:
    """A hash of the loaded weights that may not come from the model's directory: the tower's and an adapter's."""
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        if any(part in name for part in _ADDED):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def directory_fingerprint(name: str, config: Any, exclude: Path | None = None) -> str:
    """A hash of a model directory's config and weights, or the commit of a hub id.

    Args:
        name: Directory or hub id.
        config: The model's config, which stores the commit of a hub id.
        exclude: A file of the directory to skip. Hidden files, such as a lock, are always skipped.
    """
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{config._commit_hash}"
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix not in _HASHED_SUFFIXES or not file.is_file():
            continue
        if file.name.startswith(".") or (exclude is not None and file.resolve() == exclude):
            continue
        status = file.stat()
        hashed = status.st_size <= _MAX_HASHED
        digest.update(file.name.encode())
        digest.update(file.read_bytes() if hashed else f"{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()
