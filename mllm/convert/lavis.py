"""`alpha-clip convert-lavis`: LAVIS' BLIP-2 with a CLIP ViT-L, and Alpha-CLIP's tower, to a Hugging Face directory."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alpha_clip_commands.command_line import say
from mllm.blip2 import AlphaBlip2Config, AlphaBlip2ForConditionalGeneration, AlphaBlip2Processor
from mllm.convert.lavis_keys import PROJECTIONS, from_lavis, projection_of, read_lavis
from mllm.folders import check_new, replacing_folder
from mllm.hub import offline_options
from vision_tower import AlphaCLIPImageProcessor
from vision_tower.conversion import StateDict, read_tower

logger = logging.getLogger(__name__)

_LAVIS_IMAGE_SIZE = 224  # pixels. Source: lavis/configs/models/blip2/blip2_pretrain_*vitL.yaml at 506965b
_MODELS = {"t5": AutoModelForSeq2SeqLM, "opt": AutoModelForCausalLM}


def run(args: argparse.Namespace) -> int:
    """Convert, and say so; returns the exit code."""
    check_new(args.out)
    model, processor = convert(args)
    with replacing_folder(args.out, "model", reads=[args.checkpoint], new=True) as folder:
        save(model, processor, folder)
    say(f"wrote {args.out}")
    return 0


def convert(args: argparse.Namespace) -> tuple[AlphaBlip2ForConditionalGeneration, AlphaBlip2Processor]:
    """Read what the arguments name, the largest file last, and put it together."""
    lavis = read_lavis(args.checkpoint)
    hub = offline_options(args.language_model)
    text_config, tokenizer = read_language_config(args.language_model, hub)
    if args.new_projection:
        lavis |= new_projection(lavis, text_config)
    tower = read_tower(args.vision_tower) if args.vision_tower else None
    try:
        fields, weights = from_lavis(lavis, tower, args.blocks)
    except ValueError as error:
        raise ValueError(f"{args.checkpoint}: {error}") from error
    check_language_model(lavis, text_config, args.language_model)
    side = fields["vision_config"].image_size
    if side != _LAVIS_IMAGE_SIZE:
        logger.warning("LAVIS trained this Q-Former on %d pixels, the tower takes %d", _LAVIS_IMAGE_SIZE, side)
    images = AlphaCLIPImageProcessor.for_size(side, "stretch")
    processor = AlphaBlip2Processor(images, tokenizer, num_query_tokens=fields["num_query_tokens"])  # adds <image>
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    if image_token >= text_config.vocab_size:  # resizing would tie Flan-T5's output to its input embedding
        raise ValueError(
            f"expected room for the token <image> in {args.language_model}, got {text_config.vocab_size} embeddings "
            f"for {len(tokenizer)} tokens; take the released T5 or OPT, which have rows to spare"
        )
    config = AlphaBlip2Config(**fields, text_config=text_config, image_token_index=image_token)
    return build(config, weights, read_language_model(args.language_model, text_config, hub)), processor


def read_language_config(name: str, hub: dict) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Configuration of a language model, with what LAVIS changes in it, and its tokenizer.

    Raises:
        ValueError: If there is no such model, or it is neither T5 nor OPT.
    """
    try:
        config, tokenizer = AutoConfig.from_pretrained(name, **hub), AutoTokenizer.from_pretrained(name, **hub)
    except (OSError, ValueError) as error:
        reason = "expected a directory or hub id of a T5 or OPT with its tokenizer"
        raise ValueError(f"cannot load the language model {name}: {reason}") from error
    if config.model_type == "t5":
        config.dense_act_fn = "gelu"  # Source: `Blip2T5.__init__`; Flan-T5's own is the approximate gelu
    elif config.model_type == "opt":
        # Source: `Blip2OPT.__init__`: an answer ends with its line
        config.eos_token_id = tokenizer("\n", add_special_tokens=False).input_ids[0]
    else:
        raise ValueError(f"expected a T5 or OPT language model, got model_type {config.model_type!r} in {name}")
    return config, tokenizer


def new_projection(lavis: StateDict, text_config: PreTrainedConfig) -> StateDict:
    """A random projection under LAVIS' name for it.

    Raises:
        ValueError: If the checkpoint has one, or no query tokens to project.
    """
    if (found := projection_of(lavis)) is not None or "query_tokens" not in lavis:
        raise ValueError(
            f"--new-projection is for a stage-1 checkpoint, this one has {found or 'no query_tokens'}; leave it out"
        )
    logger.warning("the projection is random: the model cannot answer until it is trained")
    name = next(name for name, kind in PROJECTIONS.items() if kind == text_config.model_type)
    linear = nn.Linear(lavis["query_tokens"].shape[-1], text_config.hidden_size)
    return {f"{name}.{kind}": tensor for kind, tensor in linear.state_dict().items()}


def check_language_model(lavis: StateDict, text_config: PreTrainedConfig, name: str) -> None:
    """Raise ValueError unless the checkpoint's projection leads into this language model."""
    projection = projection_of(lavis)
    kind, width = PROJECTIONS[projection], len(lavis[f"{projection}.weight"])
    if (text_config.model_type, text_config.hidden_size) != (kind, width):
        raise ValueError(
            f"the checkpoint's {projection} leads into a {kind} {width} wide, {name} is a {text_config.model_type} "
            f"{text_config.hidden_size} wide; blip2_pretrained_flant5xl_vitL.pth belongs to google/flan-t5-xl"
        )


def read_language_model(name: str, config: PreTrainedConfig, hub: dict) -> PreTrainedModel:
    """The language model, every weight of it, in the dtype in which it is stored.

    Raises:
        ValueError: If a weight is missing or of another shape, or the file is damaged.
    """
    try:
        model, report = _MODELS[config.model_type].from_pretrained(
            name, config=config, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True, **hub
        )
    except SafetensorError as error:
        raise ValueError(f"the weights in {name} are damaged ({error}); were they copied whole?") from error
    problems = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if problems:
        raise ValueError(f"the weights in {name} do not fit its config.json (first: {problems[0]}); is it whole?")
    return model


def build(
    config: AlphaBlip2Config, weights: StateDict, language_model: PreTrainedModel
) -> AlphaBlip2ForConditionalGeneration:
    """The whole model: the language model in its own dtype, what LAVIS' file and the tower gave in float32."""
    with torch.device("meta"):
        model = AlphaBlip2ForConditionalGeneration(config)
    weights |= {f"language_model.{key}": tensor for key, tensor in language_model.state_dict().items()}
    model.load_state_dict(weights, assign=True)  # strict; nothing is copied
    return model


def save(model: AlphaBlip2ForConditionalGeneration, processor: AlphaBlip2Processor, out: Path) -> None:
    """Model and processor; loading takes the language model's dtype (the Q-Former stays float32 beside float16)."""
    model.save_pretrained(out)
    model.config.dtype = model.language_model.dtype  # saving the model has put the first parameter's there
    model.config.text_config._name_or_path = ""  # a place on this machine
    model.config.save_pretrained(out)
    processor.save_pretrained(out)
