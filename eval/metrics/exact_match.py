"""Exact match: is the answer, letter for letter, one of the references?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def exact_matches(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Which predictions equal one of their references, 1 or 0 (N,); no case folding, nothing stripped.

    Raises:
        ValueError: If there are no predictions, or not one list of references each.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"expected as many references as predictions, and some, got {len(references)} and {len(predictions)}"
        )
    return np.array([float(p in refs) for p, refs in zip(predictions, references, strict=True)])


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share of `exact_matches`, in [0, 1]."""
    return float(exact_matches(predictions, references).mean())
