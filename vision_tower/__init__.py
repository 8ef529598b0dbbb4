"""The Alpha-CLIP vision tower as Hugging Face classes: CLIP with an alpha map of the region as fourth input channel.

Importing this package registers the classes with `AutoConfig`, `AutoModel`, `AutoImageProcessor` and `AutoProcessor`.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from .alpha_embedding import AlphaConv2d, AlphaPatchEmbedding, add_alpha_channel
from .configuration_alpha_clip import AlphaCLIPConfig, AlphaCLIPVisionConfig
from .image_processing_alpha_clip import AlphaCLIPImageProcessor
from .image_processing_alpha_llava_next import AlphaLlavaNextImageProcessor
from .loading import load_with_alpha
from .modeling_alpha_clip import AlphaCLIPModel, AlphaCLIPVisionModel, AlphaCLIPVisionModelWithProjection
from .processing_alpha_clip import AlphaCLIPProcessor
from .regions import Region

__all__ = [
    "AlphaCLIPConfig",
    "AlphaCLIPImageProcessor",
    "AlphaCLIPModel",
    "AlphaCLIPProcessor",
    "AlphaCLIPVisionConfig",
    "AlphaCLIPVisionModel",
    "AlphaCLIPVisionModelWithProjection",
    "AlphaConv2d",
    "AlphaLlavaNextImageProcessor",
    "AlphaPatchEmbedding",
    "Region",
    "add_alpha_channel",
    "load_with_alpha",
]

# exist_ok: the package can be imported twice (reloaded in a notebook, or next to a copy loaded as remote code).
# A tower without text model has its image processor as processor.
for _config, _processor in (
    (AlphaCLIPVisionConfig, AlphaCLIPImageProcessor),
    (AlphaCLIPConfig, AlphaCLIPProcessor),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoImageProcessor.register(_config, image_processor_classes={"pil": AlphaCLIPImageProcessor}, exist_ok=True)
    AutoProcessor.register(_config, _processor, exist_ok=True)
AutoModel.register(AlphaCLIPVisionConfig, AlphaCLIPVisionModel, exist_ok=True)
AutoModel.register(AlphaCLIPConfig, AlphaCLIPModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(AlphaCLIPConfig, AlphaCLIPModel, exist_ok=True)

# `save_pretrained` then copies the source files next to the weights, for `trust_remote_code=True` without this package.
AlphaCLIPVisionConfig.register_for_auto_class()
AlphaCLIPConfig.register_for_auto_class()
AlphaCLIPVisionModel.register_for_auto_class("AutoModel")
AlphaCLIPModel.register_for_auto_class("AutoModel")
AlphaCLIPImageProcessor.register_for_auto_class()
AlphaCLIPProcessor.register_for_auto_class()
