"""Keys of LAVIS' BLIP-2 with a CLIP ViT-L -> ours: Q-Former, query tokens, `ln_vision` and the projection. The weights
of the language model are not in LAVIS' file.

Source of the layout: lavis/models/blip2_models/{blip2,blip2_qformer,blip2_t5,blip2_opt,Qformer}.py and
lavis/models/clip_vit.py of salesforce/LAVIS at 506965b. All sizes are inferred from the tensors. The text part that
stage 1 trains is dropped by name; any other missing or unexpected tensor, or another shape, is an error.
"""

from __future__ import annotations

import logging
import os
import re
from typing import Any

import torch
from transformers import Blip2QFormerConfig

from mllm.blip2 import AlphaCLIPBlip2VisionConfig
from vision_tower import AlphaCLIPVisionConfig
from vision_tower.conversion import check_tensors, count_blocks, from_original
from vision_tower.weight_files import StateDict, read_tensors

logger = logging.getLogger(__name__)

VIT_L_BLOCKS = 23  # Source: `create_clip_vit_L` in lavis/models/clip_vit.py: the 24 of CLIP without the last
PROJECTIONS = {"t5_proj": "t5", "opt_proj": "opt"}  # LAVIS' name -> model_type of its language model

_KEYS = {
    "query_tokens": "query_tokens",
    "ln_vision.weight": "vision_model.post_layernorm.weight",
    "ln_vision.bias": "vision_model.post_layernorm.bias",
    "Qformer.bert.embeddings.LayerNorm.weight": "qformer.layernorm.weight",
    "Qformer.bert.embeddings.LayerNorm.bias": "qformer.layernorm.bias",
}
_LAYER_KEYS = {
    "attention.self.query": "attention.attention.query",
    "attention.self.key": "attention.attention.key",
    "attention.self.value": "attention.attention.value",
    "attention.output.dense": "attention.output.dense",
    "attention.output.LayerNorm": "attention.output.LayerNorm",
    "crossattention.self.query": "crossattention.attention.query",
    "crossattention.self.key": "crossattention.attention.key",
    "crossattention.self.value": "crossattention.attention.value",
    "crossattention.output.dense": "crossattention.output.dense",
    "crossattention.output.LayerNorm": "crossattention.output.LayerNorm",
    "intermediate_query.dense": "intermediate_query.dense",
    "output_query.dense": "output_query.dense",
    "output_query.LayerNorm": "output_query.LayerNorm",
}
_LAYER = "Qformer.bert.encoder.layer"
_TOWER = "visual_encoder."
_HEAD_WIDTH = 64  # Source: bert-base-uncased, from which `Blip2Base.init_Qformer` takes its configuration: 768 / 12
# parts that only stage 1 uses, and an index buffer
_TEXT_PART = re.compile(
    r"Qformer\.bert\.embeddings\.(word_embeddings\.weight|position_embeddings\.weight|position_ids)"
    r"|Qformer\.bert\.encoder\.layer\.\d+\.(intermediate\.dense|output\.dense|output\.LayerNorm)\.(weight|bias)"
    r"|Qformer\.cls\.predictions\.(bias|(decoder|transform\.dense|transform\.LayerNorm)\.(weight|bias))"
    r"|(vision_proj|text_proj|itm_head)\.(weight|bias)|temp"
)


def read_lavis(path: str | os.PathLike) -> StateDict:
    """The tensors of a LAVIS checkpoint, `{"model": {...}}`, read without running code.

    Raises:
        ValueError: As `vision_tower.weight_files.read_tensors`.
    """
    return read_tensors(path, "model")


def projection_of(lavis: StateDict) -> str | None:
    """Which of `PROJECTIONS` the checkpoint contains; None for a stage-1 file."""
    return next((name for name in PROJECTIONS if f"{name}.weight" in lavis), None)


