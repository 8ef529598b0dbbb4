"""`mllm.load`: from a directory, a hub id or None (the embedded model) to a model and its processor."""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import re
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.integrations import is_deepspeed_zero3_enabled

import vision_tower
from alpha_clip_commands.command_line import check_model, one_line
from mllm import blip2, llava, llava_next
from mllm.hub import offline_options
from mllm.modeling_alpha_blip2 import AlphaBlip2VisionConfig
from mllm.processing_blip2 import AlphaBlip2Processor
from mllm.processing_llava import AlphaLlavaProcessor
from mllm.processing_llava_next import AlphaLlavaNextProcessor
from vision_tower import AlphaCLIPImageProcessor
from vision_tower.conversion import MAX_BLOCKS

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

AlphaProcessor = AlphaLlavaProcessor | AlphaLlavaNextProcessor | AlphaBlip2Processor
FAMILIES = {"llava": llava, "llava_next": llava_next, "blip-2": blip2, "alpha_blip2": blip2}  # by model_type
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
    """Load a LLaVA-1.5, LLaVA-NeXT or BLIP-2 with an alpha tower in evaluation mode, and its processor.

    Args:
        model: Directory or hub id of a LLaVA-1.5, LLaVA-NeXT or BLIP-2, with its stock tower or ours. None is the
            embedded model, which was trained on synthetic scenes only (docs/shapes.md).
        device: "auto" (cuda, else mps, else cpu), "cpu", "cuda" or "mps"; ignored with `device_map`.
        device_map: As in `from_pretrained`.
        dtype: "auto" (as stored), a torch dtype, or its name.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Whether code from the model directory may run.
        attn_implementation: "eager", "sdpa", ... as in `from_pretrained`.
        alpha_weights: Alpha-CLIP checkpoint (original file, or a converted directory) that replaces the tower's weights
            after the model is loaded. Released models contain plain CLIP, which ignores regions.
        load_in: "4bit" (nf4) or "8bit": quantize the language model's matrices with bitsandbytes. Tower, projector and
            Q-Former are not quantized.
        adapter: Directory of a LoRA adapter (PEFT) that was trained for this model.
        compile: Compile the vision tower with `torch.compile`. The first image takes a minute, later ones are faster.

    Returns:
        The model and its processor.

    Raises:
        ValueError: If the model is not found or not supported, or its weights do not match its config.
    """
    name = EMBEDDED_MODEL if model is None else model
    hub = {"revision": revision, "trust_remote_code": trust_remote_code, **offline_options(name)}
    config = _read_config(name, hub)
    family = FAMILIES[config.model_type]
    placed = device_map
    if load_in is not None and device_map is None:
        placed = {"": pick_device(device)}  # quantized weights stay on the device that they are loaded on
    options = {"dtype": dtype, "device_map": placed, "attn_implementation": attn_implementation}
    loaded = _load_model(name, config, hub, load_in, options)
    if alpha_weights is not None:
        family.load_alpha_weights(loaded, alpha_weights)
    if adapter is not None:
        load_adapter(loaded, adapter)
    _warn_if_regions_are_ignored(loaded, name)
    if placed is None:
        loaded = loaded.to(pick_device(device))
    if compile:
        family.vision_tower(loaded).compile()  # in place: parameter names do not change
    return loaded.eval(), _load_processor(name, config, hub)


def _load_model(
    name: str | os.PathLike, config: PreTrainedConfig, hub: dict, load_in: str | None, options: dict
) -> PreTrainedModel:
    if os.path.isdir(name):
        _check_sizes(name, config)
    family = FAMILIES[config.model_type]
    options = {**options, "quantization_config": quantization(load_in, family.NEVER_QUANTIZED)}
    options |= {key: value for key, value in hub.items() if key != "trust_remote_code"}
    with reading(name, "cannot load the model"):
        return family.load_model(name, config, **options)


def load_config(model: str | os.PathLike | None = None) -> PreTrainedConfig:
    """The configuration alone; arguments and errors as in `load`."""
    name = EMBEDDED_MODEL if model is None else model
    return _read_config(name, offline_options(name))


def load_processor(model: str | os.PathLike | None = None) -> AlphaProcessor:
    """The processor alone, without reading weights; arguments and errors as in `load`."""
    name = EMBEDDED_MODEL if model is None else model
    hub = offline_options(name)
    return _load_processor(name, _read_config(name, hub), hub)


def _warn_if_regions_are_ignored(model: PreTrainedModel, name: str | os.PathLike) -> None:
    """Warn if the alpha weight is zero, as after loading plain CLIP weights."""
    alphas = [weight for key, weight in model.named_parameters() if "patch_embedding.alpha." in key]
    # on `meta`, or partitioned by DeepSpeed's ZeRO-3, the values of a weight are not available
    if any(weight.is_meta or hasattr(weight, "ds_id") or weight.any() for weight in alphas):
        return
    eva = model.config.model_type == "alpha_blip2" and isinstance(model.config.vision_config, AlphaBlip2VisionConfig)
    advice = "tune it, as no published weights fit EVA" if eva else "give alpha_weights (--alpha-weights)"
    logger.warning("the alpha weight of %s is zero: every region gets the same answer; %s", name, advice)


