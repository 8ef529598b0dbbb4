"""`region-chat`: every region option reaches the model, every mistake is one line and exit code 2."""

import base64
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from alpha_clip_commands.region_chat import build_parser
from alpha_clip_commands.region_chat import main as region_chat
from alpha_clip_commands.region_options import region_in
from mllm.region_chat import cli
from tests.alpha_maps import alpha_map
from tests.files import encoded_image, write_json
from tests.tiny import noise_image
from vision_tower import Region
from vision_tower.geometry import place_alpha


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    noise_image(60, 40).save(path)
    return path


@pytest.fixture
def files(tmp_path):
    """A mask of the picture's size, as PNG and as RLE."""
    mask = np.zeros((40, 60), np.uint8)
    mask[5:20, 10:30] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    write_json(tmp_path / "rle.json", Region.from_mask(mask).to_json()["rle"])
    return tmp_path


def run(model, *arguments):
    return region_chat(["--model", str(model), "--max-new-tokens", "4", *map(str, arguments)])


REGIONS = {
    "--box": ("2,2,30,30", Region.from_box(2, 2, 30, 30)),
    "--nbox": ("0.1,0.1,0.5,0.5", Region.from_box(0.1, 0.1, 0.5, 0.5, normalized=True)),
    "--polygon": ("2,2,40,2,20,30", Region.from_polygon([2, 2, 40, 2, 20, 30])),
    "--box-xywh": ("2,2,28,28", Region.from_box(2, 2, 30, 30)),
    "--points": ("20,20@6", Region.from_points([[20, 20]], radius=6)),
    "--point": ("20,20@6", Region.from_points([[20, 20]], radius=6)),
    "--stroke": ("5,5;40,30@4", Region.from_stroke([[5, 5], [40, 30]], width=4)),
}


@pytest.mark.parametrize("option", [*REGIONS, "--mask", "--rle", "--whole"])
def test_every_region_option_reaches_the_model(tiny_llava_dir, picture, files, option, fed, capsys):
    masked = Region.from_mask(files / "mask.png")
    values = {**REGIONS, "--mask": (files / "mask.png", masked), "--rle": (files / "rle.json", masked)}
    value, region = values.get(option, (None, Region.whole()))
    arguments = [option] if value is None else [option, value]
    assert run(tiny_llava_dir, "--image", picture, *arguments, "--json", "--ask", "What?") == 0
    record = json.loads(capsys.readouterr().out)
    assert Region.from_json(record["region"]) == region
    assert record["question"] == "What?" and isinstance(record["answer"], str)
    assert np.allclose(alpha_map(fed[0]), place_alpha(region, 40, 60, 32, "pad"), atol=1e-5)


def test_two_regions_give_two_answers_and_strength_counts(tiny_llava_dir, picture, capsys):
    answers = []
    for arguments in (
        ["--box", "0,0,20,20"],
        ["--box", "40,20,60,40"],
        ["--box", "0,0,20,20", "--strength", "0"],
        ["--whole"],
    ):
        assert run(tiny_llava_dir, "--image", picture, *arguments, "--json") == 0
        answers.append(json.loads(capsys.readouterr().out)["answer"])
    assert answers[0] != answers[1]
    assert answers[2] == answers[3]


def test_the_answer_is_streamed_to_stdout_alone(tiny_llava_dir, picture, capsys):
    assert run(tiny_llava_dir, "--image", picture, "--whole", "--json") == 0
    expected = json.loads(capsys.readouterr().out)["answer"]
    assert run(tiny_llava_dir, "--image", picture, "--whole", "--ask", "Describe this region.") == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == expected
    assert captured.err.startswith("model: ") and "dtype" in captured.err and len(captured.err.splitlines()) == 1


