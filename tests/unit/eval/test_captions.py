"""Caption scores on cases that nobody needs a golden file for, and Java that misbehaves."""

import functools
import stat

import numpy as np
import pytest

from eval.metrics import java
from eval.metrics.captions import METRICS, score_captions

CAPTIONS = [
    "a red bus on the road",
    "two dogs play with a ball",
    "the man in the yellow coat",
    "a cup of coffee on a table",
    "a woman who holds an umbrella",
    "three zebras near the water",
]


def test_references_as_predictions():
    found = score_captions(CAPTIONS, [[caption] for caption in CAPTIONS])
    for name in METRICS:
        assert found.corpus[name] == pytest.approx(10.0 if name == "cider" else 1.0, abs=1e-6)
    assert found.notes and "unstable" in found.notes[0]


def test_both_sides_are_tokenised():
    found = score_captions(["A RED bus, on the road."], [["a red bus on the road!"]])
    assert found.items["rouge_l"][0] == found.items["meteor"][0] == 1


def test_shuffled_references():
    found = score_captions(CAPTIONS, [[caption] for caption in CAPTIONS[1:] + CAPTIONS[:1]])
    assert found.corpus["cider"] < 0.5 and found.corpus["bleu_4"] < 0.01 and found.corpus["meteor"] < 0.2


def test_grouping_raises_meteor_far_more_than_cider():
    """What makes published numbers of RefCOCOg incomparable: the same captions, the references grouped or not."""
    first = [caption.replace("a ", "the ") for caption in CAPTIONS]
    second = ["something red", "some animals", "he who stands on the left", "the drink", "the lady", "animals"]
    predictions = ["a bus", "dogs with a ball", "man on the left", "coffee", "lady with umbrella", "zebras"]
    ungrouped = score_captions(predictions * 2, [[text] for text in first + second], ["meteor", "cider"]).corpus
    grouped = score_captions(predictions, [list(pair) for pair in zip(first, second, strict=True)], ["meteor", "cider"])
    assert grouped.corpus["meteor"] > 1.2 * ungrouped["meteor"]


ODD = [
    "",
    "a\nb",
    "\U0001f600",
    "a ||| b",
    "x\u2028y",
    "\r\n",
    "a\x85b",
    "\ud800 dog",
    "...",
    "||| ||| |||",
    "\x00 cat",
]


def test_odd_captions_do_not_shift_the_others():
    """An empty line, a line break, an emoji or a separator inside a caption: every other caption keeps its score."""
    plain = score_captions(CAPTIONS, [[caption] for caption in CAPTIONS])
    mixed = [text for pair in zip(ODD[: len(CAPTIONS)], CAPTIONS, strict=True) for text in pair] + ODD[len(CAPTIONS) :]
    references = [["a plain reference"] if text in ODD else [text] for text in mixed]
    found = score_captions(mixed, references)
    kept = [index for index, text in enumerate(mixed) if text in CAPTIONS]
    for name in ("meteor", "rouge_l", "bleu_4"):
        assert np.array_equal(found.items[name][kept], plain.items[name])
    assert found.items["meteor"][mixed.index("")] == 0 and found.items["rouge_l"][mixed.index("")] == 0
    assert (found.items["cider"][kept] > 9).all()


def test_odd_references_do_not_shift_either():
    references = [[caption, *ODD] for caption in CAPTIONS]
    assert (score_captions(CAPTIONS, references, ["meteor"]).items["meteor"] == 1).all()


def test_nothing_is_never_right():
    found = score_captions(["", "a dog"], [[""], ["a dog"]])
    assert all(found.items[name][0] == pytest.approx(0, abs=1e-6) for name in METRICS)


def test_very_long_predictions_score_low_and_come_back():
    found = score_captions(["word " * 10_000, *CAPTIONS], [["a dog"], *([caption] for caption in CAPTIONS)])
    assert found.items["meteor"][0] < 0.01 and (found.items["meteor"][1:] == 1).all()
    assert found.corpus["bleu_1"] < 0.01


