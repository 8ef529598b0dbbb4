"""The check of docs/compatibility.md against the tests, on synthetic rows."""

from tests.compatibility import PAGE, differences, page

ROWS = {
    ("CLIP", "hidden states", "1e-5", "tests/a.py::test_a"): {
        "outcomes": {"passed", "skipped"},
        "worst": [1e-7, 3.21e-6],
    },
    ("LLaVA", "logits", "equal", "tests/b.py::test_b"): {"outcomes": {"passed", "skipped"}, "worst": []},
}


def test_a_page_agrees_with_the_tests_that_wrote_it():
    text = page(ROWS)
    assert "| CLIP | hidden states | 1e-5 | 3.2e-06 | `tests/a.py::test_a` |" in text
    assert "| LLaVA | logits | equal | 0 | `tests/b.py::test_b` |" in text
    assert differences(ROWS, text) == []


def test_a_row_without_a_passing_test_is_wrong():
    text = page(ROWS)
    (first, *_) = ROWS
    failed = {**ROWS, first: {"outcomes": {"passed", "failed"}, "worst": []}}
    gone = {key: row for key, row in ROWS.items() if key != first}
    for rows in (failed, gone):
        (wrong,) = differences(rows, text)
        assert "no passing test" in wrong and "CLIP" in wrong


def test_another_tolerance_and_a_new_row_are_wrong():
    assert len(differences(ROWS, page(ROWS).replace("1e-5", "1e-3"))) == 2
    (wrong,) = differences(
        {**ROWS, ("T5", "ids", "equal", "tests/c.py::test_c"): {"outcomes": {"passed", "skipped"}, "worst": []}},
        page(ROWS),
    )
    assert "the page has no row for" in wrong


def test_the_page_is_there():
    assert PAGE.read_text(encoding="utf-8").count("| `tests/") > 15
