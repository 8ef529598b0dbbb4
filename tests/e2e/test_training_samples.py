"""What the two training programs really learn from: which split, at which strength, by which loss. Looked at where a
batch enters the trainer.
"""

import math

import pytest
import torch
from torch.nn import functional

import mllm
from alpha_clip_commands import region_tune
from alpha_clip_commands.training.contrastive_arguments import PairArguments
from alpha_clip_commands.training.tuning_arguments import DataArguments
from mllm.data.build_index import build_index
from mllm.data.densecap_splits import densecap_split
from mllm.data.index import RegionIndex
from tests.alpha_maps import alpha_map
from tests.files import read_json, write_json, write_json_lines
from tests.tiny import build_tiny_clip, build_tiny_llava, noise_image, save_model
from tests.training import train
from train import finetune
from train.contrastive import trainer as contrastive_trainer
from train.contrastive.data import RegionTextDataset
from train.contrastive.trainer import RegionTextTrainer, _capped
from train.trainer import RegionTrainer
from train.tuning.collators import IGNORE_INDEX
from train.tuning.conversations import ConversationDataset
from vision_tower import AlphaCLIPModel

SPLITS = ("test", "train", "unlisted", "val")
SMOOTHING = 0.25
IMAGES = {split: [noise_image(32, 32, 10 * row + n) for n in range(4)] for row, split in enumerate(SPLITS)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four images of each split in one file."""
    folder, lines = tmp_path_factory.mktemp("data"), []
    for split, pictures in IMAGES.items():
        for number, picture in enumerate(pictures):
            picture.save(folder / f"{split}{number}.png")
            region = {"box": [4 + number, 4, 20, 28]}
            line = {"image": f"{split}{number}.png", "region": region, "answer": f"{split} {'abcd'[number]}"}
            lines.append({**line, "meta": {"split": split}})
    write_json_lines(folder / "own.jsonl", lines)
    return folder / "own.jsonl"


class Ran:
    """A run of a program, and the batches of its trainer."""

    def __init__(self, program, model, processor, data, folder, *flags):
        self.trained, self.evaluated, self.scored, self.phrases = [], [], [], []
        self.start, self.out = folder / "start", folder / "out"
        save_model(self.start, model, processor)
        rgb = {split: processor.image_processor(list(p), return_tensors="pt") for split, p in IMAGES.items()}
        self.split_of = {row[:3].numpy().tobytes(): s for s, rows in rgb.items() for row in rows["pixel_values"]}
        schedule = "--per_device_train_batch_size 4 --eval_strategy steps --eval_steps 1 --save_strategy no".split()
        settings = "--logging_steps 1 --learning_rate 1e-2 --min_strength 0.4 --region_input box".split()
        flags = (*schedule, *settings, "--label_smoothing_factor", SMOOTHING, *flags)
        with pytest.MonkeyPatch.context() as patch:
            self.listen(patch)
            assert train(program, self.start, [data], self.out, *flags) == 0

    def listen(self, patch):
        for trainer in (RegionTextTrainer, RegionTrainer):
            step, predict = trainer.training_step, trainer.prediction_step
            patch.setattr(trainer, "training_step", noting(step, self.trained))
            patch.setattr(trainer, "prediction_step", noting(predict, self.evaluated))
        score = contrastive_trainer.score_region_text
        patch.setattr(
            contrastive_trainer, "score_region_text", lambda m, p, pictures, **k: self.seen(m, p, pictures, score, k)
        )
        answer = finetune.AnswerScorer.answer
        patch.setattr(
            finetune.AnswerScorer,
            "answer",
            lambda s, *a: self.scored.extend(held.item["image"] for held in s.questions) or answer(s, *a),
        )
        patch.setattr(finetune, "freeze_document_frequency", lambda texts: self.phrases.extend(texts))

    def seen(self, model, processor, pictures, score, settings):
        self.scored.extend(picture.image for picture in pictures)
        return score(model, processor, pictures, **settings)

    def splits(self, batches):
        return [self.split_of[row[:3].numpy().tobytes()] for batch in batches for row in batch["pixel_values"]]

    @property
    def first_loss(self):
        log = read_json(self.out / "training_record.json")["log"]
        return next(entry["loss"] for entry in log if "loss" in entry)


def noting(method, batches):
    def noted(self, model, inputs, *args, **kwargs):
        # gradient caching and RegionTextTrainer call the parent method with the same batch
        if not any(batch is inputs for batch in batches):
            batches.append(inputs if "labels" not in inputs else dict(inputs))  # Trainer removes the labels
        return method(self, model, inputs, *args, **kwargs)

    return noted


@pytest.fixture(scope="module")
def tuned(data, tmp_path_factory):
    flags = "--eval_metrics", "literal_match", "cider"
    return Ran(region_tune.main, *build_tiny_llava(), data, tmp_path_factory.mktemp("tuned"), *flags)


@pytest.fixture(scope="module")
def contrasted(data, tmp_path_factory):
    model, processor = build_tiny_clip()
    model.logit_scale.data.fill_(math.log(60))  # so large that smoothing has an effect
    return Ran(region_tune.train_alpha_clip, model, processor, data, tmp_path_factory.mktemp("contrasted"))


@pytest.fixture(scope="module")
def released(data, tmp_path_factory):
    """With the released loss and a temperature above the maximum."""
    model, processor = build_tiny_clip()
    model.logit_scale.data.fill_(math.log(500))
    flags = "--loss", "released", "--train_parts", "vision_model", "logit_scale"
    return Ran(region_tune.train_alpha_clip, model, processor, data, tmp_path_factory.mktemp("released"), *flags)


@pytest.fixture(params=["tuned", "contrasted", "released"])
def ran(request):
    return request.getfixturevalue(request.param)


def test_training_is_on_train_and_evaluation_on_val(ran):
    trained = ran.splits(ran.trained)
    assert set(trained) == {"train"} and len(trained) == 8  # two steps of four
    assert set(ran.splits(ran.evaluated)) <= {"val"}
    held_out = {picture.tobytes() for picture in ran.scored}
    assert held_out == {picture.tobytes() for picture in IMAGES["val"]}


def test_the_loss_of_tuning_is_evaluated_on_val(tuned):
    assert tuned.splits(tuned.evaluated) == ["val"] * 8  # two evaluations of four


def test_document_frequencies_are_those_of_the_held_out_split(tuned):
    assert sorted(tuned.phrases) == [[f"val {letter}"] for letter in "abcd"]


def test_regions_are_shown_at_the_drawn_strengths(ran):
    alphas = [alpha_map(row) for batch in ran.trained for row in batch["pixel_values"]]
    outside = [float(alpha.min()) for alpha in alphas]  # 1 - strength
    assert all(float(alpha.max()) == pytest.approx(1) for alpha in alphas)
    assert 0 < min(outside) and max(outside) <= 0.6 and max(outside) - min(outside) > 0.2
    assert len(set(outside)) == len(outside)


def test_labels_are_smoothed_in_tuning(tuned):
    """Shifted to the next token: Trainer would smooth the labels of LLaVA without the shift."""
    model, _ = mllm.load(tuned.start, device="cpu")
    batch = dict(tuned.trained[0])
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1]
    losses = [
        functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, label_smoothing=s)
        for s in (SMOOTHING, 0.0)
    ]
    assert tuned.first_loss == pytest.approx(losses[0].item(), abs=2e-4)
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("name", ["contrasted", "released"])
def test_labels_are_smoothed_in_contrastive_training_and_the_temperature_is_capped(request, name):
    ran = request.getfixturevalue(name)
    model = AlphaCLIPModel.from_pretrained(ran.start).eval()
    batch = ran.trained[0]
    with torch.no_grad():
        images = functional.normalize(model.get_image_features(batch["pixel_values"]).pooler_output, dim=-1)
        inputs = {key: batch[key][batch["text_of"]] for key in ("input_ids", "attention_mask")}
        texts = functional.normalize(model.get_text_features(**inputs).pooler_output, dim=-1)
    logits = model.logit_scale.exp().clamp(max=100).item() * images @ texts.T
    labels = torch.arange(4)

    def loss(smoothing):
        both = [functional.cross_entropy(m, labels, label_smoothing=smoothing).item() for m in (logits, logits.T)]
        return sum(both) / 2

    assert ran.first_loss == pytest.approx(loss(SMOOTHING), abs=2e-4)
    assert abs(loss(SMOOTHING) - loss(0)) > 1e-3


def test_the_temperature_that_is_saved_is_capped_and_comes_down_again(released):
    before, after = (AlphaCLIPModel.from_pretrained(folder).logit_scale for folder in (released.start, released.out))
    assert before.exp().item() == pytest.approx(500) and after.exp().item() <= 100 * (1 + 1e-6)
    log_scale = torch.tensor(math.log(500), requires_grad=True)
    capped = _capped(log_scale)
    capped.backward()
    assert capped.exp().item() == pytest.approx(100) and log_scale.grad.item() == 1
    assert _capped(torch.tensor(3.0)).item() == pytest.approx(3)


def test_visual_genomes_images_of_no_split_are_not_trained_on(tmp_path):
    """The DenseCap splits do not contain a tenth of Visual Genome. Training uses neither it nor val and test."""
    ids = {split: min(densecap_split(split)) for split in ("train", "val", "test")}
    listed = frozenset().union(*map(densecap_split, ids))
    ids["unlisted"] = next(number for number in range(1, 10**6) if number not in listed)
    images, regions = [], []
    (tmp_path / "VG_100K").mkdir()
    for number, image in enumerate(ids.values()):
        noise_image(32, 32, number).save(tmp_path / "VG_100K" / f"{image}.jpg")
        images.append({"image_id": image, "width": 32, "height": 32, "url": f"https://x/VG_100K/{image}.jpg"})
        box = {"x": 1, "y": 1, "width": 9, "height": 9}
        region = {"region_id": number, "image_id": image, "phrase": "a cat", **box}
        regions.append({"id": image, "regions": [region]})
    write_json(tmp_path / "image_data.json", images)
    write_json(tmp_path / "region_descriptions.json", regions)
    build_index(tmp_path)
    index = RegionIndex(tmp_path)
    assert dict(zip(index.images["image_id"], index.image_splits, strict=True)) == {
        str(image): split for split, image in ids.items()
    }
    skipped, data = tmp_path / "skipped.jsonl", [str(tmp_path)]
    for samples in (
        ConversationDataset([index], DataArguments(data=data), "train", ["What?"], 0, skipped),
        RegionTextDataset([index], PairArguments(data=data), "train", 0, skipped),
    ):
        assert len(samples) == 1 and index.images[index.image_rows[samples.rows_of(0)[1]]]["image_id"] == [
            str(ids["train"])
        ]
