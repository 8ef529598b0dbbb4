"""The arguments that `region-tune` and `alpha-clip train` share: trained parts, and how regions are given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

REGION_INPUTS = ("box", "mask", "mixed", "available")


@dataclass(kw_only=True)
class PartArguments:
    """Which parts of a model are trained, and how."""

    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, ... (Transformers' default)"})
    train_parts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "fully trained parts, by the model's names: vision_tower, alpha, multi_modal_projector, ... "
            "(default: all without LoRA, none with LoRA)"
        },
    )
    lora_r: int = field(default=0, metadata={"help": "rank of LoRA on the language model; 0 for no LoRA"})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "the scale of LoRA is lora_alpha / lora_r (default: 2 * lora_r)"}
    )
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout before the LoRA matrices"})
    lora_targets: list[str] = field(
        default_factory=list,
        metadata={"help": "names of the adapted layers: q_proj v_proj ... (default: all linear layers)"},
    )
    learning_rates: list[str] = field(
        default_factory=list,
        metadata={"help": "per-part learning rates of fully trained parts: multi_modal_projector=2e-5 alpha=2e-4"},
    )
    optimizer: str = field(
        default="trainer",
        metadata={"help": "trainer (Trainer's `optim`), or muon (Muon for matrices, AdamW for the rest)"},
    )
    plan: bool = field(
        default=False,
        metadata={"help": "print an estimate of parameters, memory, steps and hours, and exit; reads no weights"},
    )
    device_tflops: float | None = field(
        default=None, metadata={"help": "with --plan: throughput of a device, in 10^12 operations per second"}
    )

    def __post_init__(self) -> None:
        """Raise ValueError if a value is out of range, or two contradict each other."""
        if self.lora_r < 0:
            raise ValueError(f"lora_r: expected 0 (no LoRA) or more, got {self.lora_r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout: expected a number from 0 to below 1, got {self.lora_dropout}")
        for name in ("lora_alpha", "device_tflops"):
            if (value := vars(self)[name]) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        if self.optimizer not in ("trainer", "muon"):
            raise ValueError(f"optimizer: expected trainer or muon, got {self.optimizer!r}")
        # not lora_dropout, whose default may not be 0
        self._check_needs_lora("lora_targets", "lora_alpha")
        self.rate_of_part()

    def _check_needs_lora(self, *names: str) -> None:
        """Raise ValueError if one of these arguments is given without LoRA."""
        given = [name for name in names if vars(self)[name]]
        if given and not self.lora_r:
            raise ValueError(f"{', '.join(given)}: no effect without LoRA; set lora_r above 0")

    def rate_of_part(self) -> dict[str, float]:
        """`learning_rates` as a dict.

        Raises:
            ValueError: If an entry is not PART=RATE with a rate above 0.
        """
        return named_numbers("learning_rates", self.learning_rates)


@dataclass(kw_only=True)
class RegionArguments:
    """How regions are given to the model, and how many images may be missing."""

    region_input: str = field(
        default="box",
        metadata={"help": "box, mask, mixed (box or mask at random), or available (the mask if the region has one)"},
    )
    mask_share: float = field(default=0.5, metadata={"help": "with mixed: share of regions given as masks"})
    box_jitter: float = field(
        default=0.0, metadata={"help": "move each edge of a box by up to this share of its width or height (below 0.5)"}
    )
    min_strength: float = field(
        default=1.0, metadata={"help": "soft alpha: the strength of a region is sampled between this value and 1"}
    )
    max_missing: float = field(
        default=0.001,
        metadata={"help": "maximum share of images that may be missing or damaged; they are skipped and listed"},
    )

    def __post_init__(self) -> None:
        """Raise ValueError if a value is out of range."""
        if self.region_input not in REGION_INPUTS:
            raise ValueError(f"region_input: expected one of {', '.join(REGION_INPUTS)}, got {self.region_input!r}")
        if not 0 <= self.box_jitter < 0.5:  # opposite edges could meet
            raise ValueError(f"box_jitter: expected a share from 0 to below 0.5, got {self.box_jitter}")
        check_shares(self, "mask_share", "min_strength", "max_missing")


def check_shares(arguments: object, *names: str) -> None:
    """Raise ValueError unless the named arguments are from 0 to 1."""
    for name in names:
        if not 0 <= vars(arguments)[name] <= 1:
            raise ValueError(f"{name}: expected a number from 0 to 1, got {vars(arguments)[name]}")


def check_at_least(arguments: object, least: int, *names: str) -> None:
    """Raise ValueError unless the named arguments are `least` or more."""
    for name in names:
        if not least <= vars(arguments)[name] < math.inf:
            raise ValueError(f"{name}: expected {least} or more, got {vars(arguments)[name]}")


def named_numbers(name: str, entries: Sequence[str]) -> dict[str, float]:
    """NAME=NUMBER entries as a dict.

    Raises:
        ValueError: If an entry is not NAME=NUMBER with a number above 0, or a name is given twice.
    """
    numbers = {}
    for entry in entries:
        key, _, value = str(entry).partition("=")
        if key in numbers:
            raise ValueError(f"{name}: {key!r} is given twice")
        try:
            numbers[key] = float(value)
        except ValueError:
            numbers[key] = 0.0
        if not (key and 0 < numbers[key] < math.inf):
            raise ValueError(f"{name}: expected NAME=NUMBER with a number above 0, got {entry!r}")
    return numbers
