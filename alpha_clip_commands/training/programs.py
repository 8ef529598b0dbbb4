"""The flags and settings of the training commands, read and checked before torch is imported."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple, NoReturn, get_type_hints

from alpha_clip_commands.command_line import (
    ArgumentParser,
    check_found,
    check_model,
)
from alpha_clip_commands.flag_values import finite_number, plain_text, switch, whole_number
from alpha_clip_commands.training.contrastive_arguments import PairArguments, TowerArguments
from alpha_clip_commands.training.recipe import deepspeed_file, recipe_names, split_recipe
from alpha_clip_commands.training.recipe_values import check_ranges, read_values
from alpha_clip_commands.training.renamed_settings import current_settings
from alpha_clip_commands.training.training_fields import TrainingField, training_fields
from alpha_clip_commands.training.tuning_arguments import DataArguments, ModelArguments


class Program(NamedTuple):
    """A training command: name, usage, dataclasses of its arguments, help."""

    name: str
    usage: str
    kinds: tuple[type, ...]
    help: str


TUNE = Program(
    "region-tune",
    "region-tune RECIPE --data DIR --output_dir OUT [--key value ...]",
    (ModelArguments, DataArguments),
    """Fine-tune a LLaVA or BLIP-2 with an alpha tower on regions.

examples:
  region-tune shapes_lora --data SHAPES --output_dir OUT
  region-tune llava_7b_lora_vg --data VG --output_dir OUT --alpha_weights clip_l14_336_grit_20m_4xe.pth
  torchrun --nproc_per_node 8 --no-python region-tune llava_7b_lora_vg --data VG --output_dir OUT
  deepspeed --no_python region-tune llava_7b_lora_vg --deepspeed zero2 --data VG --output_dir OUT""",
)
TRAIN_ALPHA_CLIP = Program(
    "alpha-clip train",
    "alpha-clip train RECIPE --model CLIP --data DIR --output_dir OUT [--key value ...]",
    (TowerArguments, PairArguments),
    """Train an Alpha-CLIP from a CLIP, or a CLIP itself, with a contrastive loss on regions and texts.

examples:
  alpha-clip train alpha_clip_l14 --model openai/clip-vit-large-patch14 --data GRIT --output_dir OUT
  torchrun --nproc_per_node 8 --no-python alpha-clip train alpha_clip_l14 --data GRIT --output_dir OUT
  deepspeed --no_python alpha-clip train alpha_clip_l14 --deepspeed zero1 --data GRIT --output_dir OUT""",
)


def check(program: Program, argv: Sequence[str]) -> None:
    """Raise ValueError if a command line or its recipe is invalid, as far as that can be checked without torch."""
    settings = read_settings(program, argv)
    for kind in program.kinds:
        kind(**{field.name: settings[field.name] for field in dataclasses.fields(kind) if field.name in settings})
    _check_files(settings)


def read_settings(program: Program, argv: Sequence[str]) -> dict[str, Any]:
    """The settings of a recipe and of the flags, which take precedence, by key; without defaults.

    Raises:
        ValueError: If the recipe cannot be read, or a key, flag or value is unknown, invalid or missing.
    """
    known, parser = known_keys(program), build_parser(program)
    path, flags = split_recipe(argv, known)
    recipe = read_values(path, _actions(parser, known), _nullable_keys(program)) if path else {}
    given, rest = parser.parse_known_args(flags)
    if rest:
        raise ValueError(f"unknown flags or values without a flag: {' '.join(rest)}; --help lists the flags")
    settings = {**recipe, **current_settings(vars(given))}
    required = [field.name for field in _fields(program) if is_required(field)]
    required += [name for name, field in training_fields().items() if field.is_required]
    if missing := [f"--{name}" for name in required if name not in settings]:
        usage = "usage" if path else "without a recipe all settings are given as flags; usage"
        raise ValueError(
            f"the following arguments are required: {', '.join(missing)}; {usage}: {program.usage}; --help shows "
            "examples and recipes"
        )
    check_ranges(settings)
    return settings


def known_keys(program: Program) -> set[str]:
    """The keys that a recipe may contain."""
    return {field.name for field in _fields(program)} | training_fields().keys()


def _fields(program: Program) -> list[dataclasses.Field]:
    return [field for kind in program.kinds for field in dataclasses.fields(kind)]


def _nullable_keys(program: Program) -> set[str]:
    nullable = {field.name for field in _fields(program) if field.default is None}
    return nullable | {name for name, field in training_fields().items() if field.is_nullable}


def _actions(parser: argparse.ArgumentParser, known: Collection[str]) -> dict[str, argparse.Action]:
    """The flag of each key that a recipe may contain."""
    actions = {}
    for action in parser._actions:
        if action.dest in known:
            actions.setdefault(action.dest, action)  # --no_X comes after --X
    return actions


def _check_files(values: Mapping[str, Any]) -> None:
    """Raise ValueError if data, model or weights are not found. A run that has started checks this itself, because a
    finished run does not need them.
    """
    if os.path.lexists(values.get("output_dir") or "trainer_output"):  # Transformers' default
        return
    check_found("data", *values["data"])
    if values.get("model") is not None:
        check_model(values["model"])
    if values.get("alpha_weights") is not None and not values.get("plan"):  # --plan reads no weights
        check_found("alpha_weights", values["alpha_weights"])


class _Parser(ArgumentParser):
    """A parser that raises ValueError."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def build_parser(program: Program) -> argparse.ArgumentParser:
    """The flags of a training command, the same as `HfArgumentParser` creates; omitted flags have no value."""
    parser = _Parser(
        prog=program.name,
        usage=program.usage,
        description=program.help,
        epilog="Every field of transformers.TrainingArguments is a flag too: --learning_rate 1e-4, --max_steps 100, "
        "--save_steps 50 ...\nA recipe is a YAML file with the same keys, given by its path or by the name of a "
        f"shipped recipe; flags take precedence. Shipped recipes: {', '.join(recipe_names(known_keys(program)))}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('alpha-clip-mllm')}")
    for kind in program.kinds:
        group = parser.add_argument_group(kind.__doc__.strip().rstrip("."))
        hints = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            _add_field(group, field.name, hints[field.name], help_of(field))
            if field.default is True:
                _add_opposite(group, field.name)
    for field in training_fields().values():
        _add_training_field(parser, field)
    return parser


