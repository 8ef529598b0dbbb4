"""S-IoU and semantic similarity, the metrics of referring object classification (Osprey, arXiv 2312.10032, 4.2)."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

S_IOU, SEMANTIC = "s_iou", "semantic_similarity"
METRICS = (S_IOU, SEMANTIC)
# Source: `lvis_paco_eval.py` of CircleRadon/Osprey, osprey/eval: characters that are replaced with a space
_IN_PREDICTIONS, _IN_REFERENCES = str.maketrans(".:,", "   "), str.maketrans("_/:", "   ")


def semantic_iou(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Intersection over union (N,) of the lower-case words of a prediction and its best reference, in [0, 1]."""
    return np.array([max(_iou(text, ref) for ref in refs) for text, refs in zip(predictions, references, strict=True)])


def _iou(prediction: str, reference: str) -> float:
    words, wanted = set(cleaned(prediction).split()), set(_cleaned_reference(reference).split())
    return len(words & wanted) / len(words | wanted) if words and wanted else 0.0


def semantic_similarity(
    predictions: Sequence[str], references: Sequence[Sequence[str]], sentence_model: str | os.PathLike
) -> np.ndarray:
    """Cosine similarity (N,) of the embeddings of a prediction and its best reference, in [-1, 1].

    Args:
        predictions: N texts.
        references: One or more references for each.
        sentence_model: Directory of a sentence-transformers model; published results use all-MiniLM-L6-v2.

    Raises:
        ValueError: If the directory is not found, or sentence-transformers is not installed.
    """
    model = _load(os.fspath(sentence_model))
    flat = [cleaned(text) for text in predictions]
    flat += [_cleaned_reference(text) for refs in references for text in refs]
    embedded = model.encode(flat, normalize_embeddings=True, show_progress_bar=len(flat) > 10_000)
    ends = np.cumsum([len(refs) for refs in references])
    of_references = np.split(embedded[len(predictions) :], ends[:-1])
    rows = zip(embedded[: len(predictions)], of_references, strict=True)
    return np.array([float((refs @ row).max()) for row, refs in rows])


def cleaned(prediction: str) -> str:
    """A prediction in lower case, without the punctuation that Osprey's evaluation removes."""
    return prediction.lower().translate(_IN_PREDICTIONS).strip()


def _cleaned_reference(reference: str) -> str:
    return reference.lower().translate(_IN_REFERENCES).strip()


@functools.cache
def _load(folder: str) -> SentenceTransformer:
    if not Path(folder).is_dir():
        raise ValueError(f"expected the directory of a sentence-transformers model, got {folder}")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ValueError(
            "semantic_similarity requires sentence-transformers: pip install sentence-transformers"
        ) from None
    try:
        return SentenceTransformer(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot load the sentence model in {folder}: {str(error).splitlines()[0]}") from error
