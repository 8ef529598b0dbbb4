"""Draws the synthetic scenes of Shapes: objects, patterns and backgrounds as arrays.

A scene has `SCENE_SIZE` x `SCENE_SIZE` pixels and 3 to 6 objects. Each object has a size, a pattern, a color and a
shape, all visible in its pixels. See docs/shapes.md for its purpose and `mllm.data.shapes.scenes` for its questions and
splits.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from PIL import Image, ImageDraw

SCENE_SIZE = 96
MIN_OBJECTS, MAX_OBJECTS = 3, 6
SIZES = ("small", "large")
RADIUS = {"small": (8, 11), "large": (15, 18)}  # half of the object's extent in pixels, inclusive range
PATTERNS = ("plain", "striped", "dotted")
COLORS = {
    "red": (215, 35, 40),
    "orange": (245, 135, 25),
    "yellow": (240, 220, 50),
    "green": (45, 160, 60),
    "cyan": (60, 205, 215),
    "blue": (40, 75, 215),
    "purple": (135, 55, 180),
    "pink": (245, 125, 190),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
BACKGROUNDS = ("plain", "gradient", "clouds", "checks", "grain")
UNSEEN_BACKGROUNDS = ("rings", "diagonals", "speckles")  # not used in training
# Color-shape pairs of the `novel` split only. Each of these shapes and colors is common in training.
NOVEL_PAIRS = (
    ("red", "triangle"),
    ("orange", "star"),
    ("green", "circle"),
    ("blue", "cross"),
    ("purple", "square"),
    ("pink", "diamond"),
)
_SUPERSAMPLING = 4
_GAP = 2  # pixels between the boxes of two objects


@dataclasses.dataclass(frozen=True)
class ShapeObject:
    """An object: its four attributes, its center (x, y) and its radius, both in pixels."""

    size: str
    pattern: str
    color: str
    shape: str
    x: int
    y: int
    radius: int

    @property
    def phrase(self) -> str:
        """The canonical description, for example "a large striped red star"."""
        return f"a {self.size} {self.pattern} {self.color} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """A scene: `pixels` uint8 (H, W, 3), the objects, and a bool mask (H, W) of each object."""

    pixels: np.ndarray
    objects: tuple[ShapeObject, ...]
    masks: tuple[np.ndarray, ...]
    background: str


def draw_scene(
    rng: np.random.Generator,
    pairs: tuple[tuple[str, str], ...],
    backgrounds: tuple[str, ...],
    min_objects: int = MIN_OBJECTS,
    max_objects: int = MAX_OBJECTS,
) -> Scene:
    """Draw a scene.

    Args:
        rng: Source of all random choices.
        pairs: (color, shape) pairs to choose from.
        backgrounds: Kinds of background to choose from.
        min_objects: Minimum number of objects.
        max_objects: Maximum number of objects.
    """
    count = int(rng.integers(min_objects, max_objects + 1))
    objects = None
    while objects is None:
        objects = _place_objects(rng, pairs, count)
    background = backgrounds[rng.integers(len(backgrounds))]
    pixels = _draw_background(rng, background)
    masks = []
    for obj in objects:
        coverage = _coverage(obj)
        window = _window(obj)  # only the pixels that the object covers are computed
        texture = _texture(rng, obj)
        pixels[window] += coverage[window][..., None] * (texture - pixels[window])
        masks.append(coverage >= 0.5)
    return Scene(np.rint(pixels.clip(0, 255)).astype(np.uint8), objects, tuple(masks), background)


def _place_objects(
    rng: np.random.Generator, pairs: tuple[tuple[str, str], ...], count: int
) -> tuple[ShapeObject, ...] | None:
    """`count` different objects whose boxes do not overlap, or None if they do not fit."""
    placed: list[ShapeObject] = []
    for _ in range(count):
        size, pattern = SIZES[rng.integers(2)], PATTERNS[rng.integers(3)]
        color, shape = pairs[rng.integers(len(pairs))]
        if any((size, pattern, color, shape) == (o.size, o.pattern, o.color, o.shape) for o in placed):
            return None
        low, high = RADIUS[size]
        for _ in range(30):
            radius = int(rng.integers(low, high + 1))
            x, y = (int(v) for v in rng.integers(radius + 1, SCENE_SIZE - radius, size=2))
            if all(max(abs(x - o.x), abs(y - o.y)) >= radius + o.radius + _GAP for o in placed):
                placed.append(ShapeObject(size, pattern, color, shape, x, y, radius))
                break
        else:
            return None
    return tuple(placed)


def _outline(shape: str, radius: float) -> list[tuple[float, float]]:
    """Vertices (x, y) of the shape around the origin, y down; its box has half width `radius`."""
    if shape == "square":
        s = 0.86 * radius
        return [(-s, -s), (s, -s), (s, s), (-s, s)]
    if shape == "triangle":
        return [(0, -radius), (radius, 0.85 * radius), (-radius, 0.85 * radius)]
    if shape == "diamond":
        return [(0, -radius), (0.8 * radius, 0), (0, radius), (-0.8 * radius, 0)]
    if shape == "cross":
        a = radius / 3
        r = radius
        return [
            (-a, -r),
            (a, -r),
            (a, -a),
            (r, -a),
            (r, a),
            (a, a),
            (a, r),
            (-a, r),
            (-a, a),
            (-r, a),
            (-r, -a),
            (-a, -a),
        ]
    if shape == "star":
        angles = [math.pi * k / 5 - math.pi / 2 for k in range(10)]
        lengths = [radius if k % 2 == 0 else 0.42 * radius for k in range(10)]
    else:  # circle
        angles = [2 * math.pi * k / 48 for k in range(48)]
        lengths = [radius] * 48
    return [(length * math.cos(a), length * math.sin(a)) for a, length in zip(angles, lengths, strict=True)]


def _window(obj: ShapeObject) -> tuple[slice, slice]:
    """Rows and columns of the object's box with a margin of one pixel, inside the image."""
    reach = obj.radius + 1
    rows, columns = (slice(max(at - reach, 0), min(at + reach, SCENE_SIZE)) for at in (obj.y, obj.x))
    return rows, columns