def write_cut(path):
    path.write_bytes(encoded_image(noise_image(60, 60), "JPEG")[:700])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "missing.png", "--whole", "--ask", "x"], "image not found: missing.png"),
        (["--image", "text.png", "--whole", "--ask", "x"], "not an image"),
        (["--image", "cut.jpg", "--whole", "--ask", "x"], "cannot read the image"),
        (["--image", "picture.png", "--ask", "x"], "expected a region, one of --box"),
        (["--image", "picture.png", "--box", "100,100,120,120", "--ask", "x"], "outside the image of 60 x 40"),
        (["--image", "picture.png", "--box", "9,9,1,1", "--ask", "x"], "x0 < x1"),
        (["--image", "picture.png", "--box", "nan,0,1,1", "--ask", "x"], "finite"),
        (["--image", "picture.png", "--mask", "small.png", "--ask", "x"], "expected equal sizes"),
        (["--image", "picture.png", "--mask", "empty.png", "--ask", "x"], "region is empty"),
        (
            ["--image", "picture.png", "--whole", "--strength", "3", "--ask", "x", "--box", "1,1,2,2"],
            "not allowed with",
        ),
        (["--image", "picture.png", "--box", "1,1,9,9", "--strength", "3", "--ask", "x"], "strength from 0 to 1"),
        (["--image", "picture.png", "--whole", "--ask", "x", "--save-overlay", "no/folder.png"], "folder not found"),
        (["--image", "picture.png", "--whole", "--ask", "x", "--save-overlay", "."], "it is a folder"),
        (["--image", "picture.png", "--whole", "--strength", "7", "--ask", "x"], "--strength from 0 to 1"),
        (["--image", "picture.png", "--whole", "--strength", "nan", "--ask", "x"], "--strength from 0 to 1"),
        (["--image", "picture.png", "--strength", "0.5"], "--strength requires a region"),
        (["--image", "picture.png", "--whole", "--ask", "a\udc80"], "surrogates not allowed"),
        (["--batch", "r.jsonl", "--output", "o.jsonl", "--strength", "0.5"], "omit the other flags"),
        (["--batch", "r.jsonl", "--output", "no/o.jsonl"], "folder not found"),
        (["--batch", "r.jsonl", "--output", "."], "it is a folder"),
        (["--ask", "x", "--whole"], "expected --image"),
        (["--image", "picture.png", "--whole", "--ask", " "], "--ask is empty"),
        (["--image", "picture.png", "--whole", "--ask", "x", "--output", "o.jsonl"], "require --batch"),
        (["--image", "picture.png", "--whole", "--ask", "x", "--batch-size", "4"], "require --batch"),
        (["--image", "picture.png", "--whole", "--ask", "x", "--retry-failed"], "require --batch"),
        (
            ["--batch", "r.jsonl", "--output", "o.jsonl", "--max-errors", "nan"],
            "--max-errors: expected a fraction from 0 to 1",
        ),
        (["--image", "picture.png", "--whole", "--ask", "x" * 100_000], "context is 512"),
        (["--batch", "r.jsonl"], "--batch requires --output"),
        (["--batch", "missing.jsonl", "--output", "o.jsonl"], "batch file not found: missing.jsonl"),
        (["--image", "picture.png", "--whole", "--ask", "x", "--device", "quantum"], "expected a device"),
        (["--image", "picture.png", "--whole", "--ask", "x", "--device", "cpu:abc"], "expected a device"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    tiny_llava_dir, picture, tmp_path, monkeypatch, capsys, arguments, message
):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "r.jsonl").touch()
    write_cut(tmp_path / "cut.jpg")
    Image.new("L", (30, 20), 255).save(tmp_path / "small.png")
    Image.new("L", (60, 40)).save(tmp_path / "empty.png")
    monkeypatch.chdir(tmp_path)
    try:
        code = run(tiny_llava_dir, *arguments)
    except SystemExit as stopped:  # argparse
        code = stopped.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    error = captured.err.strip().splitlines()[-1]
    assert error.startswith("region-chat: error:") and message in error
    assert "Traceback" not in captured.err and len(error) < 700


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "bert"}', "expected a LLaVA-1.5, LLaVA-NeXT or BLIP-2 model, got model_type 'bert'"),
        ("not json", "cannot load the model"),
        (None, "without a config.json"),
    ],
)
def test_other_models_are_refused(picture, tmp_path, capsys, config, message):
    folder = tmp_path / "model"
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(config)
    assert run(folder, "--image", picture, "--whole", "--ask", "x") == 2
    assert message in capsys.readouterr().err


