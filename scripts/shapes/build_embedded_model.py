"""Build the embedded model from scratch, as in the paper: a CLIP, then an Alpha-CLIP, then the LLaVA.

    python scripts/shapes/build_embedded_model.py [--work DIR] [--out DIR] [--seed S] [--flag value ...]

This includes scenes, tokenizers and random weights; scripts/shapes/build_clip.py has the first two stages. Finished
stages are kept. The LLaVA is trained in two parts, with a frozen tower in the first. On 2 CPU cores, everything takes
two and a half hours; the same machine and seed give the same model. Further flags are passed to both recipes of the
LLaVA. `WORK/training.png` plots each stage.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from build_clip import (
    ALPHA_SCENES,
    ALPHA_SEED,
    ROOT,
    TOWER,
    build_alpha_clip,
    build_clip,
    claim_work,
    clip_scenes,
    is_built,
    train_stage,
)
from PIL import Image
from transformers import LlamaConfig, LlamaTokenizer, LlavaConfig, LlavaForConditionalGeneration, set_seed

from alpha_clip_commands import region_tune
from alpha_clip_commands.command_line import ArgumentParser, exit_code, say
from mllm.data.shapes import scenes, visual_genome_layout
from mllm.data.shapes.drawing import COLORS, PATTERNS, SHAPES, SIZES
from mllm.data.templates import DESCRIBE_REGION_WORDINGS
from mllm.files import write_file, write_json
from mllm.folders import claim_folder
from mllm.llava import build_llava_processor
from mllm.loading import EMBEDDED_MODEL
from mllm.processing_llava import VICUNA_V1_SYSTEM
from train.plot import draw
from vision_tower import AlphaCLIPImageProcessor, AlphaCLIPVisionConfig, AlphaCLIPVisionModel, Region

TRAIN_SCENES, TRAIN_SEED = ALPHA_SCENES, ALPHA_SEED
SAMPLE_SCENES, SAMPLE_SEED = 3, 11
STAGES = ("clip", "alpha_clip", "llava_pretrained", "llava")  # folders
_SCENE = re.compile(r"scene_\d+\.(png|json)")
VOCABULARY = 640  # 256 bytes, so that any text can be read, and the words of the Shapes world

PROGRAM = "build_embedded_model.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return exit_code(PROGRAM, lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "embedded_model", help="scenes and checkpoints")
    parser.add_argument("--out", type=Path, default=EMBEDDED_MODEL, help="where the finished model goes")
    parser.add_argument("--seed", type=int, default=2, help="of initial weights and training order (default 2)")
    parser.add_argument("--scenes", type=int, help="training scenes of each stage; only to try the script")
    args, recipe_flags = parser.parse_known_args(argv)

    claim_work(args.work)
    # now, and not after hours; the folder also holds a card and scores, which stay
    claim_folder(args.out, "embedded model", known=lambda folder: (folder / scenes.TRAINING_SCENES).is_file())
    sample_scenes = args.out.parent / "scenes"
    claim_folder(sample_scenes, "sample scenes", known=lambda folder: all(map(_SCENE.fullmatch, os.listdir(folder))))
    failed = (
        build_clip(args.work, args.seed, args.scenes)
        or build_alpha_clip(args.work, args.seed, args.scenes)
        or build_llava(args.work, args.seed, args.scenes, recipe_flags)
    )
    if failed:
        return failed
    export(args.work / "llava", args.out)
    # the Alpha-CLIP's scenes are the LLaVA's
    seen = [*clip_scenes(args.work, args.scenes), llava_scenes(args.work, args.scenes)]
    write_file(args.out / scenes.TRAINING_SCENES, b"".join(scene_hashes(*seen)))
    write_sample_scenes(sample_scenes)
    draw([args.work / stage for stage in STAGES], args.work / "training.png")
    say(f"wrote {args.out}; score it with: python scripts/shapes/score_embedded_model.py --model {args.out}")
    return 0


def build_llava(work: Path, seed: int, scene_count: int | None, flags: Sequence[str]) -> int:
    """Train the LLaVA on the Alpha-CLIP's tower, which is frozen at first; returns the exit code."""
    data, pretrained = [llava_scenes(work, scene_count)], work / "llava_pretrained"
    if not is_built(pretrained, seed, data):
        start = work / f"llava_start_{seed}"
        write_start(start, seed, work / "alpha_clip")
        failed = train_stage(region_tune.main, "shapes_embedded_pretrain.yaml", start, data, pretrained, seed, flags)
        if failed:
            return failed
    return train_stage(region_tune.main, "shapes_embedded.yaml", pretrained, data, work / "llava", seed, flags)


