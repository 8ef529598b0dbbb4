"""What the model is shown of a sample: its region, or a control that tells what the region was worth."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from mllm.data.samples import RegionSample
from vision_tower import Region

# input -> what the model gets; "box" and "mask" are the form in which the data's regions are read
INPUTS = {
    "box": "the picture with alpha inside the box",
    "mask": "the picture with alpha inside the mask",
    "whole": "the picture with alpha everywhere: no region",
    "wrong": "the picture with alpha in another region of it",
    "blind": "the question without a picture",
    "crop": "the region's box cut out of the picture, alpha everywhere",
    "blur": "the picture, blurred outside the region, alpha everywhere",
    "red-box": "the picture with a red rectangle around the region, alpha everywhere",
}
CONTROLS = tuple(name for name in INPUTS if name not in ("box", "mask"))
# Another region of the picture may overlap the asked one by so much (intersection over union of their boxes): Visual
# Genome has about 47 regions a picture, many of them of the same thing.
_WRONG_OVERLAP = 0.1
# Standard deviation of the blur, as a share of the picture's longer side: shapes of objects are gone, colours stay.
_BLUR = 0.04


def show(
    sample: RegionSample, region_input: str, picture: Image.Image | None
) -> tuple[Image.Image | None, Region | None]:
    """The image and region that the model gets. For "wrong", `sample` comes from `with_wrong_region`.

    Args:
        sample: With one region.
        region_input: One of `INPUTS`.
        picture: The sample's picture as displayed; not looked at when blind.

    Raises:
        ValueError: If the input is unknown or the region does not fit the picture.
    """
    if region_input not in INPUTS:
        raise ValueError(f"expected an input out of {', '.join(INPUTS)}, got {region_input!r}")
    if region_input == "blind":
        return None, None
    (region,) = sample.regions
    if region_input in ("box", "mask", "wrong"):
        return picture, region
    if region_input == "whole":
        return picture, Region.whole()
    draw = {"crop": crop, "blur": blur_outside, "red-box": draw_red_box}[region_input]
    return draw(picture, region), Region.whole()


def crop(picture: Image.Image, region: Region) -> Image.Image:
    """The box around the region, whole pixels."""
    x0, y0, x1, y1 = region.bounding_box(picture.height, picture.width)
    left, top = int(x0), int(y0)
    return picture.crop((left, top, max(int(np.ceil(x1)), left + 1), max(int(np.ceil(y1)), top + 1)))


def blur_outside(picture: Image.Image, region: Region) -> Image.Image:
    """The picture, blurred where the region is not."""
    blurred = picture.filter(ImageFilter.GaussianBlur(_BLUR * max(picture.size)))
    inside = np.rint(region.mask(picture.height, picture.width) * 255).astype(np.uint8)
    return Image.composite(picture, blurred, Image.fromarray(inside))


def draw_red_box(picture: Image.Image, region: Region) -> Image.Image:
    """A red rectangle, one pixel wide, around the region's box.

    Source: `refcoco_bbox_doc_to_visual` of EvolvingLMMs-Lab/lmms-eval, lmms_eval/tasks/refcocog/utils.py at v0.7.2:
    `ImageDraw.rectangle([x, y, x + w, y + h], outline="red")`.
    """
    drawn = picture.copy()
    ImageDraw.Draw(drawn).rectangle(region.bounding_box(picture.height, picture.width), outline="red")
    return drawn


def with_whole_image(samples: Sequence[RegionSample]) -> list[RegionSample]:
    """The samples with the whole image as their region."""
    return [dataclasses.replace(sample, regions=(Region.whole(),)) for sample in samples]


def with_wrong_region(samples: Sequence[RegionSample]) -> list[RegionSample]:
    """Each sample with another region of its picture; references stay those of the asked region.

    A sample whose picture has no other region is left out. What should come out is the *other* region's description:
    `meta["shown_references"]`, where the data has a right answer to the same question about it.
    """
    shown = []
    for sample, other in _with_others(samples):
        known = {"shown_references": list(other.references)} if _kind(sample) == _kind(other) else {}
        shown.append(dataclasses.replace(sample, regions=other.regions, meta={**sample.meta, **known}))
    return shown


def references_of_shown_region(samples: Sequence[RegionSample]) -> list[tuple[str, ...]]:
    """The references that belong to the regions which `with_wrong_region` shows, in its order."""
    return [other.references for _, other in _with_others(samples)]


def _with_others(samples: Sequence[RegionSample]) -> list[tuple[RegionSample, RegionSample]]:
    """Each sample with the next one of its picture that is about another place, if possible with the same question."""
    by_image: dict[object, list[RegionSample]] = defaultdict(list)
    for sample in samples:
        by_image[sample.meta.get("image_id", sample.image)].append(sample)
    pairs = []
    for group in by_image.values():
        boxes = np.array([_box(sample) for sample in group])
        for index, sample in enumerate(group):
            order = np.roll(np.arange(len(group)), -index - 1)[:-1]
            apart = [group[other] for other in order[_overlap(boxes[index], boxes[order]) <= _WRONG_OVERLAP]]
            if apart:
                pairs.append((sample, next((o for o in apart if _kind(o) == _kind(sample)), apart[0])))
    return pairs


def _kind(sample: RegionSample) -> str | None:
    """What is asked: the type of the question where the data has types, else its words; None for a description."""
    return sample.question and sample.meta.get("type", sample.question)


def _box(sample: RegionSample) -> tuple[float, float, float, float]:
    """Around the region; in pixels, or in fractions where the region is and the picture's size is not stated."""
    (region,) = sample.regions
    if "height" in sample.meta:
        size = sample.meta["height"], sample.meta["width"]
    elif region.kind == "mask":
        size = region.data[:2]
    else:
        size = (1, 1) if region.kind == "nbox" else (10**9, 10**9)  # nothing is cut off
    return region.bounding_box(*size)


def _overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of a box (4,) with boxes (N, 4)."""
    sides = np.clip(np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2]), 0, None)
    shared = sides.prod(1)
    return shared / ((box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - shared)


def best_blind_score(samples: Sequence[RegionSample]) -> float:
    """The best share of exactly right answers of one who sees the whole picture but not the region.

    For each picture and kind of question (`meta["type"]`, "description" without one) it always gives the answer that
    most of the picture's samples have; nobody who ignores the region can do better on these samples.
    """
    answers: dict[tuple, Counter] = defaultdict(Counter)
    for sample in samples:
        answers[sample.meta["image_id"], sample.meta.get("type", "description")][sample.references[0]] += 1
    return sum(max(counts.values()) for counts in answers.values()) / len(samples)
