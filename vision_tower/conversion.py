"""Conversion of original Alpha-CLIP checkpoints to and from our models, and of our models to stock CLIP ("fused").

An original checkpoint is the state dict of the visual tower (SunzeY/AlphaCLIP, alpha_clip/model.py at e5676c9). All
sizes are inferred from its tensors. A missing or unexpected tensor, or one of another shape, is an error.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable

import torch
from safetensors import SafetensorError

from .configuration_alpha_clip import AlphaCLIPVisionConfig
from .modeling_alpha_clip import ALPHA_WEIGHT, AlphaCLIPVisionModel
from .weight_files import StateDict, first_line, read_tensors, shown

# original name -> ours; `proj` and the attention input, whose shapes change, are converted separately
_TOWER_KEYS = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "conv1_alpha.weight": ALPHA_WEIGHT,
    "ln_pre.weight": "pre_layrnorm.weight",  # Hugging Face's spelling
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
_BLOCK_KEYS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")  # in the order of attn.in_proj
_HEAD_WIDTH = 64  # Source: `vision_heads = vision_width // 64` in alpha_clip/model.py
MAX_BLOCKS = 300  # of a tower or a Q-Former; published ones have at most 48
_WEIGHTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PREFIXES = ("module.", "visual.")  # from the released training script, from a full CLIP

# Source: model-zoo.md of SunzeY/AlphaCLIP at e5676c9; ImageNet-S is the mean per-class accuracy, Acc1.
RELEASED_CHECKPOINTS = """\
| file | base | image size | trained on | ImageNet-S |
|---|---|---|---|---|
| clip_b16_grit1m_fultune_8xe.pth | openai/clip-vit-base-patch16 | 224 | GRIT-1M | 68.31 |
| clip_l14_grit1m_fultune_8xe.pth | openai/clip-vit-large-patch14 | 224 | GRIT-1M | 77.22 |
| clip_l14_336_grit1m_fultune_8xe.pth | openai/clip-vit-large-patch14-336 | 336 | GRIT-1M | 78.15 |
| clip_b16_grit20m_fultune_2xe.pth | openai/clip-vit-base-patch16 | 224 | GRIT-20M | 68.89 |
| clip_l14_grit20m_fultune_2xe.pth | openai/clip-vit-large-patch14 | 224 | GRIT-20M | 77.41 |
| clip_l14_336_grit_20m_4xe.pth | openai/clip-vit-large-patch14-336 | 336 | GRIT-20M | 79.61 |
| clip_b16_grit+mim_fultune_4xe.pth | openai/clip-vit-base-patch16 | 224 | MaskImageNet + GRIT-1M | 69.40 |
| clip_l14_grit+mim_fultune_6xe.pth | openai/clip-vit-large-patch14 | 224 | MaskImageNet + GRIT-1M | 77.80 |

