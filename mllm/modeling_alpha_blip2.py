"""Configuration and model classes of BLIP-2 with an alpha tower. They are saved with their source files, for
`trust_remote_code=True`, because stock BLIP-2 supports only its own tower, with three channels.
"""

import os

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    PreTrainedConfig,
)
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mllm.remote_code import write_sources
from vision_tower import AlphaCLIPVisionConfig, AlphaCLIPVisionModel, AlphaConv2d, AlphaPatchEmbedding
from vision_tower.loading import load_checked


class AlphaBlip2VisionConfig(Blip2VisionConfig):
    """Configuration of the EVA tower, with the fields of `Blip2VisionConfig`."""

    model_type = "alpha_blip2_vision_model"


class AlphaCLIPBlip2VisionConfig(AlphaCLIPVisionConfig):
    """Configuration of the CLIP tower in BLIP-2: 23 layers for ViT-L, as LAVIS drops the last one."""

    model_type = "alpha_clip_blip2_vision_model"


_TOWERS = {config.model_type: config for config in (AlphaBlip2VisionConfig, AlphaCLIPBlip2VisionConfig)}


class AlphaBlip2Config(Blip2Config):
    """Configuration of BLIP-2 with an alpha tower. The tower of a stock BLIP-2 config is replaced by ours."""

    model_type = "alpha_blip2"

    def __post_init__(self, **kwargs) -> None:
        vision = self.vision_config
        if not isinstance(vision, PreTrainedConfig):  # a dict of another type would silently become the EVA tower
            fields = dict(vision or {})
            found = fields.pop("model_type", Blip2VisionConfig.model_type)
            if found == Blip2VisionConfig.model_type:
                found = AlphaBlip2VisionConfig.model_type
            if found not in _TOWERS:
                raise ValueError(f"expected a vision tower out of {sorted(_TOWERS)}, got {found!r}")
            self.vision_config = _TOWERS[found](**fields)
        elif type(vision) is Blip2VisionConfig:
            fields = vision.to_dict()
            fields.pop("model_type")
            self.vision_config = AlphaBlip2VisionConfig(**fields)
        elif type(vision) not in _TOWERS.values():
            raise ValueError(f"expected a vision tower out of {sorted(_TOWERS)}, got {vision.model_type!r}")
        super().__post_init__(**kwargs)
        module = type(self).__module__.rpartition(".")[2]
        classes = {"AutoConfig": AlphaBlip2Config, "AutoModelForImageTextToText": AlphaBlip2ForConditionalGeneration}
        self.auto_map = {auto: f"{module}.{cls.__name__}" for auto, cls in classes.items()}

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """As in `PreTrainedConfig`, with the source files in the same folder."""
        write_sources(type(self), os.path.dirname(json_file_path))
        super().to_json_file(json_file_path, use_diff)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Read a config file, ours or that of stock BLIP-2.

        Raises:
            ValueError: If the directory contains another kind of model.
        """
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        found = config.get("model_type", Blip2Config.model_type)
        if config and found not in (cls.model_type, Blip2Config.model_type):
            raise ValueError(
                f"expected a BLIP-2 directory, got model_type {found!r} in {pretrained_model_name_or_path}"
            )
        return {**config, "model_type": cls.model_type}, kwargs


class AlphaBlip2VisionModel(Blip2VisionModel):
    """BLIP-2's EVA tower with an alpha channel; its patch convolution has a bias.

    `forward` takes `pixel_values` (B, 4, H, W) or (B, 3, H, W) and returns what `Blip2VisionModel` returns.
    """

    config: AlphaBlip2VisionConfig

    def __init__(self, config: AlphaBlip2VisionConfig) -> None:
        super().__init__(config)
        self.embeddings.patch_embedding = AlphaPatchEmbedding(config.hidden_size, config.patch_size, bias=True)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load as in Transformers, from a directory of our tower or a stock one; errors as in `load_checked`."""
        return load_checked(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AlphaConv2d):
            init.zeros_(module.weight)


class AlphaCLIPBlip2VisionModel(AlphaCLIPVisionModel):
    """An Alpha-CLIP tower whose last hidden state is normalized over all tokens, as BLIP-2's Q-Former expects.

    In LAVIS this norm is not part of the tower (`ln_vision`); here it is the tower's `post_layernorm`.
    Source: `Blip2Base.init_vision_encoder` in salesforce/LAVIS, lavis/models/blip2_models/blip2.py at 506965b.
    """

    config: AlphaCLIPBlip2VisionConfig

    def forward(self, pixel_values: torch.Tensor | None = None, **kwargs) -> BaseModelOutputWithPooling:
        """As in `AlphaCLIPVisionModel`, with `last_hidden_state` (B, 1 + P, D) after `post_layernorm`."""
        output = super().forward(pixel_values, **kwargs)
        output.last_hidden_state = self.post_layernorm(output.last_hidden_state)
        return output


class AlphaBlip2ForConditionalGeneration(Blip2ForConditionalGeneration):
    """BLIP-2 with one of our towers as `vision_model`; forward, loss and `generate` are those of BLIP-2.

    `pixel_values` is (B, 4, H, W); build them with `AlphaBlip2Processor`.
    """

    config: AlphaBlip2Config

    def __init__(self, config: AlphaBlip2Config) -> None:
        # as in Blip2ForConditionalGeneration, except for the tower, whose class is fixed there
        super(Blip2ForConditionalGeneration, self).__init__(config)
        eva = isinstance(config.vision_config, AlphaBlip2VisionConfig)
        self.vision_model = (AlphaBlip2VisionModel if eva else AlphaCLIPBlip2VisionModel)._from_config(
            config.vision_config
        )
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.qformer_config.hidden_size))
        self.qformer = Blip2QFormerModel._from_config(config.qformer_config)
        self.language_projection = nn.Linear(config.qformer_config.hidden_size, config.text_config.hidden_size)
        decoder_only = config.use_decoder_only_language_model
        self.language_model = (AutoModelForCausalLM if decoder_only else AutoModelForSeq2SeqLM).from_config(
            config.text_config
        )
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load as in Transformers, from a directory of ours or of a stock BLIP-2.

        Raises:
            ValueError: If a weight is missing, unexpected, or has another shape (vision_tower/loading.py). Only a stock
                BLIP-2 may lack the alpha weight.
        """
        return load_checked(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)


# Key renamings of older layouts, which Transformers applies to stock classes only.
for _ours, _stock in (
    ("AlphaCLIPBlip2VisionModel", "CLIPVisionModel"),
    ("AlphaBlip2ForConditionalGeneration", "Blip2ForConditionalGeneration"),
):
    if _mapping := get_checkpoint_conversion_mapping(_stock):
        register_checkpoint_conversion_mapping(_ours, _mapping, overwrite=True)
