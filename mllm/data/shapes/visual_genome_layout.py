"""Writes Shapes in the layouts of Visual Genome and RefCOCOg.

    alpha-clip shapes --out DIR --images N --seed S [--split train|test|novel|background]

`DIR` contains the files of Visual Genome: `image_data.json`, `region_descriptions.json` (one phrase per object),
`question_answers.json`, `qa_to_region_mapping.json`, `objects.json`, `region_masks.json` (COCO RLE by region id) and
`VG_100K/<image_id>.png`; those of RefCOCOg: `refs(umd).p` and `instances.json`; and `dataset.json` with the split and
seed. The same seed gives the same bytes.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm.auto import tqdm

from mllm.data.shapes.drawing import SCENE_SIZE, SHAPES, Scene, ShapeObject
from mllm.data.shapes.scenes import PLACE_QUESTIONS, QUESTIONS, position, questions, scenes
from mllm.files import write_file, write_json
from mllm.folders import replacing_folder

_COUNT_EVERY = 5  # one scene in 5 has a question about the whole image


def write(
    out: str | os.PathLike, count: int, seed: int, split: str = "train", *, places: bool = False, progress: bool = True
) -> None:
    """Write `count` scenes of a split.

    Args:
        out: New, empty, or a folder written by this function, which is replaced at the end.
        count: Number of scenes.
        seed: The same seed gives the same bytes.
        split: One of `mllm.data.shapes.scenes.SPLITS`.
        places: Whether to add a question of type "place" about each object.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the split is unknown, `count` is not positive, or `out` contains other files.
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
        info = {"world": "shapes", "split": split, "seed": seed, "images": count}
        write_json(folder / "dataset.json", info, indent=None)  # training reads the split


class _Records:
    """Collects the contents of the JSON files; ids count from 1 in the order of drawing."""

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
            pairs = [*questions(scene, index), *([("place", position(obj))] if self._places else [])]
            for kind, answer in pairs:
                qas.append(self._question(rng, image_id, kind, answer))
                self.qa_to_region_mapping[str(self._qa_id)] = region_id
        if image_id % _COUNT_EVERY == 0:  # not mapped to a region
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
    """Write the layout of lichengunc/refer: an annotation and a ref with one expression per object."""
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
            phrase, file = region["phrase"], f"{of_image['image_id']}_{number}.png"
            sentence = {"sent_id": number, "raw": phrase, "sent": phrase, "tokens": phrase.split()}
            shared = {key: annotation[key] for key in ("image_id", "category_id")}
            ref = {"ref_id": number, "ann_id": number, **shared, "file_name": file, "split": split}
            refs.append({**ref, "sent_ids": [number], "sentences": [sentence]})
    images = [
        {"id": entry["image_id"], "file_name": f"{entry['image_id']}.png", "width": SCENE_SIZE, "height": SCENE_SIZE}
        for entry in records.image_data
    ]
    categories = [{"id": index, "name": name, "supercategory": "shape"} for index, name in enumerate(SHAPES, 1)]
    instances = {"images": images, "annotations": annotations, "categories": categories}
    write_json(out / "instances.json", instances, indent=None)
    write_file(out / "refs(umd).p", pickle.dumps(refs, protocol=2))  # protocol of Python 2, as in the published files


def _object_record(object_id: int, box: dict, obj: ShapeObject) -> dict:
    """An entry of objects.json, with the attributes that Visual Genome has in attributes.json."""
    return {
        "object_id": object_id,
        "x": box["x"],
        "y": box["y"],
        "w": box["width"],
        "h": box["height"],
        "names": [obj.shape],
        "synsets": [],
        "attributes": [obj.size, obj.pattern, obj.color],
    }
