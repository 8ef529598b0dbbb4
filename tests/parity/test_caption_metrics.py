"""The caption metrics compared with golden values of the reference implementations, on 1,000 captions.

The measured worst case is next to each tolerance. Golden values per image are rounded to 8 digits.
"""

import functools
import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from eval.metrics import java
from eval.metrics.captions import BLEU, FROZEN, bleu_of_counts, freeze_document_frequency, score_captions
from eval.metrics.intervals import resampled_totals
from eval.metrics.questions import vqa_accuracy
from tests.files import read_json

GOLDEN_NAMES = {"meteor": "METEOR", "rouge_l": "ROUGE_L", "cider": "CIDEr"} | {
    n: n.replace("bleu_", "Bleu_") for n in BLEU
}


@pytest.fixture(scope="module")
def material(shared_data):
    folder = shared_data / "metric_parity"
    rows = read_json(folder / "fakecap_tokenized_cands_refs.json")
    return rows, read_json(folder / "fakecap_goldens.json")


def score(material, names):
    rows, _ = material
    return score_captions([row["test"] for row in rows], [row["refs"] for row in rows], names, tokenized=True)


@pytest.fixture(scope="module")
def without_meteor(material):
    return score(material, [name for name in GOLDEN_NAMES if name != "meteor"])


@pytest.fixture(scope="module")
def scored(material):
    return score(material, list(GOLDEN_NAMES))


@pytest.fixture
def scores_of(request):
    """The scores that a metric is among; METEOR takes ten seconds, so its own golden of a few captions is tested in
    tests/unit/eval/test_reference_values.py.
    """
    return lambda name: request.getfixturevalue("scored" if name == "meteor" else "without_meteor")


METEOR = pytest.param("meteor", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [METEOR, *(name for name in GOLDEN_NAMES if name != "meteor")])
def test_corpus_values(material, scores_of, name):
    scored, golden = scores_of(name), material[1]["corpus"][GOLDEN_NAMES[name]]
    assert scored.corpus[name] == (pytest.approx(golden, abs=1e-6) if name == "cider" else golden)  # all equal: 0.0


@pytest.mark.parametrize("name", [METEOR, "rouge_l", "cider"])
def test_values_of_each_image(material, scores_of, name):
    scored, (rows, goldens) = scores_of(name), material
    expected = np.array([goldens["per_image"][str(row["image_id"])][GOLDEN_NAMES[name]] for row in rows])
    assert np.abs(scored.items[name] - expected).max() < 6e-9  # 5.0e-9, the rounding


@pytest.mark.slow
def test_published_values(material, scored):
    """The three digits that the notebook of tylin/coco-caption prints."""
    published = material[1]["published_notebook"]
    for name, theirs in GOLDEN_NAMES.items():
        assert scored.corpus[name] == pytest.approx(published[theirs], abs=6e-4)


@pytest.mark.slow
def test_counts_and_statistics_make_the_corpus_value(scored):
    assert bleu_of_counts(scored.bleu_counts.sum(0)) == pytest.approx([scored.corpus[name] for name in BLEU], abs=1e-15)
    (again,) = java.meteor_of_statistics(scored.meteor_statistics.sum(0, keepdims=True))
    assert again == pytest.approx(scored.corpus["meteor"], abs=1e-12)


def test_frozen_frequencies_give_a_subset_the_values_of_the_full_set(material, without_meteor):
    rows = material[0]
    frozen = freeze_document_frequency([row["refs"] for row in rows])
    part = score_captions([r["test"] for r in rows[:50]], [r["refs"] for r in rows[:50]], ["cider"], frozen)
    # one reference of the material carries a full stop that the tokenizer removes: 1e-4 of CIDEr
    assert np.abs(part.items[FROZEN] - without_meteor.items["cider"][:50]).max() < 2e-3
    assert "cider" not in part.corpus
    unfrozen = score_captions([r["test"] for r in rows[:50]], [r["refs"] for r in rows[:50]], ["cider"])
    assert abs(unfrozen.corpus["cider"] - part.corpus[FROZEN]) > 0.02


