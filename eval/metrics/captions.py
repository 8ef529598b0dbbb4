"""BLEU, METEOR, ROUGE-L and CIDEr with the scorers of pycocoevalcap, which captioning papers use.

The scorers are called directly, because `COCOEvalCap.evaluate()` downloads 384 MB for SPICE first. Three things affect
the values: the tokenizer runs on predictions and references; CIDEr computes its document frequencies from the given
references, so that it cannot be averaged over subsets; its sigma and clipping make it CIDEr-D.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from eval.metrics import java

BLEU = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")
METRICS = (*BLEU, "meteor", "rouge_l", "cider")
FROZEN = "cider_frozen_df"
_MIN_STABLE = 500  # items; with fewer, CIDEr depends more on the document frequencies than on the captions


@dataclasses.dataclass(frozen=True)
class CaptionScores:
    """Scores of captions.

    Attributes:
        corpus: Value by metric, as the reference scorers return it (METEOR .195, CIDEr .600).
        items: Values of the captions (N,) by metric. BLEU and METEOR of the corpus are not their mean.
        bleu_counts: (N, 10): matching n-grams and all n-grams of length 1 to 4, number of words of the caption and of
            the closest reference; None without BLEU.
        meteor_statistics: (N, 23), see `eval.metrics.java.meteor`; None without METEOR.
        notes: What a reader has to know to interpret the values.
    """

    corpus: dict[str, float]
    items: dict[str, np.ndarray]
    bleu_counts: np.ndarray | None = None
    meteor_statistics: np.ndarray | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class DocumentFrequency:
    """For each n-gram, the number of items of a dataset whose references contain it; for CIDEr on a subset."""

    counts: dict[tuple[str, ...], float]
    items: int


def score_captions(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str] = METRICS,
    frozen: DocumentFrequency | None = None,
    tokenized: bool = False,
) -> CaptionScores:
    """Score captions. An empty caption scores 0 in each metric.

    Args:
        predictions: N captions.
        references: One or more references for each caption.
        metrics: From `METRICS`.
        frozen: Document frequencies of a complete dataset. CIDEr is then returned as "cider_frozen_df", which is
            comparable between subsets of the dataset but not with published results.
        tokenized: Whether all texts are tokens separated by spaces; the tokenizer is then not run.

    Raises:
        ValueError: If there are no captions, a caption has no references, a metric is unknown, or Java is not found or
            fails.
    """
    _check(predictions, references, metrics)
    if tokenized:
        captions, references = list(predictions), [list(refs) for refs in references]
    else:
        captions, references = _tokenized(predictions, references)
    corpus: dict[str, float] = {}
    items: dict[str, np.ndarray] = {}
    counts, statistics = None, None
    if set(metrics) & set(BLEU):
        values, per_item, counts = _bleu(captions, references)
        corpus.update(zip(BLEU, values, strict=True))
        items.update(zip(BLEU, map(np.array, per_item), strict=True))
    if "meteor" in metrics:
        corpus["meteor"], items["meteor"], statistics = java.meteor(captions, references)
    if "rouge_l" in metrics:
        corpus["rouge_l"], items["rouge_l"] = _rouge(captions, references)
    if "cider" in metrics:
        name = "cider" if frozen is None else FROZEN
        corpus[name], items[name] = _cider(captions, references, frozen)
    notes = _cider_notes(len(captions)) if "cider" in corpus else ()
    return CaptionScores(corpus, items, counts, statistics, notes)


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[str]) -> None:
    if not predictions or len(predictions) != len(references) or not all(references):
        raise ValueError(
            f"expected captions, each with references; got {len(predictions)} captions and {len(references)} lists "
            f"of references, {sum(not refs for refs in references)} of them empty"
        )
    if unknown := set(metrics) - set(METRICS):
        raise ValueError(f"expected metrics from {', '.join(METRICS)}, got {', '.join(sorted(unknown))}")


def _cider_notes(items: int) -> tuple[str, ...]:
    if items >= _MIN_STABLE:
        return ()
    note = f"CIDEr of {items} items is unstable, because its document frequencies are computed from these items"
    return (note + "; for a single item it is 0 by definition" if items == 1 else note,)


def freeze_document_frequency(references: Sequence[Sequence[str]]) -> DocumentFrequency:
    """Compute CIDEr's document frequencies of all references of a dataset.

    Raises:
        ValueError: If Java is not found or fails.
    """
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer()
    tokens = java.tokenize([text for texts in references for text in texts])
    for texts in _split(tokens, references):
        scorer.cook_append(None, texts)
    scorer.compute_doc_freq()
    return DocumentFrequency(dict(scorer.document_frequency), len(references))


def bleu_of_counts(totals: np.ndarray) -> np.ndarray:
    """BLEU-1 to BLEU-4 (..., 4) of sums (..., 10) of `CaptionScores.bleu_counts`.

    Source: `compute_score` of pycocoevalcap 1.2, bleu/bleu_scorer.py, with its two small constants.
    """
    small, tiny = 1e-9, 1e-15
    matched, possible, words, wanted = totals[..., :4], totals[..., 4:8], totals[..., 8:9], totals[..., 9:10]
    precision = np.cumsum(np.log((matched + tiny) / (possible + small)), -1) / np.arange(1, 5)
    ratio = (words + tiny) / (wanted + small)
    with np.errstate(over="ignore"):
        return np.exp(precision + np.minimum(0, 1 - 1 / ratio))


def _tokenized(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Tokenize predictions and references in one run of the tokenizer."""
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
    # "" would match an empty reference
    items = np.array([scorer.calc_score([caption], refs) if caption else 0.0 for caption, refs in pairs])
    return float(items.mean()), items


def _cider(
    captions: list[str], references: list[list[str]], frozen: DocumentFrequency | None
) -> tuple[float, np.ndarray]:
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    class FrozenScorer(CiderScorer):
        """Takes the number of items from the frozen document frequencies instead of the scored captions."""

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
