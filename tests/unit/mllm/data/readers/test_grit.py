"""GRIT's layout: phrases, boxes and masks where they belong; whatever is wrong is counted and nothing else changes."""

import json
import tarfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mllm.data import masks
from mllm.data.readers import grit
from mllm.data.readers.grit import read_grit
from mllm.data.records import CLAMPED, NO_AREA, READ, ReadReport
from mllm.data.samples import TarMember
from tests.files import encoded_mask, write_json
from tests.tiny import noise_image
from vision_tower import Region

CAPTION = "a red dog on a mat"
WIDTH, HEIGHT = 40, 20


def filled(x0, y0, x1, y1, height=HEIGHT, width=WIDTH):
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = True
    return mask


DOG, MAT = filled(4, 2, 20, 12), filled(0, 12, 40, 20)


def record(**changes):
    """A dog and a mat, with masks."""
    content = {
        "caption": CAPTION,
        "ref_exps": [[0.0, 9.0, 0.1, 0.1, 0.5, 0.6, 0.9], [13.0, 18.0, 0, 0.6, 1, 1, 0.8]],
        "seudo_masks": [encoded_mask(DOG), encoded_mask(MAT)],
    }
    return {key: value for key, value in {**content, **changes}.items() if value is not None}


def write(folder, content, name="7", picture=None, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    (picture or noise_image(WIDTH, HEIGHT)).save(folder / f"{name}.{suffix}")


def read(folder):
    """Samples, and what was left out."""
    report = ReadReport()
    samples = list(read_grit(folder, report=report))
    return samples, {reason: count for reason, count in report.counts.items() if reason != READ}


def phrases(samples):
    """The phrases of the boxes."""
    return [s.references[0] for s in samples if s.regions[0].kind == "box"]


def test_a_picture_gives_boxes_masks_and_its_caption(tmp_path):
    write(tmp_path / "sub", record())
    samples, left_out = read(tmp_path)
    dog, dog_mask, mat, mat_mask, whole = samples
    assert not left_out and len({s.id for s in samples}) == 5
    assert {s.meta["image_id"] for s in samples} == {"sub/7"} and {s.question for s in samples} == {None}
    assert [s.meta.get("region_id") for s in samples] == [0, 0, 1, 1, None]
    assert all((s.meta["width"], s.meta["height"]) == (WIDTH, HEIGHT) for s in samples)
    assert [s.references for s in samples] == [("a red dog",)] * 2 + [("a mat",)] * 2 + [(CAPTION,)]
    assert dog.regions == (Region.from_box(4, 2, 20, 12),) and mat.regions == (Region.from_box(0, 12, 40, 20),)
    assert np.array_equal(dog_mask.regions[0].mask(HEIGHT, WIDTH), DOG)
    assert np.array_equal(mat_mask.regions[0].mask(HEIGHT, WIDTH), MAT)
    assert whole.regions == (Region.whole(),)
    assert whole.open_image().size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("key", grit.MASK_KEYS)
def test_masks_under_each_spelling(tmp_path, key):
    write(tmp_path, {**record(seudo_masks=None), key: [encoded_mask(DOG), encoded_mask(MAT)]})
    assert [s.regions[0].kind for s in read(tmp_path)[0]] == ["box", "mask", "box", "mask", "whole"]


def row(**changes):
    values = {"start": 0.0, "end": 9.0, "x0": 0.1, "y0": 0.1, "x1": 0.5, "y1": 0.6, **changes}
    return [*values.values(), 0.9]


@pytest.mark.parametrize(
    "bad, reason",
    [
        (row(start=9.0), grit.NO_PHRASE),
        (row(start=1, end=2), grit.NO_PHRASE),  # a space
        (row(end=19.0), grit.NO_PHRASE),
        (row(start=-3.0), grit.NO_PHRASE),
        (row(start="0"), grit.NO_PHRASE),
        (row(start=None), grit.NO_PHRASE),
        (row(start=float("nan")), grit.NO_PHRASE),
        (row(end=float("inf")), grit.NO_PHRASE),
        (row(end=10**400), grit.NO_PHRASE),
        (row(start=False), grit.NO_PHRASE),
        ([], grit.NO_PHRASE),
        (None, grit.NO_PHRASE),
        ({"start": 0}, grit.NO_PHRASE),
        (row(x1=0.1), NO_AREA),
        (row(y1=0.05), NO_AREA),
        (row(x0=1.1, x1=1.2), NO_AREA),
        (row(x1="1"), grit.NO_BOX),
        (row(x1=float("nan")), grit.NO_BOX),
        (row(x1=10**400), grit.NO_BOX),
        (row(x1=30.0), grit.NO_BOX),  # pixels
        ([0, 9, 0.1, 0.1], grit.NO_BOX),
    ],
)
def test_a_bad_phrase_or_box_is_counted_and_the_others_stay(tmp_path, bad, reason):
    write(tmp_path, record(ref_exps=[bad, record()["ref_exps"][1]]))
    samples, left_out = read(tmp_path)
    assert left_out == {reason: 1}
    assert [(s.references[0], s.regions[0].kind) for s in samples] == [
        ("a mat", "box"),
        ("a mat", "mask"),
        (CAPTION, "whole"),
    ]
    assert {s.meta.get("region_id") for s in samples} == {1, None}
    assert np.array_equal(samples[1].regions[0].mask(HEIGHT, WIDTH), MAT)  # not the first one's


def test_a_box_over_the_edge_is_clamped_and_counted(tmp_path):
    write(tmp_path, record(ref_exps=[row(x0=-0.01, x1=1.02)], seudo_masks=None))
    samples, left_out = read(tmp_path)
    assert left_out == {CLAMPED: 1} and samples[0].regions == (Region.from_box(0, 2, WIDTH, 12),)


@pytest.mark.parametrize(
    "bad, reason",
    [
        ("x", masks.BAD_MASK),
        ({"size": [HEIGHT, WIDTH], "counts": "zzzz"}, masks.BAD_MASK),
        ({"size": [HEIGHT, WIDTH], "counts": [1, 2]}, masks.BAD_MASK),
        ({"size": [HEIGHT], "counts": [HEIGHT * WIDTH]}, masks.BAD_MASK),
        ({"size": [10**9, 10**9], "counts": [0, 10**18]}, masks.BAD_MASK),
        (encoded_mask(np.zeros((HEIGHT, WIDTH))), masks.EMPTY_MASK),
        (encoded_mask(filled(0, 0, 5, 5, WIDTH, HEIGHT)), masks.OTHER_SIZE),
    ],
)
def test_a_bad_mask_takes_its_region_with_it(tmp_path, bad, reason):
    rows = record()["ref_exps"]
    write(tmp_path, record(ref_exps=[rows[0], *rows], seudo_masks=[bad, encoded_mask(DOG), encoded_mask(MAT)]))
    samples, left_out = read(tmp_path)
    assert left_out == {reason: 1} and phrases(samples) == ["a red dog", "a mat"]
    assert [s.meta.get("region_id") for s in samples] == [1, 1, 2, 2, None]
    assert np.array_equal(samples[1].regions[0].mask(HEIGHT, WIDTH), DOG)


def test_no_mask_for_one_phrase_leaves_its_box(tmp_path):
    write(tmp_path, record(seudo_masks=[None, encoded_mask(MAT)]))
    samples, left_out = read(tmp_path)
    assert not left_out and [s.regions[0].kind for s in samples] == ["box", "box", "mask", "whole"]


@pytest.mark.parametrize(
    "stated",
    [[], [encoded_mask(DOG)], [encoded_mask(DOG), encoded_mask(MAT), encoded_mask(MAT)], "x", {"0": encoded_mask(DOG)}],
)
def test_masks_that_could_be_shifted_are_dropped(tmp_path, stated):
    write(tmp_path, record(seudo_masks=stated))
    samples, left_out = read(tmp_path)
    assert left_out == {grit.OTHER_NUMBER: 1} and [s.regions[0].kind for s in samples] == ["box", "box", "whole"]


@pytest.mark.parametrize(
    "content, reason",
    [
        ('{"caption": "a d', grit.DAMAGED),
        ("", grit.DAMAGED),
        ("[]", grit.DAMAGED),
        ("[" * 100_000, grit.DAMAGED),
        (record(caption=None), grit.NO_CAPTION),
        (record(caption=" "), grit.NO_CAPTION),
        (record(caption=5), grit.NO_CAPTION),
        (record(caption="a \ud800 red dog on a mat"), grit.NO_CAPTION),  # cannot be written
    ],
)
def test_a_bad_json_is_counted_and_the_other_pictures_stay(tmp_path, content, reason):
    write(tmp_path, content, "6")
    write(tmp_path, record())
    samples, left_out = read(tmp_path)
    assert left_out == {reason: 1} and {s.meta["image_id"] for s in samples} == {"7"}


def test_bytes_that_are_no_text(tmp_path):
    write(tmp_path, record())
    write(tmp_path, record(), "8")
    (tmp_path / "8.json").write_bytes(b'{"caption": "\xff\xfe\xfd"}')
    assert read(tmp_path)[1] == {grit.DAMAGED: 1}


@pytest.mark.parametrize("rows", [None, "x", 5])
def test_without_phrases_there_is_the_caption(tmp_path, rows):
    write(tmp_path, record(ref_exps=rows, seudo_masks=None))
    samples, left_out = read(tmp_path)
    assert left_out == {grit.NO_PHRASES: 1} and [s.references for s in samples] == [(CAPTION,)]


def turned(tmp_path, content):
    """A picture that is stored 40 x 20 and displayed 20 x 40."""
    exif = Image.Exif()
    exif[0x0112] = 6
    tmp_path.mkdir(exist_ok=True)
    noise_image(WIDTH, HEIGHT).save(tmp_path / "7.jpg", exif=exif)
    write_json(tmp_path / "7.json", content)
    return read(tmp_path)[0]


def test_a_turned_picture_with_masks_of_the_stored_size_is_refused(tmp_path):
    for sample in turned(tmp_path, record()):
        with pytest.raises(ValueError, match="is 20 x 40 pixels, its data set says 40 x 20"):
            sample.open_image()


def test_a_turned_picture_without_masks_has_boxes_as_displayed(tmp_path):
    dog, *_ = turned(tmp_path, record(seudo_masks=None))
    assert dog.open_image().size == (20, 40) and dog.regions == (Region.from_box(2, 4, 10, 24),)


def test_the_size_is_the_masks_then_the_jsons_then_the_pictures(tmp_path):
    stated = {"width": 80, "height": 60}
    for name, content, size in (
        ("masks", record(**stated), (WIDTH, HEIGHT)),
        ("json", record(seudo_masks=None, **stated), (80, 60)),
        ("unusable", record(seudo_masks=None, width="80", height=60), (WIDTH, HEIGHT)),
        ("picture", record(seudo_masks=None), (WIDTH, HEIGHT)),
    ):
        write(tmp_path / name, content)
        samples, _ = read(tmp_path / name)
        assert {(s.meta["width"], s.meta["height"]) for s in samples} == {size}
        x0, y0, x1, y1 = samples[0].regions[0].data
        assert (x0, y0, x1, y1) == (0.1 * size[0], 0.1 * size[1], 0.5 * size[0], 0.6 * size[1])


def test_a_picture_without_a_size_is_counted(tmp_path):
    write(tmp_path, record(seudo_masks=None))
    write(tmp_path, record(seudo_masks=None), "8")
    (tmp_path / "8.png").write_bytes(b"no picture")
    samples, left_out = read(tmp_path)
    assert left_out == {grit.UNREADABLE: 1} and {s.meta["image_id"] for s in samples} == {"7"}


def test_nothing_usable_is_an_error_that_says_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        list(read_grit(tmp_path / "no"))
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match="expected pictures, each with a .json of the same name"):
        list(read_grit(tmp_path))
    write(tmp_path, "{")
    with pytest.raises(ValueError, match=grit.DAMAGED):
        list(read_grit(tmp_path))


