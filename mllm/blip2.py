"""BLIP-2 with an alpha tower, in both kinds that were published.

- EVA ViT-g (all `Salesforce/blip2-*`): `AlphaBlip2VisionModel`; a stock checkpoint loads with alpha at exactly zero.
- CLIP ViT-L/14 (LAVIS' `pretrain_vitL`, `pretrain_flant5xl_vitL`): `AlphaCLIPBlip2VisionModel`, an Alpha-CLIP tower of
  23 blocks, which is where Alpha-CLIP's released weights fit.
"""

import os
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
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

from mllm.processing_blip2 import AlphaBlip2Processor
from vision_tower import (
    AlphaCLIPImageProcessor,
    AlphaCLIPVisionConfig,
    AlphaCLIPVisionModel,
    AlphaConv2d,
    AlphaPatchEmbedding,
)
from vision_tower.conversion import read_tower_for
from vision_tower.loading import load_checked


class AlphaBlip2VisionConfig(Blip2VisionConfig):
    """Configuration of the EVA tower: every field is BLIP-2's."""

    model_type = "alpha_blip2_vision_model"


class AlphaCLIPBlip2VisionConfig(AlphaCLIPVisionConfig):
    """Configuration of the CLIP tower as BLIP-2 uses it: 23 blocks for ViT-L, LAVIS drops the last one."""

    model_type = "alpha_clip_blip2_vision_model"


_TOWERS = {config.model_type: config for config in (AlphaBlip2VisionConfig, AlphaCLIPBlip2VisionConfig)}


class AlphaBlip2Config(Blip2Config):
    """Configuration of BLIP-2 with an alpha tower. A stock BLIP-2 directory is accepted: its tower becomes ours."""

    model_type = "alpha_blip2"

    def __post_init__(self, **kwargs) -> None:
        vision = self.vision_config
        if not isinstance(vision, PreTrainedConfig):  # a dict under another type would silently become the EVA tower
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

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Read a config file; stock BLIP-2's is taken as ours.

        Raises:
            ValueError: If the directory holds another kind of model.
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
        """Load as in Transformers, from our tower's directory or a stock one's; errors as in `load_checked`."""
        return load_checked(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AlphaConv2d):
            init.zeros_(module.weight)


class AlphaCLIPBlip2VisionModel(AlphaCLIPVisionModel):
    """An Alpha-CLIP tower whose last hidden state is normalised over all tokens, as BLIP-2's Q-Former expects.

    LAVIS keeps that norm beside the tower (`ln_vision`); here it is the tower's `post_layernorm`.
    Source: `Blip2Base.init_vision_encoder` in salesforce/LAVIS, lavis/models/blip2_models/blip2.py at 506965b.
    """

    config: AlphaCLIPBlip2VisionConfig

    def forward(self, pixel_values: torch.Tensor | None = None, **kwargs) -> BaseModelOutputWithPooling:
        """As in `AlphaCLIPVisionModel`, with `last_hidden_state` (B, 1 + P, D) after `post_layernorm`."""
        output = super().forward(pixel_values, **kwargs)
        output.last_hidden_state = self.post_layernorm(output.last_hidden_state)
        return output


class AlphaBlip2ForConditionalGeneration(Blip2ForConditionalGeneration):
    """BLIP-2 whose `vision_model` is one of ours; forward, loss and `generate` are BLIP-2's.

    `pixel_values` is (B, 4, H, W); build them with `AlphaBlip2Processor`.
    """

    config: AlphaBlip2Config

    def __init__(self, config: AlphaBlip2Config) -> None:
        # BLIP-2's own lines, but for the first: there the tower's class is fixed
        super(Blip2ForConditionalGeneration, self).__init__(config)
        self.vision_model = AutoModel.from_config(config.vision_config)
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
        """Load as in Transformers, from our directory or a stock BLIP-2's.

        Raises:
            ValueError: If a weight is missing, left over, or of another shape (vision_tower/loading.py); only the alpha
                weight may be missing, from a stock BLIP-2.
        """
        return load_checked(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)


# full names, as Transformers 5 wants them; a list of one's own drops the default lm_head
NEVER_QUANTISED = ("vision_model", "qformer", "language_projection", "language_model.lm_head")
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
# Stock renamings (older key layouts) hold for ours too; Transformers applies them to stock classes only.
for _ours, _stock in (
    ("AlphaCLIPBlip2VisionModel", "CLIPVisionModel"),
    ("AlphaBlip2ForConditionalGeneration", "Blip2ForConditionalGeneration"),
):
    if _mapping := get_checkpoint_conversion_mapping(_stock):
        register_checkpoint_conversion_mapping(_ours, _mapping, overwrite=True)
