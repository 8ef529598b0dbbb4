"""Train an Alpha-CLIP out of a CLIP (or a CLIP itself) by contrast of regions and texts.

    alpha-clip train RECIPE --model CLIP --data DIR --output_dir OUT [--flag value ...]

Parse, seed, model, freeze and LoRA, data, trainer, train, save.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, CLIPImageProcessorPil, PreTrainedModel, TrainingArguments, set_seed
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from alpha_clip_commands.progress import step
from alpha_clip_commands.region_tune import train_alpha_clip as main
from alpha_clip_commands.training.contrastive_arguments import PairArguments, TowerArguments
from eval.region_matching import DescribedImage, described_images
from mllm.data.index import HELD_OUT, TRAIN
from mllm.hub import offline_options
from train.arguments import refuse_unknown_parts
from train.contrastive.arguments import parse_args
from train.contrastive.data import RegionTextCollator, RegionTextDataset, held_out_samples
from train.contrastive.memory_estimate import plan_contrast
from train.contrastive.trainer import RegionTextTrainer, clip_in
from train.lora import ALPHA, linear_layers, part_of, pattern, trained_table
from train.output import held_output
from train.run import (
    log_on_one_process,
    open_indexes,
    refuse_empty,
    refuse_missing_pictures,
    run_command,
    train_and_save,
    what_makes_the_run,
)
from train.skipped import SKIPPED
from vision_tower import AlphaCLIPConfig, AlphaCLIPImageProcessor, AlphaCLIPModel, AlphaCLIPProcessor

logger = logging.getLogger(__name__)

_NO_TRAINING = f"expected described regions of the split {TRAIN!r}"

PARTS = {
    "vision_model": "vision_model",
    "visual_projection": "visual_projection",
    "text_model": "text_model",
    "text_projection": "text_projection",
    "logit_scale": "logit_scale",
    ALPHA: "vision_model.embeddings.patch_embedding.alpha",
}


def run(argv: Sequence[str]) -> int:
    """Run one recipe, when its arguments are checked; returns the exit code."""
    return run_command("alpha-clip train", lambda arguments: train(*parse_args(arguments)), argv)


def train(tower_args: TowerArguments, pair_args: PairArguments, training_args: TrainingArguments) -> int:
    """Train a model; returns the exit code.

    Raises:
        ValueError: If model, data or settings do not fit, or the loss is no number.
        OSError: If something cannot be read or written.
    """
    log_on_one_process(training_args)
    if "logit_scale" in tower_args.train_parts and is_deepspeed_zero3_enabled():
        raise ValueError("train_parts: logit_scale is not learned under ZeRO-3; take zero2, or leave it out")
    if training_args.n_gpu > 1:
        raise ValueError(
            f"{training_args.n_gpu} GPUs need a process each: torchrun --nproc_per_node {training_args.n_gpu} "
            "--no-python alpha-clip train ..., or deepspeed --no_python alpha-clip train ...; or make one GPU visible"
        )
    if tower_args.plan:
        return show_plan(tower_args, pair_args, training_args)
    run = what_makes_the_run(training_args, tower_args, pair_args)
    with held_output(training_args, run) as resumption:
        if resumption.finished:
            logger.info("%s is already finished; nothing is changed", training_args.output_dir)
            return 0
        trainer = build_trainer(tower_args, pair_args, training_args, run)
        return train_and_save(trainer, resumption.checkpoint)


def build_trainer(
    tower_args: TowerArguments, pair_args: PairArguments, training_args: TrainingArguments, run: Mapping[str, Any]
) -> RegionTextTrainer:
    """Load and prepare the model, open the data."""
    with loaded_whole(training_args):
        model, processor = load_model(tower_args)
    set_seed(training_args.seed)  # after loading, which draws more or fewer numbers
    if training_args.deepspeed:
        # nor can it send a weight without dimensions to the other processes; it is saved as CLIP has it
        model.logit_scale.data = model.logit_scale.data.reshape(1)
    model = prepare_model(model, tower_args)
    logger.info("%s", trained_table(model, PARTS))
    dataset, pictures = read_data(pair_args, training_args, processor.image_processor)
    return RegionTextTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        pictures=pictures,
        data_collator=RegionTextCollator(processor, clip_in(model).config.text_config.max_position_embeddings),
        # as loaded: to pad or to cut texts changes what a tokenizer would be saved as
        processing_class=copy.deepcopy(processor),
        parts=PARTS,
        rates=tower_args.rate_of_part(),
        optimizer_name=tower_args.optimizer,
        run=run,
        pair_args=pair_args,
        decay_all=tower_args.decay_all,
    )


def show_plan(tower_args: TowerArguments, pair_args: PairArguments, training_args: TrainingArguments) -> int:
    """Print what the run takes; its data must be there, its pictures and the model's weights need not."""
    indexes = open_indexes(pair_args.data, training_args)
    pictures = RegionTextDataset(indexes, pair_args, TRAIN, training_args.seed, Path(SKIPPED))
    refuse_empty(pictures, indexes, _NO_TRAINING)
    with torch.device("meta"):
        model = prepare_model(AlphaCLIPModel(read_config(tower_args.model)), tower_args)
    print(  # noqa: T201
        plan_contrast(
            model, clip_in(model), pair_args, training_args, PARTS, len(pictures), tower_args.device_tflops
        ).table()
    )
    return 0


@contextlib.contextmanager
def loaded_whole(args: TrainingArguments) -> Iterator[None]:
    """Under ZeRO-3, keep Transformers from cutting weights into pieces while they are loaded: a CLIP is small, and
    DeepSpeed 0.19 cannot cut its temperature, a weight without dimensions. It cuts them when training begins.
    """
    whole = is_deepspeed_zero3_enabled()
    if whole:
        unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if whole:
            set_hf_deepspeed_config(args.hf_deepspeed_config)


