"""S-IoU by hand, semantic similarity against sentence-transformers' own cosine, COCO's files through COCO's reader."""

import numpy as np
import pytest
import torch
from pycocoevalcap.eval import COCOEvalCap
from pycocotools.coco import COCO
from transformers import BertConfig, BertModel, BertTokenizerFast

from eval.coco_format import write_coco
from eval.metrics.similarity import semantic_iou, semantic_similarity
from eval.predictions import Prediction, read_predictions

PREDICTIONS = ["A red bus.", "dog", "", "traffic light: green"]
REFERENCES = [["red_bus"], ["cat", "a dog"], ["x"], ["traffic/light"]]


def test_words_shared_over_words_of_both():
    # {a, red, bus} and {red, bus}; {dog} and {a, dog}; nothing; {traffic, light, green} and {traffic, light}
    assert semantic_iou(PREDICTIONS, REFERENCES) == pytest.approx(np.array([2 / 3, 1 / 2, 0, 2 / 3]))


@pytest.fixture(scope="module")
def sentence_model(tmp_path_factory):
    from sentence_transformers import SentenceTransformer, models

    folder = tmp_path_factory.mktemp("sentence")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a red bus dog cat x traffic light green".split()]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder / "bert")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    transformer = models.Transformer(str(folder / "bert"))
    pooling = models.Pooling(transformer.get_word_embedding_dimension())
    SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(folder / "model"))
    return folder / "model"


def test_semantic_similarity_is_the_best_cosine(sentence_model):
    from sentence_transformers import SentenceTransformer

    found = semantic_similarity(PREDICTIONS, REFERENCES, sentence_model)
    model = SentenceTransformer(str(sentence_model), device="cpu")
    first, second, cat = model.encode(["dog", "a dog", "cat"])
    cosine = [float(first @ other / np.linalg.norm(first) / np.linalg.norm(other)) for other in (second, cat)]
    assert found[1] == pytest.approx(max(cosine), abs=1e-6) and found.shape == (4,)
    same = semantic_similarity(["a red bus"], [["a_red_bus"]], sentence_model)
    assert same[0] == pytest.approx(1, abs=1e-6)


def test_no_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="directory of a sentence-transformers model"):
        semantic_similarity(PREDICTIONS, REFERENCES, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot load the sentence model"):
        semantic_similarity(PREDICTIONS, REFERENCES, tmp_path / "empty")


def test_coco_files_are_read_by_coco_and_by_us(tmp_path):
    records = [
        Prediction(id=f"s{i}", image=f"{i}.jpg", prediction=p, references=refs)
        for i, (p, refs) in enumerate(zip(PREDICTIONS, REFERENCES, strict=True))
    ]
    write_coco(tmp_path, records)
    annotations = COCO(str(tmp_path / "annotations.json"))
    found = COCOEvalCap(annotations, annotations.loadRes(str(tmp_path / "results.json")))
    assert [found.cocoRes.imgToAnns[i][0]["caption"] for i in (1, 2, 3, 4)] == PREDICTIONS
    assert [a["caption"] for a in found.coco.imgToAnns[2]] == ["cat", "a dog"]
    back, _ = read_predictions(tmp_path / "results.json", tmp_path / "annotations.json")
    assert [(r.prediction, r.references) for r in back] == list(zip(PREDICTIONS, REFERENCES, strict=True))
    write_coco(tmp_path, records[:2])  # its own files are replaced
    assert len(COCO(str(tmp_path / "annotations.json")).getImgIds()) == 2
    (tmp_path / "annotations.json").unlink()
    with pytest.raises(ValueError, match="results.json exists and was not written by this command"):
        write_coco(tmp_path, records)
