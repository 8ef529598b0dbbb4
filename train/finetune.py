"""Fine-tune a LLaVA or BLIP-2 with an alpha tower on regions: `region-tune`.

    region-tune RECIPE --data DIR --output_dir OUT [--flag value ...]

Parse, seed, model, freeze and LoRA, data, trainer, train, save.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Subset
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

import mllm
from alpha_clip_commands.progress import step
from alpha_clip_commands.training.tuning_arguments import DataArguments, ModelArguments
from eval.metrics.captions import freeze_document_frequency
from mllm.data.index import HELD_OUT, TRAIN
from mllm.data.templates import wordings
from mllm.loading import AlphaProcessor, load_processor
from train.output import locked_output
from train.parts import parameter_table
from train.process import log_on_main_process, run_command
from train.run import check_missing_images, check_not_empty, open_index, open_indexes, run_config, train_and_save
from train.skipped import SKIPPED
from train.tuning.arguments import parse_args
from train.tuning.collators import ConversationCollator
from train.tuning.conversations import ConversationDataset
from train.tuning.evaluation import AnswerScorer
from train.tuning.lora import parts_of, prepare_model
from train.tuning.memory_estimate import estimate_memory, longest_conversation, meta_model
from train.tuning.trainer import ConversationTrainer

logger = logging.getLogger(__name__)


def run(argv: Sequence[str]) -> int:
    """Run a recipe; returns the exit code."""
    return run_command("region-tune", lambda arguments: tune(*parse_args(arguments)), argv)


def tune(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> int:
    """Tune a model; returns the exit code.

    Raises:
        ValueError: If model, data and settings do not fit together.
        OSError: If a file cannot be read or written.
    """
    log_on_main_process(training_args)
    if model_args.plan:
        return show_plan(model_args, data_args, training_args)
    config = run_config(training_args, model_args, data_args)
    with locked_output(training_args, config) as resumption:
        if resumption.finished:
            logger.info("%s is already finished; nothing is changed", training_args.output_dir)
            return 0
        trainer = build_trainer(model_args, data_args, training_args, config)
        return train_and_save(trainer, resumption.checkpoint)


def build_trainer(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments, config: Mapping[str, Any]
) -> ConversationTrainer:
    """Load and prepare the model, and open the data."""
    model, processor = load_model(model_args, training_args)
    set_seed(training_args.seed)  # after loading, which uses a varying number of random values
    parts = parts_of(model)
    model = prepare_model(model, model_args)
    logger.info("%s", parameter_table(model, parts))
    collate = build_collator(model, processor)
    train, validation = read_data(data_args, training_args, processor, collate)
    return ConversationTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collate,
        # a copy, because padding and truncation change the settings that a tokenizer saves
        processing_class=copy.deepcopy(processor),
        parts=parts,
        rates=model_args.rate_of_part(),
        optimizer_name=model_args.optimizer,
        run_config=config,
        scorer=build_scorer(processor, train, validation, data_args),
    )


def show_plan(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> int:
    """Print the estimate of a run. It needs the data, but neither the images nor the weights of the model."""
    processor = load_processor(model_args.model)
    indexes = [open_index(folder) for folder in data_args.data]
    train = ConversationDataset(indexes, data_args, TRAIN, processor.description_wordings, 0, Path(SKIPPED))
    check_not_empty(train, indexes, f"expected regions in the split {TRAIN!r}")
    tokens = longest_conversation(train, processor, data_args.max_turns)
    conversations = data_args.regions_per_image
    estimate = estimate_memory(
        meta_model(model_args), model_args, training_args, conversations, tokens, samples=len(train)
    )
    print(estimate.table())  # noqa: T201
    return 0


@step("loading the model")
def load_model(model_args: ModelArguments, training_args: TrainingArguments) -> tuple[PreTrainedModel, AlphaProcessor]:
    """The model to fine-tune, on the CPU unless it is quantized; Trainer or DeepSpeed move it. Under ZeRO-3 the weights
    are partitioned from the start.
    """
    if is_deepspeed_zero3_enabled():
        import deepspeed

        deepspeed.init_distributed()  # otherwise it would partition for a single process
    device = {"device": "cpu"}
    if model_args.load_in:
        device = {"device_map": {"": str(training_args.device)}}
    model, processor = mllm.load(
        model_args.model,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        alpha_weights=model_args.alpha_weights,
        load_in=model_args.load_in,
        **device,
    )
    add_eos_token(model, processor.tokenizer.eos_token_id)
    return model, processor


def add_eos_token(model: PreTrainedModel, token: int) -> None:
    """Stop generation at the token that ends the training answers. The released BLIP-2 with OPT stops only at a newline
    and would continue to the maximum length.
    """
    text = model.config.get_text_config()
    known = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    if token not in known:
        text.eos_token_id = [*(end for end in known if end is not None), token]


def read_data(
    data_args: DataArguments,
    training_args: TrainingArguments,
    processor: AlphaProcessor,
    collate: ConversationCollator,
) -> tuple[ConversationDataset, Subset | None]:
    """The training samples (split train), and the validation samples (split val) if the run evaluates.

    Raises:
        ValueError: If the data is missing, damaged, has no region of the split, or too many images are missing.
    """
    indexes = open_indexes(data_args.data, training_args)
    out = Path(training_args.output_dir)
    requests = wordings(data_args.wordings) if data_args.wordings else processor.description_wordings

    def dataset(split: str) -> ConversationDataset:
        samples = ConversationDataset(
            indexes, data_args, split, requests, training_args.seed, out / SKIPPED, collate.check
        )
        check_not_empty(samples, indexes, f"expected regions in the split {split!r}")
        return samples

    train = dataset(TRAIN)
    logger.info("%s: %d training samples", ", ".join(data_args.data), len(train))
    check_missing_images(indexes, data_args.max_missing, training_args)
    if training_args.eval_strategy == "no":
        return train, None
    validation = dataset(HELD_OUT)
    spaced = np.linspace(0, len(validation) - 1, min(len(validation), data_args.eval_samples)).astype(int)
    return train, Subset(validation, spaced.tolist())


def build_collator(model: PreTrainedModel, processor: AlphaProcessor) -> ConversationCollator:
    """The collator for a model, with the maximum length of its language model."""
    text = model.config.get_text_config()
    limit = None if text.is_encoder_decoder else text.max_position_embeddings
    return ConversationCollator(processor, text.is_encoder_decoder, limit)


def build_scorer(
    processor: AlphaProcessor,
    train: ConversationDataset,
    validation: Subset | None,
    data_args: DataArguments,
) -> AnswerScorer | None:
    """Answers and scores the validation questions; None if the run does not evaluate."""
    if validation is None or not data_args.eval_metrics:
        return None
    conversations = [turns for sample in validation for turns in sample]
    described = [turns[0]["content"][-1]["text"] in train.wordings for turns in conversations]
    frequency = None
    if "cider" in data_args.eval_metrics:
        phrases = [phrase for index in train.indexes for phrase in index.descriptions(HELD_OUT)]
        frequency = freeze_document_frequency([[phrase] for phrase in phrases])
    return AnswerScorer(processor, conversations, described, frequency)
