"""Does what the tower learned reach the language model? The same small LLaVA tuned on each tower, which is frozen.

    python scripts/shapes/ablate_llava.py [--work DIR] [--pairs 8000] [--steps 300] [--seeds 1]

Takes the towers of scripts/shapes/ablate_alpha_clip.py (same --pairs), each at its best learning rate, and the CLIP
that they started from; projector and language model are randomly initialized. The score is the share of regions of test
scenes that are described exactly; when another object's region is shown, that object must be described.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ablate_alpha_clip import OURS, RELEASED, Ablation
from build_clip import RECIPES, ROOT, claim_work
from build_embedded_model import write_start

import mllm
from alpha_clip_commands import region_tune
from alpha_clip_commands.command_line import ArgumentParser, exit_code
from eval.generate import generate
from eval.metrics.literal_match import literal_match
from eval.views import other_region_references, with_other_region, with_whole_image
from mllm.data.readers.visual_genome import read_regions
from mllm.data.shapes import visual_genome_layout
from mllm.files import write_json
from mllm.inference import RegionChat

TOWERS = (RELEASED, OURS)

PROGRAM = "ablate_llava.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return exit_code(PROGRAM, lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "embedded_model", help="with CLIP and towers")
    parser.add_argument("--pairs", type=int, default=8000, help="of the towers")
    parser.add_argument("--scenes", type=int, default=8000, help="of the towers' training")
    parser.add_argument("--steps", type=int, default=300, help="of LLaVA's training, 64 conversations each")
    parser.add_argument("--seeds", type=int, default=1, help="towers and runs of each variant")
    parser.add_argument("--towers", nargs="*", default=list(TOWERS), help="variants of ablate_alpha_clip.py")
    args = parser.parse_args(argv)
    claim_work(args.work)
    ablation = Ablation(args.work, args.pairs, args.scenes, jobs=1)
    data = {split: args.work / f"llava_{split}" for split in ("train", "test")}
    for split, count in (("train", 8000), ("test", 200)):
        if not (data[split] / "dataset.json").exists():
            visual_genome_layout.write(data[split], count, {"train": 1, "test": 2}[split], split)
    rates = ablation.best_rates([name for name in (RELEASED, OURS) if name in args.towers or name == OURS])
    towers = {"CLIP, alpha zero": {1: ablation.clip}}
    for name in args.towers:
        rate = rates.get(name, rates[OURS])
        towers[name] = {seed: ablation.folder((name, rate, seed)) for seed in range(1, args.seeds + 1)}
    columns = "description, box", "description, mask", "the other region's", "whole image"
    print(f"| tower | seed | {' | '.join(columns)} |\n|---|---{'|---' * len(columns)}|")
    for name, of_seed in towers.items():
        for seed, tower in of_seed.items():
            out = ablation.out / f"llava_{args.steps}" / tower.name
            scores = tune_and_score(tower, out, data, args.steps, seed)
            print(f"| {name} | {seed} | {' | '.join(f'{100 * score:.1f}' for score in scores.values())} |", flush=True)
    return 0


def tune_and_score(tower: Path, out: Path, data: dict[str, Path], steps: int, seed: int) -> dict[str, float]:
    """Scores of a LLaVA tuned on a frozen tower; kept beside it."""
    kept = out / "scores.json"
    if not kept.exists():
        start = out.with_name(f"{out.name}_start")
        write_start(start, seed, tower)
        flags = {"--model": start, "--data": data["train"], "--output_dir": out, "--seed": seed, "--max_steps": steps}
        words = [str(word) for flag in flags.items() for word in flag]
        words += ["--train_parts", "multi_modal_projector", "language_model", "lm_head"]
        words += ["--save_strategy", "no"]
        words += ["--turn_kinds", "description", "--max_turns", "1", "--turn_weights", "description=1"]
        if region_tune.main(
            [str(RECIPES / "shapes_embedded.yaml"), *words, "--warmup_steps", "50", "--disable_tqdm", "true"]
        ):
            raise RuntimeError(f"training on {tower} failed")
        write_json(kept, score(RegionChat(*mllm.load(out, device="cpu")), data["test"]), indent=None)
    return json.loads(kept.read_text())


def score(chat: RegionChat, data: Path) -> dict[str, float]:
    """Literal match of the descriptions."""
    boxes, masks = (list(read_regions(data, region_type=form)) for form in ("box", "mask"))
    shown = {
        "box": (boxes, [sample.references for sample in boxes]),
        "mask": (masks, [sample.references for sample in masks]),
        "other": (with_other_region(masks), other_region_references(masks)),
        "whole": (with_whole_image(masks), [sample.references for sample in masks]),
    }
    return {
        name: literal_match(generate(chat, samples, batch_size=64, label=name), references)
        for name, (samples, references) in shown.items()
    }


if __name__ == "__main__":
    raise SystemExit(main())
