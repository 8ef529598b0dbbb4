"""Region-text pairs: each region goes with the text that describes it, what is drawn how often, and the batches."""

from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader

from alpha_clip_commands.training.contrastive_arguments import PairArguments
from mllm.data.index import HELD_OUT, TRAIN, RegionIndex
from mllm.data.prepare import make_index
from mllm.data.shapes import grit_layout, scenes, visual_genome_layout
from tests.alpha_maps import alpha_map, iou
from tests.files import encoded_mask, read_json_lines, write_json
from tests.tiny import build_tiny_clip, noise_image, tiny_clip_tokenizer
from train.contrastive.data import (
    RegionTextCollator,
    RegionTextDataset,
    RegionTexts,
    chunks_of,
    soften_region,
    text_id,
)
from train.contrastive.evaluation import validation_samples
from train.epoch_sampler import EpochSampler
from vision_tower import AlphaCLIPImageProcessor, AlphaCLIPProcessor, Region
from vision_tower.alpha_embedding import WHOLE_IMAGE

SCENES, SEED, SIDE = 12, 3, 96


@pytest.fixture(scope="module")
def grit(tmp_path_factory):
    """Scenes of 4 to 6 objects."""
    folder = tmp_path_factory.mktemp("grit") / "train"
    grit_layout.write(folder, SCENES, SEED, min_objects=4, progress=False)
    make_index(folder)
    return folder


@pytest.fixture(scope="module")
def truth():
    """Picture -> phrase -> mask, from what draws the scenes and not from what reads them."""
    return {
        f"00000/{number:09d}": dict(zip((thing.phrase for thing in scene.objects), scene.masks, strict=True))
        for number, (_, scene) in enumerate(scenes.scenes(SCENES, SEED, "train", 4), 1)
    }


def dataset(root, tmp_path, split=TRAIN, seed=0, **arguments):
    args = PairArguments(data=[str(root)], **arguments)
    return RegionTextDataset([RegionIndex(root)], args, split, seed, tmp_path / "skipped.jsonl")


def collator(geometry="pad", side=SIDE):
    processor = AlphaCLIPProcessor(AlphaCLIPImageProcessor.for_size(side, geometry), tiny_clip_tokenizer())
    return RegionTextCollator(processor, max_length=77)


def alphas(batch):
    """Alpha maps as fed, in [0, 1]: (N, S, S)."""
    return alpha_map(batch["pixel_values"].double()).numpy()


def picture_of(sample):
    return sample.id.rpartition("/")[0]


def skipped(tmp_path):
    return read_json_lines(tmp_path / "skipped.jsonl")


def write_pair(folder, name, picture, caption, phrases, boxes, masks=None, suffix="png", **saving):
    """A picture in GRIT's layout; boxes in pixels of the picture as displayed."""
    folder.mkdir(exist_ok=True)
    picture.save(folder / f"{name}.{suffix}", **saving)
    width, height = (masks[0].shape[::-1]) if masks else picture.size
    rows = []
    for phrase, (x0, y0, x1, y1) in zip(phrases, boxes, strict=True):
        start = caption.index(phrase)
        rows.append([start, start + len(phrase), x0 / width, y0 / height, x1 / width, y1 / height, 1.0])
    record = {"caption": caption, "width": width, "height": height, "ref_exps": rows}
    if masks:
        record["seudo_masks"] = [encoded_mask(mask) for mask in masks]
    write_json(folder / f"{name}.json", record)


# which region goes with which text


def test_each_alpha_drawn_back_is_the_region_that_its_text_describes(grit, truth, tmp_path):
    samples = dataset(grit, tmp_path, regions_per_image=4, whole_image_rate=0)
    batch = [samples[number] for number in range(len(samples))]
    drawn = alphas(collator()(batch)) > 0.5
    pairs = [(picture_of(sample), text) for sample in batch for text in sample.texts]
    assert len(pairs) == len(drawn) == 4 * SCENES
    for alpha, (picture, text) in zip(drawn, pairs, strict=True):
        assert iou(alpha, truth[picture][text]) >= 0.95
        for other, mask in truth[picture].items():
            assert other == text or iou(alpha, mask) < 0.1  # so that a swap would fail
    turned = np.roll(drawn.reshape(SCENES, 4, SIDE, SIDE), 1, axis=1).reshape(drawn.shape)
    assert max(iou(a, truth[p][t]) for a, (p, t) in zip(turned, pairs, strict=True)) < 0.1


