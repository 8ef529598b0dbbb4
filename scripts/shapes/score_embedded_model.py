"""Score a model of Shapes on unseen scenes with greedy decoding, with the inference code of `region-chat`.

    python scripts/shapes/score_embedded_model.py [--model DIR] [--scenes 200] [--seed 2] [--json FILE]

Prints the table of docs/shapes.md. An answer is correct if it equals the reference (literal match).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import mllm
from alpha_clip_commands.command_line import ArgumentParser, exit_code
from eval.generate import generate
from eval.metrics.literal_match import literal_match
from eval.views import majority_baseline, other_region_references, with_other_region, with_whole_image
from mllm.data.readers.visual_genome import read_region_questions, read_regions
from mllm.data.samples import RegionSample
from mllm.data.shapes import scenes, visual_genome_layout
from mllm.files import check_replaceable, made_by, write_json
from mllm.inference import RegionChat
from mllm.loading import EMBEDDED_MODEL

PROGRAM = "score_embedded_model.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return exit_code(PROGRAM, lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EMBEDDED_MODEL)
    parser.add_argument("--scenes", type=int, default=200, help="scenes of each split (default 200)")
    parser.add_argument("--seed", type=int, default=2, help="seed of the scenes (default 2; training used 1)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the scores to this file too")
    args = parser.parse_args(argv)
    if args.json:
        check_replaceable(args.json, reads=[args.model], kind=PROGRAM)
    refuse_training_scenes(args.model, args.scenes, args.seed)
    chat = RegionChat(*mllm.load(args.model))
    with tempfile.TemporaryDirectory() as folder:
        scores = score(chat, Path(folder), args.scenes, args.seed, args.batch_size)
    print(table(scores))
    if args.json:
        write_json(args.json, {"made_by": made_by(PROGRAM), **scores})
    return 0


def refuse_training_scenes(model: Path, count: int, seed: int) -> None:
    """Raise ValueError if one of the scenes was used in training."""
    trained = scenes.training_scenes(model)
    for split in ("test", "novel", "background"):
        for index, (_, scene) in enumerate(scenes.scenes(count, seed, split)):
            if scenes.scene_hash(scene.pixels) in trained:
                raise ValueError(f"scene {index} of {split}, seed {seed}, is a training scene; choose another seed")


def score(chat: RegionChat, folder: Path, count: int, seed: int, batch_size: int) -> dict[str, dict]:
    """All scores by name: {"score", "of" (samples)}, and "blind" where a region-blind answerer has a best score."""
    for split in ("test", "novel", "background"):
        visual_genome_layout.write(folder / split, count, seed, split, progress=False)
    boxes, masks = (list(read_regions(folder / "test", region_type=form)) for form in ("box", "mask"))
    scores: dict[str, dict] = {}

    def record(name: str, samples: Sequence[RegionSample], references: Sequence | None = None, **extra: float) -> None:
        predictions = generate(chat, samples, batch_size=batch_size, label=name)
        wanted = [sample.references for sample in samples] if references is None else references
        scores[name] = {"score": literal_match(predictions, wanted), "of": len(samples), **extra}

    record("description, box", boxes)
    record("description, mask", masks)
    for form, samples in (("box", boxes), ("mask", masks)):
        wrong = with_other_region(samples)
        record(f"description of the other region shown, {form}", wrong, other_region_references(samples))
    record("description, whole image", with_whole_image(boxes), blind=majority_baseline(boxes))
    questions = list(read_region_questions(folder / "test", region_type="mask"))
    for kind in (*scenes.ATTRIBUTES, "neighbour"):
        asked = [q for q in questions if q.meta["type"] in (scenes.DIRECTIONS if kind == "neighbour" else (kind,))]
        record(f"{kind}", asked)
        record(f"{kind}, whole image", with_whole_image(asked), blind=majority_baseline(asked))
    for split, name in (("novel", "unseen pairs"), ("background", "unseen backgrounds")):
        for form in ("box", "mask"):
            record(f"description, {name}, {form}", list(read_regions(folder / split, region_type=form)))
    return scores


def table(scores: dict[str, dict]) -> str:
    """The scores as a Markdown table."""
    lines = ["| measure | right | of | best without the region |", "|---|---|---|---|"]
    for name, entry in scores.items():
        blind = f"{entry['blind']:.1%}" if "blind" in entry else ""
        lines.append(f"| {name} | {entry['score']:.1%} | {entry['of']} | {blind} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
