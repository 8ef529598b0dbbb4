"""The report is one file that opens offline, says what it shows, and takes nobody's text for markup."""

import base64
import io
import re
from html.parser import HTMLParser

import msgspec
import numpy as np
import pytest
from PIL import Image

from eval import published
from eval.page import sort_metric
from eval.predictions import Prediction
from eval.report import OtherView, ReportData, write_report
from eval.results import Result, RunConfig
from eval.score import Measured

VOID = {"meta", "img", "br", "hr", "input", "link"}
OUTLINE = np.array([255, 60, 200])


class Page(HTMLParser):
    """Tags with their attributes, and the text of each element; unbalanced tags are an error."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", " ".join(data.split())))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def words(self, *tags):
        return [text for tag, text in self.texts if text and (not tags or tag in tags)]

    @property
    def text(self):
        return " ".join(self.words())

    def row(self, name):
        """The cells' texts of the first row whose head is `name`."""
        for row in re.findall(r"<tr.*?</tr>", self.source, re.S):
            cells = [
                " ".join(re.sub("<[^>]*>", " ", cell).split()) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.S)
            ]
            if cells[0].split(" ")[0] == name:
                return cells
        raise AssertionError(f"no row {name}")


def entry(value, low=None, high=None):
    return {"value": value, "low": low, "high": high, "interval": None if low is None else "bootstrap over images"}


def metrics_of(records, **others):
    return {
        "task": None,
        "protocol": {},
        "items": len(records),
        "metrics": {"meteor": entry(0.195, 0.181, 0.209), "rouge_l": entry(0.396), "cider": entry(1.092, 0.9, 1.25)},
        "by": {},
        "views": {},
        "published": [],
        "notes": [],
        "counts": {},
        "command": "region-eval score predictions.jsonl --out RUN",
        "versions": {"torch": "2.13"},
        "seed": 0,
        **others,
    }


def records_of(count, **others):
    return [
        {
            "id": f"id-{index:03}",
            "image": "scene.png",
            "region": {"box": [40, 20, 120, 100]},
            "question": None,
            "prediction": f"answer {index}",
            "references": [f"reference {index}"],
            "meta": {},
            **others,
        }
        for index in range(count)
    ]


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (400, 300), (200, 200, 200)).save(tmp_path / "scene.png")
    return tmp_path


def report(folder, records, metrics=None, inputs=None, run=None, *, right=None, image_root=..., **others):
    """A report of records whose scores, and whether they are right, are given."""
    path = folder / "report.html"
    metrics = metrics or metrics_of(records)
    scores = np.asarray(others.pop("scores", np.linspace(0, 1, len(records))))
    items = {sort_metric(list(metrics["metrics"])): scores}
    values = dict.fromkeys(metrics["metrics"], 0.5)
    if right is not None:
        items |= {"exact_match": np.asarray(right, float)}
        values |= {"exact_match": 0.5}
    data = ReportData(
        msgspec.convert(metrics, Result),
        RunConfig(**(run or {})),
        msgspec.convert(records, list[Prediction]),
        Measured(values, items),
        by_id(inputs or {}),
    )
    write_report(path, data, folder if image_root is ... else image_root, **others)
    return Page(path)


def by_id(inputs):
    """Predictions by id of each view but the main one; those that are "right" are correct."""
    return {
        name: OtherView({r["id"]: r["prediction"] for r in found}, {r["id"]: r["prediction"] == "right" for r in found})
        for name, found in inputs.items()
        if name != "box"
    }


VIEWS = {
    "box": {"items": 12, "metrics": {"meteor": entry(0.3, 0.25, 0.35), "rouge_l": entry(0.5), "cider": entry(1.0)}},
    "whole": {"items": 12, "metrics": {"meteor": entry(0.1), "rouge_l": entry(0.2), "cider": entry(0.4)}},
    "other_region": {
        "items": 9,
        "metrics": {"meteor": entry(0.05), "rouge_l": entry(0.1), "cider": entry(0.1)},
        "shown_region_metrics": {"meteor": entry(0.29), "rouge_l": entry(0.45), "cider": entry(0.95)},
    },
    "no_image": {
        "items": 9,
        "metrics": {"meteor": entry(0.02), "rouge_l": entry(0.1), "cider": entry(0.1)},
        "difference": {"meteor": {"value": -0.27, "low": -0.31, "high": -0.22, "p": 0.002}},
    },
}