@pytest.mark.parametrize("geometry", ["pad", "stretch"])
@pytest.mark.parametrize("form", ["box", "mask"])
def test_regions_of_wide_pictures_and_of_turned_ones(tmp_path, geometry, form):
    """Drawn back: the padding cut off, then to the size of the picture as displayed, (48, 24)."""
    boxes = [(2, 3, 20, 20), (25, 1, 47, 23)]
    masks = [np.zeros((24, 48), bool) for _ in boxes]
    masks[0][5:19, 4:18] = masks[1][8:20, 30:44] = True
    turned = Image.Exif()
    turned[0x0112] = 6  # the file lies on its side: 24 x 48
    folder = tmp_path / "grit"
    caption, phrases = "a cat beside a dog", ("a cat", "a dog")
    write_pair(folder, "1", noise_image(48, 24), caption, phrases, boxes, masks)
    write_pair(folder, "2", noise_image(24, 48), caption, phrases, boxes, masks, "jpg", exif=turned)
    make_index(folder)
    samples = dataset(folder, tmp_path, region_input=form, regions_per_image=2, whole_image_rate=0)
    for number in range(2):
        sample = samples[number]
        assert sample.image.size == (48, 24) and sorted(sample.texts) == sorted(phrases)
        for alpha, text in zip(alphas(collator(geometry)([sample])), sample.texts, strict=True):
            shown = alpha[24:72] if geometry == "pad" else alpha
            assert geometry != "pad" or (abs(np.delete(alpha, np.s_[24:72], 0)) < 1e-6).all()
            back = np.asarray(Image.fromarray(shown.astype(np.float32)).resize((48, 24), Image.Resampling.BOX)) > 0.5
            expected = masks[phrases.index(text)]
            if form == "box":
                x0, y0, x1, y1 = boxes[phrases.index(text)]
                expected = np.zeros((24, 48), bool)
                expected[y0:y1, x0:x1] = True
            assert iou(back, expected) >= 0.95
    assert not (tmp_path / "skipped.jsonl").exists()


def test_boxes_masks_and_both(grit, tmp_path):
    kinds = {}
    for form in ("box", "mask", "mixed"):
        samples = dataset(grit, tmp_path, region_input=form, mask_share=0.25, regions_per_image=4, whole_image_rate=0)
        kinds[form] = Counter(r.kind for n in range(4 * len(samples)) for r in samples[n].regions)
    assert set(kinds["box"]) == {"box"} and set(kinds["mask"]) == {"mask"}
    # 192 regions: 4 deviations of the share are 0.125
    assert kinds["mixed"]["mask"] / kinds["mixed"].total() == pytest.approx(0.25, abs=0.125)


# what is drawn


@pytest.mark.parametrize(("regions", "rate"), [(1, 0.1), (4, 0.1), (4, 0.25), (1, 1.0), (4, 0.0)])
def test_the_share_of_whole_images_is_that_of_all_pairs(grit, tmp_path, regions, rate):
    samples = dataset(grit, tmp_path, regions_per_image=regions, whole_image_rate=rate)
    rows = (samples.rows_of(number)[1] for number in range(len(samples)))
    index, pairs, whole, epochs = samples.indexes[0], 0, 0, 80
    for number, of_sample in enumerate(rows):
        for epoch in range(epochs):
            drawn = samples.select_rows(index, of_sample, np.random.default_rng([0, epoch, number]))
            pairs, whole = pairs + len(drawn), whole + int(index.is_whole[drawn].sum())
            assert len(set(drawn)) == len(drawn) == regions and index.is_whole[drawn].sum() <= 1
    trials, chance = epochs * SCENES, regions * rate  # one trial a sample
    deviation = (trials * chance * (1 - chance)) ** 0.5
    assert abs(whole - rate * pairs) <= 4 * deviation


