"""The caption metrics against goldens of the reference implementations, on the field's own 1,000 captions.

Measured worst cases stand beside the tolerances; the goldens per image are rounded to 8 digits.
"""

import gzip
import json

import numpy as np
import pytest

from eval.metrics import java
from eval.metrics.captions import BLEU, FROZEN, bleu_of_counts, freeze_document_frequency, score_captions
from eval.metrics.questions import vqa_accuracy

GOLDEN_NAMES = {"METEOR": "METEOR", "ROUGE-L": "ROUGE_L", "CIDEr": "CIDEr"} | {
    n: n.replace("BLEU-", "Bleu_") for n in BLEU
}


@pytest.fixture(scope="module")
def material(shared_data):
    folder = shared_data / "metric_parity"
    rows = json.loads((folder / "fakecap_tokenized_cands_refs.json").read_text())
    return rows, json.loads((folder / "fakecap_goldens.json").read_text())


@pytest.fixture(scope="module")
def scored(material):
    rows, _ = material
    return score_captions([row["test"] for row in rows], [row["refs"] for row in rows], tokenized=True)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_corpus_values(material, scored, name):
    golden = material[1]["corpus"][GOLDEN_NAMES[name]]
    assert scored.corpus[name] == (pytest.approx(golden, abs=1e-6) if name == "CIDEr" else golden)  # all equal: 0.0


@pytest.mark.parametrize("name", ["METEOR", "ROUGE-L", "CIDEr"])
def test_values_of_each_image(material, scored, name):
    rows, goldens = material
    expected = np.array([goldens["per_image"][str(row["image_id"])][GOLDEN_NAMES[name]] for row in rows])
    assert np.abs(scored.items[name] - expected).max() < 6e-9  # 5.0e-9, the rounding


def test_published_values(material, scored):
    """What the notebook of tylin/coco-caption prints, to its three digits."""
    published = material[1]["published_notebook"]
    for name, theirs in GOLDEN_NAMES.items():
        assert scored.corpus[name] == pytest.approx(published[theirs], abs=6e-4)


def test_counts_and_statistics_make_the_corpus_value(scored):
    assert bleu_of_counts(scored.bleu_counts.sum(0)) == pytest.approx([scored.corpus[name] for name in BLEU], abs=1e-15)
    (again,) = java.meteor_of_statistics(scored.meteor_statistics.sum(0, keepdims=True))
    assert again == pytest.approx(scored.corpus["METEOR"], abs=1e-12)


def test_frozen_frequencies_give_a_part_what_the_whole_gives_it(material, scored):
    rows = material[0]
    frozen = freeze_document_frequency([row["refs"] for row in rows])
    part = score_captions([r["test"] for r in rows[:50]], [r["refs"] for r in rows[:50]], ["CIDEr"], frozen)
    # one reference of the material carries a full stop that the tokenizer removes: 1e-4 of CIDEr
    assert np.abs(part.items[FROZEN] - scored.items["CIDEr"][:50]).max() < 2e-3
    assert "CIDEr" not in part.corpus
    unfrozen = score_captions([r["test"] for r in rows[:50]], [r["refs"] for r in rows[:50]], ["CIDEr"])
    assert abs(unfrozen.corpus["CIDEr"] - part.corpus[FROZEN]) > 0.02


def test_all_published_tokenisations(shared_data):
    """20,245 captions of COCO with the tokens of Stanford's own tokenizer, before punctuation is removed."""
    lines = gzip.open(shared_data / "metric_parity" / "ptb_pairs_20244.tsv.gz", "rt", encoding="utf-8").read()
    pairs = [line.split("\t") for line in lines.rstrip("\n").split("\n")]
    tokens = java.tokenize([raw for raw, _ in pairs])
    expected = [" ".join(word for word in golden.split(" ") if word not in java.PUNCTUATION) for _, golden in pairs]
    assert len(pairs) == 20_245 and tokens == expected


def test_a_german_machine_gives_the_same_meteor(material, monkeypatch):
    rows = material[0][:20]
    texts = [row["test"] for row in rows], [row["refs"] for row in rows]
    expected = java.meteor(*texts)
    java._meteor.cache_clear()
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    found = java.meteor(*texts)
    java._meteor.cache_clear()
    assert found[0] == expected[0] and np.array_equal(found[1], expected[1])


def test_human_line_of_refcocog(shared_data):
    """One person's expression of a region against the other's: METEOR 16.2, CIDEr 85.8 (the facts' figures).

    The file does not say which expressions are of one region; those of a region follow each other in it, so that
    about every second pair of neighbours is one. What can be checked is the shape of it: neighbours score like people
    who describe the same thing, strangers like nothing.
    """
    rows = json.loads((shared_data / "refcocog" / "RefCOCOg_umd_val_captions.json").read_text())
    captions = [rows[str(number)][0]["caption"][0] for number in range(1, len(rows) + 1)]
    assert len(captions) == 4896
    first, second, stranger = captions[:-1:2], captions[1::2], captions[1001::2] + captions[1:1001:2]
    human = score_captions(first, [[text] for text in second], ["CIDEr"]).corpus["CIDEr"]
    strangers = score_captions(first, [[text] for text in stranger], ["CIDEr"]).corpus["CIDEr"]
    assert 0.2 < human < 1.0 and strangers < 0.1


@pytest.mark.parametrize(
    "question_id, prediction, expected",
    [
        (2, "ec", 1.0),  # six of ten: every person finds three others
        (2, "EC.", 1.0),  # normalised, as people disagree
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
        content = json.loads((shared_data / "textvqa" / f"TextVQA_0.5.1_{name}.json").read_text())
        questions |= {row["question_id"]: row["answers"] for row in content["data"]}
    assert len(questions[question_id]) == 10
    assert vqa_accuracy(prediction, questions[question_id]) == pytest.approx(expected)
