"""A model card for what this project makes: filled from the directory's config, training record and scores, and from
the licences of what it was built from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig, PreTrainedConfig

import mllm.blip2  # noqa: F401, registers its configurations
from vision_tower import Region

# what a directory can be built from -> licence id of the hub, and in words
# Source: the READMEs of SunzeY/AlphaCLIP, openai/CLIP, haotian-liu/LLaVA and salesforce/LAVIS; BLIP-2's and LLaVA-1.5's
# language models have terms of their own
LICENCES = {
    "alpha-clip": ("cc-by-nc-4.0", "Alpha-CLIP's weights: research only (CC BY-NC 4.0 data, CLIP's terms)"),
    "clip": ("mit", "OpenAI's CLIP: MIT"),
    "llava-1.5": ("llama2", "LLaVA-1.5: the LLAMA 2 community licence of its Vicuna"),
    "blip-2": ("mit", "BLIP-2: MIT on the hub, BSD-3-Clause in LAVIS; its language model's licence besides"),
    "shapes": ("apache-2.0", "trained from nothing on Shapes scenes: Apache-2.0"),
}
_KINDS = {  # model_type -> title, pipeline tag
    "alpha_clip_vision_model": ("An Alpha-CLIP vision tower", "image-feature-extraction"),
    "alpha_clip": ("Alpha-CLIP with its text tower", "zero-shot-image-classification"),
    "llava": ("LLaVA-1.5 with an Alpha-CLIP tower", "image-text-to-text"),
    "alpha_blip2": ("BLIP-2 with an alpha tower", "image-text-to-text"),
}
_EXAMPLES = {
    "alpha_clip_vision_model": """\
from transformers import AutoImageProcessor, AutoModel
from vision_tower import Region

model, processor = AutoModel.from_pretrained("{name}"), AutoImageProcessor.from_pretrained("{name}")
inputs = processor(image, Region.{region}, return_tensors="pt")
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