@pytest.mark.slow  # takes 6 GB of memory
def test_ten_thousand_words_of_the_reference_are_scored():
    """METEOR's own limit of 2 GB is too little for this; its alignment tries every repetition."""
    found = score_captions(["the dog " * 5_000, CAPTIONS[0]], [["the dog near the cat"], [CAPTIONS[0]]], ["meteor"])
    assert 0 < found.items["meteor"][0] < 0.01 and found.items["meteor"][1] == 1


def test_line_breaks_in_tokens_do_not_shift_meteor():
    odd = ["a cat\non a mat", "a dog\r", "a ||| b", CAPTIONS[0]]
    found = score_captions(odd, [[text] for text in odd], ["meteor"], tokenized=True)
    assert len(found.items["meteor"]) == 4 and (found.items["meteor"] == 1).all()


@pytest.mark.slow
def test_an_interrupted_meteor_does_not_answer_the_next_call(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    java.meteor(["a"], [["a"]])  # it runs, so that it would go on answering
    with monkeypatch.context() as patch:
        patch.setattr(java.threading.Thread, "join", interrupt)
        with pytest.raises(KeyboardInterrupt):
            java.meteor(["no such thing"] * 100, [["a dog"]] * 100)
    assert java.meteor(["a dog"], [["a dog"]])[0] == 1


def test_one_item_has_no_cider():
    found = score_captions(CAPTIONS[:1], [CAPTIONS[:1]], ["cider"])
    assert found.corpus["cider"] == 0 and "0 by definition" in found.notes[0]


@pytest.mark.parametrize("predictions, references", [([], []), (["a"], []), (["a"], [[]]), (["a", "b"], [["a"]])])
def test_what_does_not_match_is_refused(predictions, references):
    with pytest.raises(ValueError, match="expected captions"):
        score_captions(predictions, references)


def test_unknown_metrics_are_refused():
    with pytest.raises(ValueError, match="SPICE"):
        score_captions(["a"], [["a"]], ["SPICE"])


@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    def make(script):
        file = tmp_path / "java"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(java, "java", lambda: str(file))
        monkeypatch.setattr(java, "_meteor", functools.cache(java._Meteor))  # the real one goes on running

    return make


ALL = [("the tokenizer", lambda: java.tokenize(["a"], 1)), ("METEOR", lambda: java.meteor(["a"], [["a"]], 1))]


@pytest.mark.parametrize("script", ["exec sleep 60", "sleep 60"], ids=["itself", "in a child of its own"])
@pytest.mark.parametrize("name, call", ALL, ids=["tokenizer", "meteor"])
def test_java_that_hangs_is_given_up(fake_java, name, call, script):
    fake_java(script)
    with pytest.raises(ValueError, match=f"{name} did not finish within 1 seconds"):
        call()


@pytest.mark.parametrize("name, call", ALL, ids=["tokenizer", "meteor"])
def test_java_that_dies_says_why(fake_java, name, call):
    fake_java("read line; echo out of memory >&2; printf '\\tat Main\\n' >&2; exit 3")
    with pytest.raises(ValueError, match=f"{name} exited with code 3 .* out of memory"):
        call()


@pytest.mark.parametrize("name, call", ALL, ids=["tokenizer", "meteor"])
def test_java_that_chatters_does_not_block(fake_java, name, call):
    fake_java("head -c 3000000 /dev/zero >&2; exit 1")
    with pytest.raises(ValueError, match="exited with code 1"):
        call()


def test_too_few_lines_are_never_matched_to_captions(fake_java):
    fake_java("cat > /dev/null; echo one")
    with pytest.raises(ValueError, match="1 of 2 lines"):
        java.tokenize(["a", "b"])


def test_no_java_says_what_to_install(monkeypatch, tmp_path):
    java.java.cache_clear()
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(ValueError, match="pip install"):
        java.java()
    java.java.cache_clear()
