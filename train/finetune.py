"""Tune a LLaVA or BLIP-2 with an alpha tower on regions: `region-tune`.

    region-tune RECIPE.yaml --data DIR --output_dir OUT [--flag value ...]

Parse, seed, model, freeze and LoRA, data, trainer, train, save.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

import mllm
from eval.metrics.captions import freeze_document_frequency
from mllm.data.index import HELD_OUT, TRAIN, RegionIndex, index_folder
from mllm.data.prepare import make_index
from mllm.data.templates import wordings
from mllm.loading import AlphaProcessor, load_processor
from train import plan
from train.arguments import DataArguments, ModelArguments, parse_args
from train.collators import ConversationCollator
from train.evaluation import AnswerScorer
from train.lora import parts_of, prepare_model, trained_table
from train.sampling import ConversationDataset, skipped_pictures
from train.trainer import STOPPED, RegionTrainer, checkpoint_to_resume

logger = logging.getLogger(__name__)

# What may differ between a run and its continuation: where and how it runs, not what it computes
_NOT_OF_THE_RUN = {
    "plan", "device_tflops", "output_dir", "local_rank", "deepspeed", "disable_tqdm", "report_to", "run_name",
    "logging_steps", "logging_first_step", "save_steps", "save_total_limit", "resume_from_checkpoint",
    "dataloader_num_workers", "dataloader_pin_memory", "use_cpu", "push_to_hub", "hub_token", "hub_model_id",
    "log_level", "ddp_backend", "ddp_timeout",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one recipe; returns the exit code."""
    try:
        return tune(*parse_args(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError) as error:
        # of a worker's error the last line, below its traceback
        message = str(error).strip().splitlines()[-1] if str(error).startswith("Caught ") else str(error)
        print(f"region-tune: error: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201
        return 2
    finally:
        _leave_process_group()


def tune(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> int:
    """Tune a model; returns the exit code.

    Raises:
        ValueError: If model, data or settings do not fit.
        OSError: If something cannot be read or written.
    """
    _log_on_one_process(training_args)
    if model_args.plan:
        return show_plan(model_args, data_args, training_args)
    run = what_makes_the_run(model_args, data_args, training_args)
    checkpoint = checkpoint_to_resume(training_args.output_dir, run)
    model, processor = load_model(model_args, training_args)
    set_seed(training_args.seed)  # after loading, which draws more or fewer numbers: adapters always begin the same
    parts = parts_of(model)
    model = prepare_model(model, model_args)
    logger.info("%s", trained_table(model, parts))
    train, held_out = read_data(data_args, training_args, processor)
    trainer = RegionTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=collator(model, processor),
        processing_class=processor,
        parts=parts,
        rates=model_args.rate_of_part(),
        optimizer_name=model_args.optimizer,
        run=run,
        scorer=scorer(processor, train, held_out, data_args),
    )
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.state.global_step < trainer.state.max_steps:
        logger.warning("stopped at step %d by SIGTERM; the same command goes on", trainer.state.global_step)
        return STOPPED
    save(trainer, processor, run)
    return 0


def show_plan(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> int:
    """Print what the run takes; its data must be there, its pictures and the model's weights need not."""
    processor = load_processor(model_args.model)
    indexes = [open_index(folder) for folder in data_args.data]
    train = ConversationDataset(indexes, data_args, TRAIN, processor.description_wordings, 0, Path("skipped.jsonl"))
    model = plan.meta_model(model_args)
    drawn = plan.plan(
        model,
        model_args,
        training_args,
        data_args.regions_per_image,
        plan.longest_conversation(train, processor, data_args.max_turns),
        len(train),
        model_args.device_tflops,
    )
    print(drawn.table())  # noqa: T201
    return 0


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
    data_args: DataArguments, training_args: TrainingArguments, processor: AlphaProcessor
) -> tuple[ConversationDataset, Subset | None]:
    """The training samples (split train), and the held-out ones (split val) where the run evaluates.

    Raises:
        ValueError: If the data is missing, damaged, has no region of the split, or too many pictures are missing.
    """
    with training_args.main_process_first(desc="the index of the data"):
        indexes = [open_index(folder) for folder in data_args.data]
    out = Path(training_args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    asked = wordings(data_args.wordings) if data_args.wordings else processor.description_wordings

    def dataset(split: str) -> ConversationDataset:
        samples = ConversationDataset(indexes, data_args, split, asked, training_args.seed, out / "skipped.jsonl")
        if not len(samples):
            found = sorted({name for index in indexes for name in index.record["splits"]})
            raise ValueError(f"expected regions of the split {split!r}, the data has only {', '.join(found)}")
        return samples

    train = dataset(TRAIN)
    logger.info("%s: %d training samples", ", ".join(data_args.data), len(train))
    refuse_missing_pictures(indexes, data_args, out)
    if training_args.eval_strategy == "no":
        return train, None
    held_out = dataset(HELD_OUT)
    spaced = np.linspace(0, len(held_out) - 1, min(len(held_out), data_args.eval_samples)).astype(int)
    return train, Subset(held_out, spaced.tolist())


def open_index(folder: str) -> RegionIndex:
    """The index of a data folder, made now where there is none."""
    if index_folder(folder) is None:
        make_index(folder)
    return RegionIndex(folder)


def refuse_missing_pictures(indexes: Sequence[RegionIndex], data_args: DataArguments, out: Path) -> None:
    """List the missing pictures of the training split in `missing_images.txt`.

    Raises:
        ValueError: If they are more than `max_missing` allows.
    """
    missing = [path for index in indexes for path in index.missing_pictures(TRAIN)]
    pictures = sum(int((index.split_of_picture == TRAIN).sum()) for index in indexes)
    if not missing:
        return
    listed = out / "missing_images.txt"
    listed.write_text("\n".join(missing) + "\n", encoding="utf-8")
    if len(missing) > data_args.max_missing * pictures:
        raise ValueError(
            f"{len(missing)} of {pictures} training pictures are missing (first: {missing[0]}; all: {listed}), more "
            f"than max_missing ({data_args.max_missing:.1%}) allows"
        )
    logger.warning("%d of %d training pictures are missing, left out; listed in %s", len(missing), pictures, listed)


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


def what_makes_the_run(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
) -> dict[str, Any]:
    """The settings that decide what is learned: a checkpoint goes on only under the same ones."""
    training = {k: v for k, v in training_args.to_sanitized_dict().items() if k not in _NOT_OF_THE_RUN}
    return {**training, **vars(model_args), **vars(data_args), "world_size": training_args.world_size}


def save(trainer: RegionTrainer, processor: AlphaProcessor, run: dict[str, Any]) -> None:
    """Write the model or its adapter, the processor, and what was done to the output folder."""
    out = trainer.args.output_dir
    trainer.save_model(out)
    if trainer.is_world_process_zero():
        processor.save_pretrained(out)
        skipped = sorted(skipped_pictures(trainer.train_dataset.skipped))
        record = {"run": run, "skipped_pictures": skipped, "log": trainer.state.log_history}
        with open(os.path.join(out, "training_record.json"), "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)


def _log_on_one_process(args: TrainingArguments) -> None:
    # DeepSpeed's calls, thousands of times
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    logging.basicConfig(level=logging.INFO if args.process_index == 0 else logging.ERROR, format="%(message)s")


def _leave_process_group() -> None:
    """Leave it together, with nothing of the run alive: else a process may end with SIGABRT under ZeRO-3."""
    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())
