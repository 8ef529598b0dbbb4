"""Real photographs with real masks: every region, through every kind of image, geometry and form of region, reaches the
model where pycocotools says that it is.

The rule. The model's input has 336 x 336 pixels and a photograph 640 x 480, so no region can be drawn back sharper
than that. The alpha map is divided by its peak and drawn back: each pixel of the photograph takes the alpha of the
input pixel that it lies in. The annotation as pycocotools decodes it takes the same way: as a plain array it is padded,
cropped or stretched, resized to 336 x 336 by PIL's bilinear filter, and drawn back. The IoU is that of soft masks, the
sum of minima by the sum of maxima: a threshold would decide ties at the edge by rounding. Polygons and boxes are
decoded by pycocotools at 16 times the size and averaged, since its masks round them to whole pixels. Regions outside
of the center crop must be refused.
"""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from mllm.data.samples import load_image
from tests.alpha_maps import alpha_map
from tests.files import read_json
from vision_tower import AlphaCLIPImageProcessor, Region
from vision_tower.alpha_embedding import ALPHA_MEAN, ALPHA_STD

SIDE, FINER = 336, 16
GEOMETRIES = ("pad", "crop", "stretch")


def decoded(segmentation, height, width):
    rles = segmentation
    if not (isinstance(rles, dict) and isinstance(rles["counts"], str)):
        rles = coco_mask.frPyObjects(segmentation, height, width)
    return coco_mask.decode(coco_mask.merge(rles) if isinstance(rles, list) else rles)


def decoded_finely(polygons, height, width):
    """Coverage of each pixel, 0 to 1, from pycocotools' mask of polygons that are 16 times as large."""
    points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in polygons])
    left, top = np.floor(points.min(0)).astype(int).clip(0, (width - 1, height - 1))
    right, bottom = np.ceil(points.max(0)).astype(int).clip((left + 1, top + 1), (width, height))
    large = [((np.reshape(polygon, (-1, 2)) - (left, top)) * FINER).ravel().tolist() for polygon in polygons]
    h, w = bottom - top, right - left
    fine = decoded(large, h * FINER, w * FINER)
    coverage = np.zeros((height, width), np.float32)
    coverage[top:bottom, left:right] = fine.reshape(h, FINER, w, FINER).mean((1, 3))
    return coverage


def forms(annotation, height, width):
    """Pairs of a region and the judge's mask of it."""
    mask = decoded(annotation["segmentation"], height, width)
    file = io.BytesIO()
    Image.fromarray(mask * 255).save(file, "PNG")
    rle = coco_mask.encode(np.asfortranarray(mask))
    yield "rle", Region.from_rle(rle), mask
    yield "png", Region.from_mask(file), mask
    x, y, w, h = annotation["bbox"]
    box = [x, y, x + w, y, x + w, y + h, x, y + h]
    yield "box", Region.from_box(x, y, x + w, y + h), decoded_finely([box], height, width)
    if isinstance(annotation["segmentation"], list):
        polygons = annotation["segmentation"]
        yield "polygon", Region.from_polygon(polygons), decoded_finely(polygons, height, width)


def window(geometry, height, width):
    """Left, top, right, bottom in the photograph of what the model sees; padding lies outside of it."""
    longer, shorter = max(height, width), min(height, width)
    if geometry == "stretch":
        return 0, 0, width, height
    if geometry == "pad":
        left, top = (longer - width) // 2, (longer - height) // 2
        return -left, -top, longer - left, longer - top
    scaled = int(SIDE * longer / shorter)
    scale, start = longer / scaled, (scaled - SIDE) // 2
    if width >= height:
        return start * scale, 0, (start + SIDE) * scale, height
    return 0, start * scale, width, (start + SIDE) * scale


def is_seen(mask, geometry):
    left, top, right, bottom = window(geometry, *mask.shape)
    return mask[max(int(top), 0) : int(np.ceil(bottom)), max(int(left), 0) : int(np.ceil(right))].any()


