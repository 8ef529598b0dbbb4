"""The shipped split is the published one, and no image is in two."""

import gzip
import json

import pytest

from mllm.data import densecap_splits
from mllm.data.densecap_splits import densecap_split


def test_sizes_and_no_overlap():
    parts = {name: densecap_split(name) for name in densecap_splits.SIZES}
    assert {name: len(ids) for name, ids in parts.items()} == densecap_splits.SIZES
    assert len(frozenset().union(*parts.values())) == sum(densecap_splits.SIZES.values())
    assert len(densecap_split("grit-train")) == 77_396
    with pytest.raises(ValueError, match="grit-train"):
        densecap_split("dev")


def test_equal_to_the_published_file(shared_data):
    published = json.load(gzip.open(shared_data / "visual_genome" / "densecap_splits.json.gz"))
    assert all(densecap_split(name) == frozenset(published[name]) for name in densecap_splits.SIZES)


def test_a_changed_file_is_noticed(monkeypatch):
    densecap_splits._splits.cache_clear()
    monkeypatch.setattr(densecap_splits, "_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="reinstall the package"):
        densecap_split("val")
    densecap_splits._splits.cache_clear()
