"""A model card for what this project makes: filled from the directory's config, training record and scores, and from
the licences of what it was built from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, PreTrainedConfig

from mllm.fused import is_fused
from vision_tower import AlphaCLIPVisionConfig, Region

# what a directory can be built from -> licence id (the hub's, or a name where the hub has none), and in words
# Source: the READMEs of SunzeY/AlphaCLIP, openai/CLIP, haotian-liu/LLaVA and salesforce/LAVIS, and the cards of
# llava-hf/llava-1.5-7b-hf and Salesforce/blip2-*
LICENCES = {
    "alpha-clip": (
        "alpha-clip-research-only",
        "Alpha-CLIP's weights: research use only, within CLIP's terms; the data behind them is CC BY-NC 4.0",
    ),
    "clip": ("mit", "OpenAI's CLIP: MIT"),
    "llava-1.5": ("llama2", "LLaVA-1.5: the LLAMA 2 community licence of its Vicuna"),
    "blip-2": ("mit", "BLIP-2: MIT on the hub, BSD-3-Clause in LAVIS; its language model's licence besides: unknown"),
    "shapes": ("apache-2.0", "trained from nothing on this project's Shapes scenes: Apache-2.0"),
}
_NAMED_LICENCES = ("alpha-clip-research-only",)  # not among the hub's: stated as license "other" with this name
_KINDS = {  # model_type -> title, pipeline tag
    "alpha_clip_vision_model": ("An Alpha-CLIP vision tower", "image-feature-extraction"),
    "alpha_clip": ("Alpha-CLIP with its text tower", "zero-shot-image-classification"),
    "llava": ("LLaVA-1.5 with an Alpha-CLIP tower", "image-text-to-text"),
    "llava_next": ("LLaVA-NeXT with an Alpha-CLIP tower", "image-text-to-text"),
    "alpha_blip2": ("BLIP-2 with an alpha tower", "image-text-to-text"),
}
_EXPORTED = "exported llava"  # stock classes (mllm/convert/export.py), which the model type does not tell
_KINDS[_EXPORTED] = _KINDS["llava"]
_EXAMPLES = {
    "alpha_clip_vision_model": """\
from transformers import AutoImageProcessor, AutoModel
from vision_tower import Region

model, processor = AutoModel.from_pretrained("{name}"), AutoImageProcessor.from_pretrained("{name}")
inputs = processor(image, regions=Region.{region}, return_tensors="pt")
features = model(**inputs).last_hidden_state""",
    "alpha_clip": """\
from vision_tower import AlphaCLIPModel, AlphaCLIPProcessor, Region

model, processor = AlphaCLIPModel.from_pretrained("{name}"), AlphaCLIPProcessor.from_pretrained("{name}")
inputs = processor(
    text=["a dog", "a cat"], images=image, regions=Region.{region}, padding=True, return_tensors="pt"
)
chances = model(**inputs).logits_per_image.softmax(-1)""",
    "llava": """\
import mllm
from vision_tower import Region

model, processor = mllm.load("{name}")
item = {{"type": "image", "image": image, "region": Region.{region}}}
message = {{"role": "user", "content": [item, {{"type": "text", "text": "What is this?"}}]}}
inputs = processor.apply_chat_template(
    [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))""",
}
_EXAMPLES["llava_next"] = _EXAMPLES["alpha_blip2"] = _EXAMPLES["llava"]
_EXAMPLES[_EXPORTED] = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
item = {{"type": "image", "image": image, "region": "box:40,60,220,200"}}
message = {{"role": "user", "content": [item, {{"type": "text", "text": "What is this?"}}]}}
inputs = processor.apply_chat_template(
    [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))"""
