"""The arguments of `alpha-clip train`: towers, pairs and loss."""

from __future__ import annotations

from dataclasses import dataclass, field

from alpha_clip_commands.source_values import constant
from alpha_clip_commands.training.shared_arguments import (
    PartArguments,
    RegionArguments,
    check_at_least,
    check_shares,
)

GEOMETRIES = constant("vision_tower/geometry.py", "GEOMETRIES")
LOSSES = ("symmetric", "released")
SCHEDULES = ("trainer", "released")


@dataclass(kw_only=True)
class TowerArguments(PartArguments):
    """Which CLIP, which of its parts are trained, and how."""

    model: str = field(metadata={"help": "directory or hub id of a CLIP (alpha starts at zero) or an Alpha-CLIP"})
    geometry: str = field(
        default="pad",
        metadata={"help": "how images are made square: pad, stretch or crop (which can remove regions)"},
    )
    train_parts: list[str] = field(
        default_factory=lambda: ["vision_model", "visual_projection", "alpha"],
        metadata={
            "help": "fully trained parts: vision_model (without alpha), visual_projection, alpha, text_model, "
            "text_projection, logit_scale (the temperature)"
        },
    )
    train_blocks: int | None = field(
        default=None, metadata={"help": "train only this many last blocks of vision_model and the layers after them"}
    )
    lora_r: int = field(
        default=0, metadata={"help": "rank of LoRA on the image tower, instead of vision_model; 0 for no LoRA"}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the LoRA matrices"})
    logit_scale: float | None = field(
        default=None, metadata={"help": "factor of the cosines (default: that of the model; 100 for CLIP)"}
    )
    decay_all: bool = field(
        default=False, metadata={"help": "apply weight decay to norms and biases too, as in the released training"}
    )

    def __post_init__(self) -> None:
        """Raise ValueError if a value is out of range, or two contradict each other."""
        super().__post_init__()
        if self.geometry not in GEOMETRIES:
            raise ValueError(f"geometry: expected one of {', '.join(GEOMETRIES)}, got {self.geometry!r}")
        if self.train_blocks is not None and self.train_blocks < 0:
            raise ValueError(f"train_blocks: expected 0 or more, got {self.train_blocks}")
        self._check_needs_lora("lora_dropout")
        if self.lora_r and self.train_blocks is not None:
            raise ValueError("train_blocks: blocks are frozen with LoRA; set either train_blocks or lora_r")
        if self.train_blocks is not None and "vision_model" not in self.train_parts:
            raise ValueError("train_blocks: requires vision_model in train_parts")
        if self.lora_r and "logit_scale" in self.train_parts:
            raise ValueError("train_parts: an adapter cannot contain logit_scale; remove logit_scale or lora_r")
        if self.logit_scale is not None and not 0 < self.logit_scale <= 100:
            raise ValueError(f"logit_scale: expected a factor above 0 and up to 100, got {self.logit_scale}")


@dataclass(kw_only=True)
class PairArguments(RegionArguments):
    """Which region-text pairs form a batch, and their loss."""

    data: list[str] = field(
        metadata={
            "help": "folders of GRIT (json + image, or tars), Visual Genome, RefCOCOg, JSONL files, or their indexes"
        }
    )
    region_input: str = field(
        default="mask",
        metadata={"help": "box, mask, mixed (box or mask at random), or available (the mask if the region has one)"},
    )
    regions_per_image: int = field(
        default=1,
        metadata={"help": "maximum number of regions per image in a batch, each other's hard negatives"},
    )
    whole_image_rate: float = field(
        default=0.1, metadata={"help": "r_s: share of pairs that are the whole image (alpha 1) with its caption"}
    )
    mask_jitter: int = field(
        default=0, metadata={"help": "dilate or erode masks by up to this many pixels; a mask is never empty"}
    )
    max_blur: float = field(
        default=0.0, metadata={"help": "soft alpha: blur masks by up to this share of their longer side"}
    )
    loss: str = field(
        default="symmetric", metadata={"help": "symmetric, or released (only image to text has a gradient)"}
    )
    equal_texts: bool = field(default=True, metadata={"help": "pairs with the same text are positives"})
    schedule: str = field(
        default="trainer", metadata={"help": "trainer (`lr_scheduler_type`), or released (a cosine that rises again)"}
    )
    released_steps: int = field(default=5000, metadata={"help": "schedule released: step at which the cosine is 0"})
    cache_chunk: int = field(
        default=0,
        metadata={"help": "gradient caching: pairs to embed at a time for one loss; 0 for all at once"},
    )
    eval_images: int = field(default=200, metadata={"help": "number of validation images (split val)"})

    def __post_init__(self) -> None:
        """Raise ValueError if a value is out of range, or two contradict each other."""
        super().__post_init__()
        for name, allowed in (("loss", LOSSES), ("schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        check_at_least(self, 1, "regions_per_image", "released_steps", "eval_images")
        check_at_least(self, 0, "mask_jitter", "cache_chunk")
        check_shares(self, "whole_image_rate", "max_blur")
        if self.regions_per_image * self.whole_image_rate > 1:
            raise ValueError(
                f"whole_image_rate: at most one of the {self.regions_per_image} pairs of an image (regions_per_image) "
                f"is the whole image, so expected at most {1 / self.regions_per_image:.3g}, got {self.whole_image_rate}"
            )
        if self.loss == "released" and self.cache_chunk:
            raise ValueError("loss: released does not support cache_chunk; use loss: symmetric")
