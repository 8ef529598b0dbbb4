"""Train a CLIP on Shapes from random weights, and an Alpha-CLIP from it, as in the paper.

    python scripts/shapes/build_clip.py [--work DIR] [--seed S] [--scenes N] [--flag value ...]

Writes `WORK/clip` and `WORK/alpha_clip`, each an AlphaCLIPModel with its processor. Further flags are passed to the
first recipe (shapes_clip.yaml). Both models know synthetic scenes only.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import CLIPTextConfig, CLIPTokenizer, set_seed

from alpha_clip_commands import region_tune
from alpha_clip_commands.command_line import ArgumentParser, exit_code
from mllm.data.shapes import grit_layout
from mllm.data.shapes.drawing import COLORS, MAX_OBJECTS, MIN_OBJECTS, PATTERNS, SHAPES, SIZES
from mllm.folders import claim_folder
from train.output import TRAINING_RECORD, read_training_record
from vision_tower import (
    AlphaCLIPConfig,
    AlphaCLIPImageProcessor,
    AlphaCLIPModel,
    AlphaCLIPProcessor,
    AlphaCLIPVisionConfig,
)

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "train" / "recipes"
CLIP_SCENES, CLIP_OBJECTS, ALPHA_SCENES = 24_000, 16_000, 20_000
CLIP_SEED, ALPHA_SEED = 101, 1  # of the scenes
WIDTH, TEXT_WIDTH = 192, 128
TOWER = {  # the embedded model's
    "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 6, "num_attention_heads": 6,
    "image_size": 96, "patch_size": 12, "projection_dim": WIDTH,
}  # fmt: skip
CONTEXT = 64  # tokens; the longest caption, six objects, has 37

PROGRAM = "build_clip.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return exit_code(PROGRAM, lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build" / "embedded_model",
        help="scenes and models (default: build/embedded_model)",
    )
    parser.add_argument("--seed", type=int, default=2, help="of initial weights and training order (default 2)")
    parser.add_argument(
        "--scenes", type=int, help="training scenes of each stage, to try the script; 128 or more make a batch"
    )
    parser.add_argument("--only-clip", action="store_true", help="stop after CLIP")
    args, recipe_flags = parser.parse_known_args(argv)
    claim_work(args.work)
    failed = build_clip(args.work, args.seed, args.scenes, recipe_flags)
    return failed or (0 if args.only_clip else build_alpha_clip(args.work, args.seed, args.scenes))


def claim_work(work: Path) -> None:
    """Make the folder of scenes and models this project's.

    Raises:
        ValueError: If it holds anything else.
    """
    scenes = ("grit_*/dataset.json", "shapes_*/dataset.json")
    claim_folder(work, "build", known=lambda folder: any(any(folder.glob(pattern)) for pattern in scenes))


def build_clip(work: Path, seed: int, scenes: int | None = None, flags: Sequence[str] = ()) -> int:
    """Train the CLIP on `scenes` scenes of each kind; returns the exit code. A finished model in the folder is kept."""
    data = clip_scenes(work, scenes)
    if is_built(work / "clip", seed, data):
        return 0
    start = work / f"clip_start_{seed}"
    write_start(start, seed)
    return train_stage(region_tune.train_alpha_clip, "shapes_clip.yaml", start, data, work / "clip", seed, flags)


def build_alpha_clip(work: Path, seed: int, scenes: int | None = None) -> int:
    """Train the Alpha-CLIP from the CLIP; returns the exit code. A finished model in the folder is kept."""
    data = [scenes_folder(work, scenes or ALPHA_SCENES, ALPHA_SEED)]
    if is_built(work / "alpha_clip", seed, data):
        return 0
    flags = ["--whole_image_rate", "0.25"]  # docs/ablations.md: better on whole images, hardly worse on regions
    return train_stage(
        region_tune.train_alpha_clip, "shapes_alpha_clip.yaml", work / "clip", data, work / "alpha_clip", seed, flags
    )


def is_built(folder: Path, seed: int, data: Sequence[Path]) -> bool:
    """Whether the folder contains a finished model of this seed and these scenes.

    Raises:
        ValueError: If it contains a model of another seed or other scenes.
    """
    record = folder / TRAINING_RECORD
    if not record.exists():
        return False
    run = read_training_record(record)["run_config"]
    built, asked = (run["seed"], sorted(Path(name).name for name in run["data"])), (seed, sorted(d.name for d in data))
    if built != asked:
        raise ValueError(f"{folder} was built with seed and scenes {built}, requested {asked}; pass another --work")
    return True


def clip_scenes(work: Path, scenes: int | None = None) -> list[Path]:
    """The folders that the CLIP is trained on: scenes, and objects alone. The captions of scenes already differ in
    their colors; without single objects, the CLIP does not learn to distinguish shapes and patterns.
    """
    return [
        scenes_folder(work, scenes or CLIP_SCENES, CLIP_SEED, min_objects=1),
        scenes_folder(work, scenes or CLIP_OBJECTS, CLIP_SEED + 1, min_objects=1, max_objects=1),
    ]


def scenes_folder(
    work: Path,
    count: int,
    seed: int,
    split: str = "train",
    min_objects: int = MIN_OBJECTS,
    max_objects: int = MAX_OBJECTS,
) -> Path:
    """A folder of synthetic scenes in GRIT's layout, written if it does not exist."""
    folder = work / f"grit_{split}_{seed}_{count}_{min_objects}_{max_objects}"
    if not (folder / "dataset.json").exists():
        grit_layout.write(folder, count, seed, split, min_objects=min_objects, max_objects=max_objects)
    return folder


def write_start(out: Path, seed: int) -> None:
    """A randomly initialized CLIP whose image tower is the embedded model's, with its processor."""
    tokenizer = train_tokenizer()
    set_seed(seed)
    config = AlphaCLIPConfig(
        vision_config=AlphaCLIPVisionConfig(**TOWER),
        text_config=CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        projection_dim=WIDTH,
    )
    AlphaCLIPModel(config).save_pretrained(out)
    AlphaCLIPProcessor(AlphaCLIPImageProcessor.for_size(TOWER["image_size"], "pad"), tokenizer).save_pretrained(out)


def train_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of bytes and the words of Shapes."""
    objects = [f"a {' '.join(words)}" for words in itertools.product(SIZES, PATTERNS, COLORS, SHAPES)]
    empty = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])
    tokenizer = empty.train_new_from_iterator([", ".join(objects)], vocab_size=1000)
    tokenizer.model_max_length = CONTEXT
    return tokenizer


def train_stage(
    train: Callable[[Sequence[str]], int],
    recipe: str,
    model: Path,
    data: Sequence[Path],
    out: Path,
    seed: int,
    flags: Sequence[str],
) -> int:
    """Run a training's `main` by a recipe; returns its exit code."""
    run = {"--model": [model], "--data": data, "--output_dir": [out], "--seed": [seed]}
    words = [str(word) for flag, values in run.items() for word in (flag, *values)]
    return train([str(RECIPES / recipe), *words, *flags])


if __name__ == "__main__":
    raise SystemExit(main())
