"""Literal match: whether an answer equals one of the references character by character.

`exact_match` in `eval.metrics.questions` compares after VQA's normalization instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def literal_matches(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Compare each prediction with its references, without case folding or stripping.

    Returns:
        (N,) float, 1 for a match, else 0.

    Raises:
        ValueError: If there are no predictions, or the number of reference lists differs.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"expected predictions and a list of references for each, got {len(predictions)} predictions and "
            f"{len(references)} lists"
        )
    return np.array([float(p in refs) for p, refs in zip(predictions, references, strict=True)])


def literal_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean of `literal_matches`, in [0, 1]."""
    return float(literal_matches(predictions, references).mean())
