"""The one new layer, a patch convolution that also reads an alpha channel, and how to put it into other Hugging Face
ViTs.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

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