def from_lavis(
    lavis: StateDict, tower: tuple[AlphaCLIPVisionConfig, StateDict] | None = None, blocks: int = VIT_L_BLOCKS
) -> tuple[dict[str, Any], StateDict]:
    """LAVIS' tensors and a tower -> `AlphaBlip2ForConditionalGeneration` without its language model.

    Args:
        lavis: Result of `read_lavis`.
        tower: Result of `vision_tower.conversion.read_tower` for an Alpha-CLIP. None uses the CLIP tower in the
            checkpoint, if any, with an alpha weight of zero.
        blocks: Number of the tower's layers that the Q-Former was trained on.

    Returns:
        Fields of `AlphaBlip2Config` (`vision_config`, `qformer_config`, `num_query_tokens`), and float32 weights.

    Raises:
        ValueError: If a tensor is missing, unexpected, of another shape, or contains NaN or Inf (the message names the
            first), the projection is missing, or the tower does not fit the Q-Former.
    """
    own_blocks = _check_own_tower(lavis)
    if own_blocks not in (0, blocks):
        raise ValueError(
            f"the Q-Former was trained on the {own_blocks} layers of the tower in its file, not {blocks}; "
            f"convert with {own_blocks} (--blocks)"
        )
    qformer_config = qformer_config_from_lavis(lavis)
    vision_config, weights = _shorten(*(tower or _own_tower(lavis)), blocks)
    if vision_config.hidden_size != qformer_config.encoder_hidden_size:
        raise ValueError(
            f"this Q-Former expects a tower of width {qformer_config.encoder_hidden_size} (EVA ViT-g: 1408), got "
            f"width {vision_config.hidden_size}; Alpha-CLIP's ViT-L/14 fits LAVIS' vitL checkpoints "
            "(blip2_pretrained_flant5xl_vitL.pth); load a ViT-g BLIP-2 directly from Salesforce/blip2-*"
        )
    kept = {key: t for key, t in lavis.items() if not key.startswith(_TOWER) and not _TEXT_PART.fullmatch(key)}
    check_tensors(kept, _lavis_shapes(lavis, qformer_config), "a BLIP-2 of LAVIS")
    weights |= {_name_from_lavis(key): tensor for key, tensor in kept.items()}
    fields = {
        "vision_config": vision_config,
        "qformer_config": qformer_config,
        "num_query_tokens": lavis["query_tokens"].shape[1],
    }
    return fields, {key: tensor.float() for key, tensor in weights.items()}


def _name_from_lavis(key: str) -> str:
    if key in _KEYS:
        return _KEYS[key]
    if not key.startswith(_LAYER):
        return f"language_projection.{key.rsplit('.', 1)[1]}"
    index, name, kind = re.fullmatch(rf"{re.escape(_LAYER)}\.(\d+)\.(.+)\.(weight|bias)", key).groups()
    return f"qformer.encoder.layer.{index}.{_LAYER_KEYS[name]}.{kind}"


def _check_own_tower(lavis: StateDict) -> int:
    """The number of layers of the CLIP tower in the checkpoint, 0 if there is none; an EVA tower is a ValueError."""
    if any(key.startswith((f"{_TOWER}blocks.", f"{_TOWER}patch_embed.")) for key in lavis):
        raise ValueError(
            "the checkpoint contains an EVA ViT-g tower, which Alpha-CLIP's ViT-L cannot replace; use a vitL file "
            "of LAVIS, or load the ViT-g BLIP-2 from Salesforce/blip2-*"
        )
    return count_blocks(lavis, f"{_TOWER}transformer.resblocks.")


def _own_tower(lavis: StateDict) -> tuple[AlphaCLIPVisionConfig, StateDict]:
    """The CLIP tower in the checkpoint, with an alpha weight of zero."""
    own = {key.removeprefix(_TOWER): tensor for key, tensor in lavis.items() if key.startswith(_TOWER)}
    if not own:
        raise ValueError(
            "the checkpoint contains no tower (LAVIS does not save a frozen one): give Alpha-CLIP's weights "
            "(--vision-tower clip_l14_grit20m_fultune_2xe.pth)"
        )
    logger.warning(
        "the tower is the CLIP in the checkpoint and its alpha weight is zero: every region gets the same answer until "
        "it is trained; use --vision-tower for Alpha-CLIP"
    )
    if (convolution := own.get("conv1.weight")) is not None and convolution.ndim == 4:  # else an error below
        width = len(convolution)
        # tensors that an Alpha-CLIP has in addition; those after the last layer of LAVIS' tower are not used
        own["conv1_alpha.weight"] = torch.zeros_like(convolution[:, :1])
        own |= {"proj": torch.zeros(width, 1), "ln_post.weight": torch.zeros(width), "ln_post.bias": torch.zeros(width)}
    try:
        config, weights = from_original(own)
    except ValueError as error:
        raise ValueError(f"the tower ({_TOWER}*): {error}") from error
    prefix = "vision_model."
    return config, {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}


