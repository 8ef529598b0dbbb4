"""The one new layer, a patch convolution that also reads an alpha channel, and how to put it into other Hugging Face
ViTs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

ALPHA_MEAN, ALPHA_STD = 0.5, 0.26  # Source: `transforms.Normalize(0.5, 0.26)` in SunzeY/AlphaCLIP, README.md at e5676c9
WHOLE_IMAGE = (1.0 - ALPHA_MEAN) / ALPHA_STD  # 1.923: alpha 1 after normalisation


class AlphaConv2d(nn.Conv2d):
    """The alpha convolution. A class of its own, so that a tower's `_init_weights` can zero it by type.

    Zeroing it when the *parent* is met does not work: Transformers skips a module whose own parameters were all loaded,
    and the alpha weight would stay random after loading a CLIP checkpoint.
    """


class AlphaPatchEmbedding(nn.Conv2d):
    """Patch convolution over RGB plus a bias-free convolution over alpha, in place of a ViT's `patch_embedding`.

    The RGB weight keeps its name (`patch_embedding.weight`), so CLIP checkpoints load; the alpha weight is
    `patch_embedding.alpha.weight` (D, 1, patch, patch). At zero alpha weight the output equals the RGB convolution bit
    for bit.

    Source: `conv1` + `conv1_alpha` in SunzeY/AlphaCLIP, alpha_clip/model.py at e5676c9.
    """

    def __init__(self, out_channels: int, patch_size: int, bias: bool = False, device=None, dtype=None) -> None:
        super().__init__(3, out_channels, patch_size, patch_size, bias=bias, device=device, dtype=dtype)
        self.alpha = AlphaConv2d(1, out_channels, patch_size, patch_size, bias=False, device=device, dtype=dtype)
        nn.init.zeros_(self.alpha.weight)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed patches.

        Args:
            pixel_values: (B, 4, H, W), normalised RGB and the alpha map as (alpha - 0.5) / 0.26; or (B, 3, H, W), which
                means the whole image (alpha 1 everywhere).

        Returns:
            (B, D, H / patch, W / patch).

        Raises:
            ValueError: If the input has another number of channels: a dropped or doubled alpha map would pass
                unnoticed.
        """
        channels = pixel_values.shape[1] if pixel_values.ndim == 4 else None
        if channels == 4:
            rgb, alpha = pixel_values[:, :3], pixel_values[:, 3:]
        elif channels == 3:
            rgb, alpha = pixel_values, torch.full_like(pixel_values[:, :1], WHOLE_IMAGE)
        else:
            raise ValueError(
                f"expected pixel_values (B, 4, H, W) = RGB + alpha, or (B, 3, H, W) for the whole image, got "
                f"{tuple(pixel_values.shape)}; build them with AlphaCLIPImageProcessor"
            )
        return super().forward(rgb) + self.alpha(alpha)


class AlphaDinov2PatchEmbeddings(nn.Module):
    """DINOv2's `patch_embeddings` without its check for three channels; `AlphaPatchEmbedding` has a check of its own.

    Source: `Dinov2PatchEmbeddings` in Transformers 5.23.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.projection = stock.projection
        self.num_patches, self.image_size, self.patch_size = stock.num_patches, stock.image_size, stock.patch_size

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 4, H, W) or (B, 3, H, W) -> (B, patches, D)."""
        return self.projection(pixel_values.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)


# class of a ViT -> its patch convolution
_PATCH_CONVOLUTIONS = {
    "CLIPVisionModel": "embeddings.patch_embedding",
    "SiglipVisionModel": "embeddings.patch_embedding",  # fixed-resolution SigLIP 2 has the same class
    "Blip2VisionModel": "embeddings.patch_embedding",  # EVA
    "Dinov2Model": "embeddings.patch_embeddings.projection",
}

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")


def add_alpha_channel(model: PreTrainedModel) -> PreTrainedModel:
    """Give a loaded ViT, or a model that holds one, an alpha channel: in place, at exactly zero, so that nothing
    changes until it is trained.

    Its `pixel_values` may then be (B, 4, H, W), or (B, 3, H, W) for the whole image. Weights keep their names and stay
    the very tensors they were; new is `<patch convolution>.alpha.weight`.

    Args:
        model: With one CLIPVisionModel, SiglipVisionModel, Blip2VisionModel or Dinov2Model in it, or being one.

    Raises:
        ValueError: If it has no such ViT, more than one, or one with an alpha channel.
    """
    path = _patch_convolution(model)
    parent, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    stock = getattr(parent, name)
    where = {"device": stock.weight.device, "dtype": stock.weight.dtype}
    embedding = AlphaPatchEmbedding(stock.out_channels, stock.kernel_size[0], bias=stock.bias is not None, **where)
    embedding.weight, embedding.bias = stock.weight, stock.bias
    setattr(parent, name, embedding)
    if name == "projection":
        grandparent = model.get_submodule(path.rsplit(".", 2)[0])
        grandparent.patch_embeddings = AlphaDinov2PatchEmbeddings(parent)
    return model


