"""Model cards: `mllm/assets/model_card/card.md`, filled from the directory's config, training record and scores."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, PreTrainedConfig

from mllm.fused import is_fused
from vision_tower import AlphaCLIPVisionConfig

# origin of the weights -> license id (the hub's, or a name if the hub has none), and its terms
# Source: the READMEs of SunzeY/AlphaCLIP, openai/CLIP, haotian-liu/LLaVA and salesforce/LAVIS, and the cards of
# llava-hf/llava-1.5-7b-hf and Salesforce/blip2-*
LICENSES = {
    "alpha-clip": (
        "alpha-clip-research-only",
        "Alpha-CLIP's weights: research use only, within CLIP's terms; their training data is CC BY-NC 4.0",
    ),
    "clip": ("mit", "OpenAI's CLIP: MIT"),
    "llava-1.5": ("llama2", "LLaVA-1.5: the LLAMA 2 community license of its Vicuna"),
    "blip-2": ("mit", "BLIP-2: MIT on the hub, BSD-3-Clause in LAVIS; its language model has another license: unknown"),
    "shapes": ("apache-2.0", "trained from random weights on this project's Shapes dataset: Apache-2.0"),
}
_NAMED_LICENSES = ("alpha-clip-research-only",)  # not among the hub's: stated as license "other" with this name
_EXPORTED = "exported llava"  # stock classes (mllm/convert/export.py), with LLaVA's model type
_KINDS = {  # model_type -> title, pipeline tag, code example
    "alpha_clip_vision_model": ("An Alpha-CLIP vision tower", "image-feature-extraction", "tower"),
    "alpha_clip": ("Alpha-CLIP with its text tower", "zero-shot-image-classification", "alpha_clip"),
    "llava": ("LLaVA-1.5 with an Alpha-CLIP tower", "image-text-to-text", "llava"),
    "llava_next": ("LLaVA-NeXT with an Alpha-CLIP tower", "image-text-to-text", "llava"),
    "alpha_blip2": ("BLIP-2 with an alpha tower", "image-text-to-text", "llava"),
    _EXPORTED: ("LLaVA-1.5 with an Alpha-CLIP tower", "image-text-to-text", "exported_llava"),
}
_TEMPLATES = Path(__file__).parent / "assets" / "model_card"
_SHAPES_ONLY = (
    "**Trained only on synthetic scenes of the Shapes dataset: it does not work on photographs, people or other "
    "questions.**"
)
_FILES = {
    "config.json": "the architecture",
    "adapter_config.json": "the LoRA configuration",
    "*.safetensors": "the weights",
    "generation_config.json": "the default generation settings",
    "preprocessor_config.json": "preprocessing of images and regions",
    "processor_config.json": "preprocessing of images, regions and text",
    "tokenizer*": "the tokenizer",
    "chat_template.jinja": "the conversation format",
    "scores.json": "the scores below",
    "training_scenes.bin": "hashes of the Shapes scenes used for training, which are excluded from scoring",
    "*.py": "source files, run with `trust_remote_code=True` if alpha-clip-mllm is not installed",
}
_TRAINING_SETTINGS = (  # those on the card
    *("data", "alpha_weights", "train_parts", "lora_r", "lora_alpha", "load_in", "region_input", "whole_image_rate"),
    *("learning_rate", "learning_rates", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps"),
    *(
        "weight_decay",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "world_size",
        "bf16",
        "fp16",
        "seed",
    ),
)


def model_card(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    built_from: Sequence[str] = (),
    license: str | None = None,  # noqa: A002, the name in a card's metadata
    base_model: str | None = None,
    language: Sequence[str] = (),
) -> ModelCard:
    """The card of a tower, a LLaVA or BLIP-2 with a tower, or a LoRA adapter (PEFT).

    Args:
        folder: Output of `save_pretrained` or `train.finetune`.
        repo_id: "owner/name" of the repository.
        built_from: Keys of `LICENSES`.
        license: The hub's id of a license, instead of `built_from`. Without either, the license is stated as unknown.
        base_model: Hub id of the model that this one was made from (default: that in the adapter's config).
        language: ISO 639 codes of the languages of its answers; omitted by default.

    Raises:
        ValueError: If the folder contains none of these, a file in it is damaged, a name is unknown, both `built_from`
            and `license` are given, or `base_model` is not a hub id.
    """
    folder = Path(folder)
    if unknown := set(built_from) - LICENSES.keys():
        raise ValueError(f"expected built_from out of {', '.join(LICENSES)}, got {sorted(unknown)}")
    if built_from and license:
        raise ValueError(f"got built_from and the license {license!r}; give one of both")
    adapter = read_json(folder / "adapter_config.json")
    config = None if adapter else _read_config(folder)
    if adapter or base_model:
        base_model = check_base_model(base_model or adapter.get("base_model_name_or_path"))
    kind = _kind_of_adapter(adapter) if config is None else _EXPORTED if is_fused(config) else config.model_type
    runs = _read_scores(folder / "scores.json")
    data = ModelCardData(
        **_license_fields(built_from, license),
        language=list(language) or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=_KINDS[kind][1],
        base_model=base_model,
        tags=["alpha-clip", "region", *(["lora"] if adapter else [])],
        **({"model_name": repo_id.split("/")[-1], "eval_results": _eval_results(runs)} if runs else {}),
    )
    sections = {
        "limits": _SHAPES_ONLY if "shapes" in built_from else "",
        "architecture": _architecture(config, folder) if config else _lora(adapter),
        "files": _table("Files", {f"`{name}`": text for name, text in _FILES.items() if any(folder.glob(name))}),
        "training": _training(read_json(folder / "training_record.json")),
        "scores": _scores(runs),
        "license": _license(built_from, license),
    }
    return _filled(kind, repo_id, data, sections, base_model if adapter else None)


def _filled(
    kind: str, repo_id: str, data: ModelCardData, sections: dict[str, str], base_model: str | None
) -> ModelCard:
    """The template with its sections; `base_model` is that of an adapter, which is loaded together with it."""
    title, _, example = _KINDS[kind]
    text = _template("card.md").substitute(
        sections,
        metadata=data.to_yaml(),
        title=f"A LoRA adapter for {title}" if base_model else title,
        repo_id=repo_id,
        shape="(B, tiles, 4, H, W)" if kind == "llava_next" else "(B, 4, H, W)",
        requirement=f"With {'Transformers 5.23 or newer' if kind == _EXPORTED else 'alpha-clip-mllm installed'}",
        example=_template(f"example_{'adapter' if base_model else example}.txt")
        .substitute(name=base_model or repo_id, adapter=repo_id)
        .strip(),
    )
    return ModelCard(re.sub(r"\n{3,}", "\n\n", text))  # without empty sections


def _template(name: str) -> Template:
    return Template((_TEMPLATES / name).read_text(encoding="utf-8"))


def check_base_model(base_model: str | None) -> str:
    """Validate the hub id of the model that an adapter or a model was made from.

    Raises:
        ValueError: If it is missing, a local folder, or not a hub id.
    """
    try:
        validate_repo_id(base_model or "")
    except HFValidationError:
        base_model = None
    if not base_model or os.path.exists(base_model):
        raise ValueError(
            "expected the hub id of the model that this one was made from, got none or a folder; give base_model "
            "(--base-model)"
        )
    return base_model


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file does not exist.

    Raises:
        ValueError: If the file is damaged or does not contain an object.
    """
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); was it copied completely?") from error
    if not isinstance(found, dict) or not found:
        raise ValueError(f"expected a JSON object in {file}, got {str(found)[:40]}")
    return found


