"""Opening pictures: as displayed, or an error of one line."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from mllm.data.samples import RegionSample, TarMember, load_image
from tests.tiny import noise_picture
from vision_tower import Region


def test_path_bytes_and_tar_member_are_the_same_picture(tmp_path):
    picture = noise_picture(30, 20)
    picture.save(tmp_path / "p.png")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "p.png", "inner/p.png")
    sources = [
        str(tmp_path / "p.png"),
        (tmp_path / "p.png").read_bytes(),
        TarMember(str(tmp_path / "a.tar"), "inner/p.png"),
    ]
    for source in sources:
        assert np.array_equal(np.asarray(load_image(source)), np.asarray(picture))


def test_exif_and_transparency(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise_picture(30, 20).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(str(tmp_path / "turned.jpg")).size == (20, 30)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_image(str(tmp_path / "clear.png")).getpixel((0, 0)) == (255, 255, 255)


def test_real_photographs_open(shared_data):
    for name in ("china.jpg", "camera.png", "quokka.jpg"):
        image = load_image(str(shared_data / "photos" / name))
        assert image.mode == "RGB" and min(image.size) > 100


def write_truncated(path):
    buffer = io.BytesIO()
    noise_picture(60, 60).save(buffer, "JPEG")
    path.write_bytes(buffer.getvalue()[:800])


def write_bomb(path):
    Image.new("1", (20000, 20000)).save(path, "PNG")


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("none.png", lambda path: None, "there is no image file"),
        ("folder", lambda path: path.mkdir(), "there is no image file"),
        ("text.png", lambda path: path.write_text("hello"), "not an image"),
        ("empty.png", lambda path: path.write_bytes(b""), "not an image"),
        ("cut.jpg", write_truncated, "cannot read the image"),
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


def test_another_size_than_stated_is_an_error(tmp_path):
    noise_picture(30, 20).save(tmp_path / "p.png")
    sample = RegionSample(
        "7", str(tmp_path / "p.png"), (Region.whole(),), None, ("x",), meta={"width": 60, "height": 40}
    )
    with pytest.raises(ValueError, match="30 x 20 pixels, its data set says 60 x 40"):
        sample.open_image()
