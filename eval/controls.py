"""What a score is worth: the same samples with another region, and what could be known without one."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence

from mllm.data.samples import RegionSample
from vision_tower import Region


def with_whole_image(samples: Sequence[RegionSample]) -> list[RegionSample]:
    """The samples with the whole image as their region."""
    return [dataclasses.replace(sample, regions=(Region.whole(),)) for sample in samples]


def with_wrong_region(samples: Sequence[RegionSample]) -> list[RegionSample]:
    """Each sample with the region of the next sample of its picture; references stay those of the asked region.

    A sample that is alone in its picture is left out. What should come out is the *other* region's description: compare
    with `references_of_shown_region`.
    """
    return [dataclasses.replace(sample, regions=other.regions) for sample, other in _neighbours(samples)]


def references_of_shown_region(samples: Sequence[RegionSample]) -> list[tuple[str, ...]]:
    """The references that belong to the regions which `with_wrong_region` shows, in its order."""
    return [other.references for _, other in _neighbours(samples)]


def _neighbours(samples: Sequence[RegionSample]) -> list[tuple[RegionSample, RegionSample]]:
    by_image: dict[object, list[RegionSample]] = defaultdict(list)
    for sample in samples:
        by_image[sample.meta["image_id"]].append(sample)
    pairs = []
    for group in by_image.values():
        if len(group) > 1:
            pairs.extend(zip(group, group[1:] + group[:1], strict=True))
    return pairs


def best_blind_score(samples: Sequence[RegionSample]) -> float:
    """The best exact match of an answerer who sees the whole picture but not the region.

    For each picture and kind of question (`meta["type"]`, "description" without one) it always gives the answer that
    most of the picture's samples have; nobody who ignores the region can do better on these samples.
    """
    answers: dict[tuple, Counter] = defaultdict(Counter)
    for sample in samples:
        answers[sample.meta["image_id"], sample.meta.get("type", "description")][sample.references[0]] += 1
    return sum(max(counts.values()) for counts in answers.values()) / len(samples)
