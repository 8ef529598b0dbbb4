"""A LLaVA with our tower -> a directory of stock classes, which Transformers loads without this package
(docs/export.md).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from huggingface_hub import save_torch_state_dict
from transformers import CLIPImageProcessorPil, LlavaForConditionalGeneration, PreTrainedModel

from mllm.files import replacing_folder
from mllm.llava import fused_config, vision_tower
from mllm.loading import AlphaProcessor, load_adapter
from mllm.processing import AlphaLlavaProcessor
from vision_tower import AlphaCLIPVisionModel
from vision_tower.conversion import fuse

if TYPE_CHECKING:
    from peft import PeftModel

# Names in memory -> llava-hf's, which every version of Transformers reads. What `save_pretrained` writes lacks
# `vision_model.`, and Transformers before 5 would leave the tower random, with a warning only.
_HUB_PREFIXES = {
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def export(
    model: PreTrainedModel | PeftModel,
    processor: AlphaProcessor,
    directory: str | os.PathLike,
    *,
    adapter: str | os.PathLike | None = None,
) -> None:
    """Write a LLaVA with our tower as stock `LlavaForConditionalGeneration`, whose tower is stock `CLIPVisionModel` of
    four channels, with a processor that `AutoProcessor.from_pretrained(directory, trust_remote_code=True)` loads.

    `pixel_values` is then always (B, 4, S, S): stock CLIP does not take three channels for the whole image.

    Args:
        model: As `mllm.load` gives it.
        processor: Its processor.
        directory: A new directory.
        adapter: Directory of a LoRA adapter, merged into `model` (in place) first.

    Raises:
        ValueError: If the model is not such a LLaVA, is quantized, has an adapter that is not merged or weights on no
            device, or `directory` exists.
    """
    check_exportable(model, processor)
    if adapter is not None:
        model = load_adapter(model, adapter).merge_and_unload()
    reads = [] if adapter is None else [adapter]
    with replacing_folder(directory, "exported model", reads=reads, new=True) as folder:
        config = fused_config(model.config)
        config.architectures, config.dtype = [LlavaForConditionalGeneration.__name__], model.dtype
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        weights = {_hub_name(key): tensor.to(model.dtype) for key, tensor in fuse(model.state_dict()).items()}
        save_torch_state_dict(weights, folder, max_shard_size="5GB")
        # For Transformers before 5, which do not read image settings in processor_config.json.
        side = config.vision_config.image_size
        image_settings = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        CLIPImageProcessorPil(**image_settings).save_pretrained(folder)
        processor.save_pretrained(folder)


def check_exportable(model: PreTrainedModel | PeftModel, processor: AlphaProcessor) -> None:
    """Raise ValueError unless `model` is a LLaVA with our tower, whole, not quantized and without an adapter."""
    if hasattr(model, "peft_config") or any(".base_layer." in key for key, _ in model.named_parameters()):
        raise ValueError(
            "the model has an adapter that is not merged; load the model without it, and give its directory as adapter="
        )
    if model.config.model_type == "alpha_blip2":
        raise ValueError(
            "BLIP-2 cannot be exported: the patch convolution of stock Blip2VisionModel has three channels, and stock "
            "BLIP-2 takes no other tower; its own directory loads with trust_remote_code=True (docs/export.md)"
        )
    if not (isinstance(model, LlavaForConditionalGeneration) and isinstance(vision_tower(model), AlphaCLIPVisionModel)):
        raise ValueError(f"expected a LLaVA-1.5 with our tower, as mllm.load gives it, got {type(model).__name__}")
    if not isinstance(processor, AlphaLlavaProcessor):
        raise ValueError(f"expected the model's AlphaLlavaProcessor, got {type(processor).__name__}")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("the model is quantized (load_in); load it without, in 16 bits say: dtype='bfloat16'")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("a part of the model is offloaded; load it on one device, such as device='cpu'")


def _hub_name(key: str) -> str:
    prefix = next(prefix for prefix in _HUB_PREFIXES if key.startswith(prefix))
    return _HUB_PREFIXES[prefix] + key.removeprefix(prefix)
