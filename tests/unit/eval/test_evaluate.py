"""When published numbers may stand beside a run, and when not."""

import json

import pytest

from eval import tasks
from eval.evaluate import write_results

RECORD = {"protocol": {"limited to": None}, "region_input": "box"}


@pytest.mark.parametrize(
    "task, record, notes, beside",
    [
        ("refcocog-umd-val/ungrouped", RECORD, [], True),
        ("refcocog-umd-val/ungrouped", {**RECORD, "region_input": "mask"}, [], True),
        ("refcocog-umd-val/ungrouped", {"protocol": {}}, [], True),  # another system's file, scored
        ("refcocog-umd-val/ungrouped", {**RECORD, "region_input": "crop"}, [], False),
        ("refcocog-umd-val/ungrouped", {**RECORD, "protocol": {"limited to": 100}}, [], False),
        ("refcocog-umd-val/ungrouped", RECORD, ["INCOMPLETE: 1 of 4,896 samples"], False),
        ("refcoco-unc-val/grouped", RECORD, [], False),
    ],
)
def test_published_numbers_stand_beside_their_own_protocol_only(tmp_path, task, record, notes, beside):
    entry = {"value": 0.5, "low": None, "high": None, "interval": None}
    records = [{"id": "1", "prediction": "a", "references": ["a"], "meta": {}, "image": "x", "region": None}]
    metrics = {"task": task, "protocol": {}, "items": 1, "metrics": {"ROUGE-L": entry}, "by": {}, "notes": notes}
    write_results(tmp_path, tasks.find(task), {**metrics, "inputs": {}}, record, records, {}, "region-eval", 0, None)
    published = json.loads((tmp_path / "metrics.json").read_text())["published"]
    assert bool(published) == beside