def _patch_convolution(model: PreTrainedModel) -> str:
    """The full name of the one patch convolution in a model."""
    found = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind == "Siglip2VisionModel":
            raise ValueError(
                "Siglip2VisionModel (NaFlex) embeds patches by a linear layer over cut-out patches, not by a "
                "convolution: it can have no alpha channel here; take a fixed-resolution SigLIP 2"
            )
        if isinstance(module, AlphaPatchEmbedding):
            raise ValueError(f"{type(model).__name__} has an alpha channel already ({name})")
        if kind in _PATCH_CONVOLUTIONS:
            found.append(f"{name}.{_PATCH_CONVOLUTIONS[kind]}".removeprefix("."))
    if len(found) != 1:
        raise ValueError(
            f"expected a model with one {', '.join(_PATCH_CONVOLUTIONS)}, got {type(model).__name__} with {len(found)}"
        )
    return found[0]


def load_with_alpha(name: str | os.PathLike, model_class: Any = None, **kwargs: Any) -> PreTrainedModel:
    """Load a model that `add_alpha_channel` has changed and `save_pretrained` has saved. `from_pretrained` alone would
    drop the alpha weight: the stock class has no place for it.

    Args:
        name: Directory or hub id.
        model_class: Its class, or an Auto class; the one that its config names when not given.
        **kwargs: As in `from_pretrained`.

    Raises:
        ValueError: If there is no alpha weight, a weight is missing, of another shape, or left over; or as
            `add_alpha_channel`.
    """
    hub = {option: kwargs[option] for option in HUB_OPTIONS if option in kwargs}
    if model_class is None:
        config, _ = PreTrainedConfig.get_config_dict(name, **hub)
        architecture = (config.get("architectures") or [None])[0]
        model_class = getattr(transformers, str(architecture), None)
        if model_class is None:
            raise ValueError(f"expected a Transformers model class in {name}'s config, got {architecture}; give it")
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # the report names mismatches
    with without_load_report():
        model, report = model_class.from_pretrained(name, **kwargs)
    add_alpha_channel(model)
    key = next(key for key, module in model.named_modules() if isinstance(module, AlphaConv2d)) + ".weight"
    left_over = sorted(set(report["unexpected_keys"]) - {key})
    problems = sorted(report["missing_keys"]) + left_over + sorted(str(key) for key in report["mismatched_keys"])
    if problems:
        raise ValueError(f"the weights in {name} do not fit {type(model).__name__} (first: {problems[0]})")
    if key not in report["unexpected_keys"]:
        raise ValueError(
            f"{name} has no alpha weight ({key}): every region would be ignored. To begin with a stock model, load it "
            "with from_pretrained and give it to add_alpha_channel"
        )
    model.get_parameter(key).data.copy_(stored_tensor(name, ".".join(key.split(".")[-4:]), hub))
    return model


@contextlib.contextmanager
def without_load_report() -> Iterator[None]:
    """Without Transformers' report, which would call the alpha weight unexpected (of a fused model: of another shape);
    it is read afterwards, and the rest is checked.
    """
    report = logging.getLogger("transformers.modeling_utils")
    level = report.level
    report.setLevel(logging.ERROR)
    try:
        yield
    finally:
        report.setLevel(level)


def stored_tensor(name: str | os.PathLike, ending: str, hub: dict) -> torch.Tensor:
    """The one tensor of a checkpoint whose name ends so: names may begin otherwise than in the model."""
    index = cached_file(name, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, **hub)
    files = ["model.safetensors"]
    if index is not None:
        with open(index, encoding="utf-8") as file:
            files = [shard for stored, shard in json.load(file)["weight_map"].items() if stored.endswith(ending)]
    with safe_open(cached_file(name, files[0], **hub), "pt") as tensors:
        return tensors.get_tensor(next(stored for stored in tensors.keys() if stored.endswith(ending)))  # noqa: SIM118
