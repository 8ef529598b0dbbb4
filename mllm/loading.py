"""`mllm.load`: a directory, a hub id or nothing (the embedded model) -> a model that is ready to answer, and its
processor.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoProcessor,
    BitsAndBytesConfig,
    Blip2Config,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from mllm import blip2, llava
from mllm.processing import AlphaLlavaProcessor
from mllm.processing_blip2 import AlphaBlip2Processor
from vision_tower import AlphaCLIPImageProcessor

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

AlphaProcessor = AlphaLlavaProcessor | AlphaBlip2Processor
FAMILIES = {"llava": llava, "blip-2": blip2, "alpha_blip2": blip2}  # by model_type
EMBEDDED_MODEL = Path(__file__).parent / "assets" / "model"


def load(
    model: str | os.PathLike | None = None,
    *,
    device: str = "auto",
    device_map: str | dict | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    alpha_weights: str | os.PathLike | None = None,
    load_in: str | None = None,
    adapter: str | os.PathLike | None = None,
    compile: bool = False,  # noqa: A002, the name that torch and Transformers use
) -> tuple[PreTrainedModel, AlphaProcessor]:
    """Load a LLaVA-1.5 or BLIP-2 with an alpha tower in evaluation mode, and its processor.

    Args:
        model: A directory or a hub id of a LLaVA-1.5 or BLIP-2, with its stock tower or ours; None is the embedded
            model, which knows drawn scenes only (docs/shapes.md).
        device: "auto" (cuda, else mps, else cpu), "cpu", "cuda" or "mps"; ignored with `device_map`.
        device_map: As in `from_pretrained`.
        dtype: "auto" (as stored), a torch dtype, or its name.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Whether code from the model directory may run.
        attn_implementation: "eager", "sdpa", ... as in `from_pretrained`.
        alpha_weights: An Alpha-CLIP checkpoint (original file, or a directory of ours) that replaces the tower's
            weights after the model is loaded; released models carry plain CLIP, which ignores regions.
        load_in: "4bit" (nf4) or "8bit": the language model's matrices are quantised by bitsandbytes, on a CPU too;
            tower and projector (BLIP-2: and Q-Former) are not.
        adapter: Directory of a LoRA adapter (PEFT) that was trained for this model.
        compile: Compile the vision tower with `torch.compile`: the first picture takes a minute, the others less than
            before.

    Raises:
        ValueError: If there is no such model, it is of another kind, or its weights do not fit.
    """
    name = EMBEDDED_MODEL if model is None else model
    hub = {"revision": revision, "trust_remote_code": trust_remote_code, **_offline(name)}
    config = _read_config(name, hub)
    if load_in is not None and device_map is None:
        device_map = {"": pick_device(device)}  # quantised on the device, never moved afterwards
    family = FAMILIES[config.model_type]
    loaded = family.load_model(
        name,
        config,
        dtype=dtype,
        device_map=device_map,
        quantization_config=quantization(load_in, family.NEVER_QUANTISED),
        attn_implementation=attn_implementation,
        **{key: value for key, value in hub.items() if key != "trust_remote_code"},
    )
    if alpha_weights is not None:
        family.load_alpha_weights(loaded, alpha_weights)
    if adapter is not None:
        load_adapter(loaded, adapter)
    if _ignores_regions(loaded):
        eva = config.model_type == "blip-2"
        advice = "tune it, as no published weights fit EVA" if eva else "give alpha_weights (--alpha-weights)"
        logger.warning("the alpha weight of %s is zero: every region gets the same answer; %s", name, advice)
    if device_map is None:
        loaded = loaded.to(pick_device(device))
    if compile:
        family.vision_tower(loaded).compile()  # in place: names and saving stay as they are
    return loaded.eval(), _load_processor(name, config, hub)


def load_config(model: str | os.PathLike | None = None) -> LlavaConfig | Blip2Config:
    """The configuration alone; arguments and errors as in `load`."""
    name = EMBEDDED_MODEL if model is None else model
    return _read_config(name, _offline(name))


def load_processor(model: str | os.PathLike | None = None) -> AlphaProcessor:
    """The processor alone; arguments and errors as in `load`, and no weights are read."""
    name = EMBEDDED_MODEL if model is None else model
    hub = _offline(name)
    return _load_processor(name, _read_config(name, hub), hub)


def _offline(name: str | os.PathLike) -> dict[str, bool]:
    """How a hub id is looked up when the hub cannot be reached: in the cache or not at all, at once, where Transformers
    would retry for half a minute.
    """
    return {} if os.path.isdir(name) or hub_answers() else {"local_files_only": True}


def _ignores_regions(model: PreTrainedModel) -> bool:
    """Whether the alpha weight is zero, as it is where CLIP's weights were loaded and nothing else."""
    alphas = [weight for name, weight in model.named_parameters() if "patch_embedding.alpha." in name]
    # on `meta`, or in pieces (DeepSpeed's ZeRO-3), a weight cannot be looked at
    return not any(weight.is_meta or hasattr(weight, "ds_id") or weight.any() for weight in alphas)


