"""Pairs of a picture and its JSON: found in folders and tars, in one order, damage and doubt counted."""

import io
import itertools
import os
import sys
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm.data.readers import region_text_pairs
from mllm.data.readers.region_text_pairs import find_pairs, has_pairs
from mllm.data.records import ReadReport
from mllm.data.samples import TarMember, load_image
from tests.files import encoded_image
from tests.tiny import noise_image

PICTURES = {str(seed): encoded_image(noise_image(8, 8, seed)) for seed in range(4)}
FILES = [(f"{key}.{suffix}", key) for key in PICTURES for suffix in ("json", "png", "txt")]


def content_of(name, key):
    return PICTURES[key] if name.lower().endswith(("png", "jpg")) else f'{{"key": "{key}"}}'.encode()


def tar(path, files=FILES, mode="w", **options):
    with tarfile.open(path, mode, **options) as archive:
        for name, key in files:
            member = tarfile.TarInfo(name)
            member.size = len(content_of(name, key))
            archive.addfile(member, io.BytesIO(content_of(name, key)))
    return path


def folder(path, files=FILES):
    for name, key in files:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content_of(name, key))
    return path


def pairs(root):
    """Keys, each checked to have its own picture, and what was left out."""
    report = ReadReport()
    found = []
    for pair in find_pairs(root, report):
        key = pair.key.rsplit("/", 1)[-1]
        assert pair.record == content_of("json", key)
        assert load_image(pair.image).tobytes() == noise_image(8, 8, int(key)).tobytes()
        found.append(pair.key)
    return found, dict(report.counts), report.examples


def test_folders_are_read_in_order(tmp_path):
    folder(tmp_path, [("1/3.png", "3"), ("1/3.json", "3"), ("0/2.JSON", "2"), ("0/2.JPG", "2"), *FILES[:6]])
    folder(tmp_path / "region_index", [("index.json", "0")])  # ours
    folder(tmp_path, [("dataset.json", "0")])
    assert pairs(tmp_path)[:2] == (["0", "1", "0/2", "1/3"], {})


def test_tars_are_read_in_order_and_alone(tmp_path):
    folder(tmp_path, [("3.png", "3"), ("3.json", "3")])
    tar(tmp_path / "1.tar", FILES[:3])
    tar(tmp_path / "0.tar", FILES[3:9])
    assert pairs(tmp_path)[:2] == (["1", "2", "0"], {})


@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_names_of_every_length_and_any_order_in_the_tar(tmp_path, format_):
    names = [f"{'d' * 60}/{'ü' * 30 if format_ != tarfile.USTAR_FORMAT else 'u' * 50}/{name}" for name, _ in FILES]
    files = [(name, key) for name, (_, key) in zip(names, FILES, strict=True)]
    tar(tmp_path / "0.tar", sorted(files, key=lambda file: file[0].rsplit(".")[-1]), format=format_)
    found, left_out, _ = pairs(tmp_path)
    assert [key[-1] for key in found] == list(PICTURES) and not left_out


@pytest.mark.parametrize("make", [folder, lambda path, files: tar(path / "a.tar", files)])
def test_halves_are_counted(tmp_path, make):
    make(tmp_path, [*FILES[:2], ("1.json", "1"), ("2.png", "2")])
    assert pairs(tmp_path)[:2] == (["0"], {region_text_pairs.NO_PICTURE: 1, region_text_pairs.NO_JSON: 1})


@pytest.mark.parametrize("make", [folder, lambda path, files: tar(path / "a.tar", files)])
def test_two_pictures_for_one_json_are_in_doubt(tmp_path, make):
    make(tmp_path, [("1.jpg", "1"), ("1.png", "2"), ("1.json", "1"), *FILES[:2]])
    assert pairs(tmp_path)[:2] == (["0"], {region_text_pairs.REPEATED: 1})


def test_a_name_that_comes_again_is_left_out_once(tmp_path):
    tar(tmp_path / "0.tar", [*FILES, ("0.json", "3"), ("0.png", "3")])
    tar(tmp_path / "1.tar", [("2.json", "1"), ("2.png", "1")])
    found, left_out, examples = pairs(tmp_path)
    assert found == list(PICTURES) and left_out == {region_text_pairs.REPEATED: 2}
    assert examples[region_text_pairs.REPEATED] == ["0 in 0.tar", "2 in 1.tar"]


def test_doubles_that_stand_side_by_side_are_not_mixed(tmp_path):
    tar(tmp_path / "0.tar", [("1.json", "1"), ("1.json", "2"), ("1.png", "1"), ("1.png", "2"), *FILES[:2]])
    assert pairs(tmp_path)[:2] == (["0"], {region_text_pairs.REPEATED: 1})


