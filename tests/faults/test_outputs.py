"""Commands do not replace files that they did not write; the error is one line."""

import os

import pytest
from PIL import Image

import eval.attention_map
import mllm
import mllm.convert.alpha_clip
import mllm.convert.lavis
import mllm.publish
import mllm.region_chat.cli
from alpha_clip_commands import alpha_clip, region_chat, region_eval
from mllm.data.index import RegionIndex
from mllm.data.shapes import grit_layout, visual_genome_layout
from scripts import join_images
from tests.files import write_json, write_json_lines
from tests.tiny import noise_image


def tree(folder):
    """The content of every file and the target of every link under a folder."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with an input of each kind, where no model can be loaded."""
    noise_image(60, 40).save(tmp_path / "image.png")
    Image.new("L", (60, 40), 255).save(tmp_path / "mask.png")
    visual_genome_layout.write(tmp_path / "vg", 2, 1, progress=False)
    (tmp_path / "vg" / "VG_100K_2").mkdir()
    (tmp_path / "vg" / "VG_100K_2" / "mine.jpg").write_bytes(b"x")
    grit_layout.write(tmp_path / "grit", 2, 1, progress=False)
    line = {"image": "image.png", "region": {"box": [1, 1, 9, 9]}, "answer": "x"}
    write_json(tmp_path / "mine.jsonl", line)
    record = {"id": "a", "question": "What is this?", "prediction": "a dog", "references": ["a cat"]}
    for name in ("a", "b"):
        write_json_lines(tmp_path / f"{name}.jsonl", [record])
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "training_record.json", {"log": [{"step": 1, "loss": 1.0}] * 2})
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "model.pth").write_bytes(b"x")

    def unexpected(*args, **kwargs):
        pytest.fail("a model was loaded although its output would be refused")

    for module, name in (
        (mllm, "load"),
        (mllm.region_chat.cli, "load_chat"),
        (eval.attention_map, "load"),
        (mllm.convert.alpha_clip, "read_source"),
        (mllm.convert.lavis, "convert"),
        (mllm.publish, "check_complete"),
    ):
        monkeypatch.setattr(module, name, unexpected)
    monkeypatch.chdir(tmp_path)
    return tmp_path


FOREIGN = {
    "thesis": lambda out: (out.mkdir(), (out / "1.tex").write_text("years of work")),
    "hidden": lambda out: (out.mkdir(), (out / ".git").mkdir()),
    "file": lambda out: out.write_text("years of work"),
    "png": lambda out: noise_image(9, 9).save(out, "PNG"),
    "loop": lambda out: out.symlink_to(out.name),
    "link": lambda out: (
        (out.parent / "else").mkdir(),
        (out.parent / "else" / "1.tex").write_text("x"),
        out.symlink_to("else"),
    ),
    "names of ours": lambda out: (
        out.mkdir(),
        [(out / name).write_text("[1]") for name in ("index.json", "results.json", "annotations.json", "config.json")],
    ),
    "package list": lambda out: out.write_text("alpha-clip-mllm==0.1.0\n"),
}
IMAGE = ["--image", "image.png", "--box", "1,1,9,9"]
WRITERS = {
    "overlay": (region_chat.main, [*IMAGE, "--ask", "x", "--save-overlay"]),
    "attention map": (alpha_clip.main, ["attention-map", "--model", "m", *IMAGE, "--out"]),
    "chart": (alpha_clip.main, ["plot", "run", "--out"]),
    "joined": (join_images.main, ["image.png", "mask.png", "--out"]),
    "comparison": (region_eval.main, ["compare", "a.jsonl", "b.jsonl", "--html"]),
    "export": (region_eval.main, ["export", "a.jsonl", "--out"]),
    "index of vg": (alpha_clip.main, ["prepare", "vg", "--source", "vg", "--out"]),
    "index of refcocog": (alpha_clip.main, ["prepare", "refcocog", "--source", "vg", "--out"]),
    "index of grit": (alpha_clip.main, ["prepare", "grit", "--source", "grit", "--out"]),
    "index of jsonl": (alpha_clip.main, ["prepare", "jsonl", "--source", "mine.jsonl", "--out"]),
    "shapes": (alpha_clip.main, ["shapes", "--images", "1", "--seed", "1", "--out"]),
    "grit": (alpha_clip.main, ["shapes", "--layout", "grit", "--images", "1", "--seed", "1", "--out"]),
    "converted": (alpha_clip.main, ["convert", "model.pth"]),
    "original": (alpha_clip.main, ["convert", "adapter", "--original"]),
    "lavis": (alpha_clip.main, ["convert-lavis", "model.pth", "--language-model", "m"]),
    "merged": (alpha_clip.main, ["merge", "adapter"]),
    "published": (alpha_clip.main, ["publish", "adapter", "a/b", "--to"]),
}
FILES = ("overlay", "attention map", "chart", "joined", "comparison", "original")


