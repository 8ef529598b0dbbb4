"""What a run can be told: model, data, and HF's training arguments. A recipe (YAML) first, flags win, unknown keys are
errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import yaml
from transformers import HfArgumentParser, TrainingArguments

REGION_INPUTS = ("box", "mask", "mixed")


@dataclass
class ModelArguments:
    """Which model, and which of its parts are trained."""

    model: str = field(metadata={"help": "directory or hub id of a LLaVA-1.5 or BLIP-2"})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, ... (Transformers' default)"})
    optimizer: str = field(
        default="trainer",
        metadata={"help": "trainer (Trainer's `optim`), or muon (Muon for matrices, AdamW for the rest)"},
    )
    train_parts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "parts trained in full, by the model's names: vision_tower, language_model, ... (default: all)"
        },
    )

    def __post_init__(self) -> None:
        """Check the name.

        Raises:
            ValueError: If the optimizer is unknown.
        """
        if self.optimizer not in ("trainer", "muon"):
            raise ValueError(f"optimizer: expected trainer or muon, got {self.optimizer!r}")


@dataclass
class DataArguments:
    """Which data, and how a sample is made of it."""

    data: str = field(metadata={"help": "folder in Visual Genome's layout (split: train)"})
    region_input: str = field(default="box", metadata={"help": "box, mask, or mixed (one of both at random)"})
    mask_share: float = field(default=0.5, metadata={"help": "with mixed: how often the region is given as its mask"})
    max_turns: int = field(default=1, metadata={"help": "a sample is a conversation of 1 to this many questions"})
    turn_weights: list[str] = field(
        default_factory=list,
        metadata={
            "help": "how often a kind of turn is drawn, others being 1: description=3 left=6 (a question's `type`)"
        },
    )

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If a value is out of range.
        """
        if self.region_input not in REGION_INPUTS:
            raise ValueError(f"region_input: expected one of {', '.join(REGION_INPUTS)}, got {self.region_input!r}")
        if self.max_turns < 1:
            raise ValueError(f"max_turns: expected 1 or more, got {self.max_turns}")
        if not 0 <= self.mask_share <= 1:
            raise ValueError(f"mask_share: expected a number from 0 to 1, got {self.mask_share}")
        self.weight_of_kind()

    def weight_of_kind(self) -> dict[str, float]:
        """`turn_weights` as numbers by kind.

        Raises:
            ValueError: If an entry is not KIND=WEIGHT with a positive weight.
        """
        weights = {}
        for entry in self.turn_weights:
            kind, _, weight = entry.partition("=")
            try:
                weights[kind] = float(weight)
            except ValueError:
                weights[kind] = 0.0
            if not weights[kind] > 0:
                raise ValueError(f"turn_weights: expected KIND=WEIGHT with a weight above 0, got {entry!r}")
        return weights


def parse_args(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Parse `[RECIPE.yaml] [--flag value ...]`.

    Raises:
        ValueError: If the recipe is not a mapping, or has an unknown key.
        OSError: If the recipe cannot be read.
    """
    # a launcher may put its own flags (--local_rank=0) before the recipe
    recipe = next((arg for arg in argv if arg.endswith((".yaml", ".yml"))), None)
    flags = [arg for arg in argv if arg != recipe]
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    defaults = _read_recipe(recipe) if recipe else {}
    known = {action.dest for action in parser._actions}
    if unknown := sorted(defaults.keys() - known):
        raise ValueError(f"{recipe}: unknown keys {', '.join(unknown)}")
    parser.set_defaults(**defaults)
    for action in parser._actions:
        action.required = action.required and action.dest not in defaults
    return parser.parse_args_into_dataclasses(flags)


def _read_recipe(path: str) -> dict:
    with open(path, encoding="utf-8") as file:
        try:
            recipe = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: expected 'key: value' lines, got {type(recipe).__name__}")
    return recipe