@pytest.mark.parametrize("name, mode", [("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("a.tar", "w:gz"), ("a.tar", "w:xz")])
def test_compressed_tars_are_refused(tmp_path, name, mode):
    tar(tmp_path / name, mode=mode)
    with pytest.raises(ValueError, match=f"{name} is compressed.*unpack it"):
        pairs(tmp_path)
    with pytest.raises(ValueError, match="is compressed"):
        has_pairs(tmp_path)


def ends(path):
    """Key of each picture -> the byte at which it is whole."""
    with tarfile.open(path) as archive:
        return {m.name[0]: m.offset_data + m.size for m in archive if m.name.endswith("png")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tar(tmp_path_factory.mktemp("whole") / "a.tar")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_tar_cut_anywhere_gives_what_is_before_and_one_count(whole, tmp_path_factory, data):
    end_of = ends(whole)
    last = max(end_of.values())
    cut = data.draw(st.integers(0, last) | st.sampled_from([512 * n for n in range(last // 512 + 1)]))
    root = tmp_path_factory.mktemp("cut")
    (root / "a.tar").write_bytes(whole.read_bytes()[:cut])
    tar(root / "b.tar", [("9.json", "3"), ("9.png", "3")])
    report = ReadReport()
    found = [pair.key for pair in find_pairs(root, report)]
    assert found == [*(key for key, end in end_of.items() if end <= cut), "9"]
    assert report.counts == {region_text_pairs.CUT_SHORT: 1}
    (example,) = report.examples[region_text_pairs.CUT_SHORT]
    assert example.startswith("a.tar at byte ") and int(example.split()[-1]) <= cut


def test_a_tar_with_a_damaged_header_is_not_taken_for_its_end(tmp_path):
    tar(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as archive:
        at = archive.getmember("2.json").offset
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[at + 10] ^= 1
    (tmp_path / "a.tar").write_bytes(content)
    found, left_out, examples = pairs(tmp_path)
    assert found == ["0", "1"] and left_out == {region_text_pairs.CUT_SHORT: 1}
    assert examples[region_text_pairs.CUT_SHORT] == [f"a.tar at byte {at}"]


@pytest.mark.parametrize("content", [b"", b"x" * 5000, b"\0" * 100])
def test_what_is_no_tar_is_counted(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    tar(tmp_path / "b.tar", FILES[:3])
    assert pairs(tmp_path)[:2] == (["0"], {region_text_pairs.CUT_SHORT: 1})


def test_links_and_folders_in_a_tar_are_passed_over(tmp_path):
    with tarfile.open(tar(tmp_path / "a.tar", FILES[:3]), "a") as archive:
        for name, type_ in (("1.png", tarfile.SYMTYPE), ("2.json", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = type_, "0.png"
            archive.addfile(member)
    assert pairs(tmp_path)[:2] == (["0"], {})


@pytest.mark.skipif(sys.platform != "linux", reason="file names that are no text exist on Linux alone")
def test_names_that_are_no_text_are_counted(tmp_path):
    folder(tmp_path / "f", FILES[:3])
    for suffix in (b"json", b"png"):
        open(os.fsencode(tmp_path / "f") + b"/\xff." + suffix, "wb").close()
    assert pairs(tmp_path / "f")[:2] == (["0"], {region_text_pairs.NOT_TEXT: 1})
    (tmp_path / "t").mkdir()
    tar(tmp_path / "t" / "a.tar", [*FILES[:2], ("\udcff.json", "1")])
    assert pairs(tmp_path / "t")[:2] == (["0"], {region_text_pairs.NOT_TEXT: 1})


def test_whether_there_are_pairs(tmp_path):
    assert not has_pairs(tmp_path / "no") and not has_pairs(folder(tmp_path / "a", [("0.json", "0"), ("1.png", "1")]))
    assert has_pairs(folder(tmp_path / "b", [("x/0.json", "0"), ("x/0.png", "0")]))
    (tmp_path / "c").mkdir()
    assert has_pairs(tar(tmp_path / "c" / "a.tar").parent)


def test_one_json_at_a_time(tmp_path):
    tar(tmp_path / "a.tar")
    report = ReadReport()
    first = list(itertools.islice(find_pairs(tmp_path, report), 1))
    assert first[0].key == "0" and isinstance(first[0].image, TarMember) and not report.counts


@pytest.mark.parametrize("make", [folder, lambda path, files: tar(path / "a.tar", files)])
def test_a_json_that_is_too_large_is_left_out(tmp_path, monkeypatch, make):
    make(tmp_path, FILES)
    monkeypatch.setattr(region_text_pairs, "LARGEST_RECORD", 5)
    found, left_out, _ = pairs(tmp_path)
    assert not found and left_out == {region_text_pairs.TOO_LARGE: 4}


def test_a_pipe_among_the_files_is_not_waited_for(tmp_path):
    folder(tmp_path, FILES[:3])
    (tmp_path / "1.png").write_bytes(PICTURES["1"])
    os.mkfifo(tmp_path / "1.json")
    assert pairs(tmp_path)[:2] == (["0"], {region_text_pairs.NO_ACCESS: 1})


@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_have_a_largest_size(tmp_path, format_):
    long = "/".join(["d" * 99] * 12)
    files = [(f"{long}/0.json", "0"), (f"{long}/0.png", "0"), *FILES[3:6]]
    tar(tmp_path / "0.tar", files, format=format_)
    assert pairs(tmp_path)[:2] == (["1"], {region_text_pairs.LONG_NAME: 2})
    huge = "/".join(["d" * 99] * 700)  # its header alone is over the limit: what follows cannot be trusted
    tar(tmp_path / "0.tar", [*FILES[:3], (f"{huge}/1.json", "1"), *FILES[3:6]], format=format_)
    found, left_out, _ = pairs(tmp_path)
    assert found == ["0"] and list(left_out) == [region_text_pairs.CUT_SHORT]
