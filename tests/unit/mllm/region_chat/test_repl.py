"""The conversation of `region-chat`: every command does what the help says, regions as with the flags."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from alpha_clip_commands.region_chat import main as region_chat
from alpha_clip_commands.region_options import FORMER_OPTIONS, REGION_OPTIONS
from mllm.data.templates import DESCRIBE_REGION
from mllm.inference import RegionChat
from mllm.region_chat import cli
from tests.alpha_maps import alpha_map
from tests.files import read_json, write_json
from tests.tiny import noise_image
from vision_tower import Region
from vision_tower.geometry import place_alpha


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    noise_image(60, 40).save(path)
    return path


def run(model, *arguments):
    return region_chat(["--model", str(model), "--max-new-tokens", "4", *map(str, arguments)])


def talk(monkeypatch, model, picture, lines):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    models = [] if model is None else ["--model", str(model)]
    return region_chat([*models, "--image", str(picture), "--max-new-tokens", "2"])


CONVERSATION = """\
What is this?
/box 0,0,20,20
What is it?

/box 100,100,120,120
/nonsense
/strength 0.5
/overlay {folder}/overlay.png
/save {folder}/turns.json
/image {folder}/missing.png
And now?
/save {folder}/again.json
/image {folder}/picture.png
hello?
/whole
/reset
/help
/quit
"""


def test_a_conversation(tiny_llava_dir, picture, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(CONVERSATION.format(folder=tmp_path)))
    assert run(tiny_llava_dir, "--image", picture) == 2  # lines of a pipe failed
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
    expected = ["no region yet", "outside the image", "unknown command /nonsense", "no image file", "no region yet"]
    assert all(part in line for part, line in zip(expected, errors, strict=True))
    assert Image.open(tmp_path / "overlay.png").width >= 384
    saved, again = (read_json(tmp_path / name) for name in ("turns.json", "again.json"))
    assert saved["region"] == {"box": [0, 0, 20, 20], "strength": 0.5}
    assert [(turn["question"], turn["strength"]) for turn in saved["turns"]] == [
        ("What is it?", 1),
        (DESCRIBE_REGION, 1),
    ]
    assert [(turn["question"], turn["strength"]) for turn in again["turns"][2:]] == [("And now?", 0.5)]
    assert again["turns"][:2] == saved["turns"]  # another strength keeps the conversation
    assert again["region"] == saved["region"]  # a picture that cannot be opened changes nothing
    assert "/strength S" in captured.err and f"wrote {tmp_path}/turns.json: 2 turn(s)" in captured.err
    assert "(still about region box:0,0,20,20)" in errors[1] and "still" not in errors[0]


def test_a_conversation_goes_on_after_a_refused_output(tiny_llava_dir, picture, tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.json").write_text("years of work")
    picture_before = picture.read_bytes()
    lines = f"""\
