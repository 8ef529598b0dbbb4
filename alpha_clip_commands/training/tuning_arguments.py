"""The arguments of `region-tune`: model and data. `alpha-clip train` shares some of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from alpha_clip_commands.source_values import constant

_WORDINGS = "mllm/data/templates.py", "WORDINGS"  # file, name
REGION_INPUTS = ("box", "mask", "mixed", "available")
EVAL_METRICS = ("exactly right", "CIDEr")


@dataclass(kw_only=True)
class PartArguments:
    """Which parts of a model are trained how, in both training commands."""

    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, ... (Transformers' default)"})
    train_parts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "parts trained in full, by the model's names: vision_tower, alpha, multi_modal_projector, ... "
            "(default: all without LoRA, none with it)"
        },
    )
    lora_r: int = field(default=0, metadata={"help": "rank of LoRA on the language model; 0: no LoRA"})
    lora_alpha: float | None = field(default=None, metadata={"help": "LoRA's scale is lora_alpha / r (default: 2 r)"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout before LoRA's matrices"})
    lora_targets: list[str] = field(
        default_factory=list, metadata={"help": "names of the layers, q_proj v_proj ... (default: every linear layer)"}
    )
    learning_rates: list[str] = field(
        default_factory=list,
        metadata={
            "help": "of parts trained in full, where another than learning_rate: multi_modal_projector=2e-5 alpha=2e-4"
        },
    )
    optimizer: str = field(
        default="trainer",
        metadata={"help": "trainer (Trainer's `optim`), or muon (Muon for matrices, AdamW for the rest)"},
    )
    plan: bool = field(
        default=False,
        metadata={"help": "print parameters, memory, steps and hours of the run, and end; reads no weights"},
    )
    device_tflops: float | None = field(
        default=None, metadata={"help": "with --plan: what a device computes in such work, 10^12 operations a second"}
    )

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If one is out of range, or two contradict each other.
        """
        if self.lora_r < 0:
            raise ValueError(f"lora_r: expected 0 (no LoRA) or more, got {self.lora_r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout: expected a number from 0 to below 1, got {self.lora_dropout}")
        for name in ("lora_alpha", "device_tflops"):
            if (value := vars(self)[name]) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        if self.optimizer not in ("trainer", "muon"):
            raise ValueError(f"optimizer: expected trainer or muon, got {self.optimizer!r}")
        # not the dropout: its default is not 0
        self._refuse_without_lora("lora_targets", "lora_alpha")
        self.rate_of_part()

    def _refuse_without_lora(self, *names: str) -> None:
        """Raise ValueError if one of these is given without LoRA."""
        given = [name for name in names if vars(self)[name]]
        if given and not self.lora_r:
            raise ValueError(f"{', '.join(given)}: no effect without LoRA; give lora_r above 0 too")

    def rate_of_part(self) -> dict[str, float]:
        """`learning_rates` as numbers by part.

        Raises:
            ValueError: If an entry is not PART=RATE with a rate above 0.
        """
        return named_numbers("learning_rates", self.learning_rates)


@dataclass(kw_only=True)
class ModelArguments(PartArguments):
    """Which LLaVA or BLIP-2, and which of its parts are trained how."""

    model: str | None = field(
        default=None, metadata={"help": "directory or hub id of a LLaVA or BLIP-2 (default: the embedded model)"}
    )
    alpha_weights: str | None = field(
        default=None, metadata={"help": "Alpha-CLIP checkpoint for the tower; released LLaVA carries plain CLIP"}
    )
    dtype: str = field(default="float32", metadata={"help": "of frozen weights; trained ones are kept in float32"})
    load_in: str | None = field(default=None, metadata={"help": "4bit or 8bit: quantise the frozen language model"})
    lora_tower: bool = field(default=False, metadata={"help": "LoRA on the vision tower too"})

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If one is out of range, or two contradict each other.
        """
        super().__post_init__()
        self._refuse_without_lora("lora_tower")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {self.dtype!r}")
        if self.load_in not in (None, "4bit", "8bit"):
            raise ValueError(f"load_in: expected 4bit or 8bit, got {self.load_in!r}")
        if self.load_in and not self.lora_r:
            raise ValueError("load_in: quantised weights cannot be trained; give lora_r")


@dataclass(kw_only=True)
class RegionArguments:
    """In which form a region is shown, and which pictures may be left out: in every training."""

    region_input: str = field(
        default="box",
        metadata={"help": "box, mask, mixed (one of both at random), or available (masks where there are)"},
    )
    mask_share: float = field(default=0.5, metadata={"help": "with mixed: how often the region is given as its mask"})
    box_jitter: float = field(
        default=0.0, metadata={"help": "move each edge of a box by up to this share of its width or height (below 0.5)"}
    )
    min_strength: float = field(
        default=1.0, metadata={"help": "soft alpha: a region's strength is drawn between this and 1"}
    )
    max_missing: float = field(
        default=0.001,
        metadata={"help": "share of images that may be missing or damaged; they are listed and left out"},
    )

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If one is out of range.
        """
        if self.region_input not in REGION_INPUTS:
            raise ValueError(f"region_input: expected one of {', '.join(REGION_INPUTS)}, got {self.region_input!r}")
        if not 0 <= self.box_jitter < 0.5:  # opposite edges could meet
            raise ValueError(f"box_jitter: expected a share from 0 to below 0.5, got {self.box_jitter}")
        check_shares(self, "mask_share", "min_strength", "max_missing")