def _coverage(obj: ShapeObject) -> np.ndarray:
    """Area coverage of the object, float32 (H, W) in [0, 1]; only its box is rasterized."""
    side = 2 * obj.radius + 2
    canvas = Image.new("L", (side * _SUPERSAMPLING,) * 2)
    points = [
        ((px + side / 2) * _SUPERSAMPLING, (py + side / 2) * _SUPERSAMPLING)
        for px, py in _outline(obj.shape, obj.radius)
    ]
    ImageDraw.Draw(canvas).polygon(points, fill=255)
    small = np.asarray(canvas.reduce(_SUPERSAMPLING), np.float32) / 255
    full = np.zeros((SCENE_SIZE, SCENE_SIZE), np.float32)
    top, left = obj.y - side // 2, obj.x - side // 2
    rows, columns = _window(obj)
    full[rows, columns] = small[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return full


def _texture(rng: np.random.Generator, obj: ShapeObject) -> np.ndarray:
    """The color of each pixel in the object's window, float32 (h, w, 3), with stripes or dots in a second tone."""
    base = np.asarray(COLORS[obj.color], np.float32) + rng.uniform(-14, 14, 3).astype(np.float32)
    tone = np.float32(255 if rng.random() < 0.5 else 15)
    second = base + 0.6 * (tone - base)
    period = rng.uniform(5.5, 6.5) if obj.size == "small" else rng.uniform(7.0, 9.0)
    ys, xs = np.mgrid[_window(obj)].astype(np.float32)
    if obj.pattern == "striped":
        along = ys if rng.random() < 0.5 else xs
        second_here = (along + rng.uniform(0, period)) % period < period / 2
    elif obj.pattern == "dotted":
        dx = (xs - obj.x + period / 2) % period - period / 2
        dy = (ys - obj.y + period / 2) % period - period / 2
        second_here = dx**2 + dy**2 < (0.33 * period) ** 2
    else:
        second_here = np.zeros(xs.shape, bool)
    return np.where(second_here[..., None], second, base).astype(np.float32)


def _draw_background(rng: np.random.Generator, kind: str) -> np.ndarray:
    """A muted background, float32 (H, W, 3)."""
    low, high = (_muted(rng) for _ in range(2))
    high = low + np.clip(high - low, -45, 45)
    ys, xs = np.mgrid[:SCENE_SIZE, :SCENE_SIZE].astype(np.float32) / SCENE_SIZE
    if kind == "gradient":
        angle = rng.uniform(0, 2 * math.pi)
        weight = 0.5 + 0.7 * ((xs - 0.5) * math.cos(angle) + (ys - 0.5) * math.sin(angle))
    elif kind == "clouds":
        cells = Image.fromarray(rng.uniform(0, 255, (6, 6)).astype(np.uint8)).resize(
            (SCENE_SIZE,) * 2, Image.Resampling.BICUBIC
        )
        weight = np.asarray(cells, np.float32) / 255
    elif kind == "checks":
        cell = rng.integers(8, 17) / SCENE_SIZE
        weight = (np.floor(xs / cell) + np.floor(ys / cell)) % 2
    elif kind == "grain":
        weight = np.kron(rng.random((SCENE_SIZE // 2,) * 2, np.float32), np.ones((2, 2), np.float32))
    elif kind == "rings":
        cx, cy = rng.uniform(0, 1, 2)
        weight = 0.5 + 0.5 * np.sin(np.hypot(xs - cx, ys - cy) * rng.uniform(25, 45))
    elif kind == "diagonals":
        weight = np.floor((xs + ys) / rng.uniform(0.08, 0.16)) % 2
    elif kind == "speckles":
        weight = np.kron(rng.random((SCENE_SIZE // 3,) * 2) < 0.15, np.ones((3, 3)))
    else:  # plain
        weight = np.zeros_like(xs)
    return (low + weight[..., None].clip(0, 1) * (high - low)).astype(np.float32)


def _muted(rng: np.random.Generator) -> np.ndarray:
    """A color close to gray, float32 (3,), which differs from the colors of all objects."""
    return (rng.uniform(35, 220) + rng.uniform(-18, 18, 3)).astype(np.float32)
