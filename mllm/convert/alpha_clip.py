"""`alpha-clip convert`: Alpha-CLIP weights from an original checkpoint to a Hugging Face directory, and back."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPModel

import mllm
from alpha_clip_commands.command_line import say
from mllm.convert.export import export
from mllm.files import replacing_file
from mllm.folders import check_new, replacing_folder, work_folder
from mllm.fused import fused_tower_config, save_stock_image_processor
from mllm.hub import offline_options
from mllm.locks import locked
from vision_tower import (
    AlphaCLIPConfig,
    AlphaCLIPImageProcessor,
    AlphaCLIPModel,
    AlphaCLIPProcessor,
    AlphaCLIPVisionConfig,
    AlphaCLIPVisionModel,
    AlphaCLIPVisionModelWithProjection,
)
from vision_tower.conversion import StateDict, fuse, read_original, to_original
from vision_tower.modeling_alpha_clip import ALPHA_WEIGHT


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    check_new(args.out)
    convert(args)
    say(f"wrote {args.out}")
    return 0


def convert(args: argparse.Namespace) -> None:
    """Read, convert and write weights as the arguments specify."""
    if args.fused and _model_type(args.source) == "llava":
        export(*mllm.load(args.source, device="cpu"), args.out)
        return
    config, weights = read_source(args.source)
    with _output(args) as out:
        if args.original:
            save_original(to_original(weights), out)
        elif args.fused:
            save_fused(config, weights, out)
        elif args.text_from:
            save_with_text(config, weights, args.text_from, out)
        else:
            save_tower(config, weights, out)


def _model_type(source: Path) -> str | None:
    file = source / "config.json"
    return json.loads(file.read_text(encoding="utf-8")).get("model_type") if file.is_file() else None


def read_source(source: Path) -> tuple[AlphaCLIPVisionConfig, StateDict]:
    """Config and weights of `AlphaCLIPVisionModelWithProjection`, from an original file or a converted directory."""
    if not source.is_dir():
        return read_original(source)
    model, report = AlphaCLIPVisionModelWithProjection.from_pretrained(source, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        if any(key.endswith(ALPHA_WEIGHT) for key in missing):
            raise ValueError(f"{source} contains a plain CLIP without an alpha weight: there is nothing to convert")
        raise ValueError(
            f"{source} contains a tower without {missing[0]}, which an original checkpoint has (a LLaVA's tower has no "
            "projection); convert the directory that `alpha-clip convert` wrote"
        )
    return model.config, model.state_dict()


@contextmanager
def _output(args: argparse.Namespace) -> Iterator[Path]:
    """A temporary path that is renamed to OUT at the end, so that OUT is never incomplete."""
    if not args.original:
        with replacing_folder(args.out, "model", reads=[args.source], new=True) as folder:
            yield folder
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with locked(args.out), work_folder(args.out, "checkpoint") as folder, replacing_file(args.out) as partial:
        yield folder / args.out.name
        check_new(args.out)
        os.replace(folder / args.out.name, partial)


def save_tower(config: AlphaCLIPVisionConfig, weights: StateDict, out: Path) -> None:
    """Save tower and projection; `AutoModel` loads the tower."""
    config.dtype = next(iter(weights.values())).dtype
    # with the tower's class, so that its source files are saved next to the weights, which include the projection
    AlphaCLIPVisionModel(config).to(config.dtype).save_pretrained(out, state_dict=weights)
    image_processor(config).save_pretrained(out)


def save_with_text(config: AlphaCLIPVisionConfig, weights: StateDict, text_from: str, out: Path) -> None:
    """Save the tower with CLIP's text tower, text projection and temperature.

    Raises:
        ValueError: If the CLIP is not found, or its text projection has another size than the visual one.
    """
    hub = offline_options(text_from)
    try:
        clip = CLIPModel.from_pretrained(text_from, **hub)
    except OSError as error:
        reason = "not found as a directory, on the hub or in its cache"
        raise ValueError(f"cannot load a CLIP from {text_from}: {reason}") from error
    if clip.config.projection_dim != config.projection_dim:
        raise ValueError(
            f"{text_from} embeds texts in {clip.config.projection_dim} dimensions, but this checkpoint images in "
            f"{config.projection_dim}; use the CLIP that the checkpoint was trained from"
        )
    both = AlphaCLIPConfig(
        vision_config=config.to_dict(),
        text_config=clip.config.text_config.to_dict(),
        projection_dim=config.projection_dim,
    )
    model = AlphaCLIPModel(both)
    text = {key: tensor for key, tensor in clip.state_dict().items() if not key.startswith(("vision_", "visual_"))}
    model.load_state_dict({**text, **weights})  # strict
    model.save_pretrained(out)
    AlphaCLIPProcessor(image_processor(config), AutoTokenizer.from_pretrained(text_from, **hub)).save_pretrained(out)


def save_fused(config: AlphaCLIPVisionConfig, weights: StateDict, out: Path) -> None:
    """Save a stock `clip_vision_model` with four channels, with key names that every version of Transformers reads."""
    dtype = next(iter(weights.values())).dtype
    stock = fused_tower_config(config, architectures=["CLIPVisionModelWithProjection"], dtype=dtype)
    stock.save_pretrained(out)
    save_file(fuse(weights), out / "model.safetensors", metadata={"format": "pt"})
    save_stock_image_processor(config.image_size, out)  # the caller adds alpha (docs/export.md)


def save_original(weights: StateDict, out: Path) -> None:
    """Save the original layout as .safetensors, or with torch.save for any other suffix."""
    if out.suffix == ".safetensors":
        save_file({key: tensor.contiguous() for key, tensor in weights.items()}, out, metadata={"format": "pt"})
    else:
        torch.save(weights, out)


def image_processor(config: AlphaCLIPVisionConfig) -> AlphaCLIPImageProcessor:
    """CLIP's preprocessing at the tower's size."""
    return AlphaCLIPImageProcessor.for_size(config.image_size, "crop")
