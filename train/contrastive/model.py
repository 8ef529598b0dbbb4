"""Loading of the CLIP that `alpha-clip train` trains."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator

import torch
from transformers import AutoTokenizer, CLIPImageProcessorPil, TrainingArguments
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from alpha_clip_commands.progress import step
from alpha_clip_commands.training.contrastive_arguments import TowerArguments
from mllm.hub import offline_options
from vision_tower import AlphaCLIPConfig, AlphaCLIPImageProcessor, AlphaCLIPModel, AlphaCLIPProcessor


@contextlib.contextmanager
def without_partitioning(args: TrainingArguments) -> Iterator[None]:
    """Under ZeRO-3, load weights without partitioning them: DeepSpeed 0.19 cannot partition the temperature, which has
    no dimensions, and a CLIP is small. The weights are partitioned when training begins.
    """
    zero3 = is_deepspeed_zero3_enabled()
    if zero3:
        unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if zero3:
            set_hf_deepspeed_config(args.hf_deepspeed_config)


@step("loading the model")
def load_model(args: TowerArguments) -> tuple[AlphaCLIPModel, AlphaCLIPProcessor]:
    """A CLIP with an alpha channel, and its processor with the geometry used in training.

    Raises:
        ValueError: If the model is not found, is not a full CLIP (text tower and projections included), or its towers
            do not fit together.
    """
    config, hub = read_config(args.model), offline_options(args.model)
    # float32: at these learning rates 16-bit weights would not change; autocast computes in 16 bits
    model = AlphaCLIPModel.from_pretrained(
        args.model, config=config, attn_implementation=args.attn_implementation, dtype=torch.float32, **hub
    )
    if args.logit_scale is not None:
        with torch.no_grad():
            model.logit_scale.fill_(math.log(args.logit_scale))
    # whatever class the directory specifies, only mean and standard deviation are taken from it
    colors = CLIPImageProcessorPil.from_pretrained(args.model, **hub)
    images = AlphaCLIPImageProcessor.for_size(model.config.vision_config.image_size, args.geometry, like=colors)
    return model, AlphaCLIPProcessor(images, AutoTokenizer.from_pretrained(args.model, **hub))


def read_config(name: str) -> AlphaCLIPConfig:
    """The configuration of a CLIP with both towers.

    Raises:
        ValueError: If it is not found, or belongs to another model.
    """
    try:
        return AlphaCLIPConfig.from_pretrained(name, **offline_options(name))
    except (OSError, ValueError) as error:
        reason = error if os.path.isdir(name) else "directory not found, and no such model on a reachable hub"
        raise ValueError(
            f"expected a directory or hub id of a CLIP with both towers, got {name!r}: {reason}"
        ) from error
