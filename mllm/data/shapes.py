"""Write the Shapes world to disk in Visual Genome's own format, and in RefCOCOg's.

    alpha-clip shapes --out DIR --images N --seed S [--split train|test|novel|background]

`DIR` then holds `image_data.json`, `region_descriptions.json` (one canonical phrase an object),
`question_answers.json`, `qa_to_region_mapping.json`, `objects.json`, `region_masks.json` (COCO RLE by region id) and
`VG_100K/<image_id>.png`, so the Visual Genome reader takes it like the real thing; `refs(umd).p` and `instances.json`,
so RefCOCOg's does; `dataset.json` says which split and seed it is. The same seed gives the same bytes and the same
pixels.

Splits: `train` and `test` share colour-shape pairs and backgrounds; `novel` draws only pairs that `train` never has;
`background` is `test` on backgrounds that `train` never has.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import pickle
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm.auto import tqdm

from mllm.data.json_files import read_json
from mllm.data.samples import RegionSample
from mllm.data.schemas import GenomeObjects, checked
from mllm.data.shapes_world import (
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
from mllm.files import replacing_folder, write_file, write_json

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
_COUNT_EVERY = 5  # one scene in so many is counted: the world is about its regions
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


def write(
    out: str | os.PathLike, count: int, seed: int, split: str = "train", *, places: bool = False, progress: bool = True
) -> None:
    """Write `count` scenes of a split to the folder `out` in Visual Genome's layout, with `places` also a question of
    type "place" about each object.

    Args:
        out: New, empty, or a folder that this wrote, which is replaced at the end.
        count: Number of scenes.
        seed: The same seed gives the same bytes.
        split: One of `SPLITS`.
        places: Whether to ask where each object is.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the split is unknown, `count` is not positive, or `out` holds anything else.
        OSError: If the folder cannot be written.
    """
    if count < 1:
        raise ValueError(f"expected at least 1 image, got {count}")
    drawn = scenes(count, seed, split)
    with replacing_folder(out, "shapes") as folder:
        (folder / "VG_100K").mkdir()
        records = _Records(places)
        for rng, scene in tqdm(drawn, total=count, desc=f"shapes {split}", disable=not progress):
            image_id = records.add(rng, scene)
            Image.fromarray(scene.pixels).save(folder / "VG_100K" / f"{image_id}.png")
        records.save(folder)
        _write_refs(folder, records, "train" if split == "train" else "val")
        about = {"world": "shapes", "split": split, "seed": seed, "images": count}
        write_json(folder / "dataset.json", about, indent=None)  # training refuses another split than train


class _Records:
    """The JSON files of a data set while they grow; ids count from 1 in drawing order."""

    def __init__(self, places: bool = False) -> None:
        self._places = places
        self.image_data: list[dict] = []
        self.region_descriptions: list[dict] = []
        self.question_answers: list[dict] = []
        self.qa_to_region_mapping: dict[str, int] = {}
        self.objects: list[dict] = []
        self.region_masks: dict[str, dict] = {}
        self._qa_id = 0

    def add(self, rng: np.random.Generator, scene: Scene) -> int:
        image_id = len(self.image_data) + 1
        self.image_data.append(
            {
                "image_id": image_id,
                "url": f"VG_100K/{image_id}.png",
                "width": SCENE_SIZE,
                "height": SCENE_SIZE,
                "coco_id": None,
                "flickr_id": None,
                "background": scene.background,
            }
        )
        regions, qas, objects = [], [], []
        for index, (obj, mask) in enumerate(zip(scene.objects, scene.masks, strict=True)):
            region_id = len(self.region_masks) + 1
            rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            self.region_masks[str(region_id)] = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
            x, y, width, height = (int(v) for v in coco_mask.toBbox(rle))
            box = {"x": x, "y": y, "width": width, "height": height}
            regions.append({"region_id": region_id, "image_id": image_id, **box, "phrase": obj.phrase, "synsets": []})
            objects.append(_object_record(region_id, box, obj))
            asked = [*questions(scene, index), *([("place", place(obj))] if self._places else [])]
            for kind, answer in asked:
                qas.append(self._question(rng, image_id, kind, answer))
                self.qa_to_region_mapping[str(self._qa_id)] = region_id
        if image_id % _COUNT_EVERY == 0:  # about the whole image: not mapped to a region
            qas.append(self._question(rng, image_id, "count", str(len(scene.objects))))
        self.region_descriptions.append({"id": image_id, "regions": regions})
        self.question_answers.append({"id": image_id, "qas": qas})
        self.objects.append({"image_id": image_id, "objects": objects})
        return image_id

    def _question(self, rng: np.random.Generator, image_id: int, kind: str, answer: str) -> dict:
        self._qa_id += 1
        wordings = PLACE_QUESTIONS if kind == "place" else QUESTIONS[kind]
        wording = wordings[rng.integers(len(wordings))]
        return {
            "qa_id": self._qa_id,
            "image_id": image_id,
            "question": wording,
            "answer": answer,
            "type": kind,
            "q_objects": [],
            "a_objects": [],
        }

    def save(self, out: Path) -> None:
        for name, content in vars(self).items():
            if not name.startswith("_"):
                write_json(out / f"{name}.json", content, indent=None)


def _write_refs(out: Path, records: _Records, split: str) -> None:
    """The same objects in the layout of lichengunc/refer: a ref, with its one expression, and an annotation each."""
    annotations, refs = [], []
    for of_image, described in zip(records.objects, records.region_descriptions, strict=True):
        for obj, region in zip(of_image["objects"], described["regions"], strict=True):
            number, mask = obj["object_id"], records.region_masks[str(obj["object_id"])]
            annotation = {
                "id": number,
                "image_id": of_image["image_id"],
                "category_id": SHAPES.index(obj["names"][0]) + 1,
                "bbox": [obj["x"], obj["y"], obj["w"], obj["h"]],
                "area": int(coco_mask.area({**mask, "counts": mask["counts"].encode("ascii")})),
                "segmentation": mask,
                "iscrowd": 0,
            }
            annotations.append(annotation)
            words, file = region["phrase"], f"{of_image['image_id']}_{number}.png"
            sentence = {"sent_id": number, "raw": words, "sent": words, "tokens": words.split()}
            about = {key: annotation[key] for key in ("image_id", "category_id")}
            ref = {"ref_id": number, "ann_id": number, **about, "file_name": file, "split": split}
            refs.append({**ref, "sent_ids": [number], "sentences": [sentence]})
    images = [
        {"id": entry["image_id"], "file_name": f"{entry['image_id']}.png", "width": SCENE_SIZE, "height": SCENE_SIZE}
        for entry in records.image_data
    ]
    categories = [{"id": index, "name": name, "supercategory": "shape"} for index, name in enumerate(SHAPES, 1)]
    instances = {"images": images, "annotations": annotations, "categories": categories}
    write_json(out / "instances.json", instances, indent=None)
    write_file(out / "refs(umd).p", pickle.dumps(refs, protocol=2))  # as Python 2 wrote the published ones


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


def _object_record(object_id: int, box: dict, obj: ShapeObject) -> dict:
    """An entry of objects.json, with the attributes that VG keeps in attributes.json."""
    return {
        "object_id": object_id,
        "x": box["x"],
        "y": box["y"],
        "w": box["width"],
        "h": box["height"],
        "names": [obj.shape],
        "synsets": [],
        "attributes": [obj.size, obj.pattern, obj.colour],
    }


def run(args: argparse.Namespace) -> int:
    """Draw what `alpha-clip shapes` asks for; returns the exit code."""
    if args.layout == "grit":
        from mllm.data import shapes_grit

        asked = {"tars": args.tars, "min_objects": args.min_objects, "max_objects": args.max_objects}
        given = {name: value for name, value in asked.items() if value is not None}
        shapes_grit.write(args.out, args.images, args.seed, args.split, **given)
    else:
        write(args.out, args.images, args.seed, args.split, places=args.places)
    return 0
