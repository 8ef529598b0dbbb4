"""The scenes of the drawn world: splits, what is asked about each object, and which scenes a model was trained on.

Splits: `train` and `test` share colour-shape pairs and backgrounds; `novel` draws only pairs that `train` never has;
`background` is `test` on backgrounds that `train` never has.
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
from mllm.data.schemas import GenomeObjects, checked
from mllm.data.shapes.world import (
    BACKGROUNDS,
    COLOURS,
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

_ALL_PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
_SEEN_PAIRS = tuple(pair for pair in _ALL_PAIRS if pair not in NOVEL_PAIRS)
# split -> (its own random stream, colour-shape pairs, backgrounds)
SPLITS = {
    "train": (0, _SEEN_PAIRS, BACKGROUNDS),
    "test": (1, _SEEN_PAIRS, BACKGROUNDS),
    "novel": (2, NOVEL_PAIRS, BACKGROUNDS),
    "background": (3, _SEEN_PAIRS, UNSEEN_BACKGROUNDS),
    "val": (4, _SEEN_PAIRS, BACKGROUNDS),
}
# question type -> wordings, one of which is drawn for each question
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
# asked only where `places` are wanted: the embedded model never heard of them, so that tuning has something to teach
PLACE_QUESTIONS = ("Where in the picture is this?", "Where is it?", "In which part of the picture is it?")
ATTRIBUTES = ("size", "pattern", "colour", "shape")
# direction -> unit vector (x, y), y down
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
TRAINING_SCENES = "training_scenes.bin"  # beside a model's weights: the hash of each scene it was trained on
# An object lies in a direction when it is within 35 degrees of it; between 35 and 55 degrees nobody could say, so
# nothing is asked.
_CLEAR_SLOPE, _UNCLEAR_SLOPE = 0.7, 1.43


def neighbour(objects: Sequence[ShapeObject], index: int, direction: str) -> ShapeObject | None:
    """The one object that lies in `direction` of object `index`, or None when there is none, several, or an unclear
    one.
    """
    ux, uy = DIRECTIONS[direction]
    found = []
    for other_index, other in enumerate(objects):
        dx, dy = other.x - objects[index].x, other.y - objects[index].y
        along, across = dx * ux + dy * uy, abs(dx * uy) + abs(dy * ux)
        if other_index == index or along <= 0 or across > _UNCLEAR_SLOPE * along:
            continue
        if across > _CLEAR_SLOPE * along:
            return None
        found.append(other)
    return found[0] if len(found) == 1 else None


def questions(scene: Scene, index: int) -> Iterator[tuple[str, str]]:
    """(question type, answer) pairs about object `index`: its attributes, then its neighbours where the answer is
    unique.
    """
    obj = scene.objects[index]
    for attribute in ATTRIBUTES:
        yield attribute, getattr(obj, attribute)
    for direction in DIRECTIONS:
        other = neighbour(scene.objects, index, direction)
        if other is not None:
            yield direction, f"{other.colour} {other.shape}"


def place(obj: ShapeObject) -> str:
    """In which of nine fields of the picture the object's centre lies: "top left", "top", ..., "centre", ..."""
    row, column = (min(3 * value // SCENE_SIZE, 2) for value in (obj.y, obj.x))
    return " ".join(filter(None, (("top", "", "bottom")[row], ("left", "", "right")[column]))) or "centre"


def scenes(
    count: int, seed: int, split: str, min_objects: int = MIN_OBJECTS, max_objects: int = MAX_OBJECTS
) -> Iterator[tuple[np.random.Generator, Scene]]:
    """`count` scenes of a split, each with its own generator: a longer set begins with the shorter one.

    Raises:
        ValueError: If the split is unknown, or not 1 <= `min_objects` <= `max_objects` <= `MAX_OBJECTS`.
    """
    if not 1 <= min_objects <= max_objects <= MAX_OBJECTS:
        raise ValueError(f"expected 1 to {MAX_OBJECTS} objects a scene, got {min_objects} to {max_objects}")
    if split not in SPLITS:
        raise ValueError(f"expected a split out of {', '.join(SPLITS)}, got {split!r}")
    stream, pairs, backgrounds = SPLITS[split]
    for index in range(count):
        rng = np.random.default_rng([seed, stream, index])
        yield rng, draw_scene(rng, pairs, backgrounds, min_objects, max_objects)


def scene_hash(pixels: np.ndarray) -> bytes:
    """8 bytes that tell a scene's pixels (uint8, H x W x 3) from all others."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).digest()[:8]


def training_scenes(model: str | os.PathLike) -> set[bytes]:
    """The hashes of the scenes that a model of the Shapes world was trained on.

    Raises:
        ValueError: If the model does not say which they were.
    """
    try:
        packed = (Path(model) / TRAINING_SCENES).read_bytes()
    except FileNotFoundError:
        raise ValueError(
            f"{model} has no {TRAINING_SCENES}: whether it saw a scene in training cannot be told"
        ) from None
    return {packed[start : start + 8] for start in range(0, len(packed), 8)}


def with_same_class(samples: Iterable[RegionSample], root: str | os.PathLike) -> Iterator[RegionSample]:
    """The samples of a Shapes folder, their meta with `same_class`: how many other objects of the picture have the
    region's shape.
    """
    counts: dict[int, int] = {}
    path = Path(root) / "objects.json"
    for number, entry in enumerate(read_json(path, list)):
        objects = checked(entry, GenomeObjects, f"{path}: entry {number}").objects
        shapes = Counter(obj.names[0] for obj in objects)
        counts |= {obj.object_id: shapes[obj.names[0]] - 1 for obj in objects}
    for sample in samples:
        if sample.meta["region_id"] not in counts:
            raise ValueError(f"{path} has no object {sample.meta['region_id']}, which a region of the same world needs")
        same = {"same_class": counts[sample.meta["region_id"]]}
        yield dataclasses.replace(sample, meta={**sample.meta, **same})


def expect_split(root: str | os.PathLike, split: str) -> None:
    """Raise ValueError unless a folder is this split of the Shapes world."""
    found = read_json(Path(root) / "dataset.json", dict)
    if found.get("world") != "shapes" or found.get("split") != split:
        raise ValueError(
            f"expected the split {split!r} of the Shapes world in {root}, got {found.get('split')!r} of "
            f"{found.get('world')!r}; write it with alpha-clip shapes --split {split}"
        )