def test_the_whole_image_is_alpha_of_ones_with_the_full_caption(tmp_path):
    """Padding included, bit for bit what three channels mean."""
    folder = tmp_path / "grit"
    write_pair(folder, "1", noise_image(48, 24), "a cat beside a dog", ["a cat"], [(2, 3, 20, 20)])
    make_index(folder)
    softening = {"max_blur": 0.1, "min_strength": 0.2, "box_jitter": 0.3, "mask_jitter": 3}
    samples = dataset(folder, tmp_path, region_input="box", whole_image_rate=1.0, **softening)
    sample = samples[0]
    assert sample.texts == ("a cat beside a dog",) and sample.regions == (Region.whole(),)
    alpha = collator()([sample])["pixel_values"][0, 3]
    assert torch.equal(alpha, torch.full_like(alpha, WHOLE_IMAGE))


def test_regions_of_a_sample_differ_and_all_come_in_time(grit, truth, tmp_path):
    samples = dataset(grit, tmp_path, regions_per_image=4)
    seen = {picture: set() for picture in truth}
    for position in range(12 * len(samples)):
        sample = samples[position]
        assert len(set(sample.texts)) == len(set(sample.regions)) == len(sample.texts) == 4
        seen[picture_of(sample)].update(sample.texts)
    for picture, texts in seen.items():
        assert texts >= set(truth[picture])


def test_the_draw_depends_on_seed_epoch_and_sample_alone(grit, tmp_path):
    settings = {"regions_per_image": 3, "region_input": "mixed", "box_jitter": 0.2, "mask_jitter": 2}
    settings |= {"min_strength": 0.5, "max_blur": 0.05}

    def drawn(order, seed=0):
        samples = dataset(grit, tmp_path, seed=seed, **settings)
        found = {}
        for position in order:
            np.random.seed(position)
            torch.manual_seed(position)
            found[position % SCENES] = samples[position][2:]
        return found

    first = drawn(range(SCENES))
    assert drawn(reversed(range(SCENES))) == first
    assert drawn(range(SCENES, 2 * SCENES)) != first
    assert drawn(range(SCENES), seed=1) != first


def test_data_without_captions_gives_no_whole_images(tmp_path):
    folder = tmp_path / "train"
    visual_genome_layout.write(folder, 6, 1, progress=False)
    make_index(folder)
    samples = dataset(folder, tmp_path, whole_image_rate=1.0)
    assert samples.indexes[0].is_whole.any()  # questions about the whole image: no captions
    assert not samples.has_captions and len(samples) == 6
    for position in range(5 * len(samples)):
        assert [region.kind for region in samples[position].regions] == ["mask"]


def test_captions_are_noticed_and_a_split_has_its_own_pictures(grit, tmp_path):
    assert dataset(grit, tmp_path).has_captions
    assert len(dataset(grit, tmp_path, split=HELD_OUT)) == 0 and not dataset(grit, tmp_path, split="test").has_captions


def test_two_data_sets_are_told_apart(grit, truth, tmp_path):
    other = tmp_path / "other"
    visual_genome_layout.write(other, 4, 1, progress=False)
    make_index(other)
    args = PairArguments(data=["a", "b"], regions_per_image=2, whole_image_rate=0.5)
    indexes = [RegionIndex(grit), RegionIndex(other)]
    samples = RegionTextDataset(indexes, args, TRAIN, 0, tmp_path / "skipped.jsonl")
    assert len(samples) == SCENES + 4 and samples.has_captions
    kinds = [[region.kind for region in samples[number].regions] for number in range(len(samples))]
    assert any("whole" in of_sample for of_sample in kinds[:SCENES])
    assert all(of_sample == ["mask", "mask"] for of_sample in kinds[SCENES:])


