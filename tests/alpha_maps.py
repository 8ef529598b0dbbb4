"""The pixels that reach a tower, and the overlap of their alpha map with the region."""

import numpy as np
import pytest
from PIL import Image

from vision_tower.alpha_embedding import ALPHA_MEAN, ALPHA_STD, AlphaPatchEmbedding


@pytest.fixture(name="fed")
def fed_pixels(monkeypatch):
    """Every image (4, S, S) that reaches a tower, however it is called."""
    seen, forward = [], AlphaPatchEmbedding.forward

    def record(self, pixel_values):
        seen.extend(pixel_values.detach().clone())
        return forward(self, pixel_values)

    monkeypatch.setattr(AlphaPatchEmbedding, "forward", record)
    return seen


def alpha_map(pixel_values):
    """The alpha map (..., H, W), in [0, 1], of pixel values (..., 4, H, W)."""
    return pixel_values[..., 3, :, :] * ALPHA_STD + ALPHA_MEAN


def iou(first, second):
    """Intersection over union of two masks."""
    return float((first & second).sum() / (first | second).sum())


def overlap(pixel_values, region, height, width):
    """IoU of a region and the alpha map of pixel values (4, S, S), resized to the padded image of height x width."""
    side = max(height, width)
    alpha = alpha_map(pixel_values).float().numpy()
    drawn = np.asarray(Image.fromarray(alpha).resize((side, side), Image.Resampling.BILINEAR)) >= 0.5
    top, left = (side - height) // 2, (side - width) // 2
    assert not drawn[:top].any() and not drawn[:, :left].any()
    drawn = drawn[top : top + height, left : left + width]
    return iou(drawn, region.mask(height, width) >= 0.5)