def test_torn_weights_are_named(tiny_llava_dir, picture, tmp_path, capsys):
    shutil.copytree(tiny_llava_dir, tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])
    assert run(tmp_path / "torn", "--image", picture, "--whole", "--ask", "x") == 2
    assert "are damaged" in capsys.readouterr().err


def test_an_unknown_hub_id_fails_at_once_without_network(picture, monkeypatch, capsys):
    import socket

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", no_network)
    assert run("nobody/nothing-of-this-name", "--image", picture, "--whole", "--ask", "x") == 2
    assert "without network" in capsys.readouterr().err


@pytest.mark.parametrize("flags, noted", [(["--points", "20,20@6"], True), (["--box", "2,2,30,30"], False)])
def test_what_the_embedded_model_never_learned_is_noted(picture, capsys, flags, noted):
    assert region_chat(["--image", str(picture), *flags, "--ask", "What is this?", "--max-new-tokens", "1"]) == 0
    assert ("trained on boxes and masks" in capsys.readouterr().err) == noted


WORDS = [
    (["--box", "24", "3", "60", "39"], Region.from_box(24, 3, 60, 39)),
    (["--box", "24,", "3,", "60,", "39"], Region.from_box(24, 3, 60, 39)),
    (["--box", "24,3", "60,39"], Region.from_box(24, 3, 60, 39)),
    (["--box", "24, 3, 60, 39"], Region.from_box(24, 3, 60, 39)),
    (["--box", "24 3 60 39"], Region.from_box(24, 3, 60, 39)),
    (["--box=24", "3", "60", "39"], Region.from_box(24, 3, 60, 39)),
    (["--box=-5,3,60,39"], Region.from_box(-5, 3, 60, 39)),
    (["--box", "-5,3,60,39"], Region.from_box(-5, 3, 60, 39)),
    (["--box", "-5", "3", "60", "39"], Region.from_box(-5, 3, 60, 39)),
    (["--box", "-.5", "-3", "60", "+39"], Region.from_box(-0.5, -3, 60, 39)),
    (["--box", "24", "3", "60", "39", "*0.5"], Region.from_box(24, 3, 60, 39, strength=0.5)),
    (["--box-xywh", "-5", "3", "65", "36"], Region.from_box(-5, 3, 60, 39)),
    (["--nbox", ".1", "0.2", "1", "6e-1"], Region.from_box(0.1, 0.2, 1, 0.6, normalized=True)),
    (["--nbox", "-0.0005,0,.5,1"], Region.from_box(-0.0005, 0, 0.5, 1, normalized=True)),
    (["--polygon", "-2,2", "40,2", "20,30"], Region.from_polygon([-2, 2, 40, 2, 20, 30])),
    (["--polygon", "2 2 40 2 20 30;", "1 1 9 1 9 9"], Region.from_polygon([[2, 2, 40, 2, 20, 30], [1, 1, 9, 1, 9, 9]])),
    (["--points", "-5,3", "20", "20", "@6"], Region.from_points([[-5, 3], [20, 20]], radius=6)),
    (["--point", "-5,3@6"], Region.from_points([[-5, 3]], radius=6)),
    (["--stroke", "-5,5", ";", "40,30", "@", "4"], Region.from_stroke([[-5, 5], [40, 30]], width=4)),
]


