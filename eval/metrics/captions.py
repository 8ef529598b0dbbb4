"""BLEU, METEOR, ROUGE-L and CIDEr as papers on captioning report them: pycocoevalcap's scorers, called directly.

Its own `COCOEvalCap.evaluate()` would download SPICE's 384 MB first. What changes a number: the tokenizer runs on both
sides; CIDEr's document frequencies are those of the references at hand, so that a part of a data set scores differently
and parts cannot be averaged; its sigma and clipping make it CIDEr-D.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from eval.metrics import java

BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
METRICS = (*BLEU, "METEOR", "ROUGE-L", "CIDEr")
FROZEN = "CIDEr (frozen df)"
_UNSTABLE = 500  # items; below, CIDEr's document frequencies say more of the items than of the captions


@dataclasses.dataclass(frozen=True)
class CaptionScores:
    """What captions scored.

    Attributes:
        corpus: Value by metric, as the reference scorers give it (METEOR .195, CIDEr .600).
        items: Value of each caption (N,) by metric. BLEU and METEOR of the corpus are not the mean of these.
        bleu_counts: (N, 10): matching and all n-grams of length 1 to 4, words, words of the closest reference; None
            without BLEU.
        meteor_statistics: (N, 23), see `eval.metrics.java.meteor`; None without METEOR.
        notes: What a reader must know of these values.
    """

    corpus: dict[str, float]
    items: dict[str, np.ndarray]
    bleu_counts: np.ndarray | None = None
    meteor_statistics: np.ndarray | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class DocumentFrequency:
    """How many items of a whole data set have an n-gram in their references, for CIDEr on a part of it."""

    counts: dict[tuple[str, ...], float]
    items: int


def score_captions(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str] = METRICS,
    frozen: DocumentFrequency | None = None,
    tokenized: bool = False,
) -> CaptionScores:
    """Score captions; an empty one scores 0 in each metric.

    Args:
        predictions: N captions.
        references: One or more right captions for each.
        metrics: Out of `METRICS`.
        frozen: Document frequencies of a whole data set: CIDEr is then called "CIDEr (frozen df)", and can be compared
            between parts of that data set but with no published number.
        tokenized: Whether all texts are tokens already, separated by spaces: the tokenizer is not run.

    Raises:
        ValueError: If there is no caption, one has no reference, a metric is unknown, or Java is absent or fails.
    """
    if not predictions or len(predictions) != len(references) or not all(references):
        raise ValueError(
            f"expected captions, each with references, got {len(predictions)} captions and {len(references)} lists "
            f"of references, {sum(not refs for refs in references)} of them empty"
        )
    if unknown := set(metrics) - set(METRICS):
        raise ValueError(f"expected metrics out of {', '.join(METRICS)}, got {', '.join(sorted(unknown))}")
    if tokenized:
        captions, references = list(predictions), [list(refs) for refs in references]
    else:
        captions, references = _tokenized(predictions, references)
    corpus: dict[str, float] = {}
    items: dict[str, np.ndarray] = {}
    counts, statistics, notes = None, None, []
    if set(metrics) & set(BLEU):
        bleus, per_item, counts = _bleu(captions, references)
        for order, name in enumerate(BLEU):
            corpus[name], items[name] = bleus[order], np.array(per_item[order])
    if "METEOR" in metrics:
        corpus["METEOR"], items["METEOR"], statistics = java.meteor(captions, references)
    if "ROUGE-L" in metrics:
        corpus["ROUGE-L"], items["ROUGE-L"] = _rouge(captions, references)
    if "CIDEr" in metrics:
        name = "CIDEr" if frozen is None else FROZEN
        corpus[name], items[name] = _cider(captions, references, frozen)
        if frozen is None and len(captions) < _UNSTABLE:
            notes.append(
                f"CIDEr of {len(captions)} items is unstable: its document frequencies are those of these items"
                + (", and of one item it is 0 by definition" if len(captions) == 1 else "")
            )
    return CaptionScores(corpus, items, counts, statistics, tuple(notes))


def freeze_document_frequency(references: Sequence[Sequence[str]]) -> DocumentFrequency:
    """The document frequencies of all references of a data set, as CIDEr counts them on the whole.

    Raises:
        ValueError: If Java is absent or fails.
    """
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer()
    tokens = java.tokenize([text for texts in references for text in texts])
    for texts in _split(tokens, references):
        scorer.cook_append(None, texts)
    scorer.compute_doc_freq()
    return DocumentFrequency(dict(scorer.document_frequency), len(references))


def bleu_of_counts(totals: np.ndarray) -> np.ndarray:
    """BLEU-1 to BLEU-4 (..., 4) of summed counts (..., 10), as `CaptionScores.bleu_counts` has them.

    Source: `compute_score` of pycocoevalcap 1.2, bleu/bleu_scorer.py, with its two small constants.
    """
    small, tiny = 1e-9, 1e-15
    matched, possible, words, wanted = totals[..., :4], totals[..., 4:8], totals[..., 8:9], totals[..., 9:10]
    precision = np.cumsum(np.log((matched + tiny) / (possible + small)), -1) / np.arange(1, 5)
    ratio = (words + tiny) / (wanted + small)
    with np.errstate(over="ignore"):
        return np.exp(precision + np.minimum(0, 1 - 1 / ratio))


def _tokenized(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Both sides through the tokenizer, in one run of it."""
    flat = [*predictions, *(text for refs in references for text in refs)]
    tokens = java.tokenize(flat)
    return tokens[: len(predictions)], _split(tokens[len(predictions) :], references)


def _split(texts: Sequence[str], like: Sequence[Sequence[str]]) -> list[list[str]]:
    rest = iter(texts)
    return [[next(rest) for _ in refs] for refs in like]


def _bleu(captions: list[str], references: list[list[str]]) -> tuple[list[float], list[list[float]], np.ndarray]:
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for caption, refs in zip(captions, references, strict=True):
        scorer.cook_append(caption, refs)
    corpus, items = scorer.compute_score(option="closest")
    rows = [
        (*c["correct"], *c["guess"], c["testlen"], min((abs(n - c["testlen"]), n) for n in c["reflen"])[1])
        for c in scorer.ctest
    ]
    return corpus, items, np.array(rows, np.int32)


def _rouge(captions: list[str], references: list[list[str]]) -> tuple[float, np.ndarray]:
    from pycocoevalcap.rouge.rouge import Rouge

    scorer = Rouge()
    pairs = zip(captions, references, strict=True)
    # an empty caption against an empty reference would match as "" = ""
    items = np.array([scorer.calc_score([caption], refs) if caption else 0.0 for caption, refs in pairs])
    return float(items.mean()), items


def _cider(
    captions: list[str], references: list[list[str]], frozen: DocumentFrequency | None
) -> tuple[float, np.ndarray]:
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    class FrozenScorer(CiderScorer):
        """Takes the number of items from the frozen frequencies, where its parent counts its own."""

        ref_len = property(lambda self: np.log(float(frozen.items)), lambda self, value: None)

    scorer = CiderScorer() if frozen is None else FrozenScorer()
    for caption, refs in zip(captions, references, strict=True):
        scorer.cook_append(caption, refs)
    if frozen is None:
        scorer.compute_doc_freq()
    else:
        scorer.document_frequency = collections.defaultdict(float, frozen.counts)
    items = np.array(scorer.compute_cider())
    return float(items.mean()), items
