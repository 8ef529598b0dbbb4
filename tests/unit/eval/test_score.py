"""What metrics.json says: values, intervals, kinds of regions, counts of what a reader must know."""

import pytest
from msgspec import structs

from eval.predictions import Prediction
from eval.score import measure, score


def record(number, prediction, reference, **meta):
    question = meta.pop("question", None)
    return Prediction(id=str(number), prediction=prediction, references=[reference], question=question, meta=meta)


def scores(predictions, metrics, **options):
    return score(predictions, measure(predictions, metrics), metrics, **options)


RECORDS = [
    record(0, "red", "red", image_id=1, area=0.005, same_class=0, question="What colour?"),
    record(1, "blue", "red", image_id=1, area=0.05, same_class=1, question="what colour?"),
    record(2, "2", "two", image_id=2, area=0.5, same_class=7, question="How many?"),
    record(3, "", "two", image_id=2, area=1.0, same_class=3, question="Is it?"),
]


def test_values_and_kinds():
    found = scores(RECORDS, ["literal_match", "exact_match"])
    assert found.items == 4
    assert found.metrics["literal_match"].value == 0.25
    entry = found.metrics["exact_match"]
    assert entry.value == 0.5 and entry.low == entry.high == 0.5  # one of two in each picture: drawn whole
    assert "over images" in entry.interval
    assert found.by["area"] == {
        "under 1%": {"items": 1, "literal_match": 1.0, "exact_match": 1.0},
        "1% to 10%": {"items": 1, "literal_match": 0.0, "exact_match": 0.0},
        "over 10%": {"items": 2, "literal_match": 0.0, "exact_match": 0.5},
    }
    assert [(name, row["items"]) for name, row in found.by["same_class"].items()] == [
        ("0", 1),
        ("1", 1),
        ("3 or more", 2),
    ]
    assert {name: row["items"] for name, row in found.by["question_word"].items()} == {
        "what": 2,
        "how": 1,
        "other": 1,
    }
    assert "type" not in found.by


def test_what_a_reader_must_know_is_counted():
    long = record(4, "word " * 101, "a", image_id=3)
    truncated = structs.replace(record(5, "a red", "a red bus", image_id=3), truncated=True)
    found = scores([*RECORDS, long, truncated], ["exact_match"], with_intervals=False)
    assert found.metrics["exact_match"].low is None
    assert found.counts == {
        "empty_predictions": 1,
        "truncated_predictions": 1,
        "long_predictions": 1,
    }
    assert len(found.notes) == 3
    assert found.length["words_per_prediction"] == pytest.approx((3 + 101 + 2) / 6)


def test_intervals_are_over_items_where_pictures_are_not_named():
    rows = [structs.replace(row, meta={}) for row in RECORDS]
    entry = scores(rows, ["exact_match"]).metrics["exact_match"]
    assert "over items" in entry.interval and entry.low < 0.5 < entry.high


def test_captions_and_letters_together():
    found = scores(RECORDS, ["literal_match", "bleu_1", "rouge_l", "cider"])
    assert list(found.metrics) == ["literal_match", "bleu_1", "rouge_l", "cider"]
    assert any("unstable" in note for note in found.notes)


CAPTIONS = [
    record(0, "a red bus", "a red bus on the left", area=0.005),
    record(1, "a big dog on the grass", "the big dog", area=0.005),
    record(2, "a cat", "a cat", area=0.005),
    record(3, "two men", "a man with a hat", area=0.5),
    record(4, "a tree behind the house", "a tall tree behind a house", area=0.5),
]


def test_a_part_is_scored_as_the_whole_is():
    """What the breakdown calls METEOR, BLEU or ROUGE-L is what scoring those captions alone gives; a mean over captions
    is another quantity. CIDEr, whose document frequencies are those of all, has another name.
    """
    metrics = ["exact_match", "bleu_1", "bleu_4", "meteor", "rouge_l", "cider"]
    found = measure(CAPTIONS, metrics)
    by = score(CAPTIONS, found, metrics, with_intervals=False).by["area"]
    for bucket, part in {"under 1%": CAPTIONS[:3], "over 10%": CAPTIONS[3:]}.items():
        alone = measure(part, metrics).values
        assert list(by[bucket]) == ["items", *metrics[:-1], "cider_df_of_all_items"]
        for name in metrics[:-1]:
            assert by[bucket][name] == pytest.approx(alone[name], abs=1e-12)
    assert abs(by["under 1%"]["meteor"] - found.items["meteor"][:3].mean()) > 0.01
    assert by["over 10%"]["cider_df_of_all_items"] == found.items["cider"][3:].mean()


@pytest.mark.parametrize(
    "records, metrics, message", [([], ["cider"], "nothing to score"), (RECORDS, ["BLEU"], "got BLEU")]
)
def test_bad_input(records, metrics, message):
    with pytest.raises(ValueError, match=message):
        measure(records, metrics)


def test_vqa_accuracy_of_one_answer_is_refused():
    with pytest.raises(ValueError, match="several annotators"):
        measure(RECORDS, ["vqa_accuracy"])