def full(folder, **others):
    records = records_of(12)
    task = "refcocog-umd-val/ungrouped"
    metrics = metrics_of(
        records,
        task=task,
        protocol={"item": "expression", "references": "1", "limit": None},
        by={"area": {"under 1 %": {"items": 5, "meteor": 0.1}, "over 10 %": {"items": 7, "meteor": 0.31}}},
        views=VIEWS,
        published=msgspec.to_builtins(published.comparable(task)),
        notes=["human line: METEOR 16.2", "2 empty"],
    )
    whole = [{**record, "prediction": f"whole {record['id']}"} for record in records]
    inputs = {"box": records, "whole": whole, "other_region": whole[:9]}
    run = {"model": "some/model", "view": "box", "prompt": "What is <this>?", "max_new_tokens": 64}
    return report(folder, records, metrics, inputs, run, **others)


def test_it_opens_offline_and_runs_nothing(folder):
    page = full(folder)
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    policy = next(tag["content"] for tag in page.all("meta") if tag.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
        assert attributes.get("href", "#").startswith("#")
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {link["href"][1:] for link in page.all("a")} == ids
    assert not re.search(r"url\(|@import", page.source)


def test_headings_tables_and_pictures_are_named(folder):
    page = full(folder)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert len(page.all("table")) == len(page.all("caption")) >= 5
    assert all("scope" in attributes for attributes in page.all("th"))
    assert all(tag["alt"] and tag["width"] and tag["height"] for tag in page.all("img"))
    assert {"viewport", "color-scheme"} <= {tag.get("name") for tag in page.all("meta")}
    # a wide table scrolls inside its own box, not the page
    assert page.source.count("<table") == page.source.count('<div class="scroll" tabindex="0" role="region"')


def test_contrast():
    """Both schemes, by WCAG 2.1's formula: text at least 4.5 to 1."""
    from importlib.resources import files

    style = (files("eval") / "pages" / "base.html").read_text("utf-8")
    schemes = [dict(re.findall(r"--(\w+): (#\w+)", found)) for found in re.findall(r":root \{(.*?)\}", style, re.S)]
    assert len(schemes) == 2

    def luminance(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return np.dot(linear, (0.2126, 0.7152, 0.0722))

    for scheme in schemes:
        for text in ("ink", "muted", "mark", "correct", "incorrect"):
            for ground in ("page", "card"):
                dark, light = sorted((luminance(scheme[text]), luminance(scheme[ground])))
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)


def test_values_are_times_100_and_stand_beside_their_peers_only(folder):
    page = full(folder)
    assert page.row("METEOR")[1:3] == ["19.5", "[18.1, 20.9]"]
    assert page.row("ROUGE-L")[1:] == ["39.6", "–"]
    assert page.row("this")[2:4] == ["19.5", "109.2"]
    assert page.row("Alpha-CLIP")[2:4] == ["16.7", "109.2"]
    names = page.words("th")
    assert any(name.startswith("Osprey") for name in names) and "ASMv2-13B" in page.text
    assert "114.7" not in page.text  # of a grouped system: named with the reason, its number left out
    assert "some/model" in page.text and "What is <this>?" in page.text and "expression" in page.text
    assert "human line: METEOR 16.2" in page.text and "2 empty" in page.text
    assert "region-eval score" in page.text and "2.13" in page.text
    assert page.row("under")[1:] == ["5", "10.0"]


def test_a_part_of_a_task_stands_beside_nothing(folder):
    records = records_of(3)
    page = report(folder, records, metrics_of(records, task="refcocog-umd-val/ungrouped"))
    assert "No published results are comparable with these" in page.text
    assert "109.2" not in page.row("CIDEr")[2] and "105.9" not in page.text
    assert "did not score all of its items" in page.text


def test_the_inputs_stand_side_by_side(folder):
    page = full(folder)
    assert page.row("box")[1:3] == ["12", "30.0 [25.0, 35.0]"]
    assert page.row("whole")[1:] == ["12", "10.0 \u221220.0", "20.0 \u221230.0", "40.0 \u221260.0"]
    # of fewer samples: no difference, unless metrics.json has a paired one
    assert page.row("other_region")[1:3] == ["9", "5.0"]
    assert "other_region: 9 of 12 samples" in page.text
    assert page.row("other_region,")[1:3] == ["9", "29.0"]
    assert page.row("no_image")[2] == "2.0 \u221227.0 [\u221231.0, \u221222.0]" or page.row("no_image")[2].startswith(
        "2.0 \u221227.0"
    )
    assert "whole id-000" in page.text and "(not run)" in page.text


def test_worst_best_and_random_samples(folder):
    records = records_of(40)
    scores = np.random.default_rng(0).permutation(np.linspace(0, 1, 40))
    pages = [report(folder, records, scores=scores, max_images=9, seed=seed) for seed in (0, 0, 1)]
    shown = [[text.split(" ")[0] for text in page.words("h4")] for page in pages]
    assert len(set(shown[0])) == len(shown[0]) == len(pages[0].all("img")) == 9
    assert shown[0][:3] == [f"id-{index:03}" for index in np.argsort(scores)[:3]]
    assert shown[0][3:6] == [f"id-{index:03}" for index in np.argsort(scores)[::-1][:3]]
    assert pages[0].source == pages[1].source and shown[0] != shown[2]
    assert "9 of 40 samples" in pages[0].text


@pytest.mark.parametrize("count", [1, 2, 4])
def test_few_samples_are_all_shown(folder, count):
    page = report(folder, records_of(count))
    assert len(page.all("article")) == count


def test_the_region_is_where_it_was(folder):
    page = report(folder, records_of(1))
    (tag,) = page.all("img")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(tag["src"].partition(",")[2]))).convert("RGB"), float)
    assert pixels.shape == (240, 320, 3) and (tag["width"], tag["height"]) == ("320", "240")
    scale = 320 / 400
    inside = pixels[int(20 * scale) + 4 : int(100 * scale) - 4, int(40 * scale) + 4 : int(120 * scale) - 4]
    assert abs(inside - 200).max() < 12  # JPEG
    assert abs(pixels[200:, 200:] - 70).max() < 12
    band = pixels[20:70, int(40 * scale) - 3 : int(40 * scale) + 2]
    assert (abs(band - OUTLINE).sum(-1).min(1) < 160).all()
    assert "box:40,20,120,100" in tag["alt"]