def llava_scenes(work: Path, scene_count: int | None = None) -> Path:
    """The folder that the LLaVA is trained on, in Visual Genome's layout, written now where there is none."""
    count = scene_count or TRAIN_SCENES
    data = work / f"shapes_train_{TRAIN_SEED}_{count}"
    if not (data / "image_data.json").exists():
        visual_genome_layout.write(data, count, TRAIN_SEED, "train")
    return data


def write_start(out: Path, seed: int, alpha_clip: Path) -> None:
    """A LLaVA of the embedded model's size with its processor: the tower of an Alpha-CLIP, all else random."""
    tokenizer = train_tokenizer(out / "tokenizer")
    set_seed(seed)
    config = LlavaConfig(
        vision_config=AlphaCLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=2048,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(TOWER["image_size"] // TOWER["patch_size"]) ** 2,
    )
    model = LlavaForConditionalGeneration(config)
    tower = AlphaCLIPVisionModel.from_pretrained(alpha_clip)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.generation_config.update(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=64,
    )
    model.save_pretrained(out)
    image_processor = AlphaCLIPImageProcessor.for_size(TOWER["image_size"], "pad")
    build_llava_processor(image_processor, tokenizer, config).save_pretrained(out)


def train_tokenizer(folder: Path) -> LlamaTokenizer:
    """A SentencePiece tokenizer (BPE with bytes, LLaMA's kind) trained on the sentences of the Shapes world."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(world_sentences()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "tokenizer.model", model.getvalue())
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<pad>"})
    return tokenizer


def world_sentences() -> list[str]:
    """Every question and answer of Shapes in the conversation format."""
    answers = {
        "size": SIZES,
        "pattern": PATTERNS,
        "colour": tuple(COLORS),
        "shape": SHAPES,
        "count": ("3", "4", "5", "6"),
        **dict.fromkeys(scenes.DIRECTIONS, [f"{color} {shape}" for color in COLORS for shape in SHAPES]),
    }
    phrases = [f"a {' '.join(words)}" for words in itertools.product(SIZES, PATTERNS, COLORS, SHAPES)]
    pairs = [(question, phrase) for question in DESCRIBE_REGION_WORDINGS for phrase in phrases]
    pairs += [
        (question, a) for kind, wordings in scenes.QUESTIONS.items() for question in wordings for a in answers[kind]
    ]
    return [VICUNA_V1_SYSTEM] + [f"USER: \n{question} ASSISTANT: {answer}" for question, answer in pairs]


def write_sample_scenes(folder: Path) -> None:
    """Scenes outside the training data, with the box and description of each object."""
    for number, (_, scene) in enumerate(scenes.scenes(SAMPLE_SCENES, SAMPLE_SEED, "test"), 1):
        Image.fromarray(scene.pixels).save(folder / f"scene_{number}.png")
        regions = [
            {**Region.from_box(*Region.from_mask(mask).bounding_box(*mask.shape)).to_json(), "phrase": obj.phrase}
            for obj, mask in zip(scene.objects, scene.masks, strict=True)
        ]
        write_json(folder / f"scene_{number}.json", regions)


def scene_hashes(*folders: Path) -> Iterator[bytes]:
    """The hash of each scene in these folders."""
    for folder in folders:
        for file in sorted(folder.rglob("*.png"), key=lambda file: (len(file.name), file.name)):
            with Image.open(file) as image:
                yield scenes.scene_hash(np.asarray(image))


def export(trained: Path, out: Path) -> None:
    """Copy the trained model to `out` with its weights in bfloat16, half the size; config.json keeps float32, in which
    it runs.

    When run in bfloat16, answers could depend on the batch. Storing the weights in bfloat16 does not change the scores.
    """
    model = LlavaForConditionalGeneration.from_pretrained(trained, dtype=torch.bfloat16)
    model.save_pretrained(out)
    for file in trained.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, out / file.name)
    processor = json.loads((out / "processor_config.json").read_text(encoding="utf-8"))
    processor["image_processor"].pop("auto_map", None)  # the package contains the code already
    write_json(out / "processor_config.json", processor, indent=2)


if __name__ == "__main__":
    raise SystemExit(main())
