"""Ablations of contrastive training on synthetic scenes: writes the tables of docs/ablations.md.

    python scripts/shapes/ablate_alpha_clip.py [--work DIR] [--pairs 8000] [--seeds 3] [--jobs 2] [--only NAME ...]

Starts from one CLIP (scripts/shapes/build_clip.py). Every variant sees the same number of region-text pairs in batches
of the same size (except for rounding: batches consist of images, and those of the released recipe have up to 3% more
pairs). The released recipe and ours each use the best of three learning rates for alpha, chosen on validation scenes
with the first seed, and a hundredth or a tenth of it for the tower; all other rows use ours. Scores are those of test
scenes. Finished runs are kept: rerun the same command to resume.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from build_clip import ALPHA_SEED, ROOT, build_clip, claim_work, scenes_folder
from tqdm import tqdm

from alpha_clip_commands.command_line import ArgumentParser, exit_code
from eval.region_matching import TOWER_VIEWS, DescribedImage, described_images, score_region_text
from mllm.data.readers.grit import read_grit
from mllm.files import write_json
from train.run import open_index
from vision_tower import AlphaCLIPModel, AlphaCLIPProcessor

OURS, RELEASED = "ours", "the released recipe"
GRID = (3e-4, 1e-3, 3e-3)  # learning rates of alpha
BATCH = 128  # pairs of a step
# name -> (recipe, what is switched, alpha's learning rate as a multiple of the tower's)
VARIANTS: dict[str, tuple[str, dict[str, object], int]] = {
    RELEASED: ("shapes_alpha_clip_released", {}, 100),
    OURS: ("shapes_alpha_clip", {}, 10),
    "one region per image": ("shapes_alpha_clip", {"regions_per_image": 1}, 10),
    "eight regions per image": ("shapes_alpha_clip", {"regions_per_image": 8}, 10),
    "equal texts are negatives": ("shapes_alpha_clip", {"equal_texts": "false"}, 10),
    "the released loss": ("shapes_alpha_clip", {"loss": "released"}, 10),
    "label smoothing 0.1": ("shapes_alpha_clip", {"label_smoothing_factor": 0.1}, 10),
    "the released schedule": ("shapes_alpha_clip", {"schedule": "released"}, 10),
    "no whole images": ("shapes_alpha_clip", {"whole_image_rate": 0}, 10),
    "whole images 0.25": ("shapes_alpha_clip", {"whole_image_rate": 0.25}, 10),
    "alpha at the tower's rate": ("shapes_alpha_clip", {}, 1),
    "alpha at 100 times the tower's rate": ("shapes_alpha_clip", {}, 100),
    "temperature learned": (
        "shapes_alpha_clip",
        {"train_parts": "vision_model visual_projection alpha logit_scale"},
        10,
    ),
    "mask jitter (2 pixels)": ("shapes_alpha_clip", {"mask_jitter": 2}, 10),
    "soft alpha (strength from 0.5, blur to 0.02)": ("shapes_alpha_clip", {"min_strength": 0.5, "max_blur": 0.02}, 10),
    "the last 3 of 6 blocks": ("shapes_alpha_clip", {"train_blocks": 3}, 10),
    "LoRA (rank 16)": ("shapes_alpha_clip", {"lora_r": 16}, 10),
}
COLUMNS = {
    "top1": "region-text top-1 among all descriptions",
    "top1_same_image": "same-image top-1",
    "cosine_same_image": "mean cosine between two objects of one image",
    "whole_top1": "whole-image top-1",
}

PROGRAM = "ablate_alpha_clip.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return exit_code(PROGRAM, lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "embedded_model", help="with the CLIP")
    parser.add_argument("--pairs", type=int, default=8000, help="region-text pairs that every variant sees")
    parser.add_argument("--scenes", type=int, default=8000, help="training scenes")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="these variants")
    args = parser.parse_args(argv)
    claim_work(args.work)
    if failed := build_clip(args.work, seed=2):
        return failed
    ablation = Ablation(args.work, args.pairs, args.scenes, args.jobs)
    seeds = range(1, args.seeds + 1)
    print(
        table(
            "CLIP, no training",
            {f"CLIP, {view}": [ablation.score_clip(view)] for view in TOWER_VIEWS if view != "alpha"},
        )
    )
    rates = ablation.best_rates([name for name in (RELEASED, OURS) if name in args.only or name == OURS])
    runs = {name: [(name, rates.get(name, rates[OURS]), seed) for seed in seeds] for name in args.only}
    ablation.train(run for of_variant in runs.values() for run in of_variant)
    print(
        table(f"{args.pairs} pairs", {name: [ablation.score(run, "test") for run in of] for name, of in runs.items()})
    )
    print("learning rates:", {name: rates.get(name, rates[OURS]) for name in runs})
    return 0


Run = tuple[str, float, int]  # variant, learning rate, seed


class Ablation:
    """Runs and their scores in a folder."""

    def __init__(self, work: Path, pairs: int, scenes: int, jobs: int) -> None:
        self.clip = work / "clip"
        with open(self.clip / "model.safetensors", "rb") as weights:  # runs depend on the CLIP
            of_clip = hashlib.file_digest(weights, "sha256").hexdigest()[:8]
        self.out = work / f"ablations_{pairs}_of_{scenes}_{of_clip}"
        self.steps = pairs // BATCH
        self.jobs = jobs
        self.data = scenes_folder(work, scenes, ALPHA_SEED)
        index = open_index(str(self.data))
        self.objects = np.bincount(index.image_rows[~index.is_whole])  # of each scene
        self.images = {
            "val": _images(scenes_folder(work, 150, 7, split="val")),
            "test": _images(scenes_folder(work, 300, 2, split="test")),
        }

    def best_rates(self, names: Sequence[str]) -> dict[str, float]:
        """Of each variant the learning rate whose three shares of right answers on validation scenes add up to most."""
        grids = {name: [alpha / VARIANTS[name][2] for alpha in GRID] for name in names}
        self.train((name, rate, 1) for name, grid in grids.items() for rate in grid)
        best = {}
        for name, grid in grids.items():
            scores = {rate: self.score((name, rate, 1), "val") for rate in grid}
            best[name] = max(grid, key=lambda rate: sum(v for k, v in scores[rate].items() if "top1" in k))
            print(name, {rate: {k: round(100 * v, 1) for k, v in score.items()} for rate, score in scores.items()})
        return best

    def train(self, runs) -> None:
        """Train what is not there yet."""
        missing = [run for run in dict.fromkeys(runs) if not (self.folder(run) / "training_record.json").exists()]
        with ThreadPoolExecutor(self.jobs) as pool:
            list(tqdm(pool.map(self._train, missing), total=len(missing), desc="runs", disable=not missing))

    def folder(self, run: Run) -> Path:
        """Where a run is."""
        name, rate, seed = run
        return self.out / f"{''.join(c if c.isalnum() else '_' for c in name)}_{rate:g}_{seed}"

    def _train(self, run: Run) -> None:
        name, rate, seed = run
        recipe, switched, times = VARIANTS[name]
        regions = int(switched.get("regions_per_image", 1 if name == RELEASED else 4))
        flags = {
            "model": self.clip, "data": self.data, "output_dir": self.folder(run), "seed": seed,
            "learning_rate": rate, "learning_rates": f"alpha={times * rate}", "max_steps": self.steps,
            "per_device_train_batch_size": round(BATCH / np.minimum(self.objects, regions).mean()),
            "released_steps": self.steps * 5 // 8, "region_input": "mask", "dataloader_num_workers": 0,
            "save_strategy": "no", "disable_tqdm": "true", **switched,
        }  # fmt: skip
        released_loss = RELEASED == name or switched.get("loss") == "released"  # needs a process group, as the original
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"] if released_loss else []
        words = [word for key, value in flags.items() for word in (f"--{key}", *str(value).split(" "))]
        command = [
            sys.executable,
            *launcher,
            "-m",
            "alpha_clip_commands.alpha_clip",
            "train",
            str(ROOT / f"train/recipes/{recipe}.yaml"),
            *words,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1:]}")

    def score(self, run: Run, split: str) -> dict[str, float]:
        """Scores of a run, kept beside it."""
        return self._kept(self.folder(run), split, "alpha")

    def score_clip(self, view: str) -> dict[str, float]:
        """Scores of the CLIP that all runs start from, with regions shown in another way."""
        return self._kept(self.clip, "test", view)

    def _kept(self, model: Path, split: str, view: str) -> dict[str, float]:
        kept = self.out / "scores" / f"{model.name}_{split}_{view}.json"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            scores = score_region_text(*load(model, self.clip), self.images[split], view=view)
            write_json(kept, scores, indent=None)
        return json.loads(kept.read_text())


def load(model: Path, clip: Path) -> tuple[AlphaCLIPModel, AlphaCLIPProcessor]:
    """A trained model, or the CLIP with its trained adapter."""
    if (model / "adapter_config.json").exists():
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(AlphaCLIPModel.from_pretrained(clip), model)
        return adapted.merge_and_unload(), AlphaCLIPProcessor.from_pretrained(model)
    return AlphaCLIPModel.from_pretrained(model), AlphaCLIPProcessor.from_pretrained(model)


def table(title: str, rows: dict[str, list[dict[str, float]]]) -> str:
    """Mean and standard deviation over the runs, one Markdown row per variant."""
    lines = [f"| {title} | {' | '.join(COLUMNS.values())} |", f"|---{'|---' * len(COLUMNS)}|"]
    for name, scores in rows.items():
        cells = []
        for column in COLUMNS:
            scale, digits = (1, 3) if "cosine" in column else (100, 1)
            values = scale * np.array([score[column] for score in scores])
            spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.{digits}f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _images(folder: Path) -> list[DescribedImage]:
    """The images of a dataset, with the mask of each object."""
    samples = (sample for sample in read_grit(folder) if sample.regions[0].kind != "box")
    return described_images(samples)


if __name__ == "__main__":
    raise SystemExit(main())