_ABOUT = """\
CLIP with a fourth input channel, alpha, that says where to look ([Alpha-CLIP](https://arxiv.org/abs/2312.03818)). A
region is the fourth channel of `pixel_values`, which is (B, 4, H, W)."""
_SHAPES_ONLY = "**It knows only drawn scenes of the Shapes world: no photographs, no people, no other questions.**"
_FILES = {
    "config.json": "the architecture",
    "adapter_config.json": "LoRA's settings",
    "*.safetensors": "the weights",
    "generation_config.json": "how `generate` runs by default",
    "preprocessor_config.json": "how a picture and its region are prepared",
    "processor_config.json": "how a picture, its region and the text are prepared",
    "tokenizer*": "the tokenizer",
    "chat_template.jinja": "the conversation format",
    "scores.json": "the scores below",
    "training_scenes.bin": "hashes of the Shapes scenes that it was trained on, so that none is scored",
    "*.py": "source files, run by `trust_remote_code=True` where alpha-clip-mllm is not installed",
}
_TOLD = (  # what of the training arguments is told
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "weight_decay"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16", "seed"),
)


def model_card(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    built_from: Sequence[str] = (),
    licence: str | None = None,
    base_model: str | None = None,
    language: Sequence[str] = (),
) -> ModelCard:
    """The card of a tower, a LLaVA or BLIP-2 with a tower, or a LoRA adapter (PEFT).

    Args:
        folder: What `save_pretrained` or `train.finetune` wrote.
        repo_id: "owner/name" that it will be published under.
        built_from: Names out of `LICENCES`.
        licence: The hub's id of a licence, in place of `built_from`; without either, it is stated as unknown.
        base_model: Hub id of the model that it was made from; an adapter's own when not given.
        language: ISO 639 codes of the languages that it answers in; left out when not given.

    Raises:
        ValueError: If the folder holds none of these, a file in it is damaged, a name is unknown, both `built_from`
            and `licence` are given, or `base_model` is no hub id.
    """
    folder = Path(folder)
    if unknown := set(built_from) - LICENCES.keys():
        raise ValueError(f"expected parts out of {', '.join(LICENCES)}, got {sorted(unknown)}")
    if built_from and licence:
        raise ValueError(f"got built_from and the licence {licence!r}; the parts say the licence, give one of both")
    adapter = read_json(folder / "adapter_config.json")
    config = None if adapter else _read_config(folder)
    if adapter or base_model:
        base_model = check_base_model(base_model or adapter.get("base_model_name_or_path"))
    kind = _kind_of_adapter(adapter) if config is None else _EXPORTED if is_fused(config) else config.model_type
    title, pipeline = _KINDS[kind]
    runs = _read_scores(folder / "scores.json")
    data = ModelCardData(
        **_licence_fields(built_from, licence),
        language=list(language) or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=pipeline,
        base_model=base_model,
        tags=["alpha-clip", "region", *(["lora"] if adapter else [])],
        **({"model_name": repo_id.split("/")[-1], "eval_results": _eval_results(runs)} if runs else {}),
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {f'A LoRA adapter for {title}' if adapter else title}: {repo_id}",
        _ABOUT.replace("(B, 4, H, W)", "(B, tiles, 4, H, W)") if kind == "llava_next" else _ABOUT,
        *([_SHAPES_ONLY] if "shapes" in built_from else []),
        _example(kind, repo_id, base_model if adapter else None),
        _architecture(config, folder) if config else _lora(adapter),
        _table("Files", {f"`{name}`": words for name, words in _FILES.items() if any(folder.glob(name))}),
        _training(read_json(folder / "training_record.json")),
        _scores(runs),
        _licence(built_from, licence),
    ]
    return ModelCard("\n\n".join(part for part in parts if part) + "\n")


def check_base_model(base_model: str | None) -> str:
    """The hub id of the model that an adapter or a model was made from.

    Raises:
        ValueError: If it is absent, a folder of this machine, or no hub id.
    """
    try:
        validate_repo_id(base_model or "")
    except HFValidationError:
        base_model = None
    if not base_model or os.path.exists(base_model):
        raise ValueError(
            "expected the hub id of the model that it was made from, got none or a folder; give base_model "
            "(--base-model)"
        )
    return base_model


