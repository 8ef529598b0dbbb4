"""MaskImageNet's list, as the original code takes its entries: no published file was at hand."""

import numpy as np
import pytest

from mllm.data.index import RegionIndex
from mllm.data.masks import BAD_MASK, EMPTY_MASK
from mllm.data.prepare import index_mask_imagenet
from mllm.data.readers import mask_imagenet
from mllm.data.records import CLAMPED, NO_AREA, READ, ReadReport
from tests.files import encoded_mask, write_json
from tests.tiny import noise_image
from vision_tower import Region

PATH = "imagenet-21k/images/n01440764/{}.JPEG"


def masked(x0, x1):
    mask = np.zeros((20, 30), bool)
    mask[5:15, x0:x1] = True
    return mask


def entry(number, **changes):
    values = {
        "id": number,
        "class": "n01440764",
        "path": PATH.format(number),
        "mask": encoded_mask(masked(number, number + 10)),
        "box": [number, 5, 10, 10],
        "score": 0.5,
        "text": f" a tench number {number} on a white background ",
        **changes,
    }
    return list(values.values())


def write(folder, *entries):
    write_json(folder / mask_imagenet.LIST, entries)
    for number in (1, 2):
        path = folder / PATH.format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(30, 20, number).save(path)
    return folder


def test_masks_boxes_and_texts_come_back_from_the_index(tmp_path):
    index_mask_imagenet(write(tmp_path, entry(1), entry(2)))
    index = RegionIndex(tmp_path)
    assert index.missing_pictures("train") == {} and index.rows("train").tolist() == [0, 1]
    for number, facts in enumerate(index.read([0, 1]), 1):
        assert facts.forms[0] == Region.from_box(number, 5, number + 10, 15)
        assert np.array_equal(facts.forms[1].mask(20, 30), masked(number, number + 10))
        # the text as it is
        assert facts.turns == (("description", None, f"a tench number {number} on a white background"),)
        assert facts.sample.open_image().size == (30, 20)
        assert facts.sample.meta["image_id"] == PATH.format(number)


def test_pictures_may_lie_elsewhere(tmp_path):
    (tmp_path / "lists").mkdir()
    write(tmp_path, entry(1))
    (tmp_path / mask_imagenet.LIST).rename(tmp_path / "lists" / mask_imagenet.LIST)
    samples = list(mask_imagenet.read_mask_imagenet(tmp_path / "lists", images=tmp_path))
    assert len(samples) == 2 and all(sample.open_image().size == (30, 20) for sample in samples)


def test_a_picture_of_another_size_is_refused(tmp_path):
    write(tmp_path, entry(1))
    noise_image(20, 30).save(tmp_path / PATH.format(1))
    for sample in mask_imagenet.read_mask_imagenet(tmp_path):
        with pytest.raises(ValueError, match="is 20 x 30 pixels, its data set says 30 x 20"):
            sample.open_image()


@pytest.mark.parametrize(
    "bad, reason",
    [
        ({}, mask_imagenet.OTHER_FORM),
        (entry(1)[:6], mask_imagenet.OTHER_FORM),
        (entry(1, path=None), mask_imagenet.OTHER_FORM),
        (entry(1, text=" "), mask_imagenet.NO_TEXT),
        (entry(1, text=None), mask_imagenet.NO_TEXT),
        (entry(1, mask=None), BAD_MASK),
        (entry(1, mask={"size": [20, 30], "counts": "zz"}), BAD_MASK),
        (entry(1, mask=encoded_mask(np.zeros((20, 30)))), EMPTY_MASK),
        (entry(1, box=None), mask_imagenet.NO_BOX),
        (entry(1, box=[1, 2, "3", 4]), mask_imagenet.NO_BOX),
        (entry(1, box=[1, 2, 0, 4]), NO_AREA),
    ],
)
def test_bad_entries_are_counted_and_the_others_stay(tmp_path, bad, reason):
    report = ReadReport()
    samples = list(mask_imagenet.read_mask_imagenet(write(tmp_path, bad, entry(2)), report=report))
    assert dict(report.counts) == {reason: 1, READ: 1}
    assert [(s.meta["region_id"], s.regions[0].kind) for s in samples] == [(1, "box"), (1, "mask")]


def test_a_box_over_the_edge_is_clamped(tmp_path):
    report = ReadReport()
    box, _ = mask_imagenet.read_mask_imagenet(write(tmp_path, entry(1, box=[-1, 5, 12, 10])), report=report)
    assert report.counts[CLAMPED] == 1 and box.regions == (Region.from_box(0, 5, 11, 15),)


def test_nothing_usable_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="is missing"):
        list(mask_imagenet.read_mask_imagenet(tmp_path))
    with pytest.raises(ValueError, match="no entry of .* can be used; expected lists"):
        list(mask_imagenet.read_mask_imagenet(write(tmp_path, {})))
