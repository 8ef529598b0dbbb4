"""Exact match: is the answer, letter for letter, one of the references?"""

from __future__ import annotations

from collections.abc import Sequence


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share of predictions that equal one of their references, in [0, 1]; no case folding, nothing stripped.

    Raises:
        ValueError: If there are no predictions, or not one list of references each.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"expected as many references as predictions, and some, got {len(references)} and {len(predictions)}"
        )
    return sum(p in refs for p, refs in zip(predictions, references, strict=True)) / len(predictions)