def read_json(file: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is no file.

    Raises:
        ValueError: If the file is damaged or holds no object.
    """
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); was it copied whole?") from error
    if not isinstance(found, dict) or not found:
        raise ValueError(f"expected names and values in {file}, got {str(found)[:40]}")
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
        raise ValueError(f"expected a LLaVA with our tower, got a tower {found!r}; save what mllm.load({folder}) gives")
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise ValueError(f"{folder} has no processor; save it there too: processor.save_pretrained({str(folder)!r})")
    return config


def _kind_of_adapter(adapter: dict) -> str:
    """Which of `_KINDS` it was trained for; PEFT notes the class where no task type is set."""
    mapping = adapter.get("auto_mapping") or {}
    name = mapping.get("base_model_class", "")
    return "alpha_blip2" if "Blip2" in name else "llava_next" if "LlavaNext" in name else "llava"


def _table(title: str, rows: dict[str, Any]) -> str:
    return f"## {title}\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _example(kind: str, repo_id: str, base_model: str | None) -> str:
    region = str(Region.from_box(40, 60, 220, 200)).replace("box:", "from_box(").replace(",", ", ") + ")"
    code = _EXAMPLES[kind].format(region=region, name=base_model or repo_id)
    if base_model:  # an adapter: `mllm.load` takes it as a directory
        code = code.replace("import mllm\n", "import mllm\nfrom huggingface_hub import snapshot_download\n")
        code = code.replace(f'load("{base_model}"', f'load("{base_model}", adapter=snapshot_download("{repo_id}")')
    needed = "With Transformers 5.23 or newer" if kind == _EXPORTED else "With alpha-clip-mllm installed"
    return f"## Use\n\n{needed}, and a picture `image` (PIL):\n\n```python\n{code}\n```"


def _architecture(config: PreTrainedConfig, folder: Path) -> str:
    """What config and processor say of tower, language model and pictures."""
    vision = getattr(config, "vision_config", config)  # a tower's directory is the tower
    side = vision.image_size // vision.patch_size
    files = [read_json(folder / name) for name in ("processor_config.json", "preprocessor_config.json")]
    geometry = [found["geometry"] for file in files if "geometry" in (found := file.get("image_processor", file))]
    rows = {
        "class": ", ".join(f"`{name}`" for name in config.architectures or ["unknown"]),
        "tower": f"`{vision.model_type}`, {vision.num_hidden_layers} blocks, {vision.hidden_size} wide",
        "picture": f"{vision.image_size} x {vision.image_size} pixels, {side} x {side} patches of {vision.patch_size}",
        "geometry": f"`{geometry[0]}`" if geometry else "as the stock processor's files say",
    }
    text = getattr(config, "text_config", None)  # absent from a tower
    if text is not None:
        rows["text side"] = f"`{text.model_type}`, {text.num_hidden_layers} blocks, {text.hidden_size} wide"
    if config.model_type == "llava":
        tokens = side * side + (config.vision_feature_select_strategy == "full")
        rows["image tokens"] = f"{tokens}, from hidden state {config.vision_feature_layer}"
    if config.model_type == "llava_next":
        grid = ", ".join(f"{width} x {height}" for height, width in config.image_grid_pinpoints)
        rows["tiles"] = f"the whole picture, and those of the best of {grid} pixels, padded"
    if config.model_type == "alpha_blip2":
        rows["image tokens"] = f"{config.num_query_tokens}, from a Q-Former"
    return _table("Architecture", rows)


def _lora(adapter: dict) -> str:
    names = {"r": "rank", "lora_alpha": "alpha", "target_modules": "in", "modules_to_save": "trained in full"}
    return _table("LoRA", {words: f"`{adapter[name]}`" for name, words in names.items() if adapter.get(name)})


def _training(record: dict) -> str:
    """Data, the arguments that matter and the losses; of folders their own names only."""
    if not record:
        return ""
    training = record.get("training", {})
    rows = record.get("model", {}) | record.get("data", {})
    rows |= {name: training[name] for name in _TOLD if training.get(name) not in (None, "None", -1, False)}
    if "max_steps" in rows:
        rows.pop("num_train_epochs", None)  # Trainer does not heed it then
    losses = [float(entry["loss"]) for entry in record.get("log", []) if "loss" in entry]
    rows |= {"loss, first and last logged": f"{losses[0]:.3g}, {losses[-1]:.3g}"} if losses else {}
    return _table("Training", {name: _without_folders(value) for name, value in rows.items()})


def _without_folders(value: Any) -> str:
    """A value in words; of a path of any system the last name, since the others are this machine's."""
    if isinstance(value, list):
        return ", ".join(_without_folders(entry) for entry in value)
    return PureWindowsPath(value).name if isinstance(value, str) else str(value)


def _read_scores(file: Path) -> dict[str, dict[str, dict]]:
    """Run -> measure -> {"score", "of", maybe "blind"}; a file of one run is that run.

    Raises:
        ValueError: If the file holds something else.
    """
    scores = {name: entry for name, entry in read_json(file).items() if name != "made_by"}
    try:
        runs = {"right": scores} if scores and any("score" in entry for entry in scores.values()) else scores
        for entry in (entry for run in runs.values() for entry in run.values()):
            entry["score"] + entry["of"] + entry.get("blind", 0)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"expected in {file} what scripts/shapes/score_embedded_model.py --json writes: {error!r}"
        ) from error
    return runs


