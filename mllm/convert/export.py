"""Export to directories that load without this package: a LLaVA as stock classes, a BLIP-2 with its source files
(docs/export.md).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import save_torch_state_dict
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from alpha_clip_commands.command_line import say
from mllm.blip2 import AlphaBlip2ForConditionalGeneration
from mllm.folders import check_new, replacing_folder
from mllm.fused import fused_config, save_stock_image_processor
from mllm.llava import vision_tower
from mllm.loading import AlphaProcessor, load, load_adapter
from vision_tower import AlphaCLIPVisionModel
from vision_tower.conversion import fuse

if TYPE_CHECKING:
    from peft import PeftModel

# Key prefixes in memory -> those of llava-hf, which every version of Transformers reads. `save_pretrained` omits
# `vision_model.`, and Transformers before 5 would then initialize the tower randomly, with only a warning.
_HUB_PREFIXES = {
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    check_new(args.out)
    model, processor = load(
        args.model, device="cpu", dtype=args.dtype, revision=args.revision, alpha_weights=args.alpha_weights
    )
    export(model, processor, args.out, adapter=args.adapter)
    say(f'wrote {args.out}; AutoProcessor.from_pretrained("{args.out}", trust_remote_code=True) loads its processor')
    return 0


def export(
    model: PreTrainedModel | PeftModel,
    processor: AlphaProcessor,
    directory: str | os.PathLike,
    *,
    adapter: str | os.PathLike | None = None,
) -> None:
    """Export a model to a directory that loads without this package.

    A LLaVA becomes a stock `LlavaForConditionalGeneration` with a stock `CLIPVisionModel` of four channels. Its
    `pixel_values` must be (B, 4, S, S): three channels are an error, not the whole image. The processor is loaded by
    `AutoProcessor.from_pretrained(directory, trust_remote_code=True)`. A BLIP-2 model needs `trust_remote_code=True`,
    too.

    Args:
        model: As returned by `mllm.load`.
        processor: Its processor.
        directory: The output, which must not exist.
        adapter: Directory of a LoRA adapter, merged into `model` (in place) first.

    Raises:
        ValueError: If the model is of another kind, quantized or offloaded, or has an unmerged adapter; if the adapter
            does not fit it; or if `directory` exists.
    """
    check_exportable(model, processor)
    reads = [] if adapter is None else [adapter]
    with replacing_folder(directory, "exported model", reads=reads, new=True) as folder:
        if adapter is not None:
            model = load_adapter(model, adapter).merge_and_unload()
        if isinstance(model, AlphaBlip2ForConditionalGeneration):
            model.save_pretrained(folder)
        else:
            _save_fused(model, folder)
        processor.save_pretrained(folder)


def check_exportable(model: PreTrainedModel | PeftModel, processor: AlphaProcessor) -> None:
    """Raise ValueError unless `model` has our tower and is not quantized, offloaded or wrapped in an adapter."""
    if hasattr(model, "peft_config") or any(".base_layer." in name for name, _ in model.named_parameters()):
        raise ValueError(
            "the model has an unmerged adapter; load the model without it, and pass its directory as adapter="
        )
    llava = isinstance(model, LlavaForConditionalGeneration) and isinstance(vision_tower(model), AlphaCLIPVisionModel)
    if not (llava or isinstance(model, AlphaBlip2ForConditionalGeneration)):
        raise ValueError(
            f"expected a LLaVA-1.5 or BLIP-2 with our tower, as returned by mllm.load, got {type(model).__name__}"
        )
    if not isinstance(processor, AlphaProcessor):
        raise ValueError(f"expected the model's processor, as returned by mllm.load, got {type(processor).__name__}")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("the model is quantized; load it without load_in")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("part of the model is offloaded; load it on one device, such as device='cpu'")


def _save_fused(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Save the model as stock classes, with the image processor config that Transformers before 5 reads."""
    config = fused_config(model.config)
    config.architectures, config.dtype = [LlavaForConditionalGeneration.__name__], model.dtype
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    weights = {_hub_name(name): tensor.to(model.dtype) for name, tensor in fuse(model.state_dict()).items()}
    save_torch_state_dict(weights, folder, max_shard_size="5GB")
    save_stock_image_processor(config.vision_config.image_size, folder)


def _hub_name(name: str) -> str:
    prefix = next(prefix for prefix in _HUB_PREFIXES if name.startswith(prefix))
    return _HUB_PREFIXES[prefix] + name.removeprefix(prefix)