def _shorten(
    config: AlphaCLIPVisionConfig, weights: StateDict, blocks: int
) -> tuple[AlphaCLIPBlip2VisionConfig, StateDict]:
    """The first `blocks` layers of a tower, without the norm after the last one."""
    found = config.num_hidden_layers
    if not 1 <= blocks <= found:
        raise ValueError(
            f"expected a tower of at least {blocks} layers (CLIP's ViT-L has 24), got {found}; give the ViT-L/14, or "
            "another number (--blocks)"
        )
    not_used = ("post_layernorm.", *(f"encoder.layers.{index}." for index in range(blocks, found)))
    not_its_own = ("model_type", "architectures", "auto_map", "dtype", "projection_dim")
    fields = {key: value for key, value in config.to_dict().items() if key not in not_its_own}
    shorter = AlphaCLIPBlip2VisionConfig(**{**fields, "num_hidden_layers": blocks})
    return shorter, {f"vision_model.{key}": t for key, t in weights.items() if not key.startswith(not_used)}


def qformer_config_from_lavis(lavis: StateDict) -> Blip2QFormerConfig:
    """The configuration of LAVIS' Q-Former, inferred from its tensors.

    Raises:
        ValueError: If it is not a BLIP-2 checkpoint of LAVIS, or one of stage 1, without a projection.
    """
    layer = f"{_LAYER}.0"
    keys = ("query_tokens", f"{layer}.crossattention.self.key.weight", f"{layer}.intermediate_query.dense.weight")
    for key, dimensions in zip(keys, (3, 2, 2), strict=True):
        if key not in lavis or lavis[key].ndim != dimensions:
            found = "nothing" if key not in lavis else tuple(lavis[key].shape)
            raise ValueError(f"expected a BLIP-2 checkpoint of LAVIS with {key} ({dimensions} dimensions), got {found}")
    if projection_of(lavis) is None:
        raise ValueError(
            "this is a stage-1 checkpoint (blip2_pretrained_vitL.pth): it has no projection into a language model "
            "(t5_proj, opt_proj); use blip2_pretrained_flant5xl_vitL.pth, or add a random projection to train "
            "(--new-projection)"
        )
    queries, crossing, inner = (lavis[key] for key in keys)
    width = queries.shape[-1]
    if width % _HEAD_WIDTH or 0 in (*queries.shape, *crossing.shape, *inner.shape):
        raise ValueError(f"expected query_tokens (1, queries, {_HEAD_WIDTH} per head), got {tuple(queries.shape)}")
    layers = count_blocks(lavis, f"{_LAYER}.")
    crossed = [index for index in range(layers) if f"{_LAYER}.{index}.crossattention.self.key.weight" in lavis]
    return Blip2QFormerConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // _HEAD_WIDTH,
        intermediate_size=len(inner),
        encoder_hidden_size=crossing.shape[1],
        cross_attention_frequency=crossed[1] if len(crossed) > 1 else layers,
    )


def _lavis_shapes(lavis: StateDict, config: Blip2QFormerConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the checkpoint, except for tower and text part."""
    width, inner, seen = config.hidden_size, config.intermediate_size, config.encoder_hidden_size
    projection = projection_of(lavis)
    shapes: dict[str, tuple[int, ...]] = {"query_tokens": (1, lavis["query_tokens"].shape[1], width)}
    matrices = {projection: (*lavis[f"{projection}.weight"].shape[:1], width)}  # of the language model's width
    norms = {"ln_vision": seen, "Qformer.bert.embeddings.LayerNorm": width}
    for index in range(config.num_hidden_layers):
        crosses = index % config.cross_attention_frequency == 0
        for name in _LAYER_KEYS:
            if name.startswith("crossattention.") and not crosses:
                continue
            key = f"{_LAYER}.{index}.{name}"
            if name.endswith("LayerNorm"):
                norms[key] = width
            elif name in ("crossattention.self.key", "crossattention.self.value"):
                matrices[key] = (width, seen)
            else:
                matrices[key] = {"intermediate_query.dense": (inner, width), "output_query.dense": (width, inner)}.get(
                    name, (width, width)
                )
    for name, shape in (matrices | {name: (size,) for name, size in norms.items()}).items():
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]
    return shapes
