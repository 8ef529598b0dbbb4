"""BLIP-2 with an alpha tower, in both kinds that were published.

- EVA ViT-g (all `Salesforce/blip2-*`): `AlphaBlip2VisionModel`; a stock checkpoint loads with alpha at exactly zero.
- CLIP ViT-L/14 (LAVIS' `pretrain_vitL`, `pretrain_flant5xl_vitL`): `AlphaCLIPBlip2VisionModel`, an Alpha-CLIP tower of
  23 blocks, which is where Alpha-CLIP's released weights fit.
"""

import os
from typing import Any

from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Blip2Config,
)

from mllm.modeling_alpha_blip2 import (
    AlphaBlip2Config,
    AlphaBlip2ForConditionalGeneration,
    AlphaBlip2VisionConfig,
    AlphaBlip2VisionModel,
    AlphaCLIPBlip2VisionConfig,
    AlphaCLIPBlip2VisionModel,
)
from mllm.processing_blip2 import AlphaBlip2Processor
from vision_tower import AlphaCLIPImageProcessor
from vision_tower.conversion import read_tower_for

# full names, as Transformers 5 wants them; a list of one's own drops the default lm_head
NEVER_QUANTIZED = ("vision_model", "qformer", "language_projection", "language_model.lm_head")
# what can be trained or frozen -> its parameters' prefix
PARTS = {name: name for name in ("vision_model", "query_tokens", "qformer", "language_projection", "language_model")}


def vision_tower(model: AlphaBlip2ForConditionalGeneration) -> AlphaBlip2VisionModel | AlphaCLIPBlip2VisionModel:
    """The model's tower, which BLIP-2 calls `vision_model`."""
    return model.vision_model


def load_model(name: str | os.PathLike, config: Blip2Config, **kwargs: Any) -> AlphaBlip2ForConditionalGeneration:
    """Load a BLIP-2 checkpoint with an alpha tower, ours or a stock one.

    Args:
        name: Directory or hub id.
        config: Its configuration, as `AutoConfig` gives it.
        **kwargs: As in `from_pretrained`.

    Raises:
        ValueError: If a weight is missing (a stock BLIP-2 has no alpha weight, ours must), left over, or of another
            shape.
    """
    try:
        return AlphaBlip2ForConditionalGeneration.from_pretrained(name, **kwargs)
    except SafetensorError as error:
        raise ValueError(
            f"the weights in {name} are damaged ({error}); were they copied or downloaded whole?"
        ) from error


def load_alpha_weights(model: AlphaBlip2ForConditionalGeneration, source: str | os.PathLike) -> None:
    """Overwrite the CLIP tower of a loaded BLIP-2 with Alpha-CLIP's first blocks; the norm after it stays BLIP-2's.

    Args:
        model: With a CLIP tower; changed in place.
        source: An original checkpoint (.pth, .safetensors) or a directory of ours.

    Raises:
        ValueError: If the model's tower is EVA's, or the checkpoint is no whole Alpha-CLIP tower that fits.
    """
    tower = vision_tower(model)
    if not isinstance(tower, AlphaCLIPBlip2VisionModel):
        raise ValueError(
            "this BLIP-2 has an EVA ViT-g tower, whose Q-Former cannot read Alpha-CLIP's ViT-L; Alpha-CLIP's weights "
            "fit LAVIS' ViT-L BLIP-2 (alpha-clip convert-lavis)"
        )
    weights = read_tower_for(tower.config, source, first_blocks=True)
    weights |= {f"post_layernorm.{key}": tensor for key, tensor in tower.post_layernorm.state_dict().items()}
    tower.load_state_dict(weights)  # strict; casts to the tower's dtype and device


def load_processor(name: str | os.PathLike, config: Blip2Config, **hub: Any) -> AlphaBlip2Processor:
    """The processor of a BLIP-2 directory that knows nothing of regions: its tokenizer and image settings, pictures
    stretched to a square as BLIP-2 was trained.

    Raises:
        ValueError: If its tokenizer's `<image>` is not the token that the model looks for.
    """
    stock = AutoImageProcessor.from_pretrained(name, backend="pil", **hub)
    image_processor = AlphaCLIPImageProcessor.for_size(config.vision_config.image_size, "stretch", like=stock)
    processor = AlphaBlip2Processor(
        image_processor, AutoTokenizer.from_pretrained(name, **hub), num_query_tokens=config.num_query_tokens
    )
    found = processor.tokenizer.convert_tokens_to_ids("<image>")
    if found != config.image_token_index:
        raise ValueError(
            f"the tokenizer in {name} gives <image> the id {found}, the model expects {config.image_token_index}: no "
            "image would reach it"
        )
    return processor


for _config, _model in (
    (AlphaBlip2VisionConfig, AlphaBlip2VisionModel),
    (AlphaCLIPBlip2VisionConfig, AlphaCLIPBlip2VisionModel),
    (AlphaBlip2Config, AlphaBlip2ForConditionalGeneration),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
AutoModelForImageTextToText.register(AlphaBlip2Config, AlphaBlip2ForConditionalGeneration, exist_ok=True)
AutoProcessor.register(AlphaBlip2Config, AlphaBlip2Processor, exist_ok=True)
