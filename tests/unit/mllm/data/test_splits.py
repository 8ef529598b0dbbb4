"""The shipped split is the published one, and no image is in two."""

import gzip
import json

import pytest

from mllm.data import splits
from mllm.data.splits import densecap_split


def test_sizes_and_no_overlap():
    parts = {name: densecap_split(name) for name in splits.SIZES}
    assert {name: len(ids) for name, ids in parts.items()} == splits.SIZES
    assert len(frozenset().union(*parts.values())) == sum(splits.SIZES.values())
    assert len(densecap_split("grit-train")) == 77_396
    with pytest.raises(ValueError, match="grit-train"):
        densecap_split("dev")


def test_equal_to_the_published_file(shared_data):
    published = json.load(gzip.open(shared_data / "visual_genome" / "densecap_splits.json.gz"))
    assert all(densecap_split(name) == frozenset(published[name]) for name in splits.SIZES)


def test_a_changed_file_is_noticed(monkeypatch):
    splits._splits.cache_clear()
    monkeypatch.setattr(splits, "_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="reinstall the package"):
        densecap_split("val")
    splits._splits.cache_clear()
