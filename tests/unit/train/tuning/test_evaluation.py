"""Held-out questions answered while training: by region, in shares of several processes, with frozen document
frequencies.
"""

import itertools

import pytest

from eval.metrics.captions import freeze_document_frequency
from mllm.data.readers.visual_genome import read_region_questions, read_regions
from mllm.data.shapes import visual_genome_layout
from mllm.inference import RegionChat
from train.tuning.evaluation import AnswerScorer


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "val"
    visual_genome_layout.write(folder, 3, 9, "val", progress=False)
    described = list(itertools.islice(read_regions(folder), 6))
    asked = [q for q in read_region_questions(folder) if q.meta["type"] == "colour"][:5]
    return [*described, *asked]


def scorer(embedded, samples, regions=None, frequency=None):
    chat = RegionChat(*embedded)
    conversations = [
        [
            *chat.conversation(sample.open_image(), region, sample.question),
            {"role": "assistant", "content": [{"type": "text", "text": sample.references[0]}]},
        ]
        for sample, region in zip(samples, regions or [s.regions[0] for s in samples], strict=True)
    ]
    return AnswerScorer(embedded[1], conversations, [sample.question is None for sample in samples], frequency)


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_shares_of_several_processes_make_the_whole(embedded, held_out, world):
    asked = scorer(embedded, held_out, frequency=freeze_document_frequency([s.references for s in held_out]))
    answered = [answer for rank in reversed(range(world)) for answer in asked.answer(embedded[0], rank, world)]
    assert sorted(answer.number for answer in answered) == list(range(11))
    scores = asked.score(answered)
    assert scores["literal_match_descriptions"] == scores["literal_match_questions"] == scores["literal_match"] == 1.0
    assert scores["cider_frozen_df"] > 1


def test_another_region_is_another_answer(embedded, held_out):
    regions = [sample.regions[0] for sample in held_out]
    asked = scorer(embedded, held_out, regions[1:6] + regions[:1] + regions[7:] + regions[6:7])
    assert asked.score(asked.answer(embedded[0], 0, 1))["literal_match_descriptions"] < 0.2


def test_the_model_goes_on_training(embedded, held_out):
    model = embedded[0]
    model.train()
    try:
        scorer(embedded, held_out[:2]).answer(model, 0, 1)
        assert model.training
    finally:
        model.eval()