def shown(mask, geometry):
    """The mask as the model should see it, (336, 336): by one call of PIL on a canvas with the padding around it."""
    height, width = mask.shape
    left, top, right, bottom = window(geometry, height, width)
    sides = [[max(int(-top), 0), max(int(bottom) - height, 0)], [max(int(-left), 0), max(int(right) - width, 0)]]
    canvas = Image.fromarray(np.pad(mask.astype(np.float32), sides))
    above, before = sides[0][0], sides[1][0]
    box = (left + before, top + above, right + before, bottom + above)
    return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box))


def drawn_back(alpha, geometry, height, width):
    left, top, right, bottom = window(geometry, height, width)
    across, down = SIDE / (right - left), SIDE / (bottom - top)
    inverse = (across, 0, -left * across, 0, down, -top * down)
    alpha = np.where(alpha > 1e-6, alpha, 0)  # float32 of the normalised alpha leaves 3e-8 outside
    image = Image.fromarray((alpha / alpha.max()).astype(np.float32))
    back = image.transform((width, height), Image.Transform.AFFINE, inverse, Image.Resampling.NEAREST)
    return np.asarray(back)


def overlap(ours, theirs):
    return float(np.minimum(ours, theirs).sum() / np.maximum(ours, theirs).sum())


def image_inputs(path):
    content = path.read_bytes()
    array = np.asarray(load_image(str(path)))
    yield from (str(path), path, Image.open(path), content, io.BytesIO(content), array)
    yield from (torch.tensor(array).permute(2, 0, 1), array / 255, load_image(content))


def check_photo(folder, image, annotations, worst):
    height, width = image["height"], image["width"]
    processor = AlphaCLIPImageProcessor.for_size(SIDE, "pad")
    cases = [case for annotation in annotations for case in forms(annotation, height, width)]
    first, *others = image_inputs(folder / "images" / image["file_name"])
    for geometry in GEOMETRIES:
        inside = [case for case in cases if is_seen(case[2], geometry)]
        for _, region, mask in cases:
            if not is_seen(mask, geometry):
                with pytest.raises(ValueError, match="outside the center crop"):
                    processor(first, region, geometry=geometry)
        if not inside:
            continue
        values = processor(first, [region for _, region, _ in inside], geometry=geometry)["pixel_values"]
        for source in others:
            same = processor(source, inside[0][1], geometry=geometry)["pixel_values"]
            assert np.array_equal(same[0], values[0])
        for (form, _, mask), value in zip(inside, values, strict=True):
            alpha = alpha_map(value)
            ours, theirs = (drawn_back(one, geometry, height, width) for one in (alpha, shown(mask, geometry)))
            iou = overlap(ours, theirs)
            worst[form, geometry] = min(worst.get((form, geometry), (2,)), (iou, image["id"]))
    return len(annotations)


def check(shared_data, images, most=None):
    folder = shared_data / "coco_photos"
    records = read_json(folder / "instances.json")
    worst, count = {}, 0
    for image in records["images"][images]:
        of_image = [one for one in records["annotations"] if one["image_id"] == image["id"]][:most]
        count += check_photo(folder, image, of_image, worst)
    assert all(iou >= 0.95 for iou, _ in worst.values()), worst
    return count, worst


def test_a_photograph(shared_data):
    check(shared_data, slice(0, 1), most=1)


@pytest.mark.slow
def test_all_708_regions(shared_data):
    count, worst = check(shared_data, slice(None))
    assert count == 708 and len(worst) == 12


def test_one_pixel(shared_data):
    """The smallest regions: a pixel in the corners and the middle of a photograph."""
    path = shared_data / "coco_photos" / "images" / "000000000030.jpg"
    for x, y in ((0, 0), (639, 427), (320, 200), (301, 3)):
        mask = np.zeros((428, 640), np.uint8)
        mask[y, x] = 1
        region = Region.from_mask(mask)
        for geometry in ("pad", "stretch") if x in (0, 639) else GEOMETRIES:
            value = AlphaCLIPImageProcessor.for_size(SIDE, geometry)(path, region)["pixel_values"][0, 3]
            alpha = value * ALPHA_STD + ALPHA_MEAN
            ours, theirs = (drawn_back(one, geometry, 428, 640) for one in (alpha, shown(mask, geometry)))
            assert ours[y, x] > 0.2 and overlap(ours, theirs) >= 0.95