def _read_config(folder: Path) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ValueError(f"cannot read {folder / 'config.json'}: {str(error).strip().splitlines()[0]}") from error
    if config.model_type not in _KINDS:
        raise ValueError(f"expected a model out of {', '.join(_KINDS)}, got {config.model_type!r} in {folder}")
    ours = AlphaCLIPVisionConfig.model_type
    is_llava = config.model_type in ("llava", "llava_next")
    if is_llava and config.vision_config.model_type != ours and not is_fused(config):
        found = config.vision_config.model_type
        raise ValueError(
            f"expected a LLaVA with our tower, got a tower {found!r}; save the model that mllm.load returns"
        )
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise ValueError(f"{folder} has no processor; save it there too: processor.save_pretrained({str(folder)!r})")
    return config


def _kind_of_adapter(adapter: dict) -> str:
    """The key of `_KINDS` that it was trained for; PEFT stores the class if no task type is set."""
    mapping = adapter.get("auto_mapping") or {}
    name = mapping.get("base_model_class", "")
    return "alpha_blip2" if "Blip2" in name else "llava_next" if "LlavaNext" in name else "llava"


def _table(title: str, rows: dict[str, Any]) -> str:
    return f"## {title}\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _architecture(config: PreTrainedConfig, folder: Path) -> str:
    """The tower, language model and image settings in config and processor."""
    vision = getattr(config, "vision_config", config)  # the config of a tower
    side = vision.image_size // vision.patch_size
    files = [read_json(folder / name) for name in ("processor_config.json", "preprocessor_config.json")]
    geometry = [found["geometry"] for file in files if "geometry" in (found := file.get("image_processor", file))]
    rows = {
        "class": ", ".join(f"`{name}`" for name in config.architectures or ["unknown"]),
        "tower": f"`{vision.model_type}`, {vision.num_hidden_layers} layers, width {vision.hidden_size}",
        "image size": f"{vision.image_size} pixels, {side} x {side} patches of {vision.patch_size}",
        "geometry": f"`{geometry[0]}`" if geometry else "that of the stock processor",
    }
    text = getattr(config, "text_config", None)  # absent from a tower
    if text is not None:
        rows["language model"] = f"`{text.model_type}`, {text.num_hidden_layers} layers, width {text.hidden_size}"
    if config.model_type == "llava":
        tokens = side * side + (config.vision_feature_select_strategy == "full")
        rows["image tokens"] = f"{tokens}, from hidden state {config.vision_feature_layer}"
    if config.model_type == "llava_next":
        grid = ", ".join(f"{width} x {height}" for height, width in config.image_grid_pinpoints)
        rows["tiles"] = f"the whole image, and those of the best fit of {grid} pixels, padded"
    if config.model_type == "alpha_blip2":
        rows["image tokens"] = f"{config.num_query_tokens}, from a Q-Former"
    return _table("Architecture", rows)


