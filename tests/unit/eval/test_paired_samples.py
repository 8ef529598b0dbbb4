"""A paired difference is of the same samples in both runs, and the crop view shows every pixel of the region."""

from unittest import mock

import numpy as np
import pytest
from msgspec import structs
from PIL import Image

from eval import compare as comparing
from eval import evaluate
from eval.compare import compare
from eval.generate import GenerationSettings
from eval.metrics.captions import score_captions
from eval.metrics.intervals import difference_of_captions, paired_difference
from eval.predictions import Prediction
from eval.score import measure
from eval.tasks import TASKS
from eval.views import crop, draw_red_box
from tests.files import write_json_lines
from vision_tower import Region

PREDICTIONS = ["a red bus", "two dogs", "a man in a coat", "a cup of tea", "the left cat", "three zebras"]
REFERENCES = ["a blue bus", "two dogs", "the man in the coat", "a cup", "the cat on the left", "zebras"]


def predictions(order):
    return [Prediction(**row) for row in records(order)]


def same(difference):
    return (difference.value, difference.low, difference.high) == (0, 0, 0)


METRICS = ["exact_match", "token_f1", "bleu_1", "cider"]


def records(order, predictions=PREDICTIONS):
    return [
        {"id": f"q{n}", "question": "?", "prediction": predictions[n], "references": [REFERENCES[n]], "meta": {}}
        for n in order
    ]


def test_the_same_answers_in_another_order_differ_in_nothing(tmp_path):
    """Not by 0 on average: sample by sample, or the interval has a width."""
    a, b = (
        write_json_lines(tmp_path / "a.jsonl", records(range(6))),
        write_json_lines(tmp_path / "b.jsonl", records([3, 5, 0, 4, 2, 1])),
    )
    found = compare([a, b], metrics=METRICS)
    for metric in METRICS:
        assert same(found.differences[metric][0]), metric
    assert found.changed == []


def test_each_sample_is_compared_with_itself(tmp_path):
    shuffled = [4, 2, 5, 1, 0, 3]
    better = [REFERENCES[n] if n in (0, 3) else text for n, text in enumerate(PREDICTIONS)]
    a, b = (
        write_json_lines(tmp_path / "a.jsonl", records(range(6))),
        write_json_lines(tmp_path / "b.jsonl", records(shuffled, better)),
    )
    seen, difference = [], paired_difference
    with mock.patch("eval.score.paired_difference", lambda a, b, *rest: seen.append((a, b)) or difference(a, b, *rest)):
        found = compare([a, b], metrics=["exact_match"])
    (pair,) = seen
    assert [scores.tolist() for scores in pair] == [[0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]  # without articles
    assert {sample.predictions[1].id for sample in found.changed} == {"q0", "q3"}
    assert all(one.id == two.id for one, two in (sample.predictions for sample in found.changed))
    assert comparing._matched(a, predictions(range(6)), b, predictions(shuffled)) == predictions(range(6))


def test_a_view_without_some_samples_is_compared_on_those_it_has(tmp_path):
    """A region alone in its image has no other region: the sample is missing under "other region"."""
    main = predictions(range(6))
    view = [structs.replace(prediction, prediction=prediction.references[0]) for prediction in main[2:5]]
    settings = GenerationSettings()
    config = evaluate.EvalConfig(TASKS["jsonl"], tmp_path, tmp_path, settings, metrics=("exact_match", "token_f1"))
    base, found = measure(main, config.metrics), measure(view, config.metrics)
    differences = evaluate._differences(config, main, base, view, found)
    for metric in config.metrics:
        expected = found.items[metric].mean() - base.items[metric][2:5].mean()
        assert differences[metric].value == pytest.approx(expected) and expected != 0


@pytest.mark.parametrize("count", [0, 1, 5])
def test_scores_of_another_number_of_samples_are_refused(count):
    scores = np.linspace(0, 1, 6)
    for pair in ((scores, scores[:count]), (scores[:count], scores)):
        with pytest.raises(ValueError, match="expected scores of the same items"):
            paired_difference(*pair)
    if count:
        texts, refs = PREDICTIONS, [[text] for text in REFERENCES]
        few, all_ = (score_captions(texts[:n], refs[:n], ["bleu_1"], tokenized=True) for n in (count, 6))
        for pair in ((few, all_), (all_, few)):
            with pytest.raises(ValueError, match="expected scores of the same items"):
                difference_of_captions(*pair, "bleu_1")


@pytest.mark.parametrize(
    ("box", "pixels"),
    [
        ((10.2, 20.7, 40.3, 50.1), (10, 20, 41, 51)),
        ((10, 20, 40, 50), (10, 20, 40, 50)),
        ((10.9, 20.9, 11.1, 21.1), (10, 20, 12, 22)),
        ((10.2, 20.2, 10.4, 20.4), (10, 20, 11, 21)),
        ((-5, -5, 3.5, 200), (0, 0, 4, 60)),
        ((79.5, 59.5, 90, 90), (79, 59, 80, 60)),
    ],
)
def test_the_crop_view_shows_every_pixel_that_the_region_touches(box, pixels):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
    region = Region.from_box(*box)
    found = np.asarray(crop(picture, region))
    x0, y0, x1, y1 = pixels
    assert np.array_equal(found, np.asarray(picture)[y0:y1, x0:x1])
    rows, columns = np.nonzero(region.mask(60, 80))  # what the tower is shown
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == pixels
    assert draw_red_box(picture, region).size == (80, 60)
