"""The index and the conversations drawn from it."""

from collections import Counter

import numpy as np
import pytest

from alpha_clip_commands.training.tuning_arguments import DataArguments
from mllm.data.index import RegionIndex
from mllm.data.prepare import make_index
from mllm.data.readers.visual_genome import read_free_questions, read_region_questions, read_regions
from mllm.data.shapes import visual_genome_layout
from mllm.data.templates import DESCRIBE_REGION_WORDINGS
from tests.files import read_json, read_json_lines, write_json
from train.epoch_sampler import EpochSampler
from train.region_dataset import group_rows, sample_region
from train.tuning.conversations import ConversationDataset
from vision_tower import Region


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "train"
    visual_genome_layout.write(folder, 6, 1, progress=False)
    make_index(folder)
    return folder


def dataset(root, tmp_path, split="train", **arguments):
    args = DataArguments(data=[str(root)], **arguments)
    return ConversationDataset(
        [RegionIndex(root)], args, split, DESCRIBE_REGION_WORDINGS, 0, tmp_path / "skipped.jsonl"
    )


def texts(conversations):
    return [[m["content"][-1]["text"] for m in turns] for turns in conversations]


def test_the_index_holds_what_the_readers_say(root):
    index = RegionIndex(root)
    facts = index.read(range(len(index)))
    boxes, masks = (list(read_regions(root, region_input=form)) for form in ("box", "mask"))
    questions, free = list(read_region_questions(root)), list(read_free_questions(root))
    assert len(facts) == len(boxes) + len(free)
    for entry, box, mask in zip(facts, boxes, masks, strict=False):
        assert set(entry.forms) == {box.regions[0], mask.regions[0]} and entry.forms[0].kind == "box"
        asked = [
            (q.meta["type"], q.question, q.references[0])
            for q in questions
            if q.meta["region_id"] == box.meta["region_id"]
        ]
        assert set(entry.turns) == {("description", None, box.references[0]), *asked}
        assert entry.sample.image == box.image
        assert (entry.sample.meta["width"], entry.sample.meta["height"]) == (96, 96)
    assert all(entry.forms[0].is_whole for entry in facts[len(boxes) :])
    assert index.descriptions("train") == [box.references[0] for box in boxes]
    assert index.descriptions("test") == []


def test_refcocogs_layout_gives_the_same_regions(root, tmp_path):
    from mllm.data.prepare import index_refcocog

    index_refcocog(root, tmp_path / "index")
    other = RegionIndex(tmp_path / "index", root=root)
    first = RegionIndex(root)
    assert len(other) == len(list(read_regions(root)))
    for one, two in zip(first.read(range(len(other))), other.read(range(len(other))), strict=True):
        assert one.forms[0] == two.forms[0] and set(one.forms) == set(two.forms)
        assert ("description", None, two.turns[0][2]) in one.turns