def _lora(adapter: dict) -> str:
    names = {"r": "rank", "lora_alpha": "alpha", "target_modules": "in", "modules_to_save": "trained in full"}
    return _table("LoRA", {words: f"`{adapter[name]}`" for name, words in names.items() if adapter.get(name)})


def _training(record: dict) -> str:
    """The main settings, without the parents of folders, and the losses of a `training_record.json`."""
    if not record:
        return ""
    settings = record.get("run_config", record.get("run", {}))  # "run" in version 0.1.0
    rows = {
        name: settings[name] for name in _TRAINING_SETTINGS if settings.get(name) not in (None, "None", -1, False, [])
    }
    if "max_steps" in rows:
        rows.pop("num_train_epochs", None)  # which Trainer then ignores
    losses = [float(entry["loss"]) for entry in record.get("log", []) if "loss" in entry]
    rows |= {"loss, first and last logged": f"{losses[0]:.3g}, {losses[-1]:.3g}"} if losses else {}
    return _table("Training", {name: _without_folders(value) for name, value in rows.items()})


def _without_folders(value: Any) -> str:
    """A value as text; only the last name of a path, as its parents are specific to a machine."""
    if isinstance(value, list):
        return ", ".join(_without_folders(entry) for entry in value)
    return PureWindowsPath(value).name if isinstance(value, str) else str(value)


def _read_scores(file: Path) -> dict[str, dict[str, dict]]:
    """Run -> measure -> {"score", "of", optionally "majority_baseline"}; a file may contain a single run.

    Raises:
        ValueError: If the file has other content.
    """
    scores = {name: entry for name, entry in read_json(file).items() if name != "made_by"}
    try:
        runs = {"accuracy": scores} if scores and any("score" in entry for entry in scores.values()) else scores
        for entry in (entry for run in runs.values() for entry in run.values()):
            if "blind" in entry:  # its key in earlier versions
                entry["majority_baseline"] = entry.pop("blind")
            entry["score"] + entry["of"] + entry.get("majority_baseline", 0)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"expected in {file} what scripts/shapes/score_embedded_model.py --json writes: {error!r}"
        ) from error
    return runs


def _scores(runs: dict) -> str:
    """A table of all measures, with a column per run."""
    if not runs:
        return ""
    lines = [f"| measure | {' | '.join(runs)} | of | majority baseline |", "|---" * (3 + len(runs)) + "|"]
    for measure in dict.fromkeys(measure for run in runs.values() for measure in run):
        cells = [f"{run[measure]['score']:.1%}" if measure in run else "" for run in runs.values()]
        entry = next(run[measure] for run in runs.values() if measure in run)
        baseline = f"{entry['majority_baseline']:.1%}" if "majority_baseline" in entry else ""
        lines.append(f"| {measure} | {' | '.join(cells)} | {entry['of']} | {baseline} |")
    return (
        "## Scores\n\nAnswers that equal the reference exactly, on Shapes (synthetic scenes), greedy decoding.\n\n"
        + "\n".join(lines)
    )


def _eval_results(runs: dict) -> list[EvalResult]:
    """The first run's descriptions, for the metadata; measures without a region are only in the table."""
    first = next(iter(runs.values()), {})
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type="shapes",
            dataset_name=f"Shapes: {measure}",
            dataset_config=measure,  # without it the results would be merged into one
            metric_type="literal_match",
            metric_name="literal match",
            metric_value=round(entry["score"], 4),
        )
        for measure, entry in first.items()
        if measure.startswith("description, ") and "majority_baseline" not in entry
    ]


def _license_fields(built_from: Sequence[str], license_id: str | None) -> dict[str, str]:
    """The license in the metadata: the only one, or else "other" with a name composed of all."""
    ids = sorted({LICENSES[part][0] for part in built_from}) or [license_id or "unknown"]
    if len(ids) == 1 and ids[0] not in _NAMED_LICENSES:
        return {"license": ids[0]}
    return {"license": "other", "license_name": "-and-".join(ids)}


def _license(built_from: Sequence[str], license_id: str | None) -> str:
    if license_id:
        return f"`{license_id}`, as stated by its publisher."
    if not built_from:
        return "Unknown: its publisher did not state what it was built from."
    lines = "\n".join(f"- {LICENSES[part][1]}" for part in built_from)
    return f"The weights are subject to the terms of everything that they were built from:\n\n{lines}"