def quantization(load_in: str | None, never_quantised: Sequence[str]) -> BitsAndBytesConfig | None:
    """How bitsandbytes loads a model but for the modules `never_quantised`; None as it is stored.

    Raises:
        ValueError: If bitsandbytes is absent or the name is neither "4bit" nor "8bit".
    """
    if load_in is None:
        return None
    if load_in not in ("4bit", "8bit"):
        raise ValueError(f"expected load_in '4bit' or '8bit', got {load_in!r}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"loading in {load_in} needs bitsandbytes, which is not installed: pip install bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=load_in == "4bit",
        load_in_8bit=load_in == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=list(never_quantised),
    )


def load_adapter(model: PreTrainedModel, adapter: str | os.PathLike) -> PeftModel:
    """Put a LoRA adapter into `model`, in place; what is returned is PEFT's handle on it, for merging.

    Raises:
        ValueError: If there is no adapter there, or its tensors are not exactly those that it puts into this model.
    """
    from peft import PeftModel, get_peft_model_state_dict  # here: it takes a second that most runs do not need

    file = Path(adapter) / "adapter_model.safetensors"
    if not file.is_file() or not (Path(adapter) / "adapter_config.json").is_file():
        raise ValueError(f"expected a LoRA adapter (adapter_config.json, adapter_model.safetensors) in {adapter}")
    another = f"the adapter in {adapter} was trained for another model"
    try:
        handle = PeftModel.from_pretrained(model, adapter)
        stored = set(load_file(file))
    except (RuntimeError, ValueError, TypeError, KeyError) as error:  # sizes, target modules, settings
        raise ValueError(f"{another}: {str(error).strip().splitlines()[-1].strip()}") from error
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); was it copied whole?") from error
    placed = set(get_peft_model_state_dict(handle, save_embedding_layers=False))  # "auto" may ask the hub
    if stored != placed:
        first = sorted(stored ^ placed)[0]
        raise ValueError(f"{another}: {len(stored ^ placed)} tensors do not match (first: {first})")
    return handle


def pick_device(device: str = "auto") -> str:
    """The torch device that "auto" stands for; another name is checked and returned.

    Raises:
        ValueError: If the device is unknown or absent.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, there in present.items() if there)
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = None
    if not present.get(kind):
        raise ValueError(f"expected a device out of {[n for n, there in present.items() if there]}, got {device!r}")
    return device


def hub_answers() -> bool:
    """Whether the hub can be reached; behind a proxy only a request could tell, so yes."""
    url = urlsplit(huggingface_hub.constants.ENDPOINT)
    if getproxies():
        return True
    try:
        socket.create_connection((url.hostname, url.port or 443), timeout=2).close()
    except OSError:
        return False
    return True


def _read_config(name: str | os.PathLike, hub: dict) -> LlavaConfig | Blip2Config:
    """The configuration of a LLaVA or BLIP-2, or a ValueError that says what the name stands for instead."""
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(f"expected a model directory, got {name} without a config.json")
    if not os.path.isdir(name) and (os.path.exists(name) or os.path.isabs(name) or str(name).startswith((".", "~"))):
        raise ValueError(f"expected a model directory or a hub id, got {name}, which is not a directory")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, **hub)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[0]
        if hub.get("local_files_only"):
            reason = "there is no such directory, and without network only models in the hub's cache can be loaded"
        raise ValueError(f"cannot load the model {name}: {reason}") from error
    if config.model_type not in FAMILIES:
        raise ValueError(f"expected a LLaVA-1.5 or BLIP-2 model, got model_type {config.model_type!r} in {name}")
    return config


def _load_processor(name: str | os.PathLike, config: LlavaConfig | Blip2Config, hub: dict) -> AlphaProcessor:
    """The model's own processor if it is ours, else one built from its tokenizer and image settings."""
    processor = AutoProcessor.from_pretrained(name, backend="pil", **hub)
    # a tokenizer copied from one of ours names our processor; its image settings may still be a stock one's
    if isinstance(processor, AlphaProcessor) and isinstance(processor.image_processor, AlphaCLIPImageProcessor):
        return processor
    logger.info("%s has no alpha processor: pictures and questions are prepared as its authors did", name)
    return FAMILIES[config.model_type].load_processor(name, config, **hub)