def test_what_cannot_be_drawn_says_why(folder):
    records = records_of(6)
    records[0]["image"] = "gone.png"
    records[1]["region"] = {"box": [900, 900, 950, 950]}
    records[2]["image"] = ""
    del records[3]["image"], records[3]["region"], records[3]["question"]  # another system's file
    page = report(folder, records)
    assert len(page.all("img")) == 2 and page.text.count("No image") == 4
    assert "image file not found" in page.text
    # the reason of several is said once
    assert (
        page.text.count("2 have no image: the predictions have no image names.")
        == 1
        == page.text.count("have no image names")
    )


def test_without_a_folder_of_images(folder):
    page = report(folder, records_of(3), image_root=None)
    assert page.text.count("the folder of the images was not given") == 1 and page.text.count("No image") == 3


def test_results_come_first_and_each_sentence_once(folder):
    page = full(folder)
    headings = page.words("h2")
    assert headings == ["Metrics", "Views", "By type of region or question", "Samples", "Run"]
    assert page.text.index("109.2") < page.text.index("What is <this>?") > page.text.index("Samples")
    assert page.text.count("bootstrap over images") == 1
    sentences = [text for text in page.words("p", "li", "h4", "span", "summary") if len(text.split()) > 4]
    assert len(set(sentences)) == len(sentences)
    assert page.text.count("were never released") == 1
    assert page.text.count("he scored items and references are not stated") == 1