model, processor = mllm.load("{name}"{adapter})
inputs = processor(images=image, regions=Region.{region}, text="What is this?", return_tensors="pt")
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))""",
}
_EXAMPLES["alpha_blip2"] = _EXAMPLES["llava"].replace('"What is this?"', '"Question: What is this? Answer:"')
# what of a training record is told
_TOLD = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "lr_scheduler_type", "seed")


def model_card(
    folder: str | os.PathLike, repo_id: str, *, built_from: Sequence[str] = (), base_model: str | None = None
) -> ModelCard:
    """The card of a tower, a LLaVA or BLIP-2 with a tower, or a LoRA adapter (PEFT).

    Args:
        folder: What `save_pretrained` or `train.finetune` wrote.
        repo_id: "owner/name" that it will be published under.
        built_from: Names out of `LICENCES`; without one, the licence is stated as unknown.
        base_model: Hub id of the model that it was made from.

    Raises:
        ValueError: If the folder holds none of these, a name is unknown, or an adapter's base model is a local folder
            and no `base_model` is given.
    """
    folder = Path(folder)
    if unknown := set(built_from) - LICENCES.keys():
        raise ValueError(f"expected parts out of {', '.join(LICENCES)}, got {sorted(unknown)}")
    adapter = _read_json(folder / "adapter_config.json")
    if adapter:
        base_model = base_model or adapter.get("base_model_name_or_path")
        if not base_model or os.path.exists(base_model) or base_model.count("/") != 1:
            raise ValueError("an adapter's card needs the hub id of the model that it was trained for; give base_model")
    config = None if adapter else _read_config(folder)
    kind = config.model_type if config else "llava"
    title, pipeline = ("A LoRA adapter", "image-text-to-text") if adapter else _KINDS[kind]
    ids = sorted({LICENCES[part][0] for part in built_from})
    record, scores = _read_json(folder / "training_record.json"), _read_json(folder / "scores.json")
    data = ModelCardData(
        license=ids[0] if len(ids) == 1 else "other" if ids else "unknown",
        license_name=" and ".join(ids) if len(ids) > 1 else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=pipeline,
        base_model=base_model,
        tags=["alpha-clip", "region"],
        model_name=repo_id.split("/")[-1],
        eval_results=_eval_results(scores) or None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {title}: {repo_id}",
        _ABOUT,
        _example(kind, repo_id, base_model, adapter),
    ]
    parts += [_shape(config)] if config else [_adapter(adapter)]
    parts += [_training(record)] if record else []
    parts += [_scores(scores)] if scores else []
    parts += [_licence(built_from)]
    return ModelCard("\n\n".join(parts) + "\n")


_ABOUT = """\
CLIP with a fourth input channel, alpha, that says where to look ([Alpha-CLIP](https://arxiv.org/abs/2312.03818)). A
region is the fourth channel of `pixel_values`, which is (B, 4, H, W); three channels mean the whole image."""


def _read_config(folder: Path) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"expected a model or adapter directory, got {folder} without config.json or adapter_config.json"
        )
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in _KINDS:
        raise ValueError(f"expected a model out of {', '.join(_KINDS)}, got {config.model_type!r} in {folder}")
    return config


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _example(kind: str, repo_id: str, base_model: str | None, adapter: dict) -> str:
    names = {"name": base_model if adapter else repo_id, "adapter": f', adapter="{repo_id}"' if adapter else ""}
    region = str(Region.from_box(40, 60, 220, 200)).replace("box:", "from_box(").replace(",", ", ") + ")"
    code = _EXAMPLES[kind].format(region=region, **names)
    return f"## Use\n\nWith this project installed, and a picture `image` (PIL):\n\n```python\n{code}\n```"


def _shape(config: PreTrainedConfig) -> str:
    """What the config says of tower and language model, as a table."""
    vision = getattr(config, "vision_config", config)
    side = vision.image_size // vision.patch_size
    rows = {
        "tower": f"`{vision.model_type}`, {vision.num_hidden_layers} blocks, {vision.hidden_size} wide",
        "picture": f"{vision.image_size} x {vision.image_size} pixels, {side} x {side} patches of {vision.patch_size}",
    }
    text = getattr(config, "text_config", None)
    if text is not None:
        rows["text side"] = f"`{text.model_type}`, {text.num_hidden_layers} blocks, {text.hidden_size} wide"
    if config.model_type == "llava":
        rows["image tokens"] = f"{side * side}, from hidden state {config.vision_feature_layer}"
    if config.model_type == "alpha_blip2":
        rows["image tokens"] = f"{config.num_query_tokens}, from a Q-Former"
    return "## Architecture\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _adapter(adapter: dict) -> str:
    rows = {"rank": adapter.get("r"), "alpha": adapter.get("lora_alpha"), "in": f"`{adapter.get('target_modules')}`"}
    rows["trained in full"] = f"`{adapter.get('modules_to_save')}`"
    return "## LoRA\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _training(record: dict) -> str:
    """Data by its folder's own name only, the arguments that matter, and the last loss."""
    rows = {"data": Path(str(record["data"].pop("data", "unknown"))).name, **record["data"]}
    rows |= {name: record["training"][name] for name in _TOLD if record["training"].get(name) not in (None, -1)}
    losses = [entry["loss"] for entry in record.get("log", []) if "loss" in entry]
    rows |= {"last loss": f"{float(losses[-1]):.3g}"} if losses else {}
    return "## Training\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _scores(scores: dict) -> str:
    """One table of all measures; a file of several runs has a column each."""
    lines = [f"| measure | {' | '.join(scores)} |", "|---" * (1 + len(scores)) + "|"]
    for measure in next(iter(scores.values())):
        cells = [
            f"{run[measure]['score']:.1%} of {run[measure]['of']}" if measure in run else "" for run in scores.values()
        ]
        lines.append(f"| {measure} | {' | '.join(cells)} |")
    return "## Scores\n\nExactly right answers, greedy.\n\n" + "\n".join(lines)


def _eval_results(scores: dict) -> list[EvalResult]:
    first = next(iter(scores.values()), {})
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type="shapes",
            dataset_name=f"Shapes: {measure}",
            dataset_config=measure,  # without it the results would be taken for one
            metric_type="exact_match",
            metric_value=round(entry["score"], 4),
        )
        for measure, entry in first.items()
        if measure.startswith("description, ") and "blind" not in entry
    ]


def _licence(built_from: Sequence[str]) -> str:
    if not built_from:
        return "## Licence\n\nUnknown: its publisher has not said what it was built from."
    lines = "\n".join(f"- {LICENCES[part][1]}" for part in built_from)
    return f"## Licence\n\nWhat was built from several parts is bound by the terms of each:\n\n{lines}"