def test_all_published_tokenizations(shared_data):
    """20,245 captions of COCO with the tokens of the Stanford tokenizer, before punctuation is removed."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    lines = gzip.open(shared_data / "metric_parity" / "ptb_pairs_20244.tsv.gz", "rt", encoding="utf-8").read()
    pairs = [line.split("\t") for line in lines.rstrip("\n").split("\n")]
    tokens = java.tokenize([raw for raw, _ in pairs])
    expected = [" ".join(word for word in golden.split(" ") if word not in PUNCTUATIONS) for _, golden in pairs]
    assert len(pairs) == 20_245 and tokens == expected


@pytest.mark.slow
def test_a_german_machine_gives_the_same_meteor(material, monkeypatch):
    rows = material[0][:20]
    texts = [row["test"] for row in rows], [row["refs"] for row in rows]
    expected = java.meteor(*texts)
    monkeypatch.setattr(java, "_meteor", functools.cache(java._Meteor))
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    found = java.meteor(*texts)
    assert found[0] == expected[0] and np.array_equal(found[1], expected[1])


def expressions(shared_data):
    rows = read_json(shared_data / "refcocog" / "RefCOCOg_umd_val_captions.json")
    captions = [rows[str(number)][0]["caption"][0] for number in range(1, len(rows) + 1)]
    assert len(captions) == 4896
    return java.tokenize(captions)


def same_region(texts, regions=2573):
    """Regions as tuples of positions. The file has the expressions of a region one after the other, and does not say
    where one ends: so many neighbours are paired as the regions need, those most alike, by the sum of their CIDEr."""
    likeness = score_captions(texts[:-1], [[text] for text in texts[1:]], ["cider"], tokenized=True).items["cider"]
    low, high = 0.0, 10.0  # what a pair counts beside its likeness: found by halving
    while True:
        bonus, best, paired = (low + high) / 2, [0.0, 0.0], [False, False]
        for position, value in enumerate(likeness):
            paired.append(best[position] + value + bonus > best[position + 1])
            best.append(max(best[position] + value + bonus, best[position + 1]))
        found, end = [], len(texts)
        while end:
            start = end - (2 if paired[end] else 1)
            found.append(tuple(range(start, end)))
            end = start
        if len(found) == regions or high - low < 1e-9:
            return found[::-1]
        low, high = (bonus, high) if len(found) > regions else (low, bonus)


@pytest.mark.slow
def test_human_line_of_refcocog(shared_data):
    """One person's expression of a region against the other's, both ways: METEOR 16.2, CIDEr 85.8 (the facts' figures).

    Measured 16.19 and 86.1; the pairs are inferred, see `same_region`.
    """
    texts = expressions(shared_data)
    regions = same_region(texts)
    pairs = [region for region in regions if len(region) == 2]
    assert (len(regions), len(pairs)) == (2573, 2323)
    both = pairs + [(second, first) for first, second in pairs]
    human = score_captions(
        [texts[i] for i, _ in both], [[texts[j]] for _, j in both], ["meteor", "cider"], tokenized=True
    ).corpus
    assert 100 * human["meteor"] == pytest.approx(16.2, abs=0.1)
    assert 100 * human["cider"] == pytest.approx(85.8, abs=0.6)


@pytest.mark.slow
def test_real_expressions_as_predictions_shuffled_and_grouped(shared_data):
    """The facts' self-checks on 4,896 real expressions; measured CIDEr 9.74 and .051, METEOR 20.9 and 31.3."""
    texts, rng = expressions(shared_data), np.random.default_rng(0)
    each = [[text] for text in texts]
    perfect = score_captions(texts, each, tokenized=True).corpus
    assert all(perfect[name] == pytest.approx(1, abs=1e-9) for name in (*BLEU, "meteor", "rouge_l"))
    assert 9 < perfect["cider"] <= 10
    shuffled = score_captions(texts, [each[i] for i in rng.permutation(len(texts))], ["cider"], tokenized=True)
    assert shuffled.corpus["cider"] < 0.1
    regions = same_region(texts)
    said = [" ".join(w for w in texts[rng.choice(r)].split() if rng.random() < 0.6) for r in regions]  # a poor model
    grouped = score_captions(said, [[texts[i] for i in r] for r in regions], ["meteor", "cider"], tokenized=True).corpus
    repeated = [text for text, r in zip(said, regions, strict=True) for _ in r]
    alone = score_captions(repeated, [[texts[i]] for r in regions for i in r], ["meteor", "cider"], tokenized=True)
    assert 1.4 < grouped["meteor"] / alone.corpus["meteor"] < 1.6  # the facts: 28.5 / 18.8
    assert 0.95 < grouped["cider"] / alone.corpus["cider"] < 1.05  # 171.5 / 171.8


def test_bootstrap_scores_equal_those_of_the_scorers(material):
    """The bootstrap's BLEU and METEOR, of added up counts: those of a corpus in which captions stand repeatedly."""
    rows = [(row["test"], row["refs"]) for row in material[0][:40]] + [("a red bus", ["a red bus"])] * 10
    scores = score_captions(*zip(*rows, strict=True), tokenized=True)
    counts = resampled_totals(np.eye(len(rows)), None, 3, seed=0).astype(int)
    drawn = [[row for row, times in zip(rows, draw, strict=True) for _ in range(times)] for draw in counts]
    golden = [score_captions(*zip(*corpus, strict=True), tokenized=True).corpus for corpus in drawn]
    bleu = bleu_of_counts(resampled_totals(scores.bleu_counts, None, 3, seed=0))
    meteor = java.meteor_of_statistics(resampled_totals(scores.meteor_statistics, None, 3, seed=0))
    for index, expected in enumerate(golden):
        assert bleu[index] == pytest.approx([expected[name] for name in BLEU], abs=1e-14)
        assert meteor[index] == pytest.approx(expected["meteor"], abs=1e-12)


@pytest.mark.slow
def test_empty_captions_score_as_in_pycocoevalcap(material, monkeypatch):
    """The original wrappers on captions, some of them empty: identical to the last digit."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor

    monkeypatch.setenv("PATH", str(Path(java.java()).parent), prepend=os.pathsep)
    rows = material[0][:60]
    captions = ["" if index % 7 == 0 else row["test"] for index, row in enumerate(rows)]
    references = [row["refs"] for row in rows]
    ours = score_captions(captions, references, tokenized=True)
    theirs = dict(enumerate(references)), {index: [text] for index, text in enumerate(captions)}
    bleu, bleu_items = Bleu(4).compute_score(*theirs, verbose=0)
    assert [ours.corpus[name] for name in BLEU] == bleu
    assert ours.items["bleu_4"].tolist() == bleu_items[3]
    for name, scorer in (("meteor", Meteor()), ("cider", Cider())):
        value, items = scorer.compute_score(*theirs)
        assert ours.corpus[name] == pytest.approx(value, abs=1e-15)
        assert np.array_equal(ours.items[name], np.array(items))
        assert (ours.items[name][::7] == 0).all()


@pytest.mark.parametrize(
    "question_id, prediction, expected",
    [
        (2, "ec", 1.0),  # six of ten: every person finds three others
        (2, "EC.", 1.0),  # normalized, as people disagree
        (2, "ec agg", 0.9),  # "ec-agg" twice becomes it: three of ten, whom one finds two others
        (4, "virgin", 1.0),
        (4, "virgin mobile", 0.3),  # one: nine of ten people find one other
        (34602, "dakota", 1.0),
        (34602, "dakota digital", 0.9),
        (34602, "nikon", 0.0),
        (34606, "ten years", 1.0),  # number words become digits
    ],
)
def test_vqa_accuracy_counted_by_hand(shared_data, question_id, prediction, expected):
    questions = {}
    for name in ("train", "val"):
        content = read_json(shared_data / "textvqa" / f"TextVQA_0.5.1_{name}.json")
        questions |= {row["question_id"]: row["answers"] for row in content["data"]}
    assert len(questions[question_id]) == 10
    assert vqa_accuracy(prediction, questions[question_id]) == pytest.approx(expected)
