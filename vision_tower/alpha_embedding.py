"""The new layer of Alpha-CLIP, a patch embedding with an alpha channel, and its use in other Hugging Face ViTs."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

ALPHA_MEAN, ALPHA_STD = 0.5, 0.26  # Source: `transforms.Normalize(0.5, 0.26)` in SunzeY/AlphaCLIP, README.md at e5676c9
WHOLE_IMAGE = (1.0 - ALPHA_MEAN) / ALPHA_STD  # 1.923: alpha 1 after normalization


class AlphaConv2d(nn.Conv2d):
    """The alpha convolution. A separate class, so that `_init_weights` of a tower can initialize it to zero by type.

    Initializing it together with its parent does not work: Transformers skips a module whose own parameters were all
    loaded, and the alpha weight would stay random after loading a CLIP checkpoint.
    """


class AlphaPatchEmbedding(nn.Conv2d):
    """The sum of a patch convolution over RGB and one without bias over alpha; replaces a ViT's `patch_embedding`.

    The RGB weight keeps its name (`patch_embedding.weight`), so that CLIP checkpoints can be loaded. The alpha weight
    is `patch_embedding.alpha.weight` (D, 1, patch, patch). With an alpha weight of zero, the output is bit-identical to
    that of the RGB convolution.

    Args:
        out_channels: Width D of the ViT.
        patch_size: Side of a patch in pixels.
        bias: Whether the RGB convolution has a bias.
        device: Device of the weights.
        dtype: Data type of the weights.

    Source: `conv1` + `conv1_alpha` in SunzeY/AlphaCLIP, alpha_clip/model.py at e5676c9.
    """

    def __init__(self, out_channels: int, patch_size: int, bias: bool = False, device=None, dtype=None) -> None:
        super().__init__(3, out_channels, patch_size, patch_size, bias=bias, device=device, dtype=dtype)
        self.alpha = AlphaConv2d(1, out_channels, patch_size, patch_size, bias=False, device=device, dtype=dtype)
        nn.init.zeros_(self.alpha.weight)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed patches.

        Args:
            pixel_values: (B, 4, H, W), normalized RGB and the alpha map as (alpha - 0.5) / 0.26; or (B, 3, H, W), the
                whole image (alpha 1 everywhere).

        Returns:
            (B, D, H / patch, W / patch).

        Raises:
            ValueError: If the input has another number of channels, which indicates a missing or repeated alpha map.
        """
        channels = pixel_values.shape[1] if pixel_values.ndim == 4 else None
        if channels == 4:
            rgb, alpha = pixel_values[:, :3], pixel_values[:, 3:]
        elif channels == 3:
            rgb, alpha = pixel_values, torch.full_like(pixel_values[:, :1], WHOLE_IMAGE)
        else:
            raise ValueError(
                f"expected pixel_values (B, 4, H, W) = RGB + alpha, or (B, 3, H, W) for the whole image, got "
                f"{tuple(pixel_values.shape)}; create them with AlphaCLIPImageProcessor"
            )
        return super().forward(rgb) + self.alpha(alpha)


class AlphaDinov2PatchEmbeddings(nn.Module):
    """DINOv2's `patch_embeddings` without the check for three channels; `AlphaPatchEmbedding` checks the channels.

    Source: `Dinov2PatchEmbeddings` in Transformers 5.23.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.projection = stock.projection
        self.num_patches, self.image_size, self.patch_size = stock.num_patches, stock.image_size, stock.patch_size

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 4, H, W) or (B, 3, H, W) -> (B, patches, D)."""
        return self.projection(pixel_values.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)


# class of a ViT -> name of its patch convolution
_PATCH_CONVOLUTIONS = {
    "CLIPVisionModel": "embeddings.patch_embedding",
    "SiglipVisionModel": "embeddings.patch_embedding",  # also fixed-resolution SigLIP 2
    "Blip2VisionModel": "embeddings.patch_embedding",  # EVA
    "Dinov2Model": "embeddings.patch_embeddings.projection",
}


def add_alpha_channel(model: PreTrainedModel) -> PreTrainedModel:
    """Add an alpha channel to a ViT, in place. Its weight is zero, so outputs do not change until it is trained.

    `pixel_values` can then be (B, 4, H, W), or (B, 3, H, W) for the whole image. The existing parameters keep their
    names and tensors; `<patch convolution>.alpha.weight` is added.

    Args:
        model: A CLIPVisionModel, SiglipVisionModel, Blip2VisionModel or Dinov2Model, or a model that contains one.

    Returns:
        The same model.

    Raises:
        ValueError: If the model contains no such ViT or several, or already has an alpha channel.

    Example:
        >>> model = add_alpha_channel(AutoModel.from_pretrained("google/siglip-base-patch16-224"))
        >>> model.save_pretrained("DIR")
        >>> model = load_with_alpha("DIR")
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
    """The full name of the only patch convolution of a model."""
    found = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind == "Siglip2VisionModel":
            raise ValueError(
                "Siglip2VisionModel (NaFlex) is not supported: it embeds patches with a linear layer, not a "
                "convolution; use a fixed-resolution SigLIP 2"
            )
        if isinstance(module, AlphaPatchEmbedding):
            raise ValueError(f"{type(model).__name__} already has an alpha channel ({name})")
        if kind in _PATCH_CONVOLUTIONS:
            found.append(f"{name}.{_PATCH_CONVOLUTIONS[kind]}".removeprefix("."))
    if len(found) != 1:
        raise ValueError(
            f"expected a model with exactly one {', '.join(_PATCH_CONVOLUTIONS)}, got {type(model).__name__} with "
            f"{len(found)}"
        )
    return found[0]