@step("loading the model")
def load_model(args: TowerArguments) -> tuple[AlphaCLIPModel, AlphaCLIPProcessor]:
    """A CLIP with an alpha channel, and its processor with the geometry that is trained.

    Raises:
        ValueError: If there is no such model, it is no full CLIP (text tower and projections too), or its towers do
            not fit each other.
    """
    config, hub = read_config(args.model), offline_options(args.model)
    attention = args.attn_implementation
    # weights kept in 16 bits would not move at these learning rates: autocast computes in 16, float32 is trained
    model = AlphaCLIPModel.from_pretrained(
        args.model, config=config, attn_implementation=attention, dtype=torch.float32, **hub
    )
    if args.logit_scale is not None:
        with torch.no_grad():
            model.logit_scale.fill_(math.log(args.logit_scale))
    side = model.config.vision_config.image_size
    # under this class whatever the directory names: only the colours are taken from it
    images = AlphaCLIPImageProcessor.for_size(
        side, args.geometry, like=CLIPImageProcessorPil.from_pretrained(args.model, **hub)
    )
    return model, AlphaCLIPProcessor(images, AutoTokenizer.from_pretrained(args.model, **hub))


def read_config(name: str) -> AlphaCLIPConfig:
    """The configuration of a CLIP with both towers.

    Raises:
        ValueError: If there is none, or it is of another model.
    """
    try:
        return AlphaCLIPConfig.from_pretrained(name, **offline_options(name))
    except (OSError, ValueError) as error:
        reason = error if os.path.isdir(name) else "there is no such directory, and no such model on a hub in reach"
        raise ValueError(
            f"expected a directory or hub id of a CLIP with both towers, got {name!r}: {reason}"
        ) from error


def prepare_model(model: AlphaCLIPModel, args: TowerArguments) -> PreTrainedModel:
    """Freeze, adapt and unfreeze as the arguments say.

    Raises:
        ValueError: If the model has no such part, layer or block.
    """
    refuse_unknown_parts(args, PARTS)
    blocks = model.config.vision_config.num_hidden_layers
    if args.train_blocks is not None and args.train_blocks > blocks:
        raise ValueError(f"train_blocks: the tower has {blocks} blocks, got {args.train_blocks}")
    frozen = tuple(
        f"vision_model.{name}."
        for name in (
            "embeddings",
            "pre_layrnorm",
            *(f"encoder.layers.{n}" for n in range(blocks - (args.train_blocks or 0))),
        )
    )
    for name, parameter in model.named_parameters():
        part = part_of(name, PARTS)
        keep = part == "vision_model" and args.train_blocks is not None and name.startswith(frozen)
        parameter.requires_grad_(part in args.train_parts and not keep)
    return adapted(model, args) if args.lora_r else model


def adapted(model: AlphaCLIPModel, args: TowerArguments) -> PreTrainedModel:
    """LoRA on the image tower's linear layers; other named parts are trained in full."""
    modules = [PARTS[part] for part in args.train_parts if part != "vision_model"]
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=2 * args.lora_r if args.lora_alpha is None else args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=pattern(linear_layers(model, ["vision_model"], args.lora_targets)),
        modules_to_save=modules or None,
    )
    return get_peft_model(model, config)


def read_data(
    pair_args: PairArguments, training_args: TrainingArguments, image_processor: AlphaCLIPImageProcessor
) -> tuple[RegionTextDataset, list[DescribedImage]]:
    """The training samples (split train), and held-out pictures (split val) where the run evaluates.

    Raises:
        ValueError: If the data is missing, damaged, has no region of the split, or too many pictures are missing.
    """
    indexes = open_indexes(pair_args.data, training_args)

    def dataset(split: str) -> RegionTextDataset:
        listed = Path(training_args.output_dir) / SKIPPED
        return RegionTextDataset(indexes, pair_args, split, training_args.seed, listed, image_processor)

    train = dataset(TRAIN)
    refuse_empty(train, indexes, _NO_TRAINING)
    logger.info("%s: %d training pictures", ", ".join(pair_args.data), len(train))
    if pair_args.whole_image_rate and not train.has_captions:
        logger.warning("the data has no captions: whole images are never shown (whole_image_rate has no effect)")
    refuse_missing_pictures(indexes, pair_args.max_missing, training_args)
    if training_args.eval_strategy == "no":
        return train, []
    return train, held_out(dataset(HELD_OUT), pair_args.eval_pictures)


def held_out(dataset: RegionTextDataset, count: int) -> list[DescribedImage]:
    """Up to `count` pictures of a dataset, evenly spaced; what cannot be read is left out.

    Raises:
        ValueError: If there are none, or more had to be left out than `max_missing` allows.
    """
    pictures = [
        (index, picture)
        for index in dataset.indexes
        for picture in np.flatnonzero(index.split_of_picture == dataset.skipped.split)
    ]
    refuse_empty(pictures, dataset.indexes, f"evaluation needs pictures of the split {dataset.skipped.split!r}")
    spaced = np.linspace(0, len(pictures) - 1, min(len(pictures), count)).astype(int)
    chosen = [pictures[n] for n in spaced.tolist()]
    usable = [held_out_samples(dataset, index, picture, at) for at, (index, picture) in enumerate(chosen)]
    if not any(usable):
        raise ValueError(f"no image for evaluation can be used; all are {dataset.skipped.listed}")
    return described_images(sample for samples in usable for sample in samples)


if __name__ == "__main__":
    raise SystemExit(main())
