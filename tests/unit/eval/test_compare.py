"""Runs are compared on the same samples under the same protocol, or not at all."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from eval.compare import compare
from eval.metrics import java
from eval.score import Measured
from tests.files import write_json, write_json_lines

ANSWERS = ["red", "blue", "two", "a cat", "left", "yes"]


def records(answers, *, pictures=True, region=None):
    return [
        {
            "id": f"q{index}",
            "image": "scene.png",
            "region": region,
            "question": f"what is number {index}?",
            "prediction": answer,
            "references": [ANSWERS[index % len(ANSWERS)]],
            "meta": {"image_id": index // 2} if pictures else {},
        }
        for index, answer in enumerate(answers)
    ]


def write(folder, name, lines, run=None):
    folder = folder / name
    folder.mkdir(parents=True)
    write_json_lines(folder / "predictions.jsonl", lines)
    if run is not None:
        write_json(folder / "run.json", run)
    return folder


def run_of(task="shapes-vqa", references="1", **others):
    return {"task": task, "protocol": {"item": "question", "references": references, "region_form": "box"}, **others}


RIGHT = ANSWERS
METRICS_FILE = {"task": None, "protocol": {}, "items": 6, "metrics": {"contains": {"value": 1.0}}}
WRONG = ["red", "green", "two", "a dog", "right", "no"]  # two of six are right


def test_values_differences_and_what_changed(tmp_path):
    a, b = write(tmp_path, "a", records(RIGHT), run_of()), write(tmp_path, "b", records(WRONG), run_of())
    found = compare([a, b], metrics=["exact_match"])
    assert found.items == 6
    assert found.values == {"exact_match": [1.0, pytest.approx(2 / 6)]}
    (difference,) = found.differences["exact_match"]
    assert difference.value == pytest.approx(-4 / 6)
    assert difference.low <= difference.value <= difference.high <= 0
    assert [sample.predictions[0].id for sample in found.changed] == ["q1", "q3", "q4", "q5"]
    assert found.changed[0].scores == [1.0, 0.0]
    # the other way round: the sign turns
    assert compare([b, a], metrics=["exact_match"]).differences["exact_match"][0].value == pytest.approx(4 / 6)


def test_other_forms_of_regions_are_noted(tmp_path):
    masks = run_of()
    masks["protocol"]["region_form"] = "mask"
    a, b = write(tmp_path, "a", records(RIGHT), run_of()), write(tmp_path, "b", records(WRONG), masks)
    assert "the region forms differ: box, mask" in compare([a, b], metrics=["exact_match"]).notes
    assert not any("form" in note for note in compare([a, a], metrics=["exact_match"]).notes)


def test_what_changed_most_comes_first(tmp_path, monkeypatch):
    scores = {"a": [0.5, 0.5, 0.5, 0.5, 0.5, 0.5], "b": [0.6, 0.1, 0.5, 1.0, 0.4, 0.3]}
    runs = iter("ab")
    monkeypatch.setattr(
        "eval.compare.measure",
        lambda records, metrics: Measured({"token_f1": 0.0}, {"token_f1": np.array(scores[next(runs)])}),
    )
    a, b = write(tmp_path, "a", records(RIGHT)), write(tmp_path, "b", records(WRONG))
    found = compare([a, b], metrics=["token_f1"], max_changed=3)
    assert [sample.predictions[0].id for sample in found.changed] == ["q3", "q1", "q5"]


def test_a_run_compared_with_itself(tmp_path):
    a = write(tmp_path, "a", records(WRONG), run_of())
    found = compare([a, a / "predictions.jsonl"])
    assert list(found.values) == ["exact_match", "contains", "token_f1"]  # every sample has a question
    assert all((d.value, d.low, d.high) == (0, 0, 0) for ds in found.differences.values() for d in ds)
    assert found.changed == []


def test_another_order_is_fine(tmp_path):
    a = write(tmp_path, "a", records(RIGHT))
    straight, turned = write(tmp_path, "b", records(WRONG)), write(tmp_path, "c", records(WRONG)[::-1])
    one, two = compare([a, straight]), compare([a, turned])
    assert (one.values, one.differences, one.changed) == (two.values, two.differences, two.changed)


def test_three_runs_are_each_compared_with_the_first(tmp_path):
    paths = [
        write(tmp_path, name, records(answers)) for name, answers in zip("abc", (WRONG, RIGHT, WRONG), strict=True)
    ]
    found = compare(paths, metrics=["exact_match"])
    assert [d.value for d in found.differences["exact_match"]] == [pytest.approx(4 / 6), 0]
    assert [len(sample.predictions) for sample in found.changed] == [3] * 4


def test_samples_of_one_picture_are_no_independent_witnesses(tmp_path):
    """Eight copies of the same thing in each picture: the interval must not shrink for that."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 2, 40)
    lines = {}
    for name, picture_of in (("clustered", lambda i: i // 8), ("free", lambda i: None)):
        for side in "ab":
            rows = []
            for index in range(320):
                answer = "red" if side == "a" or pictures[index // 8] else "green"
                meta = {} if picture_of(index) is None else {"image_id": picture_of(index)}
                rows.append(
                    {"id": str(index), "prediction": answer, "references": ["red"], "question": "?", "meta": meta}
                )
            lines[name, side] = write(tmp_path, name + side, rows)
    widths, notes = {}, {}
    for name in ("clustered", "free"):
        found = compare([lines[name, "a"], lines[name, "b"]], metrics=["exact_match"])
        (difference,) = found.differences["exact_match"]
        widths[name], notes[name] = difference.high - difference.low, found.notes
    # the exact ratio of standard errors is sqrt(8) = 2.83
    assert 2.2 < widths["clustered"] / widths["free"] < 3.5
    assert any("over images" in note for note in notes["clustered"])
    assert any("over samples" in note for note in notes["free"])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (records(RIGHT)[:-2], r"lacks 2 of the 6 ids of .*a \(q4, q5\)"),
        (records(RIGHT + ["more", "more"]), r"has 2 ids that are not in .*a \(q6, q7\)"),
        (records(RIGHT)[1:] + [{**records(RIGHT)[0], "id": "other"}], r"lacks 1 of .*\(q0\).*has 1 ids.*\(other\)"),
        (records(RIGHT) + records(RIGHT)[:1], r"q0"),
        ([{**row, "references": ["something else"]} for row in records(RIGHT)], r"different references for 6 of 6 ids"),
    ],
)
def test_other_samples_are_refused_by_name(tmp_path, second, message):
    a, b = write(tmp_path, "a", records(RIGHT)), write(tmp_path, "b", second)
    with pytest.raises(ValueError, match=message):
        compare([a, b])


@pytest.mark.parametrize("other", [run_of(task="vg-regionqa/densecap-test"), run_of(references="all of the region")])
def test_another_protocol_is_refused(tmp_path, other):
    a, b = write(tmp_path, "a", records(RIGHT), run_of()), write(tmp_path, "b", records(RIGHT), other)
    with pytest.raises(ValueError, match="different protocols"):
        compare([a, b])
    bare = write(tmp_path, "c", records(RIGHT))
    with pytest.raises(ValueError, match="different protocols"):
        compare([a, bare, b])


def test_one_run_is_too_few(tmp_path):
    with pytest.raises(ValueError, match="two or more"):
        compare([write(tmp_path, "a", records(RIGHT))])


def test_an_unknown_metric_and_a_damaged_run_are_named(tmp_path):
    a, b = write(tmp_path, "a", records(RIGHT)), write(tmp_path, "b", records(WRONG))
    with pytest.raises(ValueError, match="got CIDER"):
        compare([a, b], metrics=["CIDER"])
    (b / "run.json").write_text('{"task": ', "utf-8")
    with pytest.raises(ValueError, match=r"cannot read .*run\.json"):
        compare([a, b])


def test_other_settings_are_said_and_a_silent_file_too(tmp_path):
    a = write(tmp_path, "a", records(RIGHT), run_of(model="one", prompt="same"))
    b = write(tmp_path, "b", records(WRONG), run_of(model="two", prompt="same"))
    notes = " ".join(compare([a, b]).notes)
    assert "differ in model" in notes and "prompt" not in notes and "run.json" not in notes
    c = write(tmp_path, "c", records(WRONG))
    assert "1 of 2 have no run.json" in " ".join(compare([a, c]).notes)


def test_a_view_belongs_to_its_run(tmp_path):
    a = write(tmp_path, "a", records(RIGHT), run_of(view="box"))
    whole = write(a / "views", "whole", records(WRONG))
    assert "the runs differ in view" in compare([a, whole]).notes
    with pytest.raises(ValueError, match="different protocols"):
        compare([write(tmp_path, "b", records(RIGHT), run_of(task="other")), whole])


def test_the_metrics_are_those_of_the_first_run(tmp_path):
    a, b = write(tmp_path, "a", records(RIGHT)), write(tmp_path, "b", records(WRONG))
    write_json(a / "metrics.json", METRICS_FILE)
    assert list(compare([a, b]).values) == ["contains"]


def captions(tmp_path):
    """Half of the second run's captions are as good, and one is so long that it alone lowers BLEU."""
    right = [
        f"the {colour} {thing} on the left" for colour in ("red", "blue", "green") for thing in ("horse", "cup", "man")
    ]
    rows = [{"id": str(i), "prediction": text, "references": [text]} for i, text in enumerate(right)]
    rows[8]["prediction"] = "word " * 300
    others = [{**row, "prediction": "nothing on the left" if i % 2 else right[i]} for i, row in enumerate(rows)]
    return write(tmp_path, "a", rows), write(tmp_path, "b", others)


def test_captions_by_the_reference_scorers(tmp_path):
    found = compare(captions(tmp_path), metrics=["exact_match", "bleu_1", "bleu_4", "rouge_l"])
    assert found.values["exact_match"] == [pytest.approx(8 / 9), pytest.approx(5 / 9)]
    for metric, values in found.values.items():
        (difference,) = found.differences[metric]
        assert difference.value == pytest.approx(values[1] - values[0])
        assert difference.low <= difference.value <= difference.high
    # although most samples are worse, the file's BLEU is better: the mean of the samples' BLEU would say the opposite
    assert found.differences["bleu_1"][0].value > 0 > found.differences["rouge_l"][0].value
    assert len(found.changed) == 5 and found.changed[0].predictions[0].id == "8"


@pytest.mark.slow
def test_the_interval_of_bleu_is_that_of_files_drawn_by_hand(tmp_path):
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    a, b = captions(tmp_path)
    (found,) = compare([a, b], metrics=["bleu_2"]).differences["bleu_2"]
    files = [[json.loads(line) for line in (path / "predictions.jsonl").open("rb")] for path in (a, b)]
    drawn = []
    for rows in np.random.default_rng(5).integers(9, size=(1500, 9)):
        bleus = []
        for file in files:
            scorer = BleuScorer(n=4)
            for row in rows:
                scorer.cook_append(file[row]["prediction"].strip(), file[row]["references"])
            bleus.append(scorer.compute_score(option="closest")[0][1])
        drawn.append(bleus[1] - bleus[0])
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=0.03)


