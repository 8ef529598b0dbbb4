"""DenseCap's splits of Visual Genome, which GRiT and later work on region captioning also use.

`densecap_splits.txt.gz` has one line per split: its name and its sorted image ids, each as the difference to the
previous one. Source: jcjohnson/densecap, info/densecap_splits.json (MIT).
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import itertools
from importlib.resources import files

SIZES = {"train": 77_398, "val": 5_000, "test": 5_000}
_SHA256 = "de3dd056f013ca8e3b91b6e1476ada1546851591e545fb05651e5967fe081259"
_NOT_IN_GRIT = (1650, 1684)  # the two images that GRiT's preprocessed training file lacks


def densecap_split(name: str) -> frozenset[int]:
    """The image ids of "train" (77,398), "val" (5,000), "test" (5,000) or "grit-train" ("train" without two images).

    Raises:
        ValueError: If the split is unknown, or the installed file is damaged.
    """
    if name == "grit-train":
        return densecap_split("train") - set(_NOT_IN_GRIT)
    if name not in SIZES:
        raise ValueError(f"expected one of the splits {', '.join(SIZES)}, grit-train, got {name!r}")
    return _splits()[name]


@functools.cache
def _splits() -> dict[str, frozenset[int]]:
    text = gzip.decompress((files("mllm.data") / "densecap_splits.txt.gz").read_bytes())
    if hashlib.sha256(text).hexdigest() != _SHA256:
        raise ValueError("mllm/data/densecap_splits.txt.gz is damaged; reinstall the package")
    rows = (line.split() for line in text.decode("ascii").splitlines())
    return {name: frozenset(itertools.accumulate(map(int, steps))) for name, *steps in rows}
