"""What `region-tune` freezes, adapts with LoRA and fully trains."""

from __future__ import annotations

from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from alpha_clip_commands.training.tuning_arguments import ModelArguments
from mllm.loading import FAMILIES
from train.parts import ALPHA, check_parts, is_in, linear_layers, lora_config

_ALPHA_MODULE = "patch_embedding.alpha"


def prepare_model(model: PreTrainedModel, args: ModelArguments) -> PreTrainedModel | PeftModel:
    """Freeze, adapt and unfreeze the parts of a model; trained weights become float32.

    Without LoRA, `train_parts` are fully trained (default: all parts). With LoRA, they are fully trained in addition to
    the adapters.

    Raises:
        ValueError: If the model has no such part or layer, or a part cannot be fully trained together with LoRA.
    """
    parts = parts_of(model)
    check_parts(args, parts)
    if args.lora_r:
        model = _add_lora(model, parts, args)
    else:
        for name, parameter in model.named_parameters():
            inside = any(is_in(name, parts[part]) for part in args.train_parts)
            parameter.requires_grad_(inside or not args.train_parts)
    if not is_deepspeed_zero3_enabled():  # under ZeRO-3 DeepSpeed keeps float32 copies of the partitioned weights
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


def parts_of(model: PreTrainedModel) -> dict[str, str]:
    """Prefix of the parameter names by part, including `alpha`.

    Raises:
        ValueError: If the model has no alpha channel.
    """
    parts = dict(FAMILIES[model.config.model_type].PARTS)
    alpha = next((n for n, _ in model.named_modules() if n.endswith(f".{_ALPHA_MODULE}")), None)
    if alpha is None:
        raise ValueError("expected a model with an alpha channel; load it with mllm.load")
    return {**parts, ALPHA: alpha}


def _add_lora(model: PreTrainedModel, parts: dict[str, str], args: ModelArguments) -> PeftModel:
    """LoRA on the linear layers of the language model, and of the tower with `lora_tower`."""
    prefixes = [parts["language_model"]]
    if args.lora_tower:
        prefixes.append(parts.get("vision_tower") or parts["vision_model"])
    layers = linear_layers(model, prefixes, args.lora_targets)
    modules = dict(model.named_modules())
    for part in args.train_parts:
        inside = [layer for layer in layers if is_in(layer, parts[part])]
        if parts[part] not in modules or inside:
            reason = f"LoRA already adapts {inside[0]}" if inside else "it is not a module"
            raise ValueError(f"train_parts: {part} cannot be fully trained together with LoRA: {reason}")
    if args.load_in:  # without gradient checkpointing: Trainer enables it if requested
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    modules_to_save = [_ALPHA_MODULE if part == ALPHA else parts[part] for part in args.train_parts]
    # under ZeRO-3 PEFT's cast to float32 would change the dtype of a weight but not that of its partitions
    autocast = not is_deepspeed_zero3_enabled()
    return get_peft_model(model, lora_config(args, layers, modules_to_save), autocast_adapter_dtype=autocast)
