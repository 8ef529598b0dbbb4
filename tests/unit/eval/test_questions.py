"""Short answers: VQA's normalisation with its quirks, and scores counted by hand.

The normalised forms are what `processPunctuation` and `processDigitArticle` of GT-Vision-Lab/VQA's vqaEval.py give;
both agreed on 200,000 random strings.
"""

import numpy as np
import pytest

from eval.metrics.questions import normalize_answer, question_word, score_answers, vqa_accuracy


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The Red Bus.", "red bus"),
        ("two", "2"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("its", "its"),
        ("somebody'd", "somebodyd"),  # the original's own slip
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("x-ray", "x ray"),
        ("1,000", "1000"),
        ("1,000 e-mails", "1000 emails"),  # with such a number all marks are removed
        ("3.5 miles.", "3.5 miles"),
        ("U.S.A.", "usa"),
        ("a\nb\tc", "b c"),
        ("?", ""),
    ],
)
def test_normalised_as_the_original_does(text, expected):
    assert normalize_answer(text) == expected


def test_scores_by_hand():
    predictions = ["It is a red bus.", "red", "", "bus red", "Red Bus"]
    found = score_answers(predictions, [["a red bus"], ["a red bus", "blue"], ["red"], ["red bus"], ["the red bus"]])
    assert found["exact_match"].tolist() == [0, 0, 0, 0, 1]
    assert found["contains"].tolist() == [1, 0, 0, 1, 1]
    # "it is red bus" and "red bus": 2 * 2 / (4 + 2); "red" and "red bus": 2 * 1 / (1 + 2)
    assert found["token_f1"] == pytest.approx(np.array([2 / 3, 2 / 3, 0, 1, 1]))


def test_an_article_alone_is_an_answer():
    """ "A." on a sign; and of marks alone nothing is left to be right with."""
    found = score_answers(["A", "the", "it says a", "?", "B"], [["A."], ["A."], ["red"], ["?"], ["A."]])
    assert found["exact_match"].tolist() == [1, 0, 0, 0, 0]
    assert found["contains"].tolist() == [1, 0, 0, 0, 0]


def test_the_best_reference_counts():
    assert score_answers(["blue"], [["red", "green", "Blue."]])["exact_match"].tolist() == [1]


def test_vqa_accuracy_where_people_agree_compares_as_it_stands():
    assert vqa_accuracy("Red.", ["red"] * 10) == 0 and vqa_accuracy("red", ["red"] * 10) == 1
    assert vqa_accuracy("Red.", ["red"] * 9 + ["blue"]) == 1


def test_the_single_answer_trap_is_refused():
    with pytest.raises(ValueError, match="several annotators"):
        vqa_accuracy("red", ["red"])


@pytest.mark.parametrize("predictions, references", [([], []), (["a"], []), (["a"], [[]])])
def test_what_does_not_match_is_refused(predictions, references):
    with pytest.raises(ValueError, match="expected answers"):
        score_answers(predictions, references)


def test_question_words():
    questions = ["What is it?", " how many?", '"Where" is it', "Is it red?", "", "whatever is it"]
    assert [question_word(q) for q in questions] == ["what", "how", "where", "other", "other", "other"]