def refused(main, arguments, capsys):
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if "error:" in line]
    assert code == 2 and len(errors) == 1 and "Traceback" not in captured.err, captured.err
    return errors[0]


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_not_ours_survives_every_command(place, capsys, what):
    out = place / "out.png"
    FOREIGN[what](out)
    (place / "out.png.partial").mkdir()
    (place / "out.png.partial" / "mine").touch()
    before = tree(place)
    for name, (main, arguments) in WRITERS.items():
        if what == "hidden" and name == "export":
            continue  # two new files next to existing ones
        if what in ("thesis", "link") and name == "export":
            continue
        refused(main, [*arguments, "out.png"], capsys)
        assert tree(place) == before, name


@pytest.mark.parametrize(
    "out", ["", ".", "..", "vg", "vg/..", "vg/VG_100K_2", "vg/VG_100K", "grit/00000", "loop/x", "mine.jsonl/x"]
)
def test_no_command_writes_over_what_is_read(place, capsys, out):
    (place / "loop").symlink_to("loop")
    before = tree(place)
    for name, (main, arguments) in WRITERS.items():
        if name == "export" and out not in ("loop/x", "mine.jsonl/x"):
            continue  # its two files do not exist
        refused(main, [*arguments, out], capsys)
        assert tree(place) == before, name


@pytest.mark.parametrize("read", ["image.png", "mask.png", "a.jsonl", "run/training_record.json", "model.pth"])
def test_files_that_are_read_stay(place, capsys, read):
    before = tree(place)
    for name in FILES:
        main, arguments = WRITERS[name]
        refused(main, [*arguments, read], capsys)
        assert tree(place) == before, name


@pytest.mark.parametrize("name", ["chart", "joined", "comparison", "export", "index of vg", "index of jsonl", "shapes"])
def test_what_a_command_wrote_it_replaces(place, name):
    main, arguments = WRITERS[name]
    out = place / "new.png"
    assert main([*arguments, str(out)]) == 0
    first = tree(out) if out.is_dir() else out.read_bytes()
    assert main([*arguments, str(out)]) == 0
    again = tree(out) if out.is_dir() else out.read_bytes()
    assert again == first
    assert not list(place.glob(".new*"))


def test_another_commands_output_is_not_ones_own(place, capsys):
    assert join_images.main(["image.png", "--out", "joined.png"]) == 0
    assert alpha_clip.main(["shapes", "--images", "1", "--seed", "1", "--out", "drawn"]) == 0
    before = tree(place)
    refused(alpha_clip.main, ["plot", "run", "--out", "joined.png"], capsys)
    refused(region_chat.main, [*WRITERS["overlay"][1], "joined.png"], capsys)
    refused(alpha_clip.main, [*WRITERS["grit"][1], "drawn"], capsys)
    refused(alpha_clip.main, [*WRITERS["index of vg"][1], "drawn"], capsys)
    assert tree(place) == before


def test_the_index_lies_in_the_data_and_nothing_else_changes(place, capsys):
    before = tree(place / "vg")
    for _ in range(2):
        assert alpha_clip.main(["prepare", "vg", "--source", "vg"]) == 0
    after = tree(place / "vg")
    assert before.items() <= after.items()
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"region_index"}
    (place / "vg" / "region_index" / "notes.txt").touch()
    assert "that this command did not write" in refused(alpha_clip.main, ["prepare", "vg", "--source", "vg"], capsys)


def test_an_index_of_an_earlier_version_loads_and_is_replaced(place, capsys):
    assert alpha_clip.main(["prepare", "vg", "--source", "vg"]) == 0
    index = place / "vg" / "region_index"
    (index / ".made_by.json").unlink()
    assert len(RegionIndex(place / "vg"))
    (index / "notes.txt").touch()
    refused(alpha_clip.main, ["prepare", "vg", "--source", "vg"], capsys)
    (index / "notes.txt").unlink()
    assert alpha_clip.main(["prepare", "vg", "--source", "vg"]) == 0
    (index / ".made_by.json").unlink()
    (index / "index.json").write_text("{}")
    refused(alpha_clip.main, ["prepare", "vg", "--source", "vg"], capsys)


def test_two_indexings_at_once(place, capsys):
    from mllm.locks import locked

    with locked(place / "vg" / "region_index"):
        error = refused(alpha_clip.main, ["prepare", "vg", "--source", "vg"], capsys)
    assert f"process {os.getpid()} on {os.uname().nodename}" in error
