"""Views: what the model receives of a sample. Comparing views measures whether the answers depend on the region."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from mllm.data.samples import RegionSample
from vision_tower import Region

# view -> what the model receives; "box" and "mask" are also the type of region that is read from the data
VIEWS = {
    "box": "the image, with alpha set to the box",
    "mask": "the image, with alpha set to the mask",
    "whole": "the image, with alpha 1 everywhere",
    "other_region": "the image, with alpha set to another region",
    "no_image": "the question without an image",
    "crop": "the region's box, cut out of the image",
    "blur": "the image, blurred outside the region",
    "red_box": "the image with a red rectangle around the region",
}
# Largest intersection over union of the boxes of a region and its other region: Visual Genome has about 47 regions per
# image, many of them of the same object.
_MAX_OVERLAP = 0.1
# Standard deviation as a share of the image's longer side: removes the shapes of objects, keeps colors.
_BLUR = 0.04


def apply_view(sample: RegionSample, view: str, image: Image.Image | None) -> tuple[Image.Image | None, Region | None]:
    """Build the image and region that the model receives.

    Args:
        sample: With one region. For "other_region", a sample from `with_other_region`.
        view: One of `VIEWS`.
        image: The sample's image as displayed; ignored for "no_image".

    Raises:
        ValueError: If the view is unknown or the region does not fit the image.
    """
    if view not in VIEWS:
        raise ValueError(f"expected a view from {', '.join(VIEWS)}, got {view!r}")
    if view == "no_image":
        return None, None
    (region,) = sample.regions
    if view in ("box", "mask", "other_region"):
        return image, region
    if view == "whole":
        return image, Region.whole()
    draw = {"crop": crop, "blur": blur_outside, "red_box": draw_red_box}[view]
    return draw(image, region), Region.whole()


def crop(image: Image.Image, region: Region) -> Image.Image:
    """Cut out the bounding box of the region, rounded outwards to whole pixels."""
    x0, y0, x1, y1 = region.bounding_box(image.height, image.width)
    left, top = int(x0), int(y0)
    return image.crop((left, top, max(int(np.ceil(x1)), left + 1), max(int(np.ceil(y1)), top + 1)))


def blur_outside(image: Image.Image, region: Region, blur: float = _BLUR) -> Image.Image:
    """Blur the image outside the region.

    Args:
        image: RGB.
        region: In pixels of the image.
        blur: Standard deviation as a share of the image's longer side.
    """
    return replace_outside(image, region, image.filter(ImageFilter.GaussianBlur(blur * max(image.size))))


def replace_outside(image: Image.Image, region: Region, other: Image.Image) -> Image.Image:
    """The image inside the region and `other` outside, blended at soft edges."""
    inside = np.rint(region.mask(image.height, image.width) * 255).astype(np.uint8)
    return Image.composite(image, other, Image.fromarray(inside))


def draw_red_box(image: Image.Image, region: Region) -> Image.Image:
    """Draw a red rectangle, one pixel wide, around the region's bounding box.

    Source: `refcoco_bbox_doc_to_visual` of EvolvingLMMs-Lab/lmms-eval, lmms_eval/tasks/refcocog/utils.py at v0.7.2:
    `ImageDraw.rectangle([x, y, x + w, y + h], outline="red")`.
    """
    drawn = image.copy()
    ImageDraw.Draw(drawn).rectangle(region.bounding_box(image.height, image.width), outline="red")
    return drawn


def with_whole_image(samples: Sequence[RegionSample]) -> list[RegionSample]:
    """The samples with the whole image as their region."""
    return [dataclasses.replace(sample, regions=(Region.whole(),)) for sample in samples]


def with_other_region(samples: Sequence[RegionSample]) -> list[RegionSample]:
    """The samples with another region of the same image; the references stay those of the sample's own region.

    Samples whose image has no other region are omitted. `meta["shown_references"]` has the references of the other
    region if the data has an answer to the same question about it: a model that uses the region gives these.
    """
    changed = []
    for sample, other in _with_others(samples):
        known = {"shown_references": list(other.references)} if _question_kind(sample) == _question_kind(other) else {}
        changed.append(dataclasses.replace(sample, regions=other.regions, meta={**sample.meta, **known}))
    return changed


def other_region_references(samples: Sequence[RegionSample]) -> list[tuple[str, ...]]:
    """The references of the regions that `with_other_region` sets, in its order."""
    return [other.references for _, other in _with_others(samples)]


def _with_others(samples: Sequence[RegionSample]) -> list[tuple[RegionSample, RegionSample]]:
    """Pair each sample with the next one of its image at another position, if possible with the same question."""
    by_image: dict[object, list[RegionSample]] = defaultdict(list)
    for sample in samples:
        by_image[sample.meta.get("image_id", sample.image)].append(sample)
    pairs = []
    for group in by_image.values():
        boxes = np.array([_box(sample) for sample in group])
        for index, sample in enumerate(group):
            order = np.roll(np.arange(len(group)), -index - 1)[:-1]
            apart = [group[other] for other in order[_overlap(boxes[index], boxes[order]) <= _MAX_OVERLAP]]
            if apart:
                kind = _question_kind(sample)
                pairs.append((sample, next((o for o in apart if _question_kind(o) == kind), apart[0])))
    return pairs


def _question_kind(sample: RegionSample) -> str | None:
    """The type of the question if the data has types, else its text; None for a description."""
    return sample.question and sample.meta.get("type", sample.question)


def _box(sample: RegionSample) -> tuple[float, float, float, float]:
    """Bounding box of the region in pixels, or in fractions for an "nbox" in an image of unknown size."""
    (region,) = sample.regions
    if "height" in sample.meta:
        size = sample.meta["height"], sample.meta["width"]
    elif region.kind == "mask":
        size = region.data[:2]
    else:
        size = (1, 1) if region.kind == "nbox" else (10**9, 10**9)  # large enough that nothing is clipped
    return region.bounding_box(*size)


def _overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of a box (4,) with boxes (N, 4)."""
    sides = np.clip(np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2]), 0, None)
    shared = sides.prod(1)
    return shared / ((box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - shared)


def majority_baseline(samples: Sequence[RegionSample]) -> float:
    """The highest literal match, in [0, 1], that is possible with the whole image but without the region.

    It always gives the most frequent answer for each image and question type (`meta["type"]`, else "description").
    """
    answers: dict[tuple, Counter] = defaultdict(Counter)
    for sample in samples:
        answers[sample.meta["image_id"], sample.meta.get("type", "description")][sample.references[0]] += 1
    return sum(max(counts.values()) for counts in answers.values()) / len(samples)
