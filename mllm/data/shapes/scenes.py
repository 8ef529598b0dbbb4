"""The splits and questions of Shapes, and the scenes that a model was trained on.

`train`, `val` and `test` have the same color-shape pairs and backgrounds. `novel` has only pairs, and `background` only
backgrounds, that do not occur in `train`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from mllm.data.json_files import read_json
from mllm.data.samples import RegionSample
from mllm.data.schemas import VisualGenomeObjects, validate
from mllm.data.shapes.drawing import (
    BACKGROUNDS,
    COLORS,
    MAX_OBJECTS,
    MIN_OBJECTS,
    NOVEL_PAIRS,
    SCENE_SIZE,
    SHAPES,
    UNSEEN_BACKGROUNDS,
    Scene,
    ShapeObject,
    draw_scene,
)

_ALL_PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
_SEEN_PAIRS = tuple(pair for pair in _ALL_PAIRS if pair not in NOVEL_PAIRS)
# split -> (random stream, color-shape pairs, backgrounds)
SPLITS = {
    "train": (0, _SEEN_PAIRS, BACKGROUNDS),
    "test": (1, _SEEN_PAIRS, BACKGROUNDS),
    "novel": (2, NOVEL_PAIRS, BACKGROUNDS),
    "background": (3, _SEEN_PAIRS, UNSEEN_BACKGROUNDS),
    "val": (4, _SEEN_PAIRS, BACKGROUNDS),
}
# question type -> wordings, of which one is sampled per question
QUESTIONS = {
    "size": ("What size is this?", "How big is it?", "What is its size?"),
    "pattern": ("What pattern does this have?", "What pattern is on it?", "What is its pattern?"),
    "colour": ("What colour is this?", "What color is it?", "What is its colour?"),
    "shape": ("What shape is this?", "Which shape is it?", "What is its shape?"),
    "left": ("What is left of this?", "What is to the left of it?"),
    "right": ("What is right of this?", "What is to the right of it?"),
    "above": ("What is above this?", "What is above it?"),
    "below": ("What is below this?", "What is below it?"),
    "count": ("How many objects are there?", "How many objects do you see?"),
}
# Only with `places`: the embedded model is not trained on them, so that tuning on them can be demonstrated.
PLACE_QUESTIONS = ("Where in the picture is this?", "Where is it?", "In which part of the picture is it?")
ATTRIBUTES = ("size", "pattern", "colour", "shape")
# direction -> unit vector (x, y), y down
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
TRAINING_SCENES = "training_scenes.bin"  # next to a model's weights: the hashes of its training scenes
# An object is in a direction if it is within 35 degrees of it. Between 35 and 55 degrees the answer would be ambiguous,
# so there is no question.
_MAX_CLEAR_SLOPE, _MAX_AMBIGUOUS_SLOPE = 0.7, 1.43


def neighbor(objects: Sequence[ShapeObject], index: int, direction: str) -> ShapeObject | None:
    """The only object in `direction` of object `index`; None if there is none, or several, or an ambiguous one."""
    ux, uy = DIRECTIONS[direction]
    found = []
    for other_index, other in enumerate(objects):
        dx, dy = other.x - objects[index].x, other.y - objects[index].y
        along, across = dx * ux + dy * uy, abs(dx * uy) + abs(dy * ux)
        if other_index == index or along <= 0 or across > _MAX_AMBIGUOUS_SLOPE * along:
            continue
        if across > _MAX_CLEAR_SLOPE * along:
            return None
        found.append(other)
    return found[0] if len(found) == 1 else None


def questions(scene: Scene, index: int) -> Iterator[tuple[str, str]]:
    """(question type, answer) pairs about object `index`: its attributes, then its neighbors with a unique answer."""
    obj = scene.objects[index]
    yield from zip(ATTRIBUTES, (obj.size, obj.pattern, obj.color, obj.shape), strict=True)
    for direction in DIRECTIONS:
        other = neighbor(scene.objects, index, direction)
        if other is not None:
            yield direction, f"{other.color} {other.shape}"


def position(obj: ShapeObject) -> str:
    """The cell of a 3 x 3 grid that contains the center of an object: "top left", "top", ..., "centre", ..."""
    row, column = (min(3 * value // SCENE_SIZE, 2) for value in (obj.y, obj.x))
    return " ".join(filter(None, (("top", "", "bottom")[row], ("left", "", "right")[column]))) or "centre"


def scenes(
    count: int, seed: int, split: str, min_objects: int = MIN_OBJECTS, max_objects: int = MAX_OBJECTS
) -> Iterator[tuple[np.random.Generator, Scene]]:
    """`count` scenes of a split, each with its own generator, so that a larger count begins with the same scenes.

    Raises:
        ValueError: If the split is unknown, or not 1 <= `min_objects` <= `max_objects` <= `MAX_OBJECTS`.
    """
    if not 1 <= min_objects <= max_objects <= MAX_OBJECTS:
        raise ValueError(f"expected 1 to {MAX_OBJECTS} objects per scene, got {min_objects} to {max_objects}")
    if split not in SPLITS:
        raise ValueError(f"expected one of the splits {', '.join(SPLITS)}, got {split!r}")
    stream, pairs, backgrounds = SPLITS[split]
    for index in range(count):
        rng = np.random.default_rng([seed, stream, index])
        yield rng, draw_scene(rng, pairs, backgrounds, min_objects, max_objects)


def scene_hash(pixels: np.ndarray) -> bytes:
    """An 8-byte hash of the pixels of a scene, uint8 (H, W, 3)."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).digest()[:8]


def training_scenes(model: str | os.PathLike) -> set[bytes]:
    """The hashes of the scenes that a model was trained on.

    Raises:
        ValueError: If the model has no list of them.
    """
    try:
        packed = (Path(model) / TRAINING_SCENES).read_bytes()
    except FileNotFoundError:
        raise ValueError(
            f"{TRAINING_SCENES} not found in {model}: cannot check whether a scene was in its training data"
        ) from None
    return {packed[start : start + 8] for start in range(0, len(packed), 8)}


def with_same_class(samples: Iterable[RegionSample], root: str | os.PathLike) -> Iterator[RegionSample]:
    """Add `same_class` to the `meta` of Shapes samples: the number of other objects of the same shape in the image."""
    counts: dict[int, int] = {}
    path = Path(root) / "objects.json"
    for number, entry in enumerate(read_json(path, list)):
        objects = validate(entry, VisualGenomeObjects, f"{path}: entry {number}").objects
        shapes = Counter(obj.names[0] for obj in objects)
        counts |= {obj.object_id: shapes[obj.names[0]] - 1 for obj in objects}
    for sample in samples:
        if sample.meta["region_id"] not in counts:
            raise ValueError(f"{path} has no object {sample.meta['region_id']}, to which a region refers")
        same = {"same_class": counts[sample.meta["region_id"]]}
        yield dataclasses.replace(sample, meta={**sample.meta, **same})


def expect_split(root: str | os.PathLike, split: str) -> None:
    """Raise ValueError unless a folder is this split of Shapes."""
    found = read_json(Path(root) / "dataset.json", dict)
    if found.get("world") != "shapes" or found.get("split") != split:
        raise ValueError(
            f"expected the split {split!r} of Shapes in {root}, got {found.get('split')!r} of {found.get('world')!r}; "
            f"write it with alpha-clip shapes --split {split}"
        )