@pytest.mark.parametrize(
    ("words", "region"), WORDS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_numbers_are_understood_as_they_come(words, region):
    for arguments in ([*words, "--ask", "x"], ["--ask", "x", *words], ["--ask", "x", *words, "--json"]):
        args = build_parser().parse_args(["--image", "p.png", *arguments])
        assert cli.region_from_arguments(args) == region and args.ask == "x"
        value = region_in(args)[1]
        assert value == value.strip()  # as it is shown in messages


def test_a_box_that_reaches_over_the_image_is_clipped_with_a_warning(tiny_llava_dir, picture, fed, caplog):
    for box in (["-5,3,60,39"], ["-5", "3", "60", "39"]):
        assert run(tiny_llava_dir, "--image", picture, "--box", *box, "--ask", "x") == 0
        assert caplog.text.count("extends beyond") == 1
        caplog.clear()
    clipped = place_alpha(Region.from_box(0, 3, 60, 39), 40, 60, 32, "pad")
    assert all(np.allclose(alpha_map(pixels), clipped, atol=1e-5) for pixels in fed)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--box", "0.1", "0.1", "0.5", "0.5"], "fractions of the image must be passed as nbox"),
        (["--box-xywh", "0.1,0.1,0.5,0.5"], "fractions of the image must be passed as nbox"),
        (["--nbox", "2", "2", "30", "30"], "use box for pixels"),
        (["--points", "0.5,0.5@6"], "multiplied by its width and height"),
        (["--stroke", "0.5,0.5;0.7,0.7@6"], "multiplied by its width and height"),
        (["--polygon", "0.1,0.1,0.9,0.1,0.5,0.5"], "multiplied by its width and height"),
        (["--box", "700", "700", "900", "900"], "divide them by 1000"),
        (["--box", "24", "3", "60"], "expected 4 numbers, got 3"),
        (["--box", "24", "3", "10", "10"], "use xywh for x,y,width,height"),
    ],
)
def test_a_region_in_the_wrong_unit_is_an_error(picture, flags, message, capsys):
    assert run("unused", "--image", picture, *flags, "--ask", "x") == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1


def test_images_come_from_data_urls_too(tiny_llava_dir, picture, fed, tmp_path, capsys):
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    assert run(tiny_llava_dir, "--image", picture, "--whole", "--ask", "x") == 0
    assert run(tiny_llava_dir, "--image", url, "--whole", "--ask", "x") == 0
    write_json(tmp_path / "r.jsonl", {"id": 1, "image": url, "region": {"xywh": [2, 2, 20, 20]}})
    assert run(tiny_llava_dir, "--batch", tmp_path / "r.jsonl", "--output", tmp_path / "a.jsonl") == 0
    assert torch.equal(fed[0], fed[1]) and torch.equal(fed[0][:3], fed[2][:3]) and not torch.equal(fed[0], fed[2])


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        region_chat(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out.startswith("region-chat 0.1.0")


def test_decompression_bombs_are_refused(picture, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert run("unused", "--image", picture, "--whole", "--ask", "x") == 2
    assert "too many pixels" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--save-overlay", "no/o.png"], ["--box", "99,99,120,120"]])
def test_what_can_be_checked_without_the_model_is(picture, monkeypatch, flags):
    monkeypatch.setattr(cli, "load_chat", lambda args: pytest.fail("the model was loaded"))
    region = [] if "--box" in flags else ["--whole"]
    assert run("unused", "--image", picture, "--ask", "x", *region, *flags) == 2
    assert region_chat(["--batch", str(picture), "--output", "no/o.jsonl"]) == 2


def test_the_overlay_is_saved_with_the_answer(tiny_llava_dir, picture, tmp_path):
    flags = ["--box", "2,2,30,30", "--ask", "x", "--save-overlay", tmp_path / "o.png"]
    assert run(tiny_llava_dir, "--image", picture, *flags) == 0
    assert Image.open(tmp_path / "o.png").height > 40 * 7  # 60 x 40, seven times larger, and the caption


def test_interrupts_end_quietly_and_bugs_keep_their_traceback(picture, monkeypatch, capsys):
    def stop(error):
        def raise_it(args):
            raise error

        monkeypatch.setattr(cli, "load_chat", raise_it)

    stop(KeyboardInterrupt())
    assert run("unused", "--image", picture, "--whole", "--ask", "x") == 130
    assert capsys.readouterr().err == ""
    stop(TypeError("a bug"))
    with pytest.raises(TypeError, match="a bug"):
        run("unused", "--image", picture, "--whole", "--ask", "x")


def test_an_answer_is_shown_without_what_a_terminal_obeys(tiny_llava, capsys):
    from mllm.region_chat.repl import _PrintableStreamer

    streamer = _PrintableStreamer(tiny_llava[1].tokenizer)
    streamer.on_finalized_text("a\x1b[2Jb", stream_end=True)
    assert capsys.readouterr().out == "a[2Jb\n"
