"""Scores of the embedded model before and after tuning with `shapes_lora.yaml`, on scenes outside both training sets.

    python scripts/shapes/score_lora.py ADAPTER [--scenes 100] [--seed 2]

Literal match of the places of objects; the same with the region of another object (compared with that object's place,
then with the sample's own); and all scores of the embedded model before and after.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from score_embedded_model import EMBEDDED_MODEL, refuse_training_scenes, score

import mllm
from alpha_clip_commands.command_line import ArgumentParser, exit_code
from eval.generate import generate
from eval.metrics.literal_match import literal_match
from eval.views import other_region_references, with_other_region, with_whole_image
from mllm.data.readers.visual_genome import read_region_questions
from mllm.data.shapes import visual_genome_layout
from mllm.inference import RegionChat

PROGRAM = "score_lora.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return exit_code(PROGRAM, lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="output folder of region-tune")
    parser.add_argument("--scenes", type=int, default=100, help="scenes of each split (default 100)")
    parser.add_argument("--seed", type=int, default=2, help="seed of the scenes (default 2; tuning used 31)")
    args = parser.parse_args(argv)
    refuse_training_scenes(EMBEDDED_MODEL, args.scenes, args.seed)
    before, after = RegionChat(*mllm.load()), RegionChat(*mllm.load(adapter=args.adapter))
    size = (args.adapter / "adapter_model.safetensors").stat().st_size / 1e6
    print(f"adapter: {size:.2f} MB\n\n| place | before | after |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        visual_genome_layout.write(Path(folder) / "places", args.scenes, args.seed, "test", places=True, progress=False)
        places = [places_right(chat, Path(folder) / "places") for chat in (before, after)]
        for name in places[0]:
            print(f"| {name} | {places[0][name]:.1%} | {places[1][name]:.1%} |")
        scores = []
        for name, chat in (("before", before), ("after", after)):
            scores.append(score(chat, Path(folder) / name, args.scenes, args.seed, batch_size=64))
    print("\n| earlier abilities | before | after | of |\n|---|---|---|---|")
    for name, entry in scores[0].items():
        if "blind" not in entry:
            print(f"| {name} | {entry['score']:.1%} | {scores[1][name]['score']:.1%} | {entry['of']} |")
    return 0


def places_right(chat: RegionChat, folder: Path) -> dict[str, float]:
    """Share of places right, with the region and with other views."""
    shares = {}
    for form in ("box", "mask"):
        samples = [s for s in read_region_questions(folder, region_type=form) if s.meta["type"] == "place"]
        references = [sample.references for sample in samples]
        shares[f"{form}, {len(samples)} objects"] = literal_match(generate(chat, samples, batch_size=64), references)
        others = generate(chat, with_other_region(samples), batch_size=64)
        shares[f"{form} of another object: that object's"] = literal_match(others, other_region_references(samples))
        shares[f"{form} of another object: the sample's own"] = literal_match(others, references)
    whole = generate(chat, with_whole_image(samples), batch_size=64)
    shares["whole image"] = literal_match(whole, references)
    return shares


if __name__ == "__main__":
    raise SystemExit(main())