License of all eight: research only (CC BY-NC 4.0 data, CLIP's terms). Converted checkpoints inherit it."""


def read_checkpoint(path: str | os.PathLike) -> StateDict:
    """Read the tensors of a `.pth` (without running code) or `.safetensors` file, and remove prefixes of their names.

    Raises:
        ValueError: If the file cannot be read (see `read_tensors`), or only some names have the prefix.
    """
    return _strip_prefixes(read_tensors(path), path)


def read_original(path: str | os.PathLike) -> tuple[AlphaCLIPVisionConfig, StateDict]:
    """Read and convert an original checkpoint file; see `from_original` for the result.

    Raises:
        ValueError: If the file cannot be read or is not an original checkpoint.
    """
    original = read_checkpoint(path)
    try:
        return from_original(original)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _strip_prefixes(tensors: StateDict, source: object) -> StateDict:
    for prefix in _PREFIXES * 2:  # in any order: module.visual. or visual.module.
        prefixed = [key for key in tensors if key.startswith(prefix)]
        if prefixed and len(prefixed) < len(tensors):
            other = next(key for key in tensors if not key.startswith(prefix))
            raise ValueError(
                f"{source} mixes names with and without {prefix!r} ({shown(prefixed[0])}, {shown(other)}); save only "
                "the visual tower"
            )
        if prefixed:
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def config_from_original(original: StateDict) -> AlphaCLIPVisionConfig:
    """Infer the configuration of an original visual tower from its tensors.

    Raises:
        ValueError: If it is not an Alpha-CLIP vision transformer.
    """
    _check_kind(original)
    for key in ("proj", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight"):
        if key not in original or original[key].ndim != 2:
            raise ValueError(f"expected a matrix {key} in the checkpoint, got {_shape_of(original.get(key))}")
    if original["conv1.weight"].ndim != 4:
        raise ValueError(f"expected conv1.weight (D, 3, P, P), got {_shape_of(original['conv1.weight'])}")
    width, patch = original["conv1.weight"].shape[0], original["conv1.weight"].shape[-1]
    inner, projected = original["transformer.resblocks.0.mlp.c_fc.weight"].shape[0], original["proj"].shape[1]
    grid = math.isqrt(max(len(original["positional_embedding"]) - 1, 0))
    if width % _HEAD_WIDTH or 0 in (width, patch, grid, inner, projected):
        raise ValueError(
            f"expected a width that is a multiple of {_HEAD_WIDTH} and a square grid of patches, not empty, got width "
            f"{width}, patch {patch}, {inner} in mlp.c_fc, {projected} in proj and positional_embedding "
            f"{_shape_of(original['positional_embedding'])}"
        )
    return AlphaCLIPVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=count_blocks(original, "transformer.resblocks."),
        num_attention_heads=width // _HEAD_WIDTH,
        patch_size=patch,
        image_size=patch * grid,
        projection_dim=projected,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    )


def _check_kind(original: StateDict) -> None:
    """Raise ValueError unless the tensors are those of a vision transformer with an alpha weight."""
    if "conv1.weight" not in original or "class_embedding" not in original:
        if any(key.startswith(("layer1.", "attnpool.")) for key in original):
            raise ValueError(
                "this is a ResNet CLIP; only vision transformers (ViT-B/16, ViT-L/14 ...) have an alpha tower"
            )
        if "token_embedding.weight" in original:
            raise ValueError(
                "this is a text tower; expected the visual tower's state dict (conv1.weight, class_embedding ...)"
            )
        raise ValueError(
            f"expected an original Alpha-CLIP visual tower, got tensors such as {shown(sorted(original)[:3])}"
        )
    if "conv1_alpha.weight" not in original:
        raise ValueError(
            "the checkpoint has no alpha weight (conv1_alpha.weight): it is a plain CLIP, and regions would have no "
            "effect; load a plain CLIP with AlphaCLIPVisionModel.from_pretrained instead"
        )


def _shape_of(tensor: torch.Tensor | None) -> object:
    return "nothing" if tensor is None else shown(tuple(tensor.shape))


def count_blocks(keys: Iterable[str], prefix: str) -> int:
    """Count the different block numbers after `prefix`. A gap is later reported as a missing tensor.

    Raises:
        ValueError: If there are more than `MAX_BLOCKS`.
    """
    blocks = len({key.removeprefix(prefix).split(".", 1)[0] for key in keys if key.startswith(prefix)})
    if blocks > MAX_BLOCKS:
        raise ValueError(f"the checkpoint has {blocks:,} blocks {prefix}*; expected at most {MAX_BLOCKS:,}")
    return blocks


def check_tensors(tensors: StateDict, expected: dict[str, tuple[int, ...]], name: str) -> None:
    """Check the names, shapes, dtypes and values of tensors.

    Args:
        tensors: The tensors of a checkpoint.
        expected: Shape of each tensor by name.
        name: Name of the model in messages.

    Raises:
        ValueError: If a tensor is missing, unexpected, of another shape or dtype, or contains NaN or Inf. The message
            contains the first one.
    """
    for problem, keys in (
        ("lacks", sorted(expected.keys() - tensors.keys())),
        (f"contains more than {name}:", sorted(tensors.keys() - expected.keys())),
    ):
        if keys:
            raise ValueError(f"the checkpoint {problem} {shown(keys[0])} ({len(keys)} such tensors)")
    for key, shape in expected.items():
        if tuple(tensors[key].shape) != shape:
            raise ValueError(f"expected {key} of shape {shape}, got {_shape_of(tensors[key])}")
        if tensors[key].dtype not in _WEIGHTS:
            raise ValueError(f"expected {key} as 16, 32 or 64-bit floats, got {tensors[key].dtype}")
        if not torch.isfinite(tensors[key]).all():
            raise ValueError(f"{key} contains NaN or Inf: the checkpoint is damaged")


def from_original(original: StateDict) -> tuple[AlphaCLIPVisionConfig, StateDict]:
    """Convert an original visual tower to an `AlphaCLIPVisionModelWithProjection`.

    Args:
        original: The result of `read_checkpoint`, with `attn.in_proj.weight` or OpenAI's `attn.in_proj_weight`. Tensors
            of the same dtype keep it; mixed ones become float32.

    Returns:
        The configuration, and tensors `vision_model.*` and `visual_projection.weight`.

    Raises:
        ValueError: If a tensor is missing, unexpected, of another shape, or contains NaN or Inf.
    """
    renamed = {re.sub(r"attn\.in_proj_(weight|bias)$", r"attn.in_proj.\1", key): key for key in original}
    if len(renamed) < len(original):
        raise ValueError(
            "the checkpoint contains both attn.in_proj.weight and attn.in_proj_weight, two names of one tensor"
        )
    original = {ours: original[key] for ours, key in renamed.items()}
    config = config_from_original(original)
    check_tensors(original, _original_shapes(config), "an Alpha-CLIP visual tower")
    if len({tensor.dtype for tensor in original.values()}) > 1:
        original = {key: tensor.float() for key, tensor in original.items()}
    converted = {}
    for key, tensor in original.items():
        if key == "proj":
            converted["visual_projection.weight"] = tensor.T.contiguous()
        elif key in _TOWER_KEYS:
            converted[f"vision_model.{_TOWER_KEYS[key]}"] = tensor
        else:
            converted |= {f"vision_model.{name}": part for name, part in _block_from_original(key, tensor)}
    return config, converted


def _block_from_original(key: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Names and values of ours for one tensor of a block: three for the attention input, else one."""
    index, name, kind = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)", key).groups()
    layer = f"encoder.layers.{index}"
    if name == "attn.in_proj":
        parts = zip(_ATTENTION_INPUTS, tensor.chunk(3), strict=True)
        return [(f"{layer}.self_attn.{part}.{kind}", piece.clone()) for part, piece in parts]
    return [(f"{layer}.{_BLOCK_KEYS[name]}.{kind}", tensor)]


def to_original(ours: StateDict) -> StateDict:
    """Convert weights of `AlphaCLIPVisionModelWithProjection` to the original layout; the inverse of `from_original`.

    Raises:
        ValueError: If the projection or the alpha weight is missing.
    """
    for key in ("visual_projection.weight", f"vision_model.{ALPHA_WEIGHT}"):
        if key not in ours:
            raise ValueError(
                f"expected {key} in the weights, which the original layout requires (a LLaVA tower has no projection)"
            )
    original = {"proj": ours["visual_projection.weight"].T.contiguous()}
    original |= {theirs: ours[f"vision_model.{name}"] for theirs, name in _TOWER_KEYS.items()}
    layers = sum(key.endswith(".layer_norm1.weight") for key in ours)
    for index in range(layers):
        theirs, layer = f"transformer.resblocks.{index}", f"vision_model.encoder.layers.{index}"
        for kind in ("weight", "bias"):
            pieces = [ours[f"{layer}.self_attn.{part}.{kind}"] for part in _ATTENTION_INPUTS]
            original[f"{theirs}.attn.in_proj.{kind}"] = torch.cat(pieces)
            for name, our_name in _BLOCK_KEYS.items():
                original[f"{theirs}.{name}.{kind}"] = ours[f"{layer}.{our_name}.{kind}"]
    return original


def _original_shapes(config: AlphaCLIPVisionConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of an original checkpoint with this configuration."""
    width, inner, patch = config.hidden_size, config.intermediate_size, config.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (width,),
        "positional_embedding": ((config.image_size // patch) ** 2 + 1, width),
        "proj": (width, config.projection_dim),
        "conv1.weight": (width, 3, patch, patch),
        "conv1_alpha.weight": (width, 1, patch, patch),
    }
    shapes |= {f"{norm}.{kind}": (width,) for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")}
    matrices = {
        "attn.in_proj": (3 * width, width),
        "attn.out_proj": (width, width),
        "mlp.c_fc": (inner, width),
        "mlp.c_proj": (width, inner),
    }
    for index in range(config.num_hidden_layers):
        block = f"transformer.resblocks.{index}"
        shapes |= {f"{block}.{norm}.{kind}": (width,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
        for name, shape in matrices.items():
            shapes[f"{block}.{name}.weight"], shapes[f"{block}.{name}.bias"] = shape, shape[:1]
    return shapes


def fuse(weights: StateDict) -> StateDict:
    """Concatenate the RGB and alpha convolutions to one with four channels, for stock CLIP with `num_channels=4`.

    The result is equal to the sum of both convolutions, up to rounding.

    Args:
        weights: State dict of a tower or of a model that contains one. Names are kept.

    Raises:
        ValueError: If there is not exactly one alpha weight.
    """
    alphas = [key for key in weights if key.endswith(ALPHA_WEIGHT)]
    if len(alphas) != 1:
        raise ValueError(f"expected one {ALPHA_WEIGHT} to fuse, got {len(alphas)}")
    rgb = alphas[0].replace(".alpha.weight", ".weight")
    fused = {key: tensor for key, tensor in weights.items() if key != alphas[0]}
    fused[rgb] = torch.cat([weights[rgb], weights[alphas[0]]], dim=1)
    return fused


def read_tower(path: str | os.PathLike) -> tuple[AlphaCLIPVisionConfig, StateDict]:
    """Read configuration and weights of an `AlphaCLIPVisionModel` from an original checkpoint file or our directory.

    Raises:
        ValueError: If it is not a complete tower with alpha weight, or is damaged.
    """
    if not os.path.isdir(path):
        config, weights = read_original(path)
        prefix = "vision_model."
        return config, {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
    try:
        model, report = AlphaCLIPVisionModel.from_pretrained(path, output_loading_info=True)
    except OSError as error:
        raise ValueError(f"expected a directory with an Alpha-CLIP tower in {path}: {first_line(error)}") from error
    except SafetensorError as error:
        raise ValueError(f"the weights in {path} are damaged ({first_line(error)}); is the copy complete?") from error
    if report["missing_keys"]:
        raise ValueError(f"{path} is a plain CLIP without an alpha weight, so regions would have no effect")
    return model.config, model.state_dict()


_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "patch_size", "image_size", "hidden_act")


def read_tower_for(wanted: AlphaCLIPVisionConfig, path: str | os.PathLike, *, first_blocks: bool = False) -> StateDict:
    """Read the weights of a tower, as `read_tower` does, for a model with a given configuration.

    Args:
        wanted: Configuration of the tower into which the weights are loaded.
        path: Original checkpoint file or directory of ours.
        first_blocks: Whether the last blocks are dropped if the configuration has fewer.

    Raises:
        ValueError: If the tower has another size.
    """
    config, weights = read_tower(path)
    blocks, wanted_blocks = config.num_hidden_layers, wanted.num_hidden_layers
    sizes = [(name, getattr(config, name), getattr(wanted, name)) for name in _SIZES]
    if not (first_blocks and blocks > wanted_blocks):
        sizes.append(("num_hidden_layers", blocks, wanted_blocks))
    for name, found, expected in sizes:
        if found != expected:
            raise ValueError(
                f"the alpha weights in {path} are those of another tower: {name} is {found}, expected {expected}; "
                "use weights of the same size (LLaVA-1.5: ViT-L/14@336, ViT-L BLIP-2 of LAVIS: ViT-L/14)"
            )
    surplus = tuple(f"encoder.layers.{index}." for index in range(wanted_blocks, blocks))
    return {key: tensor for key, tensor in weights.items() if not key.startswith(surplus)}
