"""`alpha-clip attention-map`: the attention that is drawn is the model's, and each row's is its own region's."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from alpha_clip_commands import alpha_clip
from eval import attention_map
from eval.attention_map import attention, panel_box, read_heads
from tests.tiny import noise_image, save_model, tiny_clip_config, tiny_clip_tokenizer
from vision_tower import AlphaCLIPConfig, AlphaCLIPImageProcessor, AlphaCLIPModel, AlphaCLIPProcessor, Region

LEFT, RIGHT = "0,0,24,24", "24,0,48,24"


@pytest.fixture(scope="module")
def model():
    """One whose class token looks where alpha is: only the last layer does anything, and a key in it is alpha."""
    torch.manual_seed(0)
    tiny = AlphaCLIPModel(AlphaCLIPConfig(**tiny_clip_config().to_dict())).eval()
    tower = tiny.vision_model
    with torch.no_grad():
        for layer in tower.encoder.layers:
            for part in (layer.self_attn.out_proj, layer.mlp.fc2):
                part.weight.zero_()
                part.bias.zero_()
        tower.embeddings.patch_embedding.weight.mul_(0.1)
        tower.embeddings.patch_embedding.alpha.weight[0] = 1.0
        attention = tower.encoder.layers[-1].self_attn
        torch.nn.init.normal_(attention.out_proj.weight)  # or all regions would have one embedding
        attention.k_proj.weight.zero_()
        attention.k_proj.weight[::8, 0] = 1.0  # 4 heads of 8 numbers: the first of each is the alpha
        attention.q_proj.weight.zero_()
        attention.q_proj.bias.zero_()
        attention.q_proj.bias[::8] = torch.tensor([4.0, 3.0, 2.0, -4.0])  # the last head looks away
    return tiny


@pytest.fixture(scope="module")
def processor():
    return AlphaCLIPProcessor(AlphaCLIPImageProcessor.for_size(32, "pad"), tiny_clip_tokenizer())


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder / "full", model, processor)
    save_model(folder / "tower", model.vision_model, processor.image_processor)
    noise_image(48, 24).save(folder / "picture.png")
    return folder


def run(folder, *extra, model="full", out="out.png"):
    """The page as an array, or None where the command ended with 2."""
    (folder / out).unlink(missing_ok=True)
    given = ["--model", folder / model, "--image", folder / "picture.png", "--out", folder / out]
    code = alpha_clip.main(["attention-map", *map(str, given), *extra])
    if code == 2:
        assert not (folder / out).exists()
        return None
    assert code == 0
    with Image.open(folder / out) as page:
        assert page.format == "PNG"
        return np.asarray(page).astype(int)


def panel(page, row, column, texts=0):
    x0, y0, x1, y1 = panel_box(row, column, texts)
    return page[y0:y1, x0:x1]


def centre_of_heat(page, row, texts=0):
    """Mean x of the brightest tenth of a heat map, 0 to 1, and how wide it is in y; the outline is left out."""
    heat = panel(page, row, 1, texts)
    warmth = np.where((heat == (0, 255, 255)).all(-1), -999, heat[..., 0] - heat[..., 2])
    y, x = np.nonzero(warmth > np.quantile(warmth, 0.9))
    return x.mean() / heat.shape[1], y.min() / heat.shape[0], y.max() / heat.shape[0]


def test_each_row_is_of_its_own_region(folder):
    page = run(folder, "--box", RIGHT, "--box", LEFT, "--text", "a red", "b", "--heads", "1")
    right, left = centre_of_heat(page, 1, 2), centre_of_heat(page, 2, 2)
    assert right[0] > 0.6 and left[0] < 0.4
    # padded to a square: the picture, and with it the region, is the middle half of the height
    assert min(right[1], left[1]) > 0.15 and max(right[2], left[2]) < 0.85
    turned = run(folder, "--box", LEFT, "--box", RIGHT, "--text", "a red", "b", "--heads", "1")
    for column in range(3):
        rows = [panel(turned, row, column, 2) for row in (0, 2, 1)]
        assert all((panel(page, row, column, 2) == rows[row]).all() for row in range(3))
        if column < 2:
            assert (rows[1] != rows[2]).any() and (rows[0] != rows[1]).any()


def test_heads_are_chosen(folder):
    towards = run(folder, "--box", RIGHT, "--heads", "1,2")
    away = run(folder, "--box", RIGHT, "--heads", "4")
    right_over_left = []
    for page in (towards, away):
        warmth = panel(page, 1, 1)[110:274, :, 0] - panel(page, 1, 1)[110:274, :, 2]  # the picture without its padding
        right_over_left.append(warmth[:, 212:370].mean() - warmth[:, 10:172].mean())
    assert right_over_left[0] > 50 and right_over_left[1] < -20
    assert (panel(towards, 1, 0) == panel(away, 1, 0)).all()
    assert read_heads("5, 16", 16) == [4, 15] and read_heads(None, 3) == [0, 1, 2]


def test_the_numbers_are_the_models(folder, model, processor):
    """Beside Hugging Face's own forward of each region alone."""
    loaded, own = attention_map.load(str(folder / "full"), with_text=True, device="cpu", revision=None)
    regions = [Region.whole(), Region.from_box(24, 0, 48, 24), Region.from_box(0, 0, 9, 9)]
    picture, texts = noise_image(48, 24), ["a red", "b"]
    rows = attention(loaded, own, picture, regions, texts, [0, 2])
    for one, region in zip(rows, regions, strict=True):
        inputs = processor(images=picture, regions=region, text=texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            output = loaded(**inputs, output_attentions=True)
            logits = model(**inputs).logits_per_image[0]
        expected = output.vision_model_output.attentions[-1][0, [0, 2], 0].mean(0)
        np.testing.assert_allclose(one.attention.ravel(), expected[1:], atol=1e-6)
        np.testing.assert_allclose(one.probabilities, logits.softmax(-1), atol=1e-5)
        np.testing.assert_allclose(one.cosines, logits / model.logit_scale.exp().item(), atol=1e-5)
        seen = own.image_processor(picture, do_normalize=False, return_tensors="pt")["pixel_values"][0, :3]
        np.testing.assert_allclose(one.pixels, seen.permute(1, 2, 0) * 255, atol=0.51)
        assert one.region == region
    for one, other in ((0, 1), (1, 2)):
        assert abs(rows[one].cosines - rows[other].cosines).max() > 0.001  # or a mix-up of regions could not be seen
    assert rows[0].alpha.min() == 1
    assert rows[1].alpha[8:24, 16:].mean() > 0.95 and rows[1].alpha[8:24, :15].max() < 0.05


def test_a_tower_is_enough_without_texts(folder):
    tower, full = (run(folder, "--mask", str(mask_file(folder)), model=name) for name in ("tower", "full"))
    assert tower.shape == full.shape
    assert all((panel(tower, row, column) == panel(full, row, column)).all() for row in (0, 1) for column in (0, 1))
    assert run(folder, "--box", LEFT, "--text", "a", model="tower") is None


def mask_file(folder):
    mask = np.zeros((24, 48), np.uint8)
    mask[6:18, 30:44] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder / "mask.png"


def test_a_plain_clip_sees_no_region(folder):
    torch.manual_seed(0)
    CLIPModel(tiny_clip_config()).save_pretrained(folder / "clip")
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tiny_clip_tokenizer()).save_pretrained(folder / "clip")
    page = run(folder, "--box", "16,0,24,24", "--box", "24,0,32,24", "--text", "a", "b", model="clip")
    bars = [panel(page, row, 2, 2) for row in range(3)]
    assert (bars[0] == bars[1]).all() and (bars[0] == bars[2]).all()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "expected a region, one of --box"),
        (["--box", "60,0,70,9"], "outside the image of 48 x 24"),
        (["--box", "1,2,3"], "expected 4 numbers"),
        (["--mask", "none.png"], "mask file not found"),
        (["--box", LEFT, "--heads", "0"], "numbers from 1 to 4"),
        (["--box", LEFT, "--heads", "5"], "numbers from 1 to 4"),
        (["--box", LEFT, "--heads", "1;2"], "numbers from 1 to 4"),
        (["--box", LEFT, "--text", "a", " "], "expected non-empty texts as --text"),
        (["--box", LEFT, "--text", "a" * 30], "32 tokens, the text tower supports 16"),
        (["--box", LEFT, "--image", "none.png"], "image not found: none.png"),
        (["--box", LEFT, "--model", "./nothing"], "directory not found"),
        (["--box", LEFT, "--device", "abacus"], "expected a device out of"),
        (["--box", LEFT, "--out", "map.jpg"], "expected --out FILE.png"),
        (["--box", LEFT, "--out", "no/folder/map.png"], "folder not found"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, extra, message):
    assert run(folder, *extra) is None
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("model: ")]
    assert len(lines) == 1 and re.match(r"alpha-clip attention-map: error: ", lines[0]) and message in lines[0]


def test_the_picture_is_not_overwritten(folder, capsys):
    before = (folder / "picture.png").read_bytes()
    arguments = ["--model", str(folder / "full"), "--image", str(folder / "picture.png"), "--box", LEFT]
    assert alpha_clip.main(["attention-map", *arguments, "--out", str(folder / "picture.png")]) == 2
    assert (folder / "picture.png").read_bytes() == before and "is read by this command" in capsys.readouterr().err
