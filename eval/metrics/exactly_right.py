"""Exactly right: is the answer, letter for letter, one of the references? "exact match" is VQA's (`questions`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def exactly_right_each(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Which predictions equal one of their references, 1 or 0 (N,); no case folding, nothing stripped.

    Raises:
        ValueError: If there are no predictions, or not one list of references each.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"expected as many references as predictions, and some, got {len(references)} and {len(predictions)}"
        )
    return np.array([float(p in refs) for p, refs in zip(predictions, references, strict=True)])


def exactly_right(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share of `exactly_right_each`, in [0, 1]."""
    return float(exactly_right_each(predictions, references).mean())
