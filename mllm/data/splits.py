"""Which images of Visual Genome are whose: the split of DenseCap, which GRiT and region captioning since then use.

`densecap_splits.txt.gz` holds a line a split: its name, then the image ids in order, each as the difference to the one
before. Source of the ids: jcjohnson/densecap, info/densecap_splits.json (MIT).
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import itertools
from importlib.resources import files

SIZES = {"train": 77_398, "val": 5_000, "test": 5_000}
_SHA256 = "de3dd056f013ca8e3b91b6e1476ada1546851591e545fb05651e5967fe081259"
_NOT_IN_GRIT = (1650, 1684)  # GRiT's preprocessed training file has 77,396 images: these two are not among them


def densecap_split(name: str) -> frozenset[int]:
    """The image ids of "train" (77,398), "val" (5,000) or "test" (5,000); "grit-train" is "train" without two.

    Raises:
        ValueError: If there is no such split, or the shipped file is damaged.
    """
    if name == "grit-train":
        return densecap_split("train") - set(_NOT_IN_GRIT)
    if name not in SIZES:
        raise ValueError(f"expected a split out of {', '.join(SIZES)}, grit-train, got {name!r}")
    return _splits()[name]


@functools.cache
def _splits() -> dict[str, frozenset[int]]:
    text = gzip.decompress((files("mllm.data") / "densecap_splits.txt.gz").read_bytes())
    if hashlib.sha256(text).hexdigest() != _SHA256:
        raise ValueError("mllm/data/densecap_splits.txt.gz is not the file that was shipped; install the package again")
    rows = (line.split() for line in text.decode("ascii").splitlines())
    return {name: frozenset(itertools.accumulate(map(int, steps))) for name, *steps in rows}
