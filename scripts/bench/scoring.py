"""Time the caption metrics, and their peak memory, on as many captions as Visual Genome's test set has regions.

    python scripts/bench/scoring.py [--captions 232935] [--references 1] [--intervals]

The captions are made up, like Visual Genome's: five words on average, some words far more often than others, and a
prediction has about half of its reference's words. The first hundred words are English, so that METEOR finds stems,
synonyms and paraphrases to try; the rest are invented. Prints Markdown rows for docs/benchmarks.md. Linux only.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alpha_clip_commands.command_line import ArgumentParser, exit_code
from eval.metrics import captions, java
from eval.metrics.intervals import interval_of_captions

VG_TEST_REGIONS = 232_935  # GRiT's test.json
LENGTHS = (2, 9)  # words of a caption, the longer end not reached: 5.0 on average
INVENTED = 20_000
KEPT = 0.5  # of a reference's words in its prediction
ENGLISH = """
    a the of on in with is and white black man woman red blue green wearing brown standing tree shirt holding wall sky
    people sign building person water table street grass his yellow side dog car two hand background large front horse
    window head orange has sitting an hair wooden train gray boy small plate at snow clouds fence behind light child bus
    walking metal sidewalk jacket cat road glass top field pink floor leaves for riding ball pants ground giraffe shadow
    to elephant bench girl long food looking bird chair legs tall beach pole part zebra tennis door bear player cup
""".split()

PROGRAM = "bench/scoring.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return exit_code(PROGRAM, lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=VG_TEST_REGIONS, help=f"default {VG_TEST_REGIONS:,}")
    parser.add_argument("--references", type=int, default=1, help="of each caption (default 1)")
    parser.add_argument("--intervals", action="store_true", help="time the bootstrap of each metric too")
    args = parser.parse_args(argv)
    predictions, references = made_up(args.captions, args.references)
    print(f"| {args.captions:,} captions | seconds |\n|---|---|")
    start = time.perf_counter()
    scores = captions.score_captions(predictions, references)
    row("all metrics", start)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # here and not later: the kernel counts for a child what this process held when it began it
    print(f"| peak memory: {own / 2**20:.2f} GiB this process, {java_peak() / 2**20:.2f} GiB Java | |", flush=True)
    if args.intervals:
        for name in captions.METRICS:
            start = time.perf_counter()
            interval_of_captions(scores, name)
            row(f"interval of {name}", start)
    alone(predictions, references)
    return 0


def alone(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Each part of the scoring by itself."""
    start = time.perf_counter()
    tokens = java.tokenize([*predictions, *(text for texts in references for text in texts)])
    row("tokenizer alone", start)
    rest = iter(tokens[len(predictions) :])
    tokenized = tokens[: len(predictions)], [[next(rest) for _ in texts] for texts in references]
    parts = {"BLEU 1 to 4": captions.BLEU} | {name: (name,) for name in captions.METRICS if name not in captions.BLEU}
    for name, metrics in parts.items():
        start = time.perf_counter()
        captions.score_captions(*tokenized, metrics, tokenized=True)
        row(f"{name} alone", start)


def row(what: str, start: float) -> None:
    """Print the seconds since `start`."""
    print(f"| {what} | {time.perf_counter() - start:.1f} |", flush=True)


def java_peak() -> int:
    """The largest memory, in KiB, of a program that we started: of those that ended, and of METEOR, which lives on."""
    peaks = [resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:  # it ended meanwhile
            continue
        if int(fields["PPid"]) == os.getpid():
            peaks.append(int(fields.get("VmHWM", "0 kB").split()[0]))
    return max(peaks)


def made_up(count: int, references: int) -> tuple[list[str], list[list[str]]]:
    """That many predictions, each with that many references."""
    rng = np.random.default_rng(0)
    words = np.array(ENGLISH + ["".join(rng.choice(list("abdeiklmnorst"), 6)) for _ in range(INVENTED)])
    share = 1 / np.arange(1, len(words) + 1)
    share /= share.sum()
    texts = [[] for _ in range(count)]
    for _ in range(references):
        for own, length in zip(texts, rng.integers(*LENGTHS, count), strict=True):
            own.append(length)
    total = sum(map(sum, texts))
    drawn, other = (iter(words[rng.choice(len(words), total, p=share)]) for _ in range(2))
    kept = iter(rng.random(total) < KEPT)
    right = [[[next(drawn) for _ in range(length)] for length in own] for own in texts]
    said = [[word if next(kept) else next(other) for word in own[0]] for own in right]
    return [" ".join(text) for text in said], [[" ".join(text) for text in own] for own in right]


if __name__ == "__main__":
    sys.exit(main())
