"""The one new layer: a patch convolution that also reads an alpha channel."""

from __future__ import annotations

import torch
from torch import nn

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
