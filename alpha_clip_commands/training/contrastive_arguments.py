"""The arguments of `alpha-clip train`: towers, pairs and loss."""

from __future__ import annotations

from dataclasses import dataclass, field

from alpha_clip_commands.source_values import constant
from alpha_clip_commands.training.tuning_arguments import PartArguments, RegionArguments, check_at_least, check_shares

GEOMETRIES = constant("vision_tower/geometry.py", "GEOMETRIES")
LOSSES = ("symmetric", "released")
SCHEDULES = ("trainer", "released")


@dataclass(kw_only=True)
class TowerArguments(PartArguments):
    """Which CLIP, and which of its parts are trained how."""

    model: str = field(metadata={"help": "directory or hub id of a CLIP (alpha starts at zero) or an Alpha-CLIP"})
    geometry: str = field(
        default="pad",
        metadata={"help": "how an image becomes a square: pad, stretch or crop (which cuts regions off)"},
    )
    train_parts: list[str] = field(
        default_factory=lambda: ["vision_model", "visual_projection", "alpha"],
        metadata={
            "help": "parts trained in full: vision_model (without alpha), visual_projection, alpha, text_model, "
            "text_projection, logit_scale (the temperature)"
        },
    )
    train_blocks: int | None = field(
        default=None, metadata={"help": "of vision_model only the last so many blocks and what follows them"}
    )
    lora_r: int = field(
        default=0, metadata={"help": "rank of LoRA on the image tower, in place of vision_model; 0: none"}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before LoRA's matrices"})
    logit_scale: float | None = field(
        default=None, metadata={"help": "what cosines are multiplied with (default: the model's own, CLIP's is 100)"}
    )
    decay_all: bool = field(
        default=False, metadata={"help": "weight decay on norms and biases too, as the released training has it"}
    )

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If one is out of range, or two contradict each other.
        """
        super().__post_init__()
        if self.geometry not in GEOMETRIES:
            raise ValueError(f"geometry: expected one of {', '.join(GEOMETRIES)}, got {self.geometry!r}")
        if self.train_blocks is not None and self.train_blocks < 0:
            raise ValueError(f"train_blocks: expected 0 or more, got {self.train_blocks}")
        self._refuse_without_lora("lora_dropout")
        if self.lora_r and self.train_blocks is not None:
            raise ValueError("train_blocks: blocks are frozen under LoRA; give one of the two")
        if self.train_blocks is not None and "vision_model" not in self.train_parts:
            raise ValueError("train_blocks: they are blocks of vision_model, which train_parts does not name")
        if self.lora_r and "logit_scale" in self.train_parts:
            raise ValueError("train_parts: an adapter holds no logit_scale; leave it out, or lora_r")
        if self.logit_scale is not None and not 0 < self.logit_scale <= 100:
            raise ValueError(f"logit_scale: expected a factor above 0 and up to 100, got {self.logit_scale}")


@dataclass(kw_only=True)
class PairArguments(RegionArguments):
    """Which region-text pairs make a batch, and what is asked of their embeddings."""

    data: list[str] = field(
        metadata={
            "help": "folders of GRIT (json + image, or tars), Visual Genome, RefCOCOg, JSONL files, or their indexes"
        }
    )
    region_input: str = field(
        default="mask",
        metadata={"help": "box, mask, mixed (one of both at random), or available (masks where there are)"},
    )
    regions_per_image: int = field(
        default=1, metadata={"help": "up to this many regions of an image in a batch: each other's hard negatives"}
    )
    whole_image_rate: float = field(
        default=0.1, metadata={"help": "r_s: share of pairs that are the whole image, alpha of ones, with its caption"}
    )
    mask_jitter: int = field(
        default=0, metadata={"help": "grow or shrink a mask by up to this many pixels; it never vanishes"}
    )
    max_blur: float = field(
        default=0.0, metadata={"help": "soft alpha: a mask is blurred by up to this share of its own longer side"}
    )
    loss: str = field(
        default="symmetric", metadata={"help": "symmetric, or released (image to text alone has a gradient)"}
    )
    equal_texts: bool = field(default=True, metadata={"help": "pairs of the same text are positives, not negatives"})
    patch_weight: float = field(
        default=0.0,
        metadata={"help": "weight of the same loss on the patch tokens that LLaVA reads, pooled over the region"},
    )
    schedule: str = field(
        default="trainer", metadata={"help": "trainer (`lr_scheduler_type`), or released (a cosine that rises again)"}
    )
    released_steps: int = field(default=5000, metadata={"help": "with schedule released: where its cosine ends"})
    cache_chunk: int = field(
        default=0, metadata={"help": "gradient caching: embed so many pairs at a time, contrast all; 0: all at once"}
    )
    eval_pictures: int = field(default=200, metadata={"help": "held-out images (split val) that evaluations use"})

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If a value is out of range.
        """
        super().__post_init__()
        for name, allowed in (("loss", LOSSES), ("schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        check_at_least(self, 1, "regions_per_image", "released_steps", "eval_pictures")
        check_at_least(self, 0, "mask_jitter", "patch_weight", "cache_chunk")
        check_shares(self, "whole_image_rate", "max_blur")
        if self.regions_per_image * self.whole_image_rate > 1:
            raise ValueError(
                f"whole_image_rate: an image is shown whole once among its {self.regions_per_image} pairs "
                f"(regions_per_image), so up to {1 / self.regions_per_image:.3g} of the pairs, got "
                f"{self.whole_image_rate}"
            )
        if self.loss == "released" and (self.patch_weight or self.cache_chunk):
            raise ValueError("loss: released knows neither patch_weight nor cache_chunk; use loss: symmetric")