/whole
/save {tmp_path}/thesis.json
/overlay {picture}
/overlay {tmp_path}
/save {tmp_path}/turns.json
/save {tmp_path}/turns.json
/overlay {tmp_path}/turns.json
/overlay {tmp_path}/\x1b[31mo.png
"""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert run(tiny_llava_dir, "--image", picture) == 2
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    parts = ["was not written by", "is read by this command", "is a folder", "was not written by"]
    assert len(errors) == len(parts) and all(part in line for part, line in zip(parts, errors, strict=True))
    assert (tmp_path / "thesis.json").read_text() == "years of work" and picture.read_bytes() == picture_before
    assert said.count("turns.json: 0 turn(s)") == 2 and "[31mo.png" in said and "\x1b" not in said


REGIONS = {
    "box": ("-5 3 60 39", Region.from_box(-5, 3, 60, 39)),
    "box-xywh": ("2, 2, 28, 28", Region.from_box(2, 2, 30, 30)),
    "nbox": ("0.1,0.1,0.5,0.5", Region.from_box(0.1, 0.1, 0.5, 0.5, normalized=True)),
    "polygon": ("2,2 40,2 20,30", Region.from_polygon([2, 2, 40, 2, 20, 30])),
    "mask": ("mask.png", Region.from_box(10, 5, 30, 20)),
    "rle": ("annotation.json", Region.from_box(10, 5, 30, 20)),
    "points": ("20,20@6", Region.from_points([[20, 20]], radius=6)),
    "point": ("20,20@6", Region.from_points([[20, 20]], radius=6)),
    "stroke": ("5,5;40,30@4", Region.from_stroke([[5, 5], [40, 30]], width=4)),
}


def test_every_region_command_reaches_the_model(tiny_llava_dir, picture, fed, tmp_path, monkeypatch):
    assert REGIONS.keys() == REGION_OPTIONS.keys() | FORMER_OPTIONS.keys()
    monkeypatch.chdir(tmp_path)
    mask = Region.from_box(10, 5, 30, 20).mask(40, 60) > 0
    Image.fromarray(mask).save("mask.png")
    write_json(tmp_path / "annotation.json", {"segmentation": Region.from_mask(mask).to_json()["rle"]})
    lines = [line for name, (value, _) in REGIONS.items() for line in (f"/{name} {value}", "What?")]
    assert talk(monkeypatch, tiny_llava_dir, picture, lines) == 0
    for pixels, (_, region) in zip(fed[:: len(fed) // len(REGIONS)], REGIONS.values(), strict=True):
        assert np.allclose(alpha_map(pixels), place_alpha(region, 40, 60, 32, "pad"), atol=1e-5)


def test_the_help_lists_every_command(tiny_llava_dir, picture, monkeypatch, capsys):
    assert talk(monkeypatch, tiny_llava_dir, picture, ["/help"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().err.splitlines() if line.startswith("/")}
    others = {"whole", "strength", "image", "overlay", "save", "reset", "help", "quit"}
    assert listed == {f"/{name}" for name in REGION_OPTIONS.keys() | others}


def test_strength_keeps_the_turns_and_changes_the_alpha(tiny_llava_dir, picture, fed, monkeypatch, capsys):
    asked, ask = [], RegionChat.ask
    monkeypatch.setattr(RegionChat, "ask", lambda self, *a, **k: asked.append(k["history"][:]) or ask(self, *a, **k))
    lines = ["/box 2 2 30 30", "What?", "/strength 0.3", "And?", "/strength strong", "/strength 3", "/whole 3", "/save"]
    lines.append("/save x.png")
    assert talk(monkeypatch, tiny_llava_dir, picture, lines) == 2
    assert [len(history) for history in asked] == [0, 1] and len(fed) == 2 and not torch.equal(*fed)
    said = capsys.readouterr().err
    assert "at strength 0.3; the turns so far are kept" in said
    assert said.count("expected a strength from 0 to 1") == 2
    assert "/save writes JSON" in said
    assert "/whole takes no value" in said and "/save needs a value" in said


def test_the_note_about_the_embedded_model_is_said_by_commands_too(embedded, picture, monkeypatch, capsys):
    monkeypatch.setattr(cli, "load_chat", lambda args: RegionChat(*embedded))
    for lines, notes in (
        (["/box 2,2,30,30"], 0),
        (["/points 20,20@6"], 1),
        (["/point 20,20@6", "/stroke 5,5;20,20@3"], 2),
        (["/box 2,2,30,30", "/strength 0.5"], 1),
    ):
        assert talk(monkeypatch, None, picture, lines) == 0
        assert capsys.readouterr().err.count("trained on boxes and masks") == notes


def test_a_region_that_is_cut_off_is_said_once_when_it_is_set(tiny_llava_dir, picture, tmp_path, monkeypatch, caplog):
    lines = ["a", f"/overlay {tmp_path / 'o.png'}", "/strength 0.9", "b", "/box -5,0,20,20", "c", "/box 0,0,9,9", "d"]
    talk(monkeypatch, tiny_llava_dir, picture, lines)
    assert caplog.text.count("extends beyond") == 1
