"""What a tower is given, and how well its alpha, drawn back onto the image, covers the region."""

import numpy as np
import pytest
from PIL import Image

from vision_tower.alpha_embedding import ALPHA_MEAN, ALPHA_STD, AlphaPatchEmbedding


@pytest.fixture(name="fed")
def fed_pixels(monkeypatch):
    """Every image (4, S, S) that reaches a tower, whoever makes it."""
    seen, forward = [], AlphaPatchEmbedding.forward

    def noting(self, pixel_values):
        seen.extend(pixel_values.detach().clone())
        return forward(self, pixel_values)

    monkeypatch.setattr(AlphaPatchEmbedding, "forward", noting)
    return seen


def alpha_map(pixel_values):
    """The alpha in [0, 1], (..., H, W), of what a tower is given, (..., 4, H, W)."""
    return pixel_values[..., 3, :, :] * ALPHA_STD + ALPHA_MEAN


def iou(first, second):
    """Intersection over union of two masks."""
    return float((first & second).sum() / (first | second).sum())


def overlap(pixel_values, region, height, width):
    """IoU of the alpha (4, S, S) that was fed, drawn back onto the padded image, with the region."""
    side = max(height, width)
    alpha = alpha_map(pixel_values).float().numpy()
    drawn = np.asarray(Image.fromarray(alpha).resize((side, side), Image.Resampling.BILINEAR)) >= 0.5
    top, left = (side - height) // 2, (side - width) // 2
    assert not drawn[:top].any() and not drawn[:, :left].any()
    drawn = drawn[top : top + height, left : left + width]
    return iou(drawn, region.mask(height, width) >= 0.5)
