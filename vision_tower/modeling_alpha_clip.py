"""Alpha-CLIP models: CLIP's classes with `AlphaPatchEmbedding` as the patch embedding. Everything else is inherited.

`pixel_values` is (B, 4, H, W): normalised RGB and the alpha map; (B, 3, H, W) means the whole image.
"""

import torch
from transformers import (
    CLIPModel,
    CLIPPreTrainedModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,  # noqa: F401, a saved diffusers pipeline looks for this name here, to know how the model is loaded
)
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .alpha_embedding import AlphaConv2d, AlphaPatchEmbedding
from .configuration_alpha_clip import AlphaCLIPConfig, AlphaCLIPVisionConfig
from .loading import load_checked

ALPHA_WEIGHT = "embeddings.patch_embedding.alpha.weight"
# What a full CLIP checkpoint holds besides the tower.
_NOT_THE_TOWER = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")


class AlphaCLIPPreTrainedModel(CLIPPreTrainedModel):
    """Shared by the three models: a zero alpha weight at the start, and loading that never leaves a weight random."""

    config: AlphaCLIPConfig
    base_model_prefix = "alpha_clip"

    def __init__(self, config: PreTrainedConfig, *args, **kwargs) -> None:
        """Check the configuration, then CLIP's.

        Raises:
            ValueError: If it is CLIP's own: saved under that, the model would load as a CLIP without alpha channel.
        """
        if not type(config).model_type.startswith("alpha_"):  # of the class: what is saved
            raise ValueError(
                f"expected an {self.config_class.__name__}, got a {type(config).__name__}; "
                f"{self.config_class.__name__}.from_pretrained reads CLIP directories too"
            )
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AlphaConv2d):
            init.zeros_(module.weight)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load as in Transformers, from an Alpha-CLIP or a CLIP directory or hub id.

        Raises:
            ValueError: If a weight is missing, has another shape, or is not ours (vision_tower/loading.py); only the
                alpha weight may be missing, from a CLIP.
        """
        load = super().from_pretrained
        return load_checked(load, pretrained_model_name_or_path, *args, ignored=_NOT_THE_TOWER, **kwargs)


class AlphaCLIPVisionModel(AlphaCLIPPreTrainedModel, CLIPVisionModel):
    """CLIP's vision tower with an alpha channel; drops into LLaVA as `vision_tower`.

    `forward` takes `pixel_values` (B, 4, H, W) or (B, 3, H, W) and returns what `CLIPVisionModel` returns.
    """

    config: AlphaCLIPVisionConfig

    def __init__(self, config: AlphaCLIPVisionConfig) -> None:
        super().__init__(config)
        self.embeddings.patch_embedding = AlphaPatchEmbedding(config.hidden_size, config.patch_size)
        self.post_init()


class AlphaCLIPVisionModelWithProjection(AlphaCLIPPreTrainedModel, CLIPVisionModelWithProjection):
    """The tower with CLIP's projection into the text-image space: `image_embeds` (B, projection_dim)."""

    config: AlphaCLIPVisionConfig
    base_model_prefix = "vision_model"

    def __init__(self, config: AlphaCLIPVisionConfig) -> None:
        super().__init__(config)
        self.vision_model = AlphaCLIPVisionModel._from_config(config)
        self.post_init()


class AlphaCLIPModel(AlphaCLIPPreTrainedModel, CLIPModel):
    """Both towers, for zero-shot use: `logits_per_image` (B, texts) of image regions against texts."""

    config: AlphaCLIPConfig

    def __init__(self, config: AlphaCLIPConfig) -> None:
        super().__init__(config)
        self.vision_model = AlphaCLIPVisionModel._from_config(config.vision_config)
        self.post_init()


# Checkpoints come in three key layouts (before and after Transformers flattened CLIP's towers). Transformers applies
# its renaming to stock classes only: without this, 71 tensors of a ViT-L tower stay random and nothing is raised.
register_checkpoint_conversion_mapping(
    "AlphaCLIPVisionModel", get_checkpoint_conversion_mapping("CLIPVisionModel"), overwrite=True
)
