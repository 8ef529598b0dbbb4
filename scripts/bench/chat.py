"""Speed of batched answers compared with single ones, on the embedded model.

python scripts/bench/chat.py [--requests 128] [--pairs 5]
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from timing import TABLE_HEADER, print_ratio, seconds

import mllm
from alpha_clip_commands.command_line import ArgumentParser, exit_code
from mllm.data.readers.visual_genome import read_regions
from mllm.data.shapes import visual_genome_layout
from mllm.inference import RegionChat

PROGRAM = "bench/chat.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return exit_code(PROGRAM, lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("--model", help="directory or hub id (default: the embedded model)")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args(argv)
    chat = RegionChat(*mllm.load(args.model))
    with tempfile.TemporaryDirectory() as folder:
        visual_genome_layout.write(Path(folder) / "x", args.requests // 3, 3, "test", progress=False)
        samples = list(read_regions(Path(folder) / "x"))[: args.requests]
        requests = [(sample.open_image(), sample.regions[0], sample.question) for sample in samples]

    def batched() -> list[str]:
        starts = range(0, len(requests), args.batch_size)
        return [answer.text for s in starts for answer in chat.answers(requests[s : s + args.batch_size])]

    def one_by_one() -> list[str]:
        return [chat.ask(*request) for request in requests]

    same = sum(a == b for a, b in zip(batched(), one_by_one(), strict=True))
    ratios = [seconds(one_by_one) / seconds(batched) for _ in range(args.pairs)]
    print(TABLE_HEADER)
    what = f"{len(requests)} requests, {same} answers equal"
    print_ratio(f"answers per second, batches of {args.batch_size} / one by one ({what})", ratios, digits=2)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
