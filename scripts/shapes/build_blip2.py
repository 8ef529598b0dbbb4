"""Train a small BLIP-2 on the Shapes world: proof that a region passes tower, Q-Former and language model.

    python scripts/shapes/build_blip2.py [--work DIR] [--seed S] [--scenes N] [--test-scenes N]

The tower is the embedded model's, without its last block, as LAVIS uses CLIP's; everything else begins at random. The
model and its scores stay in the work folder: it is a proof, and is not shipped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from build_clip import claim_work
from torch import nn
from transformers import Blip2QFormerConfig, OPTConfig, set_seed

import mllm
from alpha_clip_commands import region_tune
from alpha_clip_commands.command_line import ArgumentParser, exit_code
from eval.generate import generate
from eval.metrics.literal_match import literal_match
from eval.views import with_whole_image
from mllm.blip2 import (
    AlphaBlip2Config,
    AlphaBlip2ForConditionalGeneration,
    AlphaBlip2Processor,
    AlphaCLIPBlip2VisionConfig,
    load_alpha_weights,
)
from mllm.data.readers.visual_genome import read_regions
from mllm.data.shapes import visual_genome_layout
from mllm.files import write_json
from mllm.inference import RegionChat
from mllm.loading import EMBEDDED_MODEL
from vision_tower import AlphaCLIPImageProcessor

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "train" / "recipes" / "shapes_blip2.yaml"
TRAIN_SCENES, TRAIN_SEED, TEST_SEED = 20_000, 1, 2
WIDTH, QUERIES = 192, 16

PROGRAM = "build_blip2.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return exit_code(PROGRAM, lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "shapes_blip2", help="scenes, model and scores")
    parser.add_argument("--seed", type=int, default=1, help="seed of initial weights and training order")
    parser.add_argument("--scenes", type=int, default=TRAIN_SCENES, help="training scenes")
    parser.add_argument("--test-scenes", type=int, default=200, help="scenes it is scored on")
    args, recipe_flags = parser.parse_known_args(argv)

    claim_work(args.work)
    data, start, out = args.work / f"shapes_train_{TRAIN_SEED}_{args.scenes}", args.work / "start", args.work / "model"
    if not (data / "image_data.json").exists():
        visual_genome_layout.write(data, args.scenes, TRAIN_SEED, "train")
    write_start(start, args.work / "tower", args.seed)
    flags = {"--model": start, "--data": data, "--output_dir": out, "--seed": args.seed}
    failed = region_tune.main([str(RECIPE), *(str(part) for flag in flags.items() for part in flag), *recipe_flags])
    if failed:
        return failed
    scores = score(out, args.work / f"shapes_test_{TEST_SEED}_{args.test_scenes}", args.test_scenes)
    write_json(args.work / "scores.json", scores)
    for name, value in scores.items():
        print(f"{name:32} {value:.1%}")
    return 0


def write_start(out: Path, tower: Path, seed: int) -> None:
    """The BLIP-2 that training begins with, and its processor; `tower` gets the embedded model's tower."""
    embedded, llava_processor = mllm.load(EMBEDDED_MODEL, device="cpu")
    embedded.model.vision_tower.save_pretrained(tower)
    tokenizer = llava_processor.tokenizer
    vision = embedded.config.vision_config.to_dict()
    vision.pop("model_type")
    vision["num_hidden_layers"] -= 1  # what LLaVA reads, too: the last block but one
    set_seed(seed)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 6}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model = AlphaBlip2ForConditionalGeneration(
        AlphaBlip2Config(
            vision_config=AlphaCLIPBlip2VisionConfig(**vision),
            qformer_config=Blip2QFormerConfig(
                intermediate_size=4 * WIDTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes
            ),
            text_config=OPTConfig(
                vocab_size=len(tokenizer),
                ffn_dim=4 * WIDTH,
                word_embed_proj_dim=WIDTH,
                max_position_embeddings=512,
                dropout=0.0,
                **sizes,
                **ids,
            ),
            num_query_tokens=QUERIES,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
    )
    nn.init.normal_(model.query_tokens, std=0.02)  # zero in a fresh model: all queries would stay alike
    load_alpha_weights(model, tower)
    model.save_pretrained(out)
    images = AlphaCLIPImageProcessor.for_size(model.config.vision_config.image_size, "stretch")
    AlphaBlip2Processor(images, tokenizer, num_query_tokens=QUERIES).save_pretrained(out)


def score(model: Path, data: Path, scenes: int) -> dict[str, float]:
    """Exactly right descriptions of scenes it never saw, by box, by mask, and with the whole image as region."""
    if not (data / "image_data.json").exists():
        visual_genome_layout.write(data, scenes, TEST_SEED, "test")
    chat = RegionChat(*mllm.load(model, device="cpu"))
    boxes, masks = (list(read_regions(data, region_type=form)) for form in ("box", "mask"))
    sets = {"box": boxes, "mask": masks, "whole image": with_whole_image(boxes)}
    return {
        f"description, {name}": literal_match(
            generate(chat, samples, batch_size=64, label=name), [sample.references for sample in samples]
        )
        for name, samples in sets.items()
    }


if __name__ == "__main__":
    raise SystemExit(main())
