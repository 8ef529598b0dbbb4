"""Alpha-CLIP models: CLIP's classes with `AlphaPatchEmbedding` as the patch embedding. Everything else is inherited.

`pixel_values` is (B, 4, H, W): normalised RGB and the alpha map; (B, 3, H, W) means the whole image.
"""

import torch
from transformers import CLIPModel, CLIPPreTrainedModel, CLIPVisionModel, CLIPVisionModelWithProjection
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .alpha_embedding import AlphaConv2d, AlphaPatchEmbedding
from .configuration_alpha_clip import AlphaCLIPConfig, AlphaCLIPVisionConfig

ALPHA_WEIGHT = "embeddings.patch_embedding.alpha.weight"
# What a full CLIP checkpoint holds besides the tower, and an index buffer that old files carry.
_NOT_THE_TOWER = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")


class AlphaCLIPPreTrainedModel(CLIPPreTrainedModel):
    """Shared by the three models: a zero alpha weight at the start, and loading that never leaves a weight random."""

    config: AlphaCLIPConfig
    base_model_prefix = "alpha_clip"

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AlphaConv2d):
            init.zeros_(module.weight)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """Load as in Transformers, from an Alpha-CLIP or a CLIP directory or hub id.

        Raises:
            ValueError: If a weight other than the alpha convolution is missing, has another shape, or is not ours: it
                would stay random (or unused) and the answers would still read well.
        """
        if "config" not in kwargs and not args:  # by our config class: a plain CLIP directory becomes ours
            names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            hub = {name: kwargs[name] for name in names if name in kwargs}
            kwargs["config"] = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub)
        # mismatches are let through to the report, which names them; Transformers' own error does not
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        check_loaded(cls.__name__, pretrained_model_name_or_path, report)
        return (model, report) if output_loading_info else model


def check_loaded(class_name: str, source: object, report: dict) -> None:
    """Raise ValueError unless everything but the alpha weight came from the checkpoint and everything in it was
    used.
    """
    missing = sorted(key for key in report["missing_keys"] if not key.endswith(ALPHA_WEIGHT))
    unexpected = sorted(
        key
        for key in report["unexpected_keys"]
        if not key.startswith(_NOT_THE_TOWER) and not key.endswith(".position_ids")
    )
    mismatched = sorted(str(key) for key in report["mismatched_keys"])
    problems = [
        f"{len(keys)} {what} (first: {keys[0]})"
        for what, keys in (("missing", missing), ("not of this model", unexpected), ("of another shape", mismatched))
        if keys
    ]
    if problems:
        raise ValueError(
            f"the weights in {source} do not fit {class_name}: {', '.join(problems)}; only "
            f"{ALPHA_WEIGHT} may be missing. Is it the checkpoint of another model or size?"
        )


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
