"""Opening pictures: as displayed, or an error of one line."""

import dataclasses
import io
import struct
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image
from transformers.image_transforms import convert_to_rgb

from mllm.data.records import Folders
from mllm.data.samples import RegionSample, TarMember, displayed_size, load_image
from tests.files import encoded_image
from tests.tiny import noise_image
from vision_tower import Region


def test_path_bytes_and_tar_member_are_the_same_picture(tmp_path):
    picture = noise_image(30, 20)
    picture.save(tmp_path / "p.png")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "p.png", "inner/p.png")
    member = TarMember(str(tmp_path / "a.tar"), "inner/p.png")
    sources = [str(tmp_path / "p.png"), (tmp_path / "p.png").read_bytes(), member]
    for source in sources:
        assert np.array_equal(np.asarray(load_image(source)), np.asarray(picture))


def test_exif_and_transparency(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise_image(30, 20).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(str(tmp_path / "turned.jpg")).size == (20, 30)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_image(str(tmp_path / "clear.png")).getpixel((0, 0)) == (255, 255, 255)


def in_mode(mode):
    """A noise picture of that mode, half transparent where the mode can be."""
    picture = noise_image(30, 20)
    if mode == "P with a transparent colour":
        picture = picture.quantize(8)
        picture.info["transparency"] = picture.getpixel((0, 0))
    elif mode == "RGB with a transparent colour":
        picture.info["transparency"] = picture.getpixel((0, 0))
    else:
        picture = picture.convert(mode)
        if mode.endswith("A"):
            picture.putalpha(noise_image(30, 20, seed=1).convert("L"))
    return picture


@pytest.mark.parametrize(
    "mode", ["RGB", "L", "1", "P", "RGBA", "LA", "P with a transparent colour", "RGB with a transparent colour"]
)
def test_modes_become_rgb_as_in_transformers(mode):
    picture = in_mode(mode)
    content = encoded_image(picture, **picture.info)
    pixels = np.asarray(load_image(content))
    assert np.array_equal(pixels, convert_to_rgb(Image.open(io.BytesIO(content)), return_numpy=True))
    if mode.endswith(("A", "colour")):
        assert not np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


def test_pil_s_own_limit_is_the_limit_and_nothing_warns_below_it(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(encoded_image(noise_image(40, 50))).size == (40, 50)
    with pytest.raises(ValueError, match="too many pixels"):
        load_image(encoded_image(noise_image(41, 50)))


def test_real_photographs_open(shared_data):
    for name in ("china.jpg", "camera.png", "quokka.jpg"):
        image = load_image(str(shared_data / "photos" / name))
        assert image.mode == "RGB" and min(image.size) > 100


def write_truncated(path):
    path.write_bytes(encoded_image(noise_image(60, 60), "JPEG")[:800])


def write_cut_png(path):
    noise_image(60, 60).save(path)
    path.write_bytes(path.read_bytes()[:5000])


def write_broken_exif(path):
    """EXIF that says turned, beside an image width that is text."""
    fields = ((0x0112, 3, 1, b"\6\0\0\0"), (0x0100, 2, 4, b"abc\0"))
    entries = b"".join(struct.pack("<HHI", *field[:3]) + field[3] for field in fields)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(fields)) + entries + b"\0\0\0\0"
    noise_image(30, 20).save(path, "JPEG", exif=exif)


def write_bomb(path):
    Image.new("1", (20000, 20000)).save(path, "PNG")


def test_a_broken_field_of_exif_does_not_matter(tmp_path):
    write_broken_exif(tmp_path / "x.jpg")
    assert load_image(str(tmp_path / "x.jpg")).size == (20, 30) == displayed_size(str(tmp_path / "x.jpg"))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("none.png", lambda path: None, "image file not found"),
        ("folder", lambda path: path.mkdir(), "expected an image file, got a folder"),
        ("text.png", lambda path: path.write_text("hello"), "not an image"),
        ("empty.png", lambda path: path.write_bytes(b""), "not an image"),
        ("cut.jpg", write_truncated, "cannot read the image"),
        ("cut.png", write_cut_png, "cannot read the image"),
        ("bomb.png", write_bomb, "too many pixels"),
    ],
)
def test_bad_files(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        load_image(str(tmp_path / name))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_tar_member(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    with pytest.raises(ValueError, match="x.png in"):
        load_image(TarMember(str(tmp_path / "a.tar"), "x.png"))


@pytest.fixture
def placed(tmp_path):
    """The second of three members, with its place."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(3):
            noise_image(30, 20, number).save(tmp_path / f"{number}.png")
            archive.add(tmp_path / f"{number}.png", f"{number}.png")
    with tarfile.open(tmp_path / "a.tar") as archive:
        member = archive.getmember("1.png")
    return TarMember(str(tmp_path / "a.tar"), "1.png", member.offset_data, member.size)


def test_a_member_is_read_at_its_place_without_a_search(placed, monkeypatch):
    monkeypatch.setattr(tarfile, "open", None)
    assert np.array_equal(np.asarray(load_image(placed)), np.asarray(noise_image(30, 20, 1)))
    assert displayed_size(placed) == (30, 20)


@pytest.mark.parametrize("name", ["ü" * 20 + ".png", "d/" * 70 + "x.png"])
@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_member_whose_name_does_not_fit_its_header(tmp_path, name, format_):
    noise_image(30, 20).save(tmp_path / "p.png")
    with tarfile.open(tmp_path / "a.tar", "w", format=format_) as archive:
        archive.add(tmp_path / "p.png", name)
    with tarfile.open(tmp_path / "a.tar") as archive:
        member = archive.getmember(name)
    place = TarMember(str(tmp_path / "a.tar"), name, member.offset_data, member.size)
    assert load_image(place).size == (30, 20)


def test_a_tar_cut_in_a_member_is_an_error_of_one_line(placed, tmp_path):
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[: placed.offset + placed.size - 1])
    message = f"cannot read the image 1.png in .*a.tar: expected {placed.size} bytes, got {placed.size - 1}"
    with pytest.raises(ValueError, match=message) as caught:
        load_image(placed)
    assert "\n" not in str(caught.value)


def test_another_picture_in_a_member_s_place_is_not_taken_for_it(placed, tmp_path):
    for place in (
        placed._replace(name="0.png"),
        placed._replace(size=placed.size - 1),
        placed._replace(offset=placed.offset + 1),
        placed._replace(offset=0),
        placed._replace(offset=10**9),
    ):
        with pytest.raises(ValueError, match="does not lie at byte .* Make the index anew"):
            load_image(place)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(ValueError, match="there is no image file 1.png in"):
        load_image(placed)


@pytest.mark.parametrize("orientation, size", [(None, (30, 20)), (3, (30, 20)), (6, (20, 30)), (5, (20, 30))])
def test_the_size_as_displayed_without_the_pixels(tmp_path, orientation, size):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    noise_image(30, 20).save(tmp_path / "p.jpg", exif=exif)
    assert displayed_size(str(tmp_path / "p.jpg")) == size == load_image(str(tmp_path / "p.jpg")).size
    (tmp_path / "bad.jpg").write_bytes(b"x")
    for name in ("bad.jpg", "no.jpg"):
        with pytest.raises(ValueError, match=name):
            displayed_size(str(tmp_path / name))


@pytest.mark.parametrize("length", [0, 5, 300])
def test_a_damaged_tar(tmp_path, length):
    noise_image(30, 20).save(tmp_path / "p.png")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "p.png", "p.png")
    (tmp_path / "a.tar.gz").write_bytes((tmp_path / "a.tar.gz").read_bytes()[:length])
    with pytest.raises(ValueError, match="cannot read the image p.png in .*a.tar.gz") as caught:
        load_image(TarMember(str(tmp_path / "a.tar.gz"), "p.png"))
    assert "\n" not in str(caught.value)


def test_a_damaged_picture_never_raises_anything_else():
    rng = np.random.default_rng(0)
    refused = 0
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP"):
        content = encoded_image(noise_image(40, 30), kind)
        for _ in range(60):
            damaged = np.frombuffer(content, np.uint8).copy()
            damaged[rng.integers(0, min(len(damaged), 300), 4)] = rng.integers(0, 256, 4)
            try:
                load_image(damaged[: rng.integers(1, len(damaged))].tobytes())
            except ValueError as error:
                refused += "\n" not in str(error)
    assert refused > 200


def test_a_sample_cannot_be_changed():
    sample = RegionSample("7", b"", (Region.whole(),), None, ("x",))
    assert sample.candidates is None and sample.meta == {}
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample.question = "What is this?"
    assert not hasattr(sample, "__dict__")


def test_the_stated_size_is_that_of_the_displayed_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise_image(30, 20).save(tmp_path / "p.jpg", exif=exif)
    sample = RegionSample("7", str(tmp_path / "p.jpg"), (Region.whole(),), None, ("x",))
    assert sample.open_image().size == (20, 30)  # nothing stated
    right = dataclasses.replace(sample, meta={"width": 20, "height": 30})
    assert right.open_image().size == (20, 30)
    with pytest.raises(ValueError, match="sample 7: .*p.jpg is 20 x 30 pixels"):
        dataclasses.replace(sample, meta={"width": 30, "height": 20}).open_image()


def test_another_size_than_stated_is_an_error(tmp_path):
    noise_image(30, 20).save(tmp_path / "p.png")
    meta = {"width": 60, "height": 40}
    sample = RegionSample("7", str(tmp_path / "p.png"), (Region.whole(),), None, ("x",), meta=meta)
    with pytest.raises(ValueError, match="30 x 20 pixels, its data set says 60 x 40"):
        sample.open_image()


def test_sixteen_bits_of_grey_keep_their_tones(tmp_path):
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey * 257).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(load_image(str(tmp_path / "deep.png")))[..., 1], grey)


def test_a_file_name_with_a_newline_makes_one_line(tmp_path):
    for source in (str(tmp_path / "a\nb.png"), TarMember(str(tmp_path / "x\n.tar"), "a\nb.png")):
        with pytest.raises(ValueError) as caught:
            load_image(source)
        assert "\n" not in str(caught.value)


def test_a_file_name_with_a_folder_in_it_is_found(tmp_path):
    """As CVAT and Label Studio export COCO's layout: file_name "images/p.png"."""
    (tmp_path / "images").mkdir()
    (tmp_path / "train2014").mkdir()
    noise_image(4, 4).save(tmp_path / "images" / "p.png")
    found = Folders(tmp_path, ("train2014", "", "images")).find("images/p.png")
    assert found == str(tmp_path / "images" / "p.png")