def is_required(field: dataclasses.Field) -> bool:
    """Whether a field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def help_of(field: dataclasses.Field) -> str:
    """The help of a field, with its default if the text does not mention it."""
    text = field.metadata["help"].replace("%", "%%")
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if is_required(field) or default in (None, False, []) or "default" in text:
        return text
    return f"{text} (default {' '.join(default) if isinstance(default, list) else default})"


def _add_field(group: argparse._ActionsContainer, name: str, hint: Any, text: str) -> None:
    types = {int: whole_number, float: finite_number, str: plain_text}
    options = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    metavar = {int: "N", float: "X"}.get(hint, name.upper().rpartition("_")[2])
    if hint is bool:
        group.add_argument(*options, nargs="?", const=True, type=switch, metavar="true|false", help=text)
    elif hint == list[str]:
        group.add_argument(*options, nargs="+", type=plain_text, metavar=metavar, help=text)
    else:
        kind = next(kind for kind in types if hint in (kind, kind | None))
        group.add_argument(*options, type=types[kind], metavar=metavar, help=text)


def _add_training_field(parser: argparse.ArgumentParser, field: TrainingField) -> None:
    options = dict.fromkeys((f"--{field.name}", f"--{field.name.replace('_', '-')}"))
    kinds = {"int": whole_number, "float": finite_number, "bool": switch, "str": plain_text}
    kind = deepspeed_file if field.name == "deepspeed" else kinds.get(field.kind)
    if kind is None and field.kind.endswith("Config"):
        kind = _reject
    more: dict[str, Any] = {"nargs": field.nargs} if field.nargs else {}
    if field.nargs == "?":
        more["const"] = True
    parser.add_argument(*options, type=kind, choices=field.choices, help=argparse.SUPPRESS, **more)
    if field.has_opposite:
        _add_opposite(parser, field.name)


def _reject(text: str) -> NoReturn:
    raise argparse.ArgumentTypeError("it can be set in Python only")


def _add_opposite(group: argparse._ActionsContainer, name: str) -> None:
    options = dict.fromkeys((f"--no_{name}", f"--no-{name.replace('_', '-')}"))
    group.add_argument(*options, action="store_false", dest=name, help=argparse.SUPPRESS)
