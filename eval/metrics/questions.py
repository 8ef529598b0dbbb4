"""Metrics of short answers: exact match, contains and token F1 after VQA's normalization, and VQA accuracy."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

ANSWER_METRICS = ("exact_match", "contains", "token_f1")  # of one reference or several
METRICS = (*ANSWER_METRICS, "vqa_accuracy")
# Rules of GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py at master, quirks included:
# `(?!<=\d)` was meant as a lookbehind but has no effect, and `re.UNICODE` is passed as the count.
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_REMOVED = int(re.UNICODE)  # 32
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = ("a", "an", "the")
_NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}
_NUMBERS["none"] = "0"
# An apostrophe missing from one of these is restored ("dont", "couldn'tve"); "ill", "its", "were" are words too.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
_RESTORED = {
    word[: match.start()] + word[match.end() :]: word for word in _CONTRACTIONS for match in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}  # reversed in the original list
_QUESTION_WORDS = ("what", "who", "why", "where", "when", "how")


def normalize_answer(text: str) -> str:
    """VQA's normalization of an answer: lower case, no punctuation or articles, numbers as digits."""
    return _digits_and_articles(_without_punctuation(_on_one_line(text)))


def score_answers(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """Score answers against the best of their references, after normalizing both.

    Returns:
        (N,) float by metric, in [0, 1]: "exact_match" is 1 for an equal answer; "contains" is 1 if the prediction
        contains all words of the reference, for models that answer in sentences; "token_f1" is the F1 of the words, as
        in SQuAD (arXiv 1606.05250, section 6.1).

    Raises:
        ValueError: If there are no predictions, or a prediction has no references.
    """
    if not predictions or len(predictions) != len(references) or not all(references):
        raise ValueError(
            f"expected answers, each with references; got {len(predictions)} answers and {len(references)} lists"
        )
    rows = [
        np.max([_compare(_comparable(prediction), _comparable(text)) for text in refs], axis=0)
        for prediction, refs in zip(predictions, references, strict=True)
    ]
    return dict(zip(ANSWER_METRICS, np.array(rows, float).T, strict=True))


def _comparable(text: str) -> str:
    """The normalized text; an article alone ("A.", a letter on a sign) is an answer and is kept."""
    return normalize_answer(text) or _without_punctuation(_on_one_line(text)).strip().lower()


def _compare(answer: str, reference: str) -> tuple[float, float, float]:
    """Exact match, contains and F1 of normalized texts; an empty answer is never correct."""
    words, wanted = Counter(answer.split()), Counter(reference.split())
    if not words or not wanted:
        return 0.0, 0.0, 0.0
    shared = (words & wanted).total()
    return float(answer == reference), float(wanted <= words), 2 * shared / (words.total() + wanted.total())


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy in [0, 1]: the mean over annotators of min(1, number of the others who gave this answer / 3).

    Raises:
        ValueError: If there is a single answer, for which the formula is always 0.
    """
    if len(answers) < 2:
        raise ValueError(
            f"vqa_accuracy requires answers of several annotators (10 in VQA), got {len(answers)}; use exact_match for "
            "data with one answer"
        )
    answers, prediction = [_on_one_line(answer) for answer in answers], _on_one_line(prediction)
    if len(set(answers)) > 1:  # if all annotators agree, the original does not normalize
        answers, prediction = [normalize_answer(answer) for answer in answers], normalize_answer(prediction)
    matching = answers.count(prediction)
    return sum(min(1, (matching - (answer == prediction)) / 3) for answer in answers) / len(answers)


def question_word(question: str) -> str:
    """The first word of a question if it is "what", "who", "why", "where", "when" or "how", else "other"."""
    first = re.match(r"\W*(\w+)", question.lower())
    return first[1] if first and first[1] in _QUESTION_WORDS else "other"


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """Remove punctuation next to a space, or all of it if the text has a number such as 1,000; else insert a space."""
    cleaned = text
    for mark in _PUNCTUATION:
        removed = mark + " " in text or " " + mark in text or _COMMA_IN_NUMBER.search(text)
        cleaned = cleaned.replace(mark, "" if removed else " ")
    return _PERIOD.sub("", cleaned, count=_PERIODS_REMOVED)


def _digits_and_articles(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)