def test_how_intervals_were_made_is_one_sentence(folder):
    metrics = metrics_of(records_of(1))
    metrics["metrics"]["cider"]["interval"] = "bootstrap over images, document frequencies fixed"
    text = report(folder, records_of(1), metrics).text
    assert "Intervals: bootstrap over images; of CIDEr document frequencies fixed." in text


def test_right_and_wrong_are_marked_where_a_metric_says_so(folder):
    records = records_of(2)
    others = {"whole": records_of(2, prediction="right"), "other_region": records_of(2)}
    marked = report(folder, records, inputs=others, right=[1, 0], scores=[1, 0])
    assert marked.words("span").count("\u2713 correct") == 3 and marked.words("span").count("\u2717 incorrect") == 3
    assert "by the metric \u201cexact match\u201d" in marked.text
    plain = report(folder, records)
    assert "\u2713" not in plain.text and "\u2717" not in plain.text and "marked" not in plain.text


def test_the_reference_is_beside_the_answer(folder):
    page = report(folder, records_of(2, question="What?"), inputs={"whole": records_of(2)})
    for pair in re.findall(r'<dl class="pair">(.*?)</dl>', page.source, re.S):
        assert re.search("answer 0.*reference 0|answer 1.*reference 1", pair, re.S)
    assert page.source.count('<dl class="pair">') == 2
    assert page.words("dt")[:4] == ["question", "answer", "reference", "whole"]


def test_wide_tables_become_blocks_on_a_phone(folder):
    """Every cell of a table of more than three columns names its column, for where the head is not shown."""
    source = full(folder).source
    for table in re.findall(r"<table.*?</table>", source, re.S):
        columns = len(re.findall("<th scope=.col", table))
        is_stack = 'class="stack"' in table
        assert is_stack or columns <= 3
        if is_stack:
            assert all("data-label=" in cell for cell in re.findall("<td[^>]*>", table))


def test_the_length_of_captions_stands_there(folder):
    length = {"words_per_prediction": 4.26, "words_per_reference": 5.0}
    text = report(folder, records_of(2), metrics_of(records_of(2), length=length)).text
    assert "Mean length: 4.3 words per prediction, 5.0 words per reference." in text


def test_untrusted_text_stays_text(folder):
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}'
    records = records_of(4, prediction=evil, references=[evil], question=evil)
    for record in records:
        record["id"] += evil
    metrics = metrics_of(
        records,
        task=evil,
        notes=[evil],
        command=evil,
        versions={evil: evil},
        protocol={"item": evil, "references": evil},
    )
    inputs = {"box": records, "whole": records, evil: records}
    page = report(folder, records, metrics, inputs, {"model": evil, "view": "box", "prompt": evil})
    assert not page.all("script")
    assert len(page.all("img")) == 4 and all("onerror" not in tag for tag in page.all("img"))
    assert page.text.count(evil) > 20 and "49" not in page.text


def test_odd_answers(folder):
    records = records_of(3)
    records[0]["prediction"] = ""
    records[1]["prediction"] = "word " * 10_000
    records[2]["prediction"] = "half a pair \ud83d, right to left \u202e, nothing \x00, cat \U0001f408"
    page = report(folder, records)
    assert "(empty)" in page.text and "(49,700 more characters)" in page.text
    assert "\U0001f408" in page.text and len(page.source) < 100_000


def test_the_file_stays_small(tmp_path):
    """Noise is the worst that JPEG can be given."""
    rng = np.random.default_rng(0)
    records = records_of(120)
    for index, record in enumerate(records):
        record["image"] = f"{index % 6}.png"
    for index in range(6):
        Image.fromarray(rng.integers(0, 256, (400, 400, 3), np.uint8)).save(tmp_path / f"{index}.png")
    page = report(tmp_path, [{**record, "region": {"whole": True}} for record in records])
    assert len(page.all("img")) == 48
    assert (tmp_path / "report.html").stat().st_size < 5e6


def test_the_folder_must_exist(folder):
    with pytest.raises(ValueError, match="cannot write"):
        report(folder / "no", records_of(1))
    assert [path.name for path in folder.iterdir()] == ["scene.png"]
