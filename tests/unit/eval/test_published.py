"""Published numbers: each has a source, and stands only beside numbers of its own protocol."""

import pytest

from eval import published

PROTOCOLS = {
    "refcocog-umd-val/ungrouped",
    "refcocog-umd-val/grouped",
    "refcocog-google-val/grouped",
    "vg-test/subset5k",
    "vg-test/full",
}
ALL = [(data_set, row) for data_set, rows in published.read_published().items() for row in rows]


@pytest.mark.parametrize(("data_set", "row"), ALL, ids=lambda value: getattr(value, "system", ""))
def test_every_row_has_a_number_a_source_and_a_known_protocol(data_set, row):
    assert row.source and row.system
    assert row.protocol in PROTOCOLS | {"unknown"}
    assert row.protocol.startswith({"RefCOCOg": ("refcocog", "unknown"), "Visual Genome": ("vg-", "unknown")}[data_set])
    assert row.trained in (None, "zero-shot", "fine-tuned")
    assert row.verified in (True, False)
    numbers = [number for number in (row.meteor, row.cider) if number is not None]
    # x100, as papers print them: none of the raw scale, none beyond what a caption can reach
    assert numbers and all(isinstance(number, float) and 10 < number < 250 for number in numbers)


def test_no_result_stands_twice():
    keys = [(data_set, row.system, row.trained, row.protocol) for data_set, row in ALL]
    assert len(keys) == len(set(keys))


def test_the_protocols_are_tasks():
    from eval.tasks import TASKS

    assert TASKS.keys() >= PROTOCOLS
    assert {task.name for task in TASKS.values() if published.comparable(task.name)} <= {
        task.name for task in TASKS.values() if task.comparable
    }


@pytest.mark.parametrize("task", sorted(PROTOCOLS))
def test_a_row_is_comparable_or_says_why_not(task):
    rows, others = published.comparable(task), published.not_comparable(task)
    assert rows and all(row.protocol == task and row.verified for row in rows)
    assert all(reason for _, reason in others)
    (data_set,) = [name for name, start in published._DATASETS.items() if task.startswith(start)]
    assert len(rows) + len(others) == len(published.read_published()[data_set])


def test_what_is_known_of_protocols():
    """From the papers: the region captioners are ungrouped, All-Seeing is grouped, the subset is not the full set."""
    systems = {task: {row.system for row in published.comparable(task)} for task in PROTOCOLS}
    assert {"GLaMM", "Osprey-7B", "Alpha-CLIP + LLaVA-1.5-7B"} <= systems["refcocog-umd-val/ungrouped"]
    assert {"ASM", "ASMv2-13B", "VisionLLM v2"} <= systems["refcocog-umd-val/grouped"]
    assert not systems["refcocog-umd-val/ungrouped"] & systems["refcocog-umd-val/grouped"]
    assert "GRiT" in systems["vg-test/full"] and "GRiT" not in systems["vg-test/subset5k"]
    alpha = next(r for r in published.comparable("refcocog-umd-val/ungrouped") if r.system.startswith("Alpha-CLIP"))
    assert (alpha.meteor, alpha.cider) == (16.7, 109.2)  # arXiv 2312.03818, table 6


@pytest.mark.parametrize("task", ["vg-test/sample-5000-seed-0", "refcocog-lmms-eval", "refcocog-umd-val/ungrouped"])
def test_unknown_unverified_and_helped_systems_stand_nowhere(task):
    names = {row.system for row in published.comparable(task)}
    assert not names & {"Kosmos-2 (1.6B)", "VP-SPHINX-13B", "ControlCap, with words of the reference"}
    reasons = {row.system: reason for row, reason in published.not_comparable(task)}
    assert reasons
    if task.startswith("refcocog"):
        assert "not stated" in reasons["NExT-Chat"] and "secondary" in reasons["PAM-3B"]
    if task == "refcocog-umd-val/ungrouped":
        assert "words of the reference" in reasons["ControlCap, with words of the reference"]
    else:
        assert not names


def test_a_task_without_published_numbers_has_none():
    assert published.comparable("shapes-caption") == published.not_comparable("shapes-caption") == []
