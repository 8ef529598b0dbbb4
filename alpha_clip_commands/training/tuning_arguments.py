"""The arguments of `region-tune`: model and data."""

from __future__ import annotations

from dataclasses import dataclass, field

from alpha_clip_commands.source_values import constant
from alpha_clip_commands.training.shared_arguments import (
    PartArguments,
    RegionArguments,
    check_at_least,
    named_numbers,
)

_WORDINGS = "mllm/data/templates.py", "WORDINGS"  # file, name
EVAL_METRICS = ("literal_match", "cider")


@dataclass(kw_only=True)
class ModelArguments(PartArguments):
    """Which LLaVA or BLIP-2, which of its parts are trained, and how."""

    model: str | None = field(
        default=None, metadata={"help": "directory or hub id of a LLaVA or BLIP-2 (default: the embedded model)"}
    )
    alpha_weights: str | None = field(
        default=None,
        metadata={"help": "Alpha-CLIP checkpoint for the tower; released LLaVA has plain CLIP weights"},
    )
    dtype: str = field(default="float32", metadata={"help": "dtype of frozen weights; trained weights are float32"})
    load_in: str | None = field(default=None, metadata={"help": "4bit or 8bit: quantize the frozen language model"})
    lora_tower: bool = field(default=False, metadata={"help": "LoRA on the vision tower too"})

    def __post_init__(self) -> None:
        """Raise ValueError if a value is out of range, or two contradict each other."""
        super().__post_init__()
        self._check_needs_lora("lora_tower")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {self.dtype!r}")
        if self.load_in not in (None, "4bit", "8bit"):
            raise ValueError(f"load_in: expected 4bit or 8bit, got {self.load_in!r}")
        if self.load_in and not self.lora_r:
            raise ValueError("load_in: quantized weights cannot be trained; set lora_r")


@dataclass(kw_only=True)
class DataArguments(RegionArguments):
    """Which data, and how samples are built from it."""

    data: list[str] = field(
        metadata={"help": "folders in the layout of Visual Genome or RefCOCOg, or their indexes (alpha-clip prepare)"}
    )
    max_turns: int = field(default=1, metadata={"help": "maximum number of questions per conversation; at least 1"})
    turn_kinds: list[str] = field(
        default_factory=list,
        metadata={"help": "kinds of turns to use: description, question, or the `type` of a question (default: all)"},
    )
    turn_weights: list[str] = field(
        default_factory=list,
        metadata={
            "help": "sampling weights of kinds of turns (default 1): description=3 left=6 (the `type` of a question)"
        },
    )
    wordings: str | None = field(
        default=None,
        metadata={"help": "wordings of requests for descriptions: own, gpt4roi, ... (default: those of the model)"},
    )
    question_suffix: str | None = field(
        default=None,
        metadata={"help": "added to questions; LLaVA: 'Answer the question using a single word or phrase.'"},
    )
    regions_per_image: int = field(
        default=1, metadata={"help": "maximum number of regions of one image per sample, one conversation each"}
    )
    eval_samples: int = field(default=200, metadata={"help": "number of validation samples (split val)"})
    eval_metrics: list[str] = field(
        default_factory=lambda: ["literal_match"],
        metadata={
            "help": "metrics in addition to the loss: literal_match, cider (frozen document frequencies; requires the "
            "extra eval)"
        },
    )

    def __post_init__(self) -> None:
        """Raise ValueError if a value is out of range."""
        super().__post_init__()
        if self.wordings is not None and self.wordings not in (known := constant(*_WORDINGS)):
            raise ValueError(f"wordings: expected one of {', '.join(known)}, got {self.wordings!r}")
        check_at_least(self, 1, "max_turns", "regions_per_image", "eval_samples")
        if "exact match" in self.eval_metrics:
            raise ValueError(
                "eval_metrics: 'exact match' is not computed during training; use literal_match, which recipes of "
                "earlier versions called 'exact match'"
            )
        if unknown := set(self.eval_metrics) - set(EVAL_METRICS):
            raise ValueError(f"eval_metrics: expected {' or '.join(EVAL_METRICS)}, got {sorted(unknown)}")
        self.weight_of_kind()

    def weight_of_kind(self) -> dict[str, float]:
        """`turn_weights` as a dict.

        Raises:
            ValueError: If an entry is not KIND=WEIGHT with a positive weight.
        """
        return named_numbers("turn_weights", self.turn_weights)