def quantization(load_in: str | None, never_quantized: Sequence[str]) -> BitsAndBytesConfig | None:
    """The bitsandbytes config that quantizes all but the modules `never_quantized`; None without `load_in`.

    Raises:
        ValueError: If bitsandbytes is not installed or `load_in` is neither "4bit" nor "8bit".
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
        llm_int8_skip_modules=list(never_quantized),
    )


def load_adapter(model: PreTrainedModel, adapter: str | os.PathLike) -> PeftModel:
    """Load a LoRA adapter into `model`, in place; returns PEFT's wrapper, for merging.

    Raises:
        ValueError: If the adapter is not found or damaged, or its tensors do not match this model's adapter layers.
    """
    # imported here: PEFT takes a second, and most runs do not need it
    from peft import PeftModel, get_peft_model_state_dict

    from mllm.adapter_files import CONFIG, WEIGHTS, read_adapter_config, read_adapter_weights

    if not all((Path(adapter) / name).is_file() for name in (CONFIG, WEIGHTS)):
        raise ValueError(f"expected a LoRA adapter ({CONFIG}, {WEIGHTS}) in {adapter}")
    config = read_adapter_config(adapter)
    stored = set(read_adapter_weights(adapter, config))
    with reading(adapter, "the adapter is damaged, or was trained for another model:"):
        handle = PeftModel.from_pretrained(model, adapter, config=config)
    expected = set(get_peft_model_state_dict(handle, save_embedding_layers=False))  # "auto" may connect to the hub
    if stored != expected:
        first = sorted(stored ^ expected)[0]
        raise ValueError(
            f"the adapter in {adapter} was trained for another model: {len(stored ^ expected)} tensors do not match "
            f"(first: {first})"
        )
    return handle


# The errors of Transformers, tokenizers and PEFT on damaged or unsupported files (tests/faults/test_damaged_models.py).
_DAMAGE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    RuntimeError,
    re.error,
    pickle.UnpicklingError,
    SafetensorError,
    StrictDataclassError,
)
_STANDARD = sysconfig.get_path("stdlib") + os.sep
_OURS = tuple(str(Path(package).parent) + os.sep for package in (__file__, vision_tower.__file__))


class reading:  # noqa: N801, used like a function
    """Context manager that turns the errors of libraries that read a model's files into a one-line ValueError.

    Errors of our own code are not changed: they are one-line errors already, or bugs.
    """

    def __init__(self, name: str | os.PathLike, what: str, reason: str | None = None) -> None:
        """Take the name of what is read, the beginning of the message, and a reason to show instead of the error."""
        self.name = str(name)
        self.what = what
        self.reason = reason

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, place: Any) -> None:
        """Raise ValueError if a library failed, or if the ValueError of our own code does not include the name."""
        if kind is None or not (issubclass(kind, _DAMAGE) or kind is Exception):  # tokenizers raises plain Exception
            return
        files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(place)]
        outside = [file for file in files if not file.startswith(("<frozen", _STANDARD)) or "site-packages" in file]
        ours = bool(outside) and outside[-1].startswith(_OURS)
        if ours and (kind is not ValueError or self.name in str(error)):
            return
        raise ValueError(f"{self.what} {self.name}: {self.reason or one_line(error)[:300]}") from error


def pick_device(device: str = "auto") -> str:
    """Resolve "auto" to a torch device; check any other name.

    Raises:
        ValueError: If the device is unknown or not available.
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


def _read_config(name: str | os.PathLike, hub: dict) -> PreTrainedConfig:
    """The configuration of a supported model; raises ValueError for anything else."""
    check_model(name)
    missing = "directory not found, and without network only models in the hub's cache can be loaded"
    with reading(name, "cannot load the model", missing if hub.get("local_files_only") else None):
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, **hub)
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"expected a LLaVA-1.5, LLaVA-NeXT or BLIP-2 model, got model_type {config.model_type!r} in {name}"
        )
    return config


def _load_processor(name: str | os.PathLike, config: PreTrainedConfig, hub: dict) -> AlphaProcessor:
    """The processor in the directory if it is ours, else one built from its tokenizer and image settings."""
    with reading(name, "cannot load the processor in"):
        processor = AutoProcessor.from_pretrained(name, backend="pil", **hub)
        # the tokenizer may be a copy of ours, which names our processor class, next to a stock image processor
        if isinstance(processor, AlphaProcessor) and isinstance(processor.image_processor, AlphaCLIPImageProcessor):
            return processor
        logger.info("%s has no alpha processor: images and questions are prepared as its authors did", name)
        return FAMILIES[config.model_type].load_processor(name, config, **hub)


def _check_sizes(name: str | os.PathLike, config: PreTrainedConfig) -> None:
    """Raise ValueError if the config describes more weights than the directory contains: they would be initialized."""
    parts = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    for part in (config, *parts):
        for field, value in part.to_dict().items():
            if "layers" in field and isinstance(value, int | float) and not value <= MAX_BLOCKS:
                raise ValueError(f"{name}: expected at most {MAX_BLOCKS} in {field} of config.json, got {value}")
    if is_deepspeed_zero3_enabled():  # which would partition these weights too, although they are on meta
        return
    with reading(name, "cannot load the model"), torch.device("meta"), no_init_weights():
        model = AutoModelForImageTextToText.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(file.stat().st_size for file in Path(name).iterdir() if file.suffix in (".safetensors", ".bin"))
    if parameters > 2 * stored:  # 0.5 bytes per parameter with 4 bits
        raise ValueError(
            f"{name}: config.json describes a model of {parameters:,} parameters, but the weight files have "
            f"{stored:,} bytes; they do not belong together, or one is damaged"
        )
