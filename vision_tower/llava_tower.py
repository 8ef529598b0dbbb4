"""The tower with the interface of the original LLaVA code base (docs/original_llava.md).

import llava.model.multimodal_encoder.builder as builder
from vision_tower.llava_tower import AlphaCLIPVisionTower
builder.CLIPVisionTower = AlphaCLIPVisionTower
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from .configuration_alpha_clip import AlphaCLIPVisionConfig
from .image_processing_alpha_clip import AlphaCLIPImageProcessor
from .modeling_alpha_clip import AlphaCLIPVisionModel

logger = logging.getLogger(__name__)


class AlphaCLIPVisionTower(nn.Module):
    """Replaces LLaVA's `CLIPVisionTower`. Images have three channels (the whole image) or four (RGB and alpha).

    Unlike `CLIPVisionTower`, `forward` does not use `torch.no_grad`: a frozen tower builds no graph, and with
    `args.unfreeze_mm_vision_tower` the tower is trained, including the alpha weight.

    Args:
        vision_tower: Directory or hub id of an Alpha-CLIP tower, or of a CLIP (with an alpha weight of zero).
        args: LLaVA's arguments: `mm_vision_select_layer`, `mm_vision_select_feature` ("patch" or "cls_patch"),
            `unfreeze_mm_vision_tower`, `image_aspect_ratio` ("pad"; any other value is the center crop).
        delay_load: Whether to read only the configuration until `load_model` is called. Ignored if the tower is
            trained.

    Raises:
        ValueError: If `mm_vision_select_feature` is unknown.

    Source: `CLIPVisionTower` in haotian-liu/LLaVA, llava/model/multimodal_encoder/clip_encoder.py at c121f04.
    """

    def __init__(self, vision_tower: str, args: Any, delay_load: bool = False) -> None:
        super().__init__()
        self.is_loaded = False
        self.vision_tower_name = vision_tower
        self.select_layer = args.mm_vision_select_layer
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        self.trained = getattr(args, "unfreeze_mm_vision_tower", False)
        self.geometry = "pad" if getattr(args, "image_aspect_ratio", None) == "pad" else "crop"
        if self.select_feature not in ("patch", "cls_patch"):
            raise ValueError(f"expected mm_vision_select_feature patch or cls_patch, got {self.select_feature!r}")
        if delay_load and not self.trained:
            self.cfg_only = AlphaCLIPVisionConfig.from_pretrained(vision_tower)
        else:
            self.load_model()

    def load_model(self, device_map: Any = None) -> None:
        """Load weights and image processor, unless they are loaded.

        Raises:
            ValueError: If a weight is missing, unexpected or of another shape.
        """
        if self.is_loaded:
            return
        name = self.vision_tower_name
        self.image_processor = AlphaCLIPImageProcessor.from_pretrained(name, geometry=self.geometry)
        self.vision_tower, report = AlphaCLIPVisionModel.from_pretrained(
            name, device_map=device_map, output_loading_info=True
        )
        if report["missing_keys"]:
            logger.warning("%s is a CLIP without alpha weight; regions have no effect until it is trained", name)
        self.vision_tower.requires_grad_(self.trained)
        self.is_loaded = True

    def forward(self, images: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """Features of the selected layer, in the dtype of the images.

        Args:
            images: (B, 4, H, W) or (B, 3, H, W), or a list of (4, H, W) or (3, H, W), which are processed one by one.

        Returns:
            (B, patches, D), or (B, 1 + patches, D) for "cls_patch". For a list, a list with B = 1.
        """
        if isinstance(images, list):
            return [self.forward(image.unsqueeze(0)) for image in images]
        output = self.vision_tower(images.to(device=self.device, dtype=self.dtype), output_hidden_states=True)
        return self.feature_select(output).to(images.dtype)

    def feature_select(self, image_forward_outs: Any) -> torch.Tensor:
        """The selected hidden state, without the class token for "patch"."""
        features = image_forward_outs.hidden_states[self.select_layer]
        return features[:, 1:] if self.select_feature == "patch" else features

    @property
    def dummy_feature(self) -> torch.Tensor:
        """Zeros (1, D), for samples without an image."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.vision_tower.device

    @property
    def config(self) -> AlphaCLIPVisionConfig:
        """The configuration, available before the weights are loaded."""
        return self.vision_tower.config if self.is_loaded else self.cfg_only

    @property
    def hidden_size(self) -> int:
        """Width D of the features."""
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        """Patches along one side: 24 at 336 pixels with patch size 14."""
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image: 576 at 336 pixels with patch size 14."""
        return self.num_patches_per_side**2