def test_a_picture_with_a_caption_alone_is_shown_whole(tmp_path):
    folder = tmp_path / "grit"
    write_pair(folder, "1", noise_image(48, 24), "nothing here", [], [])
    make_index(folder)
    for regions, rate in ((1, 0.0), (4, 0.1)):
        samples = dataset(folder, tmp_path, regions_per_image=regions, whole_image_rate=rate)
        assert samples[0].texts == ("nothing here",) and samples[0].regions == (Region.whole(),)


# soft alpha


def masks_of(truth):
    return [Region.from_mask(mask) for phrases in truth.values() for mask in phrases.values()]


def test_a_jittered_mask_grows_or_shrinks_by_so_many_pixels(truth):
    args, rng, moved = PairArguments(data=["d"], mask_jitter=2), np.random.default_rng(0), Counter()
    for region in masks_of(truth):
        mask = region.mask(SIDE, SIDE) > 0.5
        after = soften_region(region, (SIDE, SIDE), args, rng).mask(SIDE, SIDE) > 0.5
        image = Image.fromarray(mask)
        largest, least = (
            np.asarray(image.convert("L").filter(f(5))) > 0 for f in (ImageFilter.MaxFilter, ImageFilter.MinFilter)
        )
        assert after.any() and (least <= after).all() and (after <= largest).all()
        moved["grown" if after.sum() > mask.sum() else "shrunk" if after.sum() < mask.sum() else "same"] += 1
    # -2 to 2, each as often: one in five stays
    assert moved["grown"] > moved["same"] and moved["shrunk"] > moved["same"] > 0


def test_blur_softens_the_edge_and_strength_stays(truth):
    args, rng, soft = PairArguments(data=["d"], max_blur=0.05), np.random.default_rng(0), []
    for region in [*masks_of(truth), Region.from_box(10, 10, 40, 50)]:
        weak = Region(region.kind, region.data, 0.7)
        after = soften_region(weak, (SIDE, SIDE), args, rng)
        mask, before = after.mask(SIDE, SIDE), region.mask(SIDE, SIDE)
        assert after.strength == 0.7
        soft.append(((mask > 0.01) & (mask < 0.99)).any())
        assert 0 < mask.max() <= 1
        assert mask.sum() == pytest.approx(before.sum(), rel=0.1)  # spread, neither lost nor made up
        assert mask[before > 0.5].mean() > 3 * mask[before < 0.5].mean()
    assert np.mean(soft) > 0.8  # of some by next to nothing


@pytest.mark.parametrize("settings", [{"mask_jitter": 8}, {"max_blur": 1.0}, {"mask_jitter": 8, "max_blur": 1.0}])
def test_a_region_of_one_pixel_never_vanishes(settings):
    mask = np.zeros((64, 300), bool)
    mask[0, 299] = True
    args, rng = PairArguments(data=["d"], **settings), np.random.default_rng(0)
    for _ in range(20):
        for region in (Region.from_mask(mask), Region.from_box(10, 10, 10.02, 10.02)):
            assert soften_region(region, (300, 64), args, rng).mask(64, 300).max() > 0


def test_without_softening_regions_are_what_they_were(grit, tmp_path):
    args, rng = PairArguments(data=["d"]), np.random.default_rng(0)
    box = Region.from_box(1.5, 2.5, 9.25, 8)
    assert soften_region(box, (SIDE, SIDE), args, rng) is box
    jitter = PairArguments(data=["d"], mask_jitter=3)
    whole = Region.whole()
    assert soften_region(whole, (SIDE, SIDE), jitter, rng) is whole
    after = soften_region(box, (SIDE, SIDE), jitter, rng)  # a box keeps its outline, to 1/255
    assert abs(after.mask(SIDE, SIDE) - box.mask(SIDE, SIDE)).max() <= 0.5 / 255 + 1e-6
    samples = dataset(grit, tmp_path, min_strength=0.5, whole_image_rate=0)
    strengths = [region.strength for number in range(len(samples)) for region in samples[number].regions]
    assert 0.5 <= min(strengths) < max(strengths) <= 1


