"""The embedded model answers by region through every entry point, and the alpha map it receives covers the region."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

import mllm
from alpha_clip_commands import region_tune
from alpha_clip_commands.region_chat import main as region_chat
from eval.generate import generate
from eval.metrics.literal_match import literal_match
from eval.views import other_region_references, with_other_region, with_whole_image
from mllm.data.build_index import build_index
from mllm.data.index import RegionIndex
from mllm.data.readers.visual_genome import read_region_questions, read_regions
from mllm.data.shapes import scenes, visual_genome_layout
from mllm.inference import RegionChat
from mllm.loading import EMBEDDED_MODEL
from tests.alpha_maps import overlap
from tests.files import read_json_lines
from tests.tiny import prompt
from train.tuning.collators import IGNORE_INDEX, encode_with_labels
from vision_tower import Region

SCENES, SEED = 8, 77


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "test"
    visual_genome_layout.write(folder, SCENES, SEED, "test", progress=False)
    return folder


@pytest.fixture(scope="module")
def samples(root):
    return list(read_regions(root, region_type="mask"))


@pytest.fixture
def fed(embedded):
    """Every `pixel_values` that reaches the tower."""
    seen = []
    handle = embedded[0].model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs["pixel_values"]).clone()),
        with_kwargs=True,
    )
    yield seen
    handle.remove()


def two_objects(samples):
    """Two samples of one image with different descriptions."""
    first, second = samples[:2]
    assert first.meta["image_id"] == second.meta["image_id"] and first.references != second.references
    return first, second


def test_five_lines(samples, fed):
    first, second = two_objects(samples)
    image = first.open_image()
    model, processor = mllm.load()
    outputs = []
    for sample in (first, second):
        inputs = processor(images=image, regions=sample.regions[0], text=prompt("What is this?"), return_tensors="pt")
        text = processor.decode(model.generate(**inputs)[0], skip_special_tokens=True)
        assert text.endswith(f"What is this? ASSISTANT: {sample.references[0]}")
        outputs.append(model(**inputs).logits[0, -1])
    assert not torch.allclose(*outputs)


def test_a_pipeline_answers_about_regions(embedded, samples):
    model, processor = embedded
    pipe = pipeline("image-text-to-text", model=model, processor=processor, max_new_tokens=24, return_full_text=False)
    shown = two_objects(samples)
    image = shown[0].open_image()
    items = [{"type": "image", "image": image, "region": sample.regions[0]} for sample in shown]
    question = {"type": "text", "text": "What is this?"}
    chats = [[{"role": "user", "content": [item, question]}] for item in items]
    expected = [sample.references[0] for sample in shown]
    assert [answer[0]["generated_text"].strip() for answer in pipe(chats, batch_size=2)] == expected
    regions = [sample.regions[0] for sample in shown]
    answers = pipe([image] * 2, text=[prompt("What is this?")] * 2, regions=regions)
    assert [answer["generated_text"].strip() for answer in answers] == expected


def test_the_mask_of_answers_is_where_labels_are(embedded, samples):
    _, processor = embedded
    image, region = samples[0].open_image(), samples[0].regions[0]
    turns = RegionChat(*embedded).conversation(image, region, "What is this?")
    turns.append({"role": "assistant", "content": [{"type": "text", "text": samples[0].references[0]}]})
    inputs = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, labels = encode_with_labels(processor, turns)
    assert inputs["input_ids"] == [ids]
    assert inputs["assistant_masks"] == [[int(label != IGNORE_INDEX) for label in labels]]


@pytest.mark.slow
def test_answers_follow_the_region_also_to_another_object(embedded, samples):
    chat = RegionChat(*embedded)
    right = generate(chat, samples)
    # The scores of the embedded model (docs/shapes.md) minus the spread of 40 samples; without the region at most 0.3.
    assert literal_match(right, [s.references for s in samples]) >= 0.9
    wrong = generate(chat, with_other_region(samples))
    assert literal_match(wrong, other_region_references(samples)) >= 0.9
    assert literal_match(wrong, [s.references for s in with_other_region(samples)]) <= 0.05
    whole = generate(chat, with_whole_image(samples))
    assert literal_match(whole, [s.references for s in samples]) < 0.3


def test_boxes_and_questions(embedded, root):
    chat = RegionChat(*embedded)
    boxes = list(read_regions(root, region_type="box"))
    assert literal_match(generate(chat, boxes), [s.references for s in boxes]) >= 0.9
    questions = list(read_region_questions(root))
    for kinds, least in ((scenes.ATTRIBUTES, 0.95), (scenes.DIRECTIONS, 0.85)):
        asked = [question for question in questions if question.meta["type"] in kinds]
        assert literal_match(generate(chat, asked), [s.references for s in asked]) >= least


@pytest.mark.parametrize("size", [(96, 96), (200, 96), (130, 300), (640, 480)])
def test_the_alpha_that_is_fed_lies_on_the_region(embedded, fed, size):
    width, height = size
    image = Image.fromarray(np.zeros((height, width, 3), np.uint8))
    region = Region.from_box(width // 8, height // 8, width - width // 8, height - height // 4)
    RegionChat(*embedded).describe(image, region, max_new_tokens=1)
    assert overlap(fed[0][0], region, height, width) >= 0.95


def test_region_chat_command(samples, fed, tmp_path, capsys):
    first, second = two_objects(samples)
    for index, sample in enumerate((first, second)):
        x0, y0, x1, y1 = sample.regions[0].bounding_box(96, 96)
        box = f"{x0:g},{y0:g},{x1:g},{y1:g}"
        overlay = tmp_path / f"{index}.png"
        assert (
            region_chat(
                ["--image", sample.image, "--box", box, "--ask", "What is this?", "--save-overlay", str(overlay)]
            )
            == 0
        )
        captured = capsys.readouterr()
        assert captured.out.strip() == sample.references[0]
        assert "model: embedded" in captured.err and "device: cpu" in captured.err
        assert Image.open(overlay).width >= 384


def test_batch_file(samples, tmp_path, capsys):
    requests = tmp_path / "requests.jsonl"
    with open(requests, "w") as file:
        for sample in samples[:10]:
            file.write(
                json.dumps({"id": sample.id, "image": sample.image, "region": sample.regions[0].to_json()}) + "\n"
            )
    output = tmp_path / "answers.jsonl"
    assert region_chat(["--batch", str(requests), "--output", str(output), "--batch-size", "4"]) == 0
    answers = read_json_lines(output)
    assert [a["id"] for a in answers] == [s.id for s in samples[:10]]
    right = sum(a["answer"] == s.references[0] for a, s in zip(answers, samples, strict=False))
    assert right >= 9


def test_a_batch_answers_as_one_by_one(embedded, samples):
    chat = RegionChat(*embedded)
    requests = [(s.open_image(), s.regions[0], s.question) for s in samples[:24]]
    assert chat.ask_batch(*zip(*requests, strict=True)) == [chat.ask(*request) for request in requests]


def test_conversation_keeps_region_and_history(embedded, samples):
    chat = RegionChat(*embedded)
    sample = samples[0]
    size, _, colour, shape = sample.references[0].split()[1:]
    image, region = sample.open_image(), sample.regions[0]
    first = chat.ask(image, region, "What colour is this?")
    second = chat.ask(image, region, "What shape is this?", history=[("What colour is this?", first)])
    assert (first, second) == (colour, shape)


def test_tuning_reads_the_region(embedded, root, tmp_path, fed):
    """One training step on the embedded model: its loss on true descriptions is low, on another object's descriptions
    high.
    """
    from alpha_clip_commands.training.tuning_arguments import DataArguments
    from train.tuning.collators import ConversationCollator
    from train.tuning.conversations import ConversationDataset

    model, processor = embedded
    build_index(root)
    args = DataArguments(data=[str(root)], region_input="mask", turn_kinds=["description"])
    dataset = ConversationDataset([RegionIndex(root)], args, "test", ["What is this?"], 0, tmp_path / "skipped.jsonl")
    collator = ConversationCollator(processor)
    conversations = [turns for number in range(8) for turns in dataset[number]]
    with torch.no_grad():
        right = model(**collator([conversations])).loss
        regions = [c[0]["content"][0]["region"] for c in conversations]
        for conversation, region in zip(conversations, regions[1:] + regions[:1], strict=True):
            conversation[0]["content"][0]["region"] = region
        wrong = model(**collator([conversations])).loss
    assert right < 0.2 < 1 < wrong
    for row in range(8):
        assert overlap(fed[0][row], regions[row], 96, 96) >= 0.95


def test_scenes_here_and_in_the_scores_are_no_training_scenes():
    trained = scenes.training_scenes(EMBEDDED_MODEL)
    assert len(trained) == 24_000 + 16_000 + 20_000  # CLIP: scenes, objects alone; Alpha-CLIP and LLaVA
    for seed, count in ((SEED, SCENES), (2, 200)):
        for _, scene in scenes.scenes(count, seed, "test"):
            assert scenes.scene_hash(scene.pixels) not in trained
    (_, first), *_ = scenes.scenes(1, 1, "train")
    assert scenes.scene_hash(first.pixels) in trained


def test_assets_are_small_and_safetensors():
    files = [file for file in EMBEDDED_MODEL.parent.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 20e6
    assert not [
        file for file in files if file.suffix in (".bin", ".pth", ".pt", ".pkl") and file.name != scenes.TRAINING_SCENES
    ]


@pytest.mark.slow
def test_the_model_trains_on(root, tmp_path):
    """The embedded model can be tuned like any other model."""
    train_root = tmp_path / "train"
    visual_genome_layout.write(train_root, 2, 9, "train", progress=False)
    arguments = [
        "--model",
        str(EMBEDDED_MODEL),
        "--data",
        str(train_root),
        "--output_dir",
        str(tmp_path / "out"),
        "--max_steps",
        "1",
    ]
    arguments += [
        "--use_cpu",
        "true",
        "--report_to",
        "none",
        "--remove_unused_columns",
        "false",
        "--learning_rate",
        "1e-6",
    ]
    assert region_tune.main(arguments) == 0
    mllm.load(tmp_path / "out")
