"""Time and memory of indexing a data set of Visual Genome's size, of opening the index, and of reading it at random.

    python scripts/bench/index.py [--work DIR] [--share 1.0]

The files are made up: 108,077 images, 5.4 million regions with synsets, 1.7 million questions, half of them tied to
a region, in Visual Genome's layout and with its size on disk; there are no image files.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from alpha_clip_commands import alpha_clip
from alpha_clip_commands.command_line import ArgumentParser, exit_code
from mllm.files import write_json
from mllm.folders import claim_folder

IMAGES, REGIONS_AN_IMAGE, QUESTIONS_AN_IMAGE = 108_077, 50, 16
WORDS = "the a clock man tree white wooden standing on of with his window black small table sky green is in".split()

PROGRAM = "bench/index.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return exit_code(PROGRAM, lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="keep the files here (2.5 GB); by default a temporary folder")
    parser.add_argument("--share", type=float, default=1.0, help="share of Visual Genome's images (default 1)")
    parser.add_argument("--step", choices=("index", "read"), help=argparse.SUPPRESS)  # a process of its own
    args = parser.parse_args(argv)
    if args.step:
        return {"index": index, "read": read}[args.step](args.work)
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        if not (work / "image_data.json").exists():
            claim_folder(work, "benchmark")
            make_files(work, int(IMAGES * args.share))
        size = sum(file.stat().st_size for file in work.glob("*.json")) / 1e9
        print(f"{size:.2f} GB of JSON")
        for step in ("index", "read"):
            subprocess.run([sys.executable, __file__, "--work", str(work), "--step", step], check=True)
    return 0


def index(work: Path) -> int:
    """Index in this process; print time and memory."""
    start = time.perf_counter()
    code = alpha_clip.main(["prepare", "vg", "--source", str(work)])
    print(f"indexing: {time.perf_counter() - start:.0f} s, {peak_gib():.2f} GiB at most")
    return code


def read(work: Path) -> int:
    """Open, and read regions at random among the first tenth and among all, interleaved; print the times."""
    from mllm.data.index import RegionIndex

    start = time.perf_counter()
    regions = RegionIndex(work)
    opened = time.perf_counter() - start
    rng = random.Random(0)
    times: dict[int, list[float]] = {len(regions) // 10: [], len(regions): []}
    for _ in range(300):
        for size, seconds in times.items():
            row = rng.randrange(size)
            start = time.perf_counter()
            regions.read([row])
            seconds.append(time.perf_counter() - start)
    few, many = (statistics.median(seconds) * 1e3 for seconds in times.values())
    print(f"opening {len(regions):,} regions: {opened:.2f} s (with the import of datasets), {peak_gib():.2f} GiB")
    print(f"a region at random: {few:.2f} ms in the first tenth, {many:.2f} ms in all, ratio {many / few:.2f}")
    return 0


def peak_gib() -> float:
    """Peak memory of this process, GiB; pages of mapped files count, though the system can take them back."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def make_files(work: Path, images: int) -> None:
    """Write the JSON files, one image after the other."""
    rng = random.Random(0)
    region_id = qa_id = 0
    mapping: dict[str, int] = {}
    names = ("image_data", "region_descriptions", "question_answers")
    files = {name: open(work / f"{name}.json", "w", encoding="utf-8") for name in names}
    for file in files.values():
        file.write("[")
    for image in range(1, images + 1):
        comma = ", " if image > 1 else ""
        regions, questions = [], []
        for _ in range(REGIONS_AN_IMAGE):
            region_id += 1
            regions.append(_region(rng, image, region_id))
        for number in range(QUESTIONS_AN_IMAGE):
            qa_id += 1
            question = {"qa_id": qa_id, "image_id": image, "question": f"What is {_text(rng, 4)}?"}
            questions.append({**question, "answer": f"{_text(rng, 2)}.", "q_objects": [], "a_objects": []})
            if number % 2:
                mapping[str(qa_id)] = region_id - number
        url = f"https://cs.stanford.edu/people/rak248/VG_100K_2/{image}.jpg"
        size = {"width": 800, "height": 600, "coco_id": None, "flickr_id": None}
        for name, entry in zip(
            names,
            (
                {"image_id": image, "url": url, **size},
                {"id": image, "regions": regions},
                {"id": image, "qas": questions},
            ),
            strict=True,
        ):
            files[name].write(comma + json.dumps(entry))
    for file in files.values():
        file.write("]")
        file.close()
    write_json(work / "qa_to_region_mapping.json", mapping, indent=None)


def _region(rng: random.Random, image: int, region_id: int) -> dict:
    x, y = rng.randrange(600), rng.randrange(400)
    box = {"x": x, "y": y, "width": rng.randrange(10, 200), "height": rng.randrange(10, 200)}
    names = [{"synset_name": "clock.n.01", "entity_name": "clock", "entity_idx_start": 4, "entity_idx_end": 9}] * 2
    return {"region_id": region_id, **box, "image_id": image, "phrase": _text(rng, 5), "synsets": names}


def _text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


if __name__ == "__main__":
    raise SystemExit(main())
