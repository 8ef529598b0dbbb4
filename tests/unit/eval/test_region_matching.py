"""Telling regions apart by their texts: scores counted by hand, and the picture that each view shows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN

from eval.region_matching import (
    TOWER_VIEWS,
    DescribedImage,
    _nearest,
    described_images,
    embed_regions,
    embed_texts,
    embed_whole,
    score_region_text,
)
from mllm.data.samples import RegionSample
from tests.tiny import noise_image, tiny_clip_config, tiny_clip_tokenizer
from vision_tower import AlphaCLIPConfig, AlphaCLIPImageProcessor, AlphaCLIPModel, AlphaCLIPProcessor, Region

LEFT, RIGHT = Region.from_box(0, 0, 16, 32), Region.from_box(16, 0, 32, 32)


@pytest.fixture(scope="module")
def processor():
    return AlphaCLIPProcessor(AlphaCLIPImageProcessor.for_size(32, "pad"), tiny_clip_tokenizer())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    tiny = AlphaCLIPModel(AlphaCLIPConfig(**tiny_clip_config().to_dict())).eval()
    for weight in tiny.parameters():
        if weight.ndim > 1:  # the alpha weight too; as initialised, all pictures would be nearly alike
            torch.nn.init.normal_(weight, std=0.2)
    return tiny


class ByAlpha(torch.nn.Module):
    """An encoder that knows the side of the region, and of a text its first letter.

    The left half is (1, 0, 0, 0), the right half (0, 1, 0, 0), the whole picture (0, 0, 1, 0). A text that begins
    with a, b or c is these three, any other (0, 0, 0, 1); with `alike` all is (1, 0, 0, 0).
    """

    def __init__(self, alike=False):
        super().__init__()
        self.alike, self.device, self.dtype = alike, torch.device("cpu"), torch.float32
        self.config = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=16), projection_dim=4)
        self.image_tower, self.text_tower = torch.nn.Identity(), torch.nn.Identity()
        self.batches, self.modes = [], []

    def _one_hot(self, kinds):
        self.modes.append((self.training, torch.is_grad_enabled()))
        kinds = torch.zeros_like(kinds) if self.alike else kinds
        return SimpleNamespace(pooler_output=2 * torch.nn.functional.one_hot(kinds, 4).float())

    def get_image_features(self, pixel_values):
        self.batches.append(len(pixel_values))
        inside = pixel_values[:, 3] > 0
        left, right = inside[:, 16, 8], inside[:, 16, 24]
        return self._one_hot(torch.where(left & right, 2, torch.where(left, 0, 1)))

    def get_text_features(self, input_ids, attention_mask):
        letters = tiny_clip_tokenizer().convert_ids_to_tokens(input_ids[:, 1].tolist())
        return self._one_hot(torch.tensor(["abc".find(letter[0]) % 4 for letter in letters]))


def picture(*described, caption=None, image=None):
    regions, texts = zip(*described, strict=True) if described else ((), ())
    return DescribedImage(image or noise_image(32, 32), regions, texts, caption)


def test_scores_counted_by_hand(processor):
    pictures = [
        picture((LEFT, "a"), (RIGHT, "bx"), caption="cc"),  # both right; the caption too
        picture((LEFT, "d"), (RIGHT, "b")),  # the left one is described as what it is not; the right one is "bx" too
        picture((RIGHT, "e"), caption="dx"),  # wrong, and alone in its picture
    ]
    scores = score_region_text(ByAlpha(), processor, pictures)
    # of all texts (a, bx, d, b, e): a is nearest; bx and b tie; d and e are no neighbours of anything
    # of the picture's own: a and bx; in the second picture the right region is nearer to b
    assert scores == {"top1": 1 / 5, "top1_same_image": 3 / 4, "cosine_same_image": 0.0, "whole_top1": 1 / 2}


def test_swapped_regions_change_the_scores(processor):
    right = score_region_text(ByAlpha(), processor, [picture((LEFT, "a"), (RIGHT, "b"))])
    swapped = score_region_text(ByAlpha(), processor, [picture((RIGHT, "a"), (LEFT, "b"))])
    assert right["top1"] == right["top1_same_image"] == 1
    assert swapped["top1"] == swapped["top1_same_image"] == 0


def test_without_the_region_no_more_than_chance(processor):
    pictures = [picture((LEFT, "a"), (RIGHT, "b"), caption="c"), picture((RIGHT, "b"), (LEFT, "a"), caption="d")]
    alike = score_region_text(ByAlpha(alike=True), processor, pictures)
    assert alike == {"top1": 0, "top1_same_image": 0, "cosine_same_image": 1, "whole_top1": 0}
    whole = score_region_text(ByAlpha(), processor, pictures, view="whole")
    assert whole["top1"] == whole["top1_same_image"] == 0 and whole["cosine_same_image"] == 1


def test_rounding_breaks_no_tie():
    image = np.array([[1, 0]], np.float32)
    rounded = np.array([[0.5 + 1e-7, 0], [0.5, 0]], np.float32)
    assert rounded[0, 0] > rounded[1, 0] and not _nearest(image, rounded, np.array([0]))[0]
    assert _nearest(image, np.array([[0.50001, 0], [0.5, 0]], np.float32), np.array([0]))[0]


def test_an_image_without_its_region_tells_nothing_apart(model, processor):
    """A real encoder to which all regions of a picture are alike: one text is right for one of them."""
    letters = "abcdefgh"
    described = [(Region.from_box(4 * i, 0, 4 * i + 4, 32), letter) for i, letter in enumerate(letters)]
    scores = score_region_text(model, processor, [picture(*described)], view="whole", batch_size=3)
    assert scores["top1_same_image"] <= 1 / 8
    assert scores["cosine_same_image"] == pytest.approx(1, abs=1e-5)


def test_equal_texts_are_one(processor):
    """Of the same picture, of another, and in other letters: none of them makes a tie."""
    pictures = [picture((LEFT, "a"), (RIGHT, "b"), (Region.from_box(0, 0, 15, 32), "A")), picture((LEFT, "a"))]
    scores = score_region_text(ByAlpha(), processor, pictures)
    assert scores["top1"] == scores["top1_same_image"] == 1
    # pairs of the first picture: left-right 0, left-left 1, right-left 0
    assert scores["cosine_same_image"] == pytest.approx(1 / 3)


def test_the_cosine_is_of_different_regions_and_each_picture_counts_once(processor):
    again = Region.from_box(0, 0, 15, 32)
    pictures = [
        picture((LEFT, "a"), (Region.from_box(0, 0, 16, 32), "b"), (RIGHT, "c")),  # left-right twice: 0
        picture((LEFT, "a"), (again, "b")),  # different, though alike: 1
    ]
    assert score_region_text(ByAlpha(), processor, pictures)["cosine_same_image"] == pytest.approx(1 / 2)


def test_what_has_nothing_to_count_is_absent(processor):
    one_text = [picture((LEFT, "a"), (RIGHT, "a"), caption="c")]
    assert score_region_text(ByAlpha(), processor, one_text) == {"cosine_same_image": 0}
    captions = [picture(caption="c"), picture(caption="a")]
    assert score_region_text(ByAlpha(), processor, captions) == {"whole_top1": 0.5}
    apart = [picture((LEFT, "a")), picture((RIGHT, "b"))]
    assert score_region_text(ByAlpha(), processor, apart) == {"top1": 1}
    for nothing in ([], [picture()], [picture((LEFT, "a"), caption="b")]):
        with pytest.raises(ValueError, match="at least two different texts"):
            score_region_text(ByAlpha(), processor, nothing)
    with pytest.raises(ValueError, match="a text for each of 2 regions of an image, got 1"):
        score_region_text(ByAlpha(), processor, [DescribedImage(noise_image(32, 32), (LEFT, RIGHT), ("a",), None)])


def test_captions_belong_to_their_pictures(model, processor):
    """Each picture is given the letter that is nearest to it: all are right, and some are not when turned round."""
    colours = ("red", "lime", "blue", "white", "black")
    pictures = [picture(image=Image.new("RGB", (32, 32), colour)) for colour in colours]
    letters = "abcdefghijklmnopqrstuv"  # of the tiny model's vocabulary
    nearest = (embed_whole(model, processor, pictures) @ embed_texts(model, processor, letters).T).argmax(1)
    captions = [letters[index] for index in nearest]
    assert captions != captions[::-1]
    right = [p._replace(caption=caption) for p, caption in zip(pictures, captions, strict=True)]
    turned = [p._replace(caption=caption) for p, caption in zip(pictures, captions[::-1], strict=True)]
    assert score_region_text(model, processor, right) == {"whole_top1": 1}
    assert score_region_text(model, processor, turned)["whole_top1"] < 1


def test_modes_are_restored_module_by_module(processor):
    fake = ByAlpha().train()
    fake.text_tower.eval()
    score_region_text(fake, processor, [picture((LEFT, "a"), (RIGHT, "b"), caption="c")])
    assert fake.training and fake.image_tower.training and not fake.text_tower.training
    assert fake.modes and set(fake.modes) == {(False, False)}
    with pytest.raises(ValueError, match="outside"):
        embed_regions(fake, processor, [picture((Region.from_box(40, 0, 50, 5), "a"))])
    assert fake.training and not fake.text_tower.training


def test_batches_keep_the_order_of_regions(model, processor):
    wide = noise_image(48, 20, seed=1)
    pictures = [
        picture((LEFT, "a"), (RIGHT, "b"), image=noise_image(32, 32)),
        picture(),
        picture((Region.from_box(30, 3, 40, 9), "c"), image=wide),
        picture((RIGHT, "d"), (LEFT, "e"), (Region.whole(), "f"), image=noise_image(32, 32)),
    ]
    embedded = embed_regions(model, processor, pictures, batch_size=2)
    pairs = [(p.image, region) for p in pictures for region in p.regions]
    with torch.no_grad():
        alone = [
            model.get_image_features(**processor(images=i, regions=r, return_tensors="pt")).pooler_output
            for i, r in pairs
        ]
    alone = torch.nn.functional.normalize(torch.cat(alone), dim=-1)
    assert embedded.dtype == torch.float32 and embedded.shape == (6, 16)
    torch.testing.assert_close(embedded, alone, atol=1e-5, rtol=0)
    assert (alone[0] - alone[1]).abs().max() > 1e-3  # or the order could not be seen
    torch.testing.assert_close(embed_whole(model, processor, pictures[3:]), embedded[5:], atol=1e-5, rtol=0)
    fake = ByAlpha()
    embed_regions(fake, processor, pictures[:1], batch_size=64)
    embed_regions(fake, processor, pictures, batch_size=4)
    assert fake.batches == [2, 4, 2]
    assert embed_regions(model, processor, []).shape == (0, 16)


@pytest.mark.parametrize("kind", ["weights", "autocast"])
def test_half_precision_comes_out_in_float32(model, processor, kind):
    pictures = [picture((LEFT, "a"), (RIGHT, "b"))]
    exact = embed_regions(model, processor, pictures)
    if kind == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            embedded = embed_regions(model, processor, pictures)
            score_region_text(model, processor, pictures)
    else:
        half = AlphaCLIPModel(model.config).to(torch.bfloat16)
        half.load_state_dict(model.state_dict())
        embedded = embed_regions(half, processor, pictures)
    assert embedded.dtype == torch.float32 and not embedded.equal(exact)
    torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(2))
    assert (embedded * exact).sum(-1).min() > 0.99


def test_texts_are_those_of_the_model_alone(model, processor):
    texts = ["a", "abcdefghij", "b c"]
    embedded = embed_texts(model, processor, texts, batch_size=2)
    for row, text in zip(embedded, texts, strict=True):
        with torch.no_grad():
            alone = model.get_text_features(**processor(text=[text], return_tensors="pt")).pooler_output
        torch.testing.assert_close(row[None], torch.nn.functional.normalize(alone, dim=-1), atol=1e-5, rtol=0)


def test_a_text_longer_than_the_context_is_named(model, processor):
    fits, long = "a" * 14, "b" * 15  # with the two marks 16 and 17 tokens
    embed_texts(model, processor, [fits])
    with pytest.raises(ValueError, match=f"'{long}' has 17 tokens, the text tower supports 16"):
        embed_texts(model, processor, ["a", long])
    pictures = [picture((LEFT, "a"), (RIGHT, long))]
    with pytest.raises(ValueError, match="truncation=True"):
        score_region_text(model, processor, pictures)
    assert embed_texts(model, processor, ["a", long], truncation=True).shape == (2, 16)
    assert "top1" in score_region_text(model, processor, pictures, truncation=True)


def test_a_zero_alpha_weight_sees_no_region(model, processor):
    pictures = [picture((LEFT, "a"), (RIGHT, "b"))]
    blind = AlphaCLIPModel(model.config)
    blind.load_state_dict(model.state_dict())
    torch.nn.init.zeros_(blind.vision_model.embeddings.patch_embedding.alpha.weight)
    seen = score_region_text(model, processor, pictures)["cosine_same_image"]
    assert seen < 0.999
    assert score_region_text(blind, processor, pictures)["cosine_same_image"] == pytest.approx(1, abs=1e-5)
    assert score_region_text(blind, processor, pictures, view="masked")["cosine_same_image"] < 0.999


# views

BOX = Region.from_box(20, 10, 40, 30)


def pixels(image):
    return np.asarray(image).astype(int)


def shown(view, region=BOX, image=None):
    """The picture that a view makes of a noise picture, and the noise."""
    image = noise_image(100, 60) if image is None else image
    made, alpha = TOWER_VIEWS[view](image, region)
    assert alpha == (region if view == "alpha" else Region.whole())
    return pixels(made), pixels(image)


def test_views_are_all_here():
    assert list(TOWER_VIEWS) == ["alpha", "whole", "crop", "masked", "blur", "circle"]
    with pytest.raises(ValueError, match="expected a view from alpha, whole"):
        embed_regions(None, None, [], view="red")


@pytest.mark.parametrize("view", ["alpha", "whole"])
def test_alpha_and_whole_show_the_picture(view):
    made, image = shown(view)
    assert (made == image).all()


def test_the_crop_is_a_square_half_as_large_again():
    made, image = shown("crop")
    assert (made == image[5:35, 15:45]).all()
    made, image = shown("crop", Region.from_box(40, 20, 60, 30))  # wide: 30 x 30 around (50, 25)
    assert (made == image[10:40, 35:65]).all()
    made, image = shown("crop", Region.from_box(80, 0, 100, 20))  # in a corner: what there is of it
    assert (made == image[0:25, 75:100]).all()
    made, image = shown("crop", Region.from_box(99.6, 59.6, 100, 60))  # the smallest has a pixel
    assert (made == image[59:60, 99:100]).all()


def test_masked_is_clips_mean_outside():
    made, image = shown("masked")
    assert (made[10:30, 20:40] == image[10:30, 20:40]).all()
    made[10:30, 20:40] = mean = np.rint(np.multiply(OPENAI_CLIP_MEAN, 255))
    assert (made == mean).all()


def test_blurred_leaves_the_region_as_it_is():
    made, image = shown("blur")
    assert (made[10:30, 20:40] == image[10:30, 20:40]).all()
    outside = np.ones((60, 100), bool)
    outside[10:30, 20:40] = False
    assert made[outside].std() < 0.2 * image[outside].std()


def test_the_blur_grows_with_the_picture():
    """A step from black to white is as soft, as a share of the picture, in a large as in a small one."""
    for width in (64, 640):
        step = np.zeros((20, width, 3), np.uint8)
        step[:, width // 2 :] = 255
        made, _ = shown("blur", Region.from_box(0, 0, 1, 1), Image.fromarray(step))
        # one deviation (100 of 640 pixels) beside the step a normal distribution has 16 %
        assert made[10, width // 2 - round(width * 100 / 640), 0] / 255 == pytest.approx(0.16, abs=0.03)


def test_the_circle_is_red_and_outside_of_the_box():
    made, image = shown("circle", Region.from_box(40, 20, 60, 40))
    changed = (made != image).any(-1)
    assert (made[changed] == (255, 0, 0)).all()
    rows, columns = np.nonzero(changed)
    assert not changed[20:40, 40:60].any()
    distance = np.hypot(columns + 0.5 - 50, rows + 0.5 - 30)
    assert distance.min() >= 200**0.5 - 1e-9 and distance.max() <= 200**0.5 + 1  # a line of one pixel
    angles = np.sort(np.arctan2(rows + 0.5 - 30, columns + 0.5 - 50))
    assert np.diff(angles).max() < 0.2  # all around
    large, image = shown("circle", Region.from_box(200, 200, 300, 250), noise_image(800, 500))
    across = (large[225] != image[225]).any(-1)
    assert across.sum() == 10  # 1 % of 500, on either side
    assert np.flatnonzero(across).min() == pytest.approx(250 - 50 * 2**0.5 - 5, abs=1)


@pytest.mark.parametrize("view", ["crop", "masked", "blur", "circle"])
def test_views_refuse_a_region_outside(view):
    with pytest.raises(ValueError, match="outside"):
        TOWER_VIEWS[view](noise_image(10, 10), Region.from_box(20, 0, 30, 5))


# reading


def sample(image_id, region, *references, question=None, image="x.png"):
    meta = {} if image_id is None else {"image_id": image_id}
    return RegionSample(f"{image_id}-{references}", image, (region,), question, references, meta=meta)


def test_samples_of_one_image_are_one_picture(tmp_path):
    files = []
    for number in range(3):
        noise_image(32, 32, seed=number).save(tmp_path / f"{number}.png")
        files.append(str(tmp_path / f"{number}.png"))
    pictures = described_images(
        [
            sample(7, LEFT, "a", "not this", image=files[0]),
            sample(7, Region.whole(), "all", image=files[0]),
            sample(7, RIGHT, "b", image=files[0]),
            sample(7, LEFT, "again", image=files[0]),
            sample(8, RIGHT, "c", image=files[1]),
            sample(None, LEFT, "d", image=files[1]),
            sample(None, LEFT, "e", image=files[2]),
        ]
    )
    assert [p[1:] for p in pictures] == [
        ((LEFT, RIGHT), ("a", "b"), "all"),
        ((RIGHT,), ("c",), None),
        ((LEFT,), ("d",), None),
        ((LEFT,), ("e",), None),
    ]
    for described, number in zip(pictures, (0, 1, 1, 2), strict=True):
        assert (pixels(described.image) == pixels(noise_image(32, 32, seed=number))).all()


@pytest.mark.parametrize(
    "wrong",
    [
        sample(1, LEFT, "2", question="How many?"),
        sample(1, LEFT),
        RegionSample("two", "x.png", (LEFT, RIGHT), None, ("a",)),
    ],
)
def test_only_descriptions_of_one_region_are_taken(wrong):
    with pytest.raises(ValueError, match="expected a description of one region"):
        described_images([wrong])


def test_images_that_cannot_be_used_are_left_out_counted_and_named(tmp_path, caplog):
    noise_image(32, 32).save(tmp_path / "good.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "good.png").read_bytes()[:80])
    outside = Region.from_box(50, 50, 60, 60)
    regions = {"damaged.png": LEFT, "good.png": LEFT, "missing.png": RIGHT}
    samples = [sample(n, region, "a", image=str(tmp_path / name)) for n, (name, region) in enumerate(regions.items())]
    samples += [
        sample(9, LEFT, "a", image=str(tmp_path / "good.png")),
        sample(9, outside, "b", image=str(tmp_path / "good.png")),
    ]
    (kept,) = described_images(samples)
    assert kept.texts == ("a",)
    assert "3 of 4 images cannot be used" in caplog.text
    assert "damaged.png" in caplog.text and "missing.png" in caplog.text and "outside" in caplog.text
    missing = [sample(n, LEFT, "a", image=str(tmp_path / f"{n}.png")) for n in range(20)]
    with pytest.raises(ValueError, match="20 of 20 images cannot be used"):
        described_images(missing)
    good = [sample(n, LEFT, "a", image=str(tmp_path / "good.png")) for n in range(100, 120)]
    assert len(described_images([*missing, *good])) == 20  # no more than half
    with pytest.raises(ValueError, match="20 of 39 images"):
        described_images([*missing, *good[1:]])


def test_an_error_of_ours_is_no_unreadable_image(tmp_path, monkeypatch):
    monkeypatch.setattr(RegionSample, "open_image", lambda self: len(None))
    with pytest.raises(TypeError):
        described_images([sample(1, LEFT, "a")])