def _scores(runs: dict) -> str:
    """One table of all measures with a column for each run."""
    if not runs:
        return ""
    lines = [f"| measure | {' | '.join(runs)} | of | best without the region |", "|---" * (3 + len(runs)) + "|"]
    for measure in dict.fromkeys(measure for run in runs.values() for measure in run):
        cells = [f"{run[measure]['score']:.1%}" if measure in run else "" for run in runs.values()]
        entry = next(run[measure] for run in runs.values() if measure in run)
        blind = f"{entry['blind']:.1%}" if "blind" in entry else ""
        lines.append(f"| {measure} | {' | '.join(cells)} | {entry['of']} | {blind} |")
    return "## Scores\n\nExactly right answers on Shapes, drawn scenes; greedy.\n\n" + "\n".join(lines)


def _eval_results(runs: dict) -> list[EvalResult]:
    """The first run's descriptions for the metadata; controls without a region stay in the table."""
    first = next(iter(runs.values()), {})
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type="shapes",
            dataset_name=f"Shapes: {measure}",
            dataset_config=measure,  # without it the results would be taken for one
            metric_type="exactly_right",
            metric_name="exactly right, letter for letter",
            metric_value=round(entry["score"], 4),
        )
        for measure, entry in first.items()
        if measure.startswith("description, ") and "blind" not in entry
    ]


def _licence_fields(built_from: Sequence[str], licence: str | None) -> dict[str, str]:
    """The metadata's licence: the only one there is, else "other" with a name made of all."""
    ids = sorted({LICENCES[part][0] for part in built_from}) or [licence or "unknown"]
    if len(ids) == 1 and ids[0] not in _NAMED_LICENCES:
        return {"license": ids[0]}
    return {"license": "other", "license_name": "-and-".join(ids)}


def _licence(built_from: Sequence[str], licence: str | None) -> str:
    if licence:
        return f"## Licence\n\n`{licence}`, as its publisher states."
    if not built_from:
        return "## Licence\n\nUnknown: its publisher has not said what it was built from."
    lines = "\n".join(f"- {LICENCES[part][1]}" for part in built_from)
    return f"## Licence\n\nThe weights are bound by the terms of everything that they come from:\n\n{lines}"