def test_a_tar_gives_the_same_as_a_folder(tmp_path):
    for name in ("7", "8"):
        write(tmp_path / "folder", record(), name, suffix="jpg")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as archive:
        for file in sorted((tmp_path / "folder").iterdir()):
            archive.add(file, file.name)
    (folder, _), (tars, left_out) = read(tmp_path / "folder"), read(tmp_path / "tars")
    assert not left_out and [(s.id, s.regions, s.references, s.meta) for s in folder] == [
        (s.id, s.regions, s.references, s.meta) for s in tars
    ]
    for one, other in zip(folder, tars, strict=True):
        assert isinstance(other.image, TarMember) and other.image.offset
        assert np.array_equal(np.asarray(one.open_image()), np.asarray(other.open_image()))


anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.sampled_from(["size", "counts"]), inner),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(["caption", "ref_exps", "seudo_masks", "width", "height"]), anything))
def test_whatever_a_json_holds_only_that_picture_suffers(tmp_path, changes):
    write(tmp_path, {**record(), **changes}, "6")
    write(tmp_path, record())
    samples, _ = read(tmp_path)
    assert phrases([s for s in samples if s.meta["image_id"] == "7"]) == ["a red dog", "a mat"]


def test_a_picture_s_bytes_are_not_needed_where_the_size_is_stated(tmp_path):
    write(tmp_path, record())
    (tmp_path / "7.png").write_bytes(b"no picture")
    samples, left_out = read(tmp_path)
    assert not left_out
    with pytest.raises(ValueError, match="7.png is not an image"):
        samples[0].open_image()
