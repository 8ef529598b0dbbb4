"""Tune a LLaVA or BLIP-2 with an alpha tower on regions.

    python -m train.finetune train/recipes/RECIPE.yaml --data DIR --output_dir OUT [--flag value ...]

Parse, seed, model, freeze, data, trainer, train, save.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

import mllm
from mllm.data import visual_genome
from mllm.loading import FAMILIES, AlphaProcessor
from train.arguments import DataArguments, ModelArguments, parse_args
from train.collators import ConversationCollator
from train.optimizers import MuonWithAdamW
from train.sampling import ConversationDataset, RegionFacts, group_by_region

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one recipe; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        model_args, data_args, training_args = parse_args(sys.argv[1:] if argv is None else argv)
        facts = read_facts(data_args)
        set_seed(training_args.seed)
        model, processor = mllm.load(
            model_args.model, device="cpu", dtype="float32", attn_implementation=model_args.attn_implementation
        )
        freeze(model, model_args.train_parts)
        end_answers_at(model, processor.tokenizer.eos_token_id)
        optimizer = build_optimizer(model, model_args.optimizer, training_args)
    except (ValueError, OSError) as error:
        print(f"region-tune: error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    wordings = processor.description_wordings
    trainer = Trainer(
        model=model,
        optimizers=(optimizer, None),
        args=training_args,
        train_dataset=ConversationDataset(
            facts, data_args.max_turns, data_args.weight_of_kind(), data_args.mask_share, wordings
        ),
        data_collator=ConversationCollator(processor),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    save(trainer, processor, model_args, data_args)
    return 0


def freeze(model: PreTrainedModel, train_parts: Sequence[str]) -> None:
    """Train the named parts in full (all of them without a name), freeze the rest, and log the table of both.

    Raises:
        ValueError: If the model has no such part, or is one whose answers this trainer cannot label.
    """
    if model.config.get_text_config().is_encoder_decoder:
        raise ValueError("expected a decoder-only language model (LLaMA, OPT), got an encoder-decoder (T5)")
    parts = FAMILIES[model.config.model_type].PARTS
    if unknown := set(train_parts) - parts.keys():
        raise ValueError(f"train_parts: expected names out of {', '.join(parts)}, got {sorted(unknown)}")
    for part, prefix in parts.items():
        trained = part in train_parts or not train_parts
        members = [p for name, p in model.named_parameters() if name == prefix or name.startswith(f"{prefix}.")]
        for parameter in members:
            parameter.requires_grad_(trained)
        count = sum(parameter.numel() for parameter in members)
        logger.info("%-24s %12s parameters  %s", part, f"{count:,}", "trained" if trained else "frozen")


def end_answers_at(model: PreTrainedModel, token: int) -> None:
    """Let generation end at the token that ends the trained answers: released BLIP-2 with OPT ends at a newline only,
    and would go on to the longest answer.
    """
    text = model.config.get_text_config()
    known = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    if token not in known:
        text.eos_token_id = [*(end for end in known if end is not None), token]


def build_optimizer(model: PreTrainedModel, name: str, args: TrainingArguments) -> MuonWithAdamW | None:
    """The recipe's own optimizer, or None for Trainer's."""
    if name == "trainer":
        return None
    betas = (args.adam_beta1, args.adam_beta2)
    return MuonWithAdamW(model, args.learning_rate, args.weight_decay, betas, args.adam_epsilon)


def read_facts(data_args: DataArguments) -> list[RegionFacts]:
    """The training regions with their descriptions and questions; questions about the whole image are among them.

    Raises:
        ValueError: If the data is missing, damaged, or another split than `train`.
    """
    root = Path(data_args.data)
    refuse_test_split(root)
    forms = ("box", "mask") if data_args.region_input == "mixed" else (data_args.region_input,)
    readings = [visual_genome.read_regions(root, region_input=form) for form in forms]
    if (root / "question_answers.json").exists():
        readings.append(visual_genome.read_region_questions(root, region_input=forms[0]))
        readings.append(visual_genome.read_free_questions(root))
    facts = group_by_region(*readings)
    logger.info("%s: %d regions, %d turns", root, len(facts), sum(len(entry.turns) for entry in facts))
    return facts


def refuse_test_split(root: Path) -> None:
    """Raise ValueError if the folder says that it is another split than `train`; real Visual Genome folders say
    nothing.
    """
    record = root / "dataset.json"
    if record.exists() and (split := json.loads(record.read_text(encoding="utf-8")).get("split")) != "train":
        raise ValueError(f"{root} holds the split {split!r}: training on it would make every later score worthless")


def save(trainer: Trainer, processor: AlphaProcessor, model_args: ModelArguments, data_args: DataArguments) -> None:
    """Write the model, its processor and the resolved arguments to the output folder."""
    out = trainer.args.output_dir
    trainer.save_model(out)
    if trainer.is_world_process_zero():
        processor.save_pretrained(out)
        record = {
            "model": vars(model_args),
            "data": vars(data_args),
            "training": trainer.args.to_sanitized_dict(),
            "log": trainer.state.log_history,
        }
        with open(os.path.join(out, "training_record.json"), "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    raise SystemExit(main())