def check_shares(arguments: object, *names: str) -> None:
    """Raise ValueError unless these of the arguments are from 0 to 1."""
    for name in names:
        if not 0 <= vars(arguments)[name] <= 1:
            raise ValueError(f"{name}: expected a number from 0 to 1, got {vars(arguments)[name]}")


def check_at_least(arguments: object, least: int, *names: str) -> None:
    """Raise ValueError unless these of the arguments are `least` or more."""
    for name in names:
        if not least <= vars(arguments)[name] < math.inf:
            raise ValueError(f"{name}: expected {least} or more, got {vars(arguments)[name]}")


@dataclass(kw_only=True)
class DataArguments(RegionArguments):
    """Which data, and how a sample is made of it."""

    data: list[str] = field(
        metadata={"help": "folders in Visual Genome's or RefCOCOg's layout, or their indexes (alpha-clip prepare)"}
    )
    max_turns: int = field(default=1, metadata={"help": "a conversation is of 1 to this many questions"})
    turn_kinds: list[str] = field(
        default_factory=list,
        metadata={"help": "only these kinds of turns: description, question, or a question's `type` (default: all)"},
    )
    turn_weights: list[str] = field(
        default_factory=list,
        metadata={
            "help": "how often a kind of turn is drawn, others being 1: description=3 left=6 (a question's `type`)"
        },
    )
    wordings: str | None = field(
        default=None, metadata={"help": "how descriptions are asked for: own, gpt4roi, ... (default: the model's own)"}
    )
    question_suffix: str | None = field(
        default=None,
        metadata={"help": "added to questions; LLaVA: 'Answer the question using a single word or phrase.'"},
    )
    regions_per_image: int = field(
        default=1, metadata={"help": "a sample is up to this many regions of one image, each a conversation"}
    )
    eval_samples: int = field(default=200, metadata={"help": "held-out samples (split val) that evaluations use"})
    eval_metrics: list[str] = field(
        default_factory=lambda: ["exactly right"],
        metadata={
            "help": "beside the loss: 'exactly right', CIDEr (with frozen document frequencies; needs the extra eval)"
        },
    )

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If a value is out of range.
        """
        super().__post_init__()
        if self.wordings is not None and self.wordings not in (known := constant(*_WORDINGS)):
            raise ValueError(f"wordings: expected one of {', '.join(known)}, got {self.wordings!r}")
        check_at_least(self, 1, "max_turns", "regions_per_image", "eval_samples")
        if "exact match" in self.eval_metrics:
            raise ValueError(
                "eval_metrics: 'exact match' is not measured while training; name 'exactly right' (letter for letter, "
                "and what 'exact match' meant in recipes of earlier versions)"
            )
        if unknown := set(self.eval_metrics) - set(EVAL_METRICS):
            raise ValueError(f"eval_metrics: expected names out of {EVAL_METRICS}, got {sorted(unknown)}")
        self.weight_of_kind()

    def weight_of_kind(self) -> dict[str, float]:
        """`turn_weights` as numbers by kind.

        Raises:
            ValueError: If an entry is not KIND=WEIGHT with a positive weight.
        """
        return named_numbers("turn_weights", self.turn_weights)


def named_numbers(name: str, entries: Sequence[str]) -> dict[str, float]:
    """NAME=NUMBER entries as a dict."""
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
