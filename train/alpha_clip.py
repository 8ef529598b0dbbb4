"""Train an Alpha-CLIP from a CLIP, or a CLIP itself, with a contrastive loss on regions and texts: `alpha-clip train`.

    alpha-clip train RECIPE --model CLIP --data DIR --output_dir OUT [--flag value ...]

Parse, seed, model, freeze and LoRA, data, trainer, train, save.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from alpha_clip_commands.training.contrastive_arguments import PairArguments, TowerArguments
from eval.region_matching import DescribedImage
from mllm.data.index import HELD_OUT, TRAIN
from train.contrastive.arguments import parse_args
from train.contrastive.data import RegionTextCollator, RegionTextDataset
from train.contrastive.evaluation import validation_images
from train.contrastive.memory_estimate import estimate_memory
from train.contrastive.model import load_model, read_config, without_partitioning
from train.contrastive.trained_parts import PARTS, prepare_model
from train.contrastive.trainer import RegionTextTrainer
from train.output import locked_output
from train.parts import parameter_table, unwrap_peft
from train.process import log_on_main_process, run_command
from train.run import check_missing_images, check_not_empty, open_indexes, run_config, train_and_save
from train.skipped import SKIPPED
from vision_tower import AlphaCLIPImageProcessor, AlphaCLIPModel

logger = logging.getLogger(__name__)

_EXPECTED = f"expected region descriptions in the split {TRAIN!r}"


def run(argv: Sequence[str]) -> int:
    """Run a recipe; returns the exit code."""
    return run_command("alpha-clip train", lambda arguments: train(*parse_args(arguments)), argv)


def train(tower_args: TowerArguments, pair_args: PairArguments, training_args: TrainingArguments) -> int:
    """Train a model; returns the exit code.

    Raises:
        ValueError: If model, data and settings do not fit together, or the loss is NaN or infinite.
        OSError: If a file cannot be read or written.
    """
    log_on_main_process(training_args)
    if "logit_scale" in tower_args.train_parts and is_deepspeed_zero3_enabled():
        raise ValueError("train_parts: logit_scale cannot be trained under ZeRO-3; use zero2, or remove it")
    if training_args.n_gpu > 1:
        raise ValueError(
            f"{training_args.n_gpu} GPUs need one process each: torchrun --nproc_per_node {training_args.n_gpu} "
            "--no-python alpha-clip train ..., or deepspeed --no_python alpha-clip train ...; or make one GPU visible"
        )
    if tower_args.plan:
        return show_plan(tower_args, pair_args, training_args)
    config = run_config(training_args, tower_args, pair_args)
    with locked_output(training_args, config) as resumption:
        if resumption.finished:
            logger.info("%s is already finished; nothing is changed", training_args.output_dir)
            return 0
        trainer = build_trainer(tower_args, pair_args, training_args, config)
        return train_and_save(trainer, resumption.checkpoint)


def build_trainer(
    tower_args: TowerArguments, pair_args: PairArguments, training_args: TrainingArguments, config: Mapping[str, Any]
) -> RegionTextTrainer:
    """Load and prepare the model, and open the data."""
    with without_partitioning(training_args):
        model, processor = load_model(tower_args)
    set_seed(training_args.seed)  # after loading, which uses a varying number of random values
    if training_args.deepspeed:
        # DeepSpeed cannot broadcast a weight without dimensions; it is saved with CLIP's shape
        model.logit_scale.data = model.logit_scale.data.reshape(1)
    model = prepare_model(model, tower_args)
    logger.info("%s", parameter_table(model, PARTS))
    dataset, images = read_data(pair_args, training_args, processor.image_processor)
    return RegionTextTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        validation_images=images,
        data_collator=RegionTextCollator(processor, unwrap_peft(model).config.text_config.max_position_embeddings),
        # a copy, because padding and truncation change the settings that a tokenizer saves
        processing_class=copy.deepcopy(processor),
        parts=PARTS,
        rates=tower_args.rate_of_part(),
        optimizer_name=tower_args.optimizer,
        run_config=config,
        pair_args=pair_args,
        decay_all=tower_args.decay_all,
    )


def show_plan(tower_args: TowerArguments, pair_args: PairArguments, training_args: TrainingArguments) -> int:
    """Print the estimate of a run. It needs the data, but neither the images nor the weights of the model."""
    indexes = open_indexes(pair_args.data, training_args)
    dataset = RegionTextDataset(indexes, pair_args, TRAIN, training_args.seed, Path(SKIPPED))
    check_not_empty(dataset, indexes, _EXPECTED)
    with torch.device("meta"):
        model = prepare_model(AlphaCLIPModel(read_config(tower_args.model)), tower_args)
    estimate = estimate_memory(model, pair_args, training_args, len(dataset), tower_args.device_tflops)
    print(estimate.table())  # noqa: T201
    return 0


def read_data(
    pair_args: PairArguments, training_args: TrainingArguments, image_processor: AlphaCLIPImageProcessor
) -> tuple[RegionTextDataset, list[DescribedImage]]:
    """The training samples (split train), and the validation images (split val) if the run evaluates.

    Raises:
        ValueError: If the data is missing, damaged, has no region of the split, or too many images are missing.
    """
    indexes = open_indexes(pair_args.data, training_args)

    def dataset(split: str) -> RegionTextDataset:
        skipped = Path(training_args.output_dir) / SKIPPED
        return RegionTextDataset(indexes, pair_args, split, training_args.seed, skipped, image_processor)

    train = dataset(TRAIN)
    check_not_empty(train, indexes, _EXPECTED)
    logger.info("%s: %d training images", ", ".join(pair_args.data), len(train))
    if pair_args.whole_image_rate and not train.has_captions:
        logger.warning("the data has no captions: whole images are never used (whole_image_rate has no effect)")
    check_missing_images(indexes, pair_args.max_missing, training_args)
    if training_args.eval_strategy == "no":
        return train, []
    return train, validation_images(dataset(HELD_OUT), pair_args.eval_images)