def test_the_interval_of_meteor_is_that_of_files_drawn_by_hand(tmp_path):
    """The very draws of the bootstrap, each written out as a corpus and given to METEOR whole."""
    a, b = captions(tmp_path)
    (found,) = compare([a, b], metrics=["meteor"], resamples=40, seed=5).differences["meteor"]
    files = [[json.loads(line) for line in (path / "predictions.jsonl").open("rb")] for path in (a, b)]
    drawn = []
    for rows in np.random.default_rng(5).integers(9, size=(40, 9)):
        texts = [([file[r]["prediction"] for r in rows], [file[r]["references"] for r in rows]) for file in files]
        first, second = (java.meteor(*corpus)[0] for corpus in texts)
        drawn.append(second - first)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=1e-9)


def test_as_text(tmp_path):
    evil = records(WRONG)
    evil[1]["prediction"] = "\x1b[2Jgreen\nnew line " + "x" * 500
    a, b = write(tmp_path, "a", records(RIGHT)), write(tmp_path, "b", evil)
    text = compare([a, b], metrics=["exact_match"]).to_text()
    (row,) = [line for line in text.splitlines() if line.startswith("exact match")]
    assert row.split()[2:5] == ["100.0", "33.3", "-66.7"]
    assert f"A = {a}" in text and f"B = {b}" in text and "'q1'" in text
    assert "\x1b" not in text and max(len(line) for line in text.splitlines()) < 250


