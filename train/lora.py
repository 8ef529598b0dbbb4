"""What is frozen, adapted by LoRA and trained in full; PEFT does the work."""

from __future__ import annotations

import re
from collections.abc import Sequence

from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from alpha_clip_commands.training.tuning_arguments import ModelArguments
from mllm.loading import FAMILIES
from train.arguments import refuse_unknown_parts

ALPHA = "alpha"  # the alpha convolution, a part inside the tower
_ALPHA_MODULE = "patch_embedding.alpha"


def prepare_model(model: PreTrainedModel, args: ModelArguments) -> PreTrainedModel | PeftModel:
    """Freeze, adapt and unfreeze as the arguments say; trained weights become float32.

    Without LoRA the named parts are trained in full (all of them without a name), with it the named ones beside the
    adapters.

    Raises:
        ValueError: If the model has no such part or layer, or a part cannot be trained beside LoRA.
    """
    parts = parts_of(model)
    refuse_unknown_parts(args, parts)
    if args.lora_r:
        model = _adapted(model, parts, args)
    else:
        for name, parameter in model.named_parameters():
            inside = any(_is_in(name, parts[part]) for part in args.train_parts)
            parameter.requires_grad_(inside or not args.train_parts)
    if not is_deepspeed_zero3_enabled():  # there weights are in pieces, of which DeepSpeed keeps copies in float32
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


def parts_of(model: PreTrainedModel) -> dict[str, str]:
    """Prefix of the parameters' names by part, `alpha` among them."""
    parts = dict(FAMILIES[model.config.model_type].PARTS)
    alpha = next((n for n, _ in model.named_modules() if n.endswith(f".{_ALPHA_MODULE}")), None)
    if alpha is None:
        raise ValueError("expected a model with an alpha channel; load it with mllm.load")
    return {**parts, ALPHA: alpha}


def part_of(name: str, parts: dict[str, str]) -> str | None:
    """The part that a parameter is of, whatever PEFT has put around its name; `alpha` rather than the tower."""
    plain = original_name(name)
    if _is_in(plain, parts[ALPHA]):
        return ALPHA
    return next((part for part, prefix in parts.items() if _is_in(plain, prefix)), None)


def original_name(name: str) -> str:
    """A parameter's name without PEFT's additions."""
    name = re.sub(r"^(module\.)?(base_model\.model\.)?", "", name)
    return re.sub(r"\.(base_layer|original_module|modules_to_save\.\w+|lora_[AB]\.\w+)(?=\.|$)", "", name)


def trained_table(model: nn.Module, parts: dict[str, str]) -> str:
    """Parameters of each part: frozen, in adapters, trained in full; a line a part."""
    counts = {part: {"frozen": 0, "LoRA": 0, "trained": 0} for part in parts}
    for name, parameter in model.named_parameters():
        part = part_of(name, parts)
        if part is None or ".original_module." in name:
            continue
        how = "frozen" if not parameter.requires_grad else "LoRA" if ".lora_" in name else "trained"
        counts[part][how] += _size(parameter)
    rows = [(part, *(f"{count:,}" if count else "-" for count in row.values())) for part, row in counts.items()]
    total = [sum(row[how] for row in counts.values()) for how in ("frozen", "LoRA", "trained")]
    rows.append(("all", *(f"{count:,}" for count in total)))
    return "\n".join(f"{a:<24}{b:>16}{c:>14}{d:>16}" for a, b, c, d in [("part", "frozen", "LoRA", "trained"), *rows])


def _size(parameter: nn.Parameter) -> int:
    """Number of weights; of one that is in pieces (ZeRO-3) or packed (4 bit) the whole."""
    if hasattr(parameter, "ds_numel"):
        return parameter.ds_numel
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


def _adapted(model: PreTrainedModel, parts: dict[str, str], args: ModelArguments) -> PeftModel:
    """LoRA on the language model's linear layers (and the tower's); the rest but `train_parts` is frozen."""
    prefixes = [parts["language_model"], *([_tower(parts)] if args.lora_tower else [])]
    targets = linear_layers(model, prefixes, args.lora_targets)
    modules = dict(model.named_modules())
    for part in args.train_parts:
        inside = [layer for layer in targets if _is_in(layer, parts[part])]
        if parts[part] not in modules or inside:
            raise ValueError(
                f"train_parts: {part} cannot be trained in full beside LoRA "
                + (f"on its own {inside[0]}" if inside else "(it is no module)")
            )
    if args.load_in:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # Trainer's, when asked for
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=2 * args.lora_r if args.lora_alpha is None else args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=pattern(targets),
        modules_to_save=[_ALPHA_MODULE if part == ALPHA else parts[part] for part in args.train_parts] or None,
        task_type=None,
    )
    # under ZeRO-3 PEFT's own cast to float32 would change a weight's type but not that of its pieces
    return get_peft_model(model, config, autocast_adapter_dtype=not is_deepspeed_zero3_enabled())


def linear_layers(model: nn.Module, prefixes: Sequence[str], leaves: Sequence[str] = ()) -> list[str]:
    """Names of the linear layers under the prefixes, or of those with these last names; never the output layer.

    Raises:
        ValueError: If a last name fits none.
    """
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(_is_in(name, p) for p in prefixes) and not name.endswith("lm_head")
    ]
    known = {name.rpartition(".")[2] for name in linear}
    if unknown := set(leaves) - known:
        raise ValueError(f"lora_targets: expected names out of {', '.join(sorted(known))}, got {sorted(unknown)}")
    return [name for name in linear if not leaves or name.rpartition(".")[2] in leaves]


def pattern(names: Sequence[str]) -> str:
    """A short regular expression that matches exactly these names, whatever the number of their block."""
    shapes = sorted({re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name)) for name in names})
    return "|".join(shapes)


def _tower(parts: dict[str, str]) -> str:
    return parts.get("vision_tower") or parts["vision_model"]


def _is_in(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")
