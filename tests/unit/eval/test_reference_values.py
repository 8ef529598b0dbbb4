"""Caption metrics on captions made for this test, with the values of the reference scorers.

Obtained once with pycocoevalcap 1.2: its `Meteor`, `Cider`, `Rouge` and `Bleu(4)` on these very texts. METEOR with and
without `-norm` differ where a token has a hyphen, a period or an apostrophe: without it the corpus has 0.279.
"""

import numpy as np
import pytest

from eval.metrics.captions import FROZEN, freeze_document_frequency, score_captions

CAPTIONS = [
    "a man 's t-shirt is light-blue",
    "two dogs running across the wet road",
    "the u.s. flag on a pole",
    "a woman holds an umbrella",
    "3 zebras drinking near the water",
    "an old-fashioned lamp",
]
REFERENCES = [
    ["the man wears a light blue t shirt", "a man in a blue shirt"],
    ["two dogs run over a wet street"],
    ["a flag of the u s on the pole", "an american flag"],
    ["a lady with an umbrella", "the woman who is holding an umbrella"],
    ["three zebras drink at the water"],
    ["a lamp of an old fashion", "old fashioned lamp"],
]
CORPUS = {
    "meteor": 0.3767951888274173,
    "rouge_l": 0.43021900743419733,
    "cider": 1.2686120467775075,
    "bleu_1": 0.5757575757401286,
    "bleu_2": 0.29205721806695356,
}
ITEMS = {
    "meteor": [
        0.3600888690063181,
        0.34672951640026717,
        0.33887493517466216,
        0.34926383889804447,
        0.39197499624191695,
        0.5098574389611754,
    ],
    "cider": [0.75032282, 1.66029368, 1.09389541, 1.63973221, 1.515207, 0.95222115],
}


def test_the_values_are_those_of_the_reference_scorers():
    found = score_captions(CAPTIONS, REFERENCES, list(CORPUS), tokenized=True)
    assert {name: found.corpus[name] for name in CORPUS} == pytest.approx(CORPUS, abs=1e-12)
    for name, items in ITEMS.items():
        assert np.allclose(found.items[name], items, atol=6e-9, rtol=0)  # CIDEr's are rounded


def test_frozen_document_frequencies_give_a_part_the_values_of_the_whole():
    frozen = freeze_document_frequency(REFERENCES)
    assert frozen.items == 6
    found = score_captions(CAPTIONS[1:4], REFERENCES[1:4], ["cider"], frozen, tokenized=True)
    assert list(found.corpus) == [FROZEN]
    assert np.allclose(found.items[FROZEN], ITEMS["cider"][1:4], atol=6e-9, rtol=0)
    assert found.corpus[FROZEN] == pytest.approx(np.mean(ITEMS["cider"][1:4]), abs=6e-9)