def test_as_html(tmp_path):
    Image.new("RGB", (60, 40), "grey").save(tmp_path / "scene.png")
    evil = records(WRONG, region={"box": [5, 5, 25, 25]})
    evil[1]["prediction"] = "<script>alert(1)</script>"
    a, b = write(tmp_path, "a", records(RIGHT, region={"box": [5, 5, 25, 25]})), write(tmp_path, "b", evil)
    page = tmp_path / "compare.html"
    compare([a, b], metrics=["exact_match"]).write_html(page, tmp_path)
    tags, texts = [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.handle_data = texts.append
    parser.feed(page.read_text("utf-8"))
    assert "script" not in {tag for tag, _ in tags}
    assert "<script>alert(1)</script>" in texts
    assert texts.count("\u2713 correct") == 4 == texts.count("\u2717 incorrect")  # of A and of B, which differ in four
    sources = [attributes["src"] for tag, attributes in tags if tag == "img"]
    assert len(sources) == 4 and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "\u221266.7" in page.read_text("utf-8")


def test_the_pictures_are_where_a_run_says(tmp_path):
    Image.new("RGB", (60, 40), "grey").save(tmp_path / "scene.png")
    a = write(tmp_path, "a", records(RIGHT), run_of(data=str(tmp_path)))
    b = write(tmp_path, "b", records(WRONG), run_of(data=str(tmp_path)))
    compare([a, b], metrics=["exact_match"]).write_html(tmp_path / "c.html")
    assert (tmp_path / "c.html").read_text("utf-8").count("<img") == 4
    with pytest.raises(ValueError, match="cannot write"):
        compare([a, b], metrics=["exact_match"]).write_html(tmp_path / "no" / "c.html")
