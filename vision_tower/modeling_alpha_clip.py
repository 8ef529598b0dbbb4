"""Alpha-CLIP models: CLIP's classes with `AlphaPatchEmbedding` as patch embedding. Everything else is inherited.

`pixel_values` is (B, 4, H, W), normalized RGB and the alpha map, or (B, 3, H, W), the whole image.
"""

import torch
from transformers import (
    CLIPModel,
    CLIPPreTrainedModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,  # noqa: F401, saved diffusers pipelines look up this name in this module
)
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .alpha_embedding import AlphaConv2d, AlphaPatchEmbedding
from .configuration_alpha_clip import AlphaCLIPConfig, AlphaCLIPVisionConfig
from .loading import load_checked

ALPHA_WEIGHT = "embeddings.patch_embedding.alpha.weight"
# Keys of a full CLIP checkpoint that do not belong to the tower.
_OUTSIDE_TOWER = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")


class AlphaCLIPPreTrainedModel(CLIPPreTrainedModel):
    """Base class: initializes the alpha weight to zero, and checks on loading that no weight is missing."""

    config: AlphaCLIPConfig
    base_model_prefix = "alpha_clip"

    def __init__(self, config: PreTrainedConfig, *args, **kwargs) -> None:
        """Check the configuration class.

        Raises:
            ValueError: If it is that of CLIP. The saved model would be loaded as a CLIP, without alpha channel.
        """
        if not type(config).model_type.startswith("alpha_"):  # the class attribute is the value that is saved
            raise ValueError(
                f"expected an {self.config_class.__name__}, got a {type(config).__name__}; "
                f"{self.config_class.__name__}.from_pretrained also reads CLIP directories"
            )
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AlphaConv2d):
            init.zeros_(module.weight)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a model as in Transformers, from the directory or hub id of an Alpha-CLIP or a CLIP.

        Only the alpha weight may be missing, if the source is a CLIP; it is then zero.

        Raises:
            ValueError: If any other weight is missing, unexpected or of another shape (see `loading.load_checked`).
        """
        load = super().from_pretrained
        return load_checked(load, pretrained_model_name_or_path, *args, ignored=_OUTSIDE_TOWER, **kwargs)


class AlphaCLIPVisionModel(AlphaCLIPPreTrainedModel, CLIPVisionModel):
    """CLIP's vision tower with an alpha channel; can be the `vision_tower` of LLaVA.

    `forward` accepts `pixel_values` (B, 4, H, W) or (B, 3, H, W) and has the output of `CLIPVisionModel`.

    Example:
        >>> model = AlphaCLIPVisionModel.from_pretrained("DIR_OR_HUB_ID")
        >>> processor = AlphaCLIPImageProcessor.from_pretrained("DIR_OR_HUB_ID")
        >>> inputs = processor(image, regions=Region.from_box(40, 60, 220, 200), return_tensors="pt")
        >>> model(**inputs).last_hidden_state  # (1, 1 + patches, D)
    """

    config: AlphaCLIPVisionConfig

    def __init__(self, config: AlphaCLIPVisionConfig) -> None:
        super().__init__(config)
        self.embeddings.patch_embedding = AlphaPatchEmbedding(config.hidden_size, config.patch_size)
        self.post_init()


class AlphaCLIPVisionModelWithProjection(AlphaCLIPPreTrainedModel, CLIPVisionModelWithProjection):
    """The vision tower with the projection of CLIP: `image_embeds` (B, projection_dim)."""

    config: AlphaCLIPVisionConfig
    base_model_prefix = "vision_model"

    def __init__(self, config: AlphaCLIPVisionConfig) -> None:
        super().__init__(config)
        self.vision_model = AlphaCLIPVisionModel._from_config(config)
        self.post_init()


class AlphaCLIPModel(AlphaCLIPPreTrainedModel, CLIPModel):
    """Vision and text towers, for zero-shot classification of regions: `logits_per_image` (B, texts)."""

    config: AlphaCLIPConfig

    def __init__(self, config: AlphaCLIPConfig) -> None:
        super().__init__(config)
        self.vision_model = AlphaCLIPVisionModel._from_config(config.vision_config)
        self.post_init()


# Checkpoints have one of three key layouts (before and after Transformers flattened CLIP's towers). Transformers
# renames the keys of stock classes only. Without this, 71 tensors of a ViT-L tower would stay random, without an error.
register_checkpoint_conversion_mapping(
    "AlphaCLIPVisionModel", get_checkpoint_conversion_mapping("CLIPVisionModel"), overwrite=True
)
