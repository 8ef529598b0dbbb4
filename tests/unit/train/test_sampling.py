"""Facts about regions, and the conversations drawn from them."""

from collections import Counter

import pytest
import torch

from mllm.data import shapes
from mllm.data.templates import DESCRIBE_REGION_WORDINGS
from mllm.data.visual_genome import read_free_questions, read_region_questions, read_regions
from train.sampling import ConversationDataset, group_by_region


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "train"
    shapes.write(folder, 6, 1, progress=False)
    return folder


def test_grouping_keeps_every_form_and_turn_once(root):
    boxes, masks = (list(read_regions(root, region_input=form)) for form in ("box", "mask"))
    questions, free = list(read_region_questions(root)), list(read_free_questions(root))
    facts = group_by_region(boxes, masks, questions, free)
    assert len(facts) == len(boxes) + len(free)
    for entry, box, mask in zip(facts, boxes, masks, strict=False):
        assert entry.forms == (box.regions[0], mask.regions[0])
        asked = [
            (q.meta["type"], q.question, q.references[0])
            for q in questions
            if q.meta["region_id"] == box.meta["region_id"]
        ]
        assert set(entry.turns) == {("description", None, box.references[0]), *asked}
    assert all(entry.forms[0].is_whole for entry in facts[len(boxes) :])


def test_conversations_are_true_and_varied(root):
    facts = group_by_region(
        *(read_regions(root, region_input=form) for form in ("box", "mask")), read_region_questions(root)
    )
    dataset = ConversationDataset(facts, max_turns=2, turn_weights={"description": 3.0})
    torch.manual_seed(0)
    lengths, forms, described = Counter(), Counter(), 0
    for _ in range(30):
        for index, entry in enumerate(facts):
            messages = dataset[index]
            lengths[len(messages) // 2] += 1
            item = messages[0]["content"][0]
            assert item["image"].size == (96, 96) and item["region"] in entry.forms
            forms[entry.forms.index(item["region"])] += 1
            for asked, answered in zip(messages[::2], messages[1::2], strict=True):
                question, answer = asked["content"][-1]["text"], answered["content"][0]["text"]
                question = None if question in DESCRIBE_REGION_WORDINGS else question
                assert (question, answer) in {turn[1:] for turn in entry.turns}
                described += question is None
    total = sum(lengths.values())
    assert 0.4 < lengths[1] / total < 0.6 and 0.4 < forms[0] / total < 0.6
    assert described / total > 0.4


def test_the_same_seed_draws_the_same(root):
    dataset = ConversationDataset(group_by_region(read_regions(root), read_region_questions(root)), max_turns=3)
    drawn = []
    for _ in range(2):
        torch.manual_seed(4)
        drawn.append([[m["content"][-1]["text"] for m in dataset[i]] for i in range(len(dataset))])
    assert drawn[0] == drawn[1]