# batches


def texts_batch(*texts_of_samples):
    """A batch of these texts, each with a region of its own."""
    samples, number = [], 0
    for name, texts in enumerate(texts_of_samples):
        regions = [Region.from_box(n, 0, n + 1, 32) for n in range(number, number + len(texts))]
        number += len(texts)
        samples.append(RegionTexts(f"p{name}", noise_image(32, 32, seed=name), tuple(regions), tuple(texts)))
    return RegionTextCollator(build_tiny_clip()[1], max_length=8)(samples)


def test_equal_texts_are_encoded_once():
    batch = texts_batch(["b", "a"], ["c"], ["a", "b", "A"])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 3)
    assert batch["text_of"].tolist() == [0, 1, 2, 1, 0, 1]  # CLIP lowers case: "A" is "a"
    assert batch["names"] == ["p0", "p1", "p2"]
    letters = tiny_clip_tokenizer().convert_ids_to_tokens(batch["input_ids"][batch["text_of"], 1].tolist())
    assert letters == ["b</w>", "a</w>", "c</w>", "a</w>", "b</w>", "a</w>"]
    same = batch["text_ids"][:, None] == batch["text_ids"]
    assert same.tolist() == (batch["text_of"][:, None] == batch["text_of"]).tolist()
    first_columns = [int(alpha.argmax()) % 32 for alpha in batch["pixel_values"][:, 3]]
    assert first_columns == list(range(6))  # the pairs stand in order


def test_long_texts_are_cut_with_their_end():
    batch = texts_batch(["abcdefghijk"], ["ab"])
    tokenizer = tiny_clip_tokenizer()
    assert batch["input_ids"].shape == (2, 8) and batch["attention_mask"].sum(1).tolist() == [8, 4]
    assert batch["input_ids"][0, -1] == tokenizer.eos_token_id


def test_text_ids_are_of_the_tokens_alone():
    texts = [(0, 5, 9, 1), (0, 9, 5, 1), (0, 5, 9), (), (0, 59, 1)]
    ids = [text_id(tokens) for tokens in texts]
    assert len(set(ids)) == len(texts) and ids == [text_id(list(tokens)) for tokens in texts]
    assert all(0 <= number < 2**63 for number in ids)
    assert text_id((0, 5, 9, 1)) == 0x4E2454D29A8DA9DF  # the same in every process, unlike Python's own hash


@pytest.mark.parametrize("count", range(1, 12))
def test_chunks_are_all_pairs_in_order_with_their_texts(count):
    batch = texts_batch(["b", "a", "c"], ["a"], ["d", "b", "a", "e"])
    chunks = chunks_of(batch, count)
    assert len(chunks) == count
    assert torch.equal(torch.cat([chunk["pixel_values"] for chunk in chunks]), batch["pixel_values"])
    for name in ("input_ids", "attention_mask"):
        got = torch.cat([chunk[name][chunk["text_of"]] for chunk in chunks])
        assert torch.equal(got, batch[name][batch["text_of"]])
    sizes = [len(chunk["text_of"]) for chunk in chunks]
    assert max(sizes) - min(sizes) <= 1
    for chunk in chunks:  # no text for nothing
        assert sorted(set(chunk["text_of"].tolist())) == list(range(len(chunk["input_ids"])))


