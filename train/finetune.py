"""Tune a LLaVA or BLIP-2 with an alpha tower on regions: `region-tune`.

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
from alpha_clip_commands.region_tune import main
from alpha_clip_commands.training.tuning_arguments import DataArguments, ModelArguments
from eval.metrics.captions import freeze_document_frequency
from mllm.data.index import HELD_OUT, TRAIN
from mllm.data.templates import wordings
from mllm.loading import AlphaProcessor, load_processor
from train.arguments import parse_args
from train.lora import parts_of, prepare_model, trained_table
from train.output import held_output
from train.run import (
    log_on_one_process,
    open_index,
    open_indexes,
    refuse_empty,
    refuse_missing_pictures,
    run_command,
    train_and_save,
    what_makes_the_run,
)
from train.sampling import ConversationDataset
from train.skipped import SKIPPED
from train.trainer import RegionTrainer
from train.tuning import memory_estimate
from train.tuning.collators import ConversationCollator
from train.tuning.evaluation import AnswerScorer

logger = logging.getLogger(__name__)


def run(argv: Sequence[str]) -> int:
    """Run one recipe, when its arguments are checked; returns the exit code."""
    return run_command("region-tune", lambda arguments: tune(*parse_args(arguments)), argv)


def tune(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> int:
    """Tune a model; returns the exit code.

    Raises:
        ValueError: If model, data or settings do not fit.
        OSError: If something cannot be read or written.
    """
    log_on_one_process(training_args)
    if model_args.plan:
        return show_plan(model_args, data_args, training_args)
    run = what_makes_the_run(training_args, model_args, data_args)
    with held_output(training_args, run) as resumption:
        if resumption.finished:
            logger.info("%s is already finished; nothing is changed", training_args.output_dir)
            return 0
        trainer = build_trainer(model_args, data_args, training_args, run)
        return train_and_save(trainer, resumption.checkpoint)


def build_trainer(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments, run: Mapping[str, Any]
) -> RegionTrainer:
    """Load and prepare the model, open the data."""
    model, processor = load_model(model_args, training_args)
    set_seed(training_args.seed)  # after loading, which draws more or fewer numbers: adapters always begin the same
    parts = parts_of(model)
    model = prepare_model(model, model_args)
    logger.info("%s", trained_table(model, parts))
    collate = collator(model, processor)
    train, held_out = read_data(data_args, training_args, processor, collate)
    return RegionTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=collate,
        # as loaded: to pad or to cut texts changes what a tokenizer would be saved as
        processing_class=copy.deepcopy(processor),
        parts=parts,
        rates=model_args.rate_of_part(),
        optimizer_name=model_args.optimizer,
        run=run,
        scorer=scorer(processor, train, held_out, data_args),
    )


def show_plan(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> int:
    """Print what the run takes; its data must be there, its pictures and the model's weights need not."""
    processor = load_processor(model_args.model)
    indexes = [open_index(folder) for folder in data_args.data]
    train = ConversationDataset(indexes, data_args, TRAIN, processor.description_wordings, 0, Path(SKIPPED))
    refuse_empty(train, indexes, f"expected regions of the split {TRAIN!r}")
    model = memory_estimate.meta_model(model_args)
    drawn = memory_estimate.plan(
        model,
        model_args,
        training_args,
        data_args.regions_per_image,
        memory_estimate.longest_conversation(train, processor, data_args.max_turns),
        len(train),
        model_args.device_tflops,
    )
    print(drawn.table())  # noqa: T201
    return 0


@step("loading the model")
def load_model(model_args: ModelArguments, training_args: TrainingArguments) -> tuple[PreTrainedModel, AlphaProcessor]:
    """The model to tune, on the CPU unless it is quantised; Trainer or DeepSpeed place it. Under ZeRO-3 each process
    holds its piece of each weight from the start.
    """
    if is_deepspeed_zero3_enabled():
        import deepspeed

        deepspeed.init_distributed()  # else it would cut the weights into one piece: it would count one process
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
    end_answers_at(model, processor.tokenizer.eos_token_id)
    return model, processor


def end_answers_at(model: PreTrainedModel, token: int) -> None:
    """Let generation end at the token that ends the trained answers: released BLIP-2 with OPT ends at a newline only,
    and would go on to the longest answer.
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
    """The training samples (split train), and the held-out ones (split val) where the run evaluates.

    Raises:
        ValueError: If the data is missing, damaged, has no region of the split, or too many pictures are missing.
    """
    indexes = open_indexes(data_args.data, training_args)
    out = Path(training_args.output_dir)
    asked = wordings(data_args.wordings) if data_args.wordings else processor.description_wordings

    def dataset(split: str) -> ConversationDataset:
        samples = ConversationDataset(
            indexes, data_args, split, asked, training_args.seed, out / SKIPPED, collate.check
        )
        refuse_empty(samples, indexes, f"expected regions of the split {split!r}")
        return samples

    train = dataset(TRAIN)
    logger.info("%s: %d training samples", ", ".join(data_args.data), len(train))
    refuse_missing_pictures(indexes, data_args.max_missing, training_args)
    if training_args.eval_strategy == "no":
        return train, None
    held_out = dataset(HELD_OUT)
    spaced = np.linspace(0, len(held_out) - 1, min(len(held_out), data_args.eval_samples)).astype(int)
    return train, Subset(held_out, spaced.tolist())


def collator(model: PreTrainedModel, processor: AlphaProcessor) -> ConversationCollator:
    """The collator for a model, with the length that its language model reads."""
    text = model.config.get_text_config()
    limit = None if text.is_encoder_decoder else text.max_position_embeddings
    return ConversationCollator(processor, text.is_encoder_decoder, limit)


def scorer(
    processor: AlphaProcessor,
    train: ConversationDataset,
    held_out: Subset | None,
    data_args: DataArguments,
) -> AnswerScorer | None:
    """What answers and scores the held-out questions; None where the run does not evaluate."""
    if held_out is None or not data_args.eval_metrics:
        return None
    conversations = [turns for sample in held_out for turns in sample]
    described = [turns[0]["content"][-1]["text"] in train.wordings for turns in conversations]
    frequency = None
    if "CIDEr" in data_args.eval_metrics:
        phrases = [phrase for index in train.indexes for phrase in index.descriptions(HELD_OUT)]
        frequency = freeze_document_frequency([[phrase] for phrase in phrases])
    return AnswerScorer(processor, conversations, described, frequency)


if __name__ == "__main__":
    raise SystemExit(main())