def test_conversations_are_true_and_varied(root, tmp_path):
    samples = dataset(root, tmp_path, region_input="mixed", max_turns=2, turn_weights=["description=3"])
    facts = samples.indexes[0].read(range(len(samples)))
    lengths, forms, described = Counter(), Counter(), 0
    for epoch in range(12):
        for row, entry in enumerate(facts):
            (messages,) = samples[epoch * len(samples) + row]
            lengths[len(messages) // 2] += 1
            item = messages[0]["content"][0]
            assert item["image"].size == (96, 96) and item["region"] in entry.forms
            if not entry.forms[0].is_whole:
                forms[item["region"].kind] += 1
            for asked, answered in zip(messages[::2], messages[1::2], strict=True):
                question, answer = asked["content"][-1]["text"], answered["content"][0]["text"]
                question = None if question in DESCRIBE_REGION_WORDINGS else question
                assert (question, answer) in {turn[1:] for turn in entry.turns}
                described += question is None
    total = sum(lengths.values())
    assert 0.4 < lengths[1] / total < 0.65 and 0.4 < forms["mask"] / forms.total() < 0.6
    assert described / total > 0.4


def test_a_sample_is_drawn_from_seed_epoch_and_number_alone(root, tmp_path):
    drawn = []
    for _ in range(2):
        samples = dataset(root, tmp_path, max_turns=3)
        np.random.seed(len(drawn))
        order = range(len(samples)) if drawn else reversed(range(len(samples)))
        drawn.append({number: texts(samples[number]) for number in order})
    assert drawn[0] == drawn[1]
    assert {n: texts(samples[len(samples) + n]) for n in drawn[0]} != drawn[0]  # another epoch


def test_only_the_asked_for_kinds(root, tmp_path):
    for kinds, allowed in ((["description"], {"description"}), (["question"], None), (["left"], {"left"})):
        samples = dataset(root, tmp_path, turn_kinds=kinds, max_turns=4)
        index = samples.indexes[0]
        known = {(q, a): kind for entry in index.read(range(len(index))) for kind, q, a in entry.turns}
        for number in range(len(samples)):
            (turns,) = texts(samples[number])
            for question, answer in zip(turns[::2], turns[1::2], strict=True):
                kind = known[None if question in DESCRIBE_REGION_WORDINGS else question, answer]
                assert kind in allowed if allowed else kind != "description"


def test_several_regions_of_a_picture_are_one_sample_with_one_decode(root, tmp_path, monkeypatch):
    from mllm.data.samples import RegionSample

    samples = dataset(root, tmp_path, regions_per_image=4)
    opened = []
    original = RegionSample.open_image
    monkeypatch.setattr(RegionSample, "open_image", lambda self: opened.append(self.id) or original(self))
    regions = Counter()
    for number in range(len(samples)):
        conversations = samples[number]
        pictures = {id(turns[0]["content"][0]["image"]) for turns in conversations}
        assert len(pictures) == 1 and 1 <= len(conversations) <= 4
        regions.update(turns[0]["content"][0]["region"] for turns in conversations)
    assert len(opened) == len(samples) < len(samples.indexes[0])
    assert regions.total() == len(samples.indexes[0])


def test_groups_hold_each_row_once():
    picture_of = np.array([0, 0, 0, 0, 0, 1, 2, 2])
    rows, bounds = group_rows(np.arange(8), picture_of, 2)
    groups = np.split(rows, bounds[1:-1])
    assert sorted(np.concatenate(groups)) == list(range(8))
    assert all(len(group) <= 2 and len(set(picture_of[group])) == 1 for group in groups)
    assert [len(group) for group in groups] == [2, 2, 1, 1, 2]


@pytest.mark.parametrize("size", [1, 3])
def test_groups_of_nothing_and_of_many(size):
    rows, bounds = group_rows(np.zeros(0, int), np.zeros(0, int), size)
    assert len(rows) == 0 and bounds.tolist() == [0]
    rng = np.random.default_rng(0)
    picture_of = np.sort(rng.integers(0, 40, 200))
    chosen = np.flatnonzero(rng.random(200) < 0.7)
    rows, bounds = group_rows(chosen, picture_of, size)
    assert sorted(rows) == chosen.tolist() and bounds[-1] == len(rows)
    for group in np.split(rows, bounds[1:-1]):
        assert 1 <= len(group) <= size and len(set(picture_of[group])) == 1


def test_samples_of_two_data_sets(root, tmp_path):
    both = dataset(root, tmp_path, regions_per_image=2)
    twice = ConversationDataset([*both.indexes] * 2, both.data_args, "train", ["What?"], 0, tmp_path / "skipped.jsonl")
    assert len(twice) == 2 * len(both) == len(twice.lengths)
    for sample in range(len(both)):
        (first, rows), (second, again) = twice.rows_of(sample), twice.rows_of(sample + len(both))
        assert first is twice.indexes[0] and second is twice.indexes[1] and np.array_equal(rows, again)
        assert twice.lengths[sample] == first.length_of[rows].max()


def test_epochs_are_permutations_that_differ_and_like_lengths_meet():
    lengths = np.random.default_rng(0).integers(1, 100, 640)
    sampler = EpochSampler(640, seed=1, lengths=lengths, batch_size=8)
    epochs = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        order = np.array(list(sampler)) - epoch * 640
        assert sorted(order) == list(range(640)) and len(sampler) == 640
        epochs.append(order)
    assert not np.array_equal(*epochs)
    spread = np.ptp(lengths[epochs[0]].reshape(-1, 8), axis=1).mean()
    assert spread < 0.3 * np.ptp(lengths[np.random.default_rng(1).permutation(640)].reshape(-1, 8), axis=1).mean()


def test_jitter_moves_a_box_a_little_and_soft_alpha_weakens_it(root, tmp_path):
    samples = dataset(root, tmp_path, box_jitter=0.2, min_strength=0.5)
    (entry,) = samples.indexes[0].read([0])
    x0, y0, x1, y1 = entry.forms[0].data
    rng, strengths = np.random.default_rng(0), []
    for _ in range(50):
        region = sample_region(entry, (96, 96), samples.data_args, rng)
        moved = np.array(region.data) - entry.forms[0].data
        assert (abs(moved[::2]) <= 0.2 * (x1 - x0)).all() and (abs(moved[1::2]) <= 0.2 * (y1 - y0)).all()
        assert moved.any() and 0 <= min(region.data) and max(region.data) <= 96
        strengths.append(region.strength)
    assert 0.5 <= min(strengths) < 0.6 and 0.9 < max(strengths) <= 1
    whole = samples.indexes[0].read([len(samples.indexes[0]) - 1])[0]
    assert sample_region(whole, (96, 96), samples.data_args, rng) == Region.whole()


def test_masks_are_not_made_up(root, tmp_path):
    samples = dataset(root, tmp_path, region_input="mask")
    (entry,) = samples.indexes[0].read([0])
    assert sample_region(entry, (96, 96), samples.data_args, np.random.default_rng(0)).kind == "mask"
    boxed = type(entry)(entry.sample, entry.forms[:1], entry.turns)
    with pytest.raises(ValueError, match="has no mask; use region_input: box"):
        sample_region(boxed, (96, 96), samples.data_args, np.random.default_rng(0))


def test_a_damaged_picture_is_replaced_counted_and_too_many_stop(tmp_path):
    folder = tmp_path / "train"
    visual_genome_layout.write(folder, 5, 1, progress=False)
    make_index(folder)
    (folder / "VG_100K" / "2.png").write_bytes(b"\x89PNG broken")
    samples = dataset(folder, tmp_path, max_missing=0.2)
    damaged = [n for n in range(len(samples)) if samples.indexes[0].picture_of[samples.rows_of(n)[1][0]] == 1]
    for number in damaged * 2:
        (turns,) = samples[number]
        assert turns[0]["content"][0]["image"].size == (96, 96)
    listed = read_json_lines(tmp_path / "skipped.jsonl")
    assert {entry["image"] for entry in listed} == {str(folder / "VG_100K" / "2.png")}
    assert sorted(entry["position"] for entry in listed) == damaged
    (folder / "VG_100K" / "4.png").unlink()
    with pytest.raises(ValueError, match="2 of 5 images cannot be read .* more than max_missing"):
        [samples[number] for number in range(len(samples))]


def test_an_index_cut_short_or_of_other_files_is_refused(root, tmp_path):
    import shutil

    with pytest.raises(ValueError, match="expected a region index"):
        RegionIndex(tmp_path)
    copy = tmp_path / "index"
    shutil.copytree(root / "region_index", copy)
    record = read_json(copy / "index.json")
    write_json(copy / "index.json", {**record, "regions": record["regions"] + 1})
    with pytest.raises(ValueError, match="not written to its end"):
        RegionIndex(copy)
    write_json(copy / "index.json", {**record, "format": 0})
    with pytest.raises(ValueError, match="format 0"):
        RegionIndex(copy)
    write_json(copy / "index.json", record)
    content = (copy / "regions.arrow").read_bytes()
    (copy / "regions.arrow").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        RegionIndex(copy)