@pytest.mark.parametrize("epoch", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_two_ranks_of_two_workers_share_an_epoch(grit, tmp_path, epoch):
    """Each picture once, and together the very batches of one rank."""

    def loader(batch, ranks, rank):
        samples = dataset(grit, tmp_path, regions_per_image=2)
        sampler = EpochSampler(len(samples), seed=5)
        sampler.set_epoch(epoch)
        workers = 2 if ranks == 2 else 0
        plain = DataLoader(
            samples, batch, sampler=sampler, num_workers=workers, drop_last=True, collate_fn=lambda batch: batch
        )
        return prepare_data_loader(plain, num_processes=ranks, process_index=rank, put_on_device=False)

    one, *two = ([[s[2:] for s in batch] for batch in loader(*args)] for args in ((4, 1, 0), (2, 2, 0), (2, 2, 1)))
    assert one == [first + second for first, second in zip(*two, strict=True)]
    positions = list(EpochSampler(SCENES, seed=5))
    assert sorted(positions) == list(range(SCENES))
    names = [picture_of(s) for rank in (0, 1) for batch in loader(2, 2, rank) for s in batch]
    assert len(names) == len(set(names)) == SCENES


# what cannot be used


@pytest.fixture()
def damaged(tmp_path):
    """A data set of two tars of four pictures: of one tar the end is gone, of the other a picture is damaged."""
    folder = tmp_path / "tars"
    grit_layout.write(folder, 8, 1, tars=2, progress=False)
    make_index(folder)
    pictures = RegionIndex(folder).pictures
    places = [(row["offset"], row["size"]) for row in pictures]
    content = bytearray((folder / "00000.tar").read_bytes())
    offset, size = places[1]
    content[offset + size // 2 : offset + size // 2 + 64] = bytes(64)
    (folder / "00000.tar").write_bytes(content)
    (folder / "00001.tar").write_bytes((folder / "00001.tar").read_bytes()[: places[6][0] + 100])
    return folder


def test_damaged_pictures_are_left_out_and_listed(damaged, tmp_path):
    samples = dataset(damaged, tmp_path, max_missing=0.4)
    shown = [picture_of(samples[number]) for number in range(2 * len(samples))]
    left = {f"{number:09d}" for number in (1, 3, 4, 5, 6)}
    assert set(shown) == left and len(shown) == 16
    lines = {line["image"]: line for line in skipped(tmp_path)}.values()
    assert len(lines) == 3 and [sum(f"{n:09d}.png" in line["image"] for line in lines) for n in (2, 7, 8)] == [1, 1, 1]
    assert all(line["reason"] for line in lines)


def test_too_many_damaged_pictures_are_refused(damaged, tmp_path):
    samples = dataset(damaged, tmp_path, max_missing=0.25)  # two of eight
    with pytest.raises(ValueError, match="3 of 8 images cannot be read .* more than max_missing"):
        [samples[number] for number in range(len(samples))]


def test_masks_of_another_size_than_the_picture_are_never_trained_on(tmp_path):
    """The masks are of the file as it lies, the picture is displayed turned."""
    folder, turned = tmp_path / "grit", Image.Exif()
    turned[0x0112] = 6
    mask, caption = np.zeros((24, 48), bool), "a cat beside a dog"
    mask[3:20, 2:20] = True
    for name, exif in (("1", turned), ("2", Image.Exif())):
        write_pair(folder, name, noise_image(48, 24), caption, ["a cat"], [(2, 3, 20, 20)], [mask], "jpg", exif=exif)
    make_index(folder)
    samples = dataset(folder, tmp_path, max_missing=0.5)
    assert {picture_of(samples[number]) for number in range(4)} == {"2"}
    line, _ = skipped(tmp_path)  # in two epochs
    assert line["image"].endswith("1.jpg") and "is 24 x 48 pixels, its data set says 48 x 24" in line["reason"]


def test_validation_samples_are_all_regions_in_the_form_that_is_trained(tmp_path):
    folder = tmp_path / "val"
    grit_layout.write(folder, 2, 1, "val", progress=False)
    make_index(folder)
    index = RegionIndex(folder)
    for form, kind in (("box", "box"), ("mask", "mask"), ("mixed", "mask")):
        samples = validation_samples(dataset(folder, tmp_path, "val", region_input=form), index, 1, 0)
        kinds = [sample.regions[0].kind for sample in samples]
        assert kinds == [kind] * (len(kinds) - 1) + ["whole"] and len(kinds) >= 4
        assert {sample.meta["image_id"] for sample in samples} == {"00000/000000002"}
        phrases = [sample.references[0] for sample in samples]
        assert phrases[-1] == ", ".join(phrases[:-1])
