"""Writes Shapes in GRIT's layout: images with captions, phrases, boxes and masks.

    alpha-clip shapes --layout grit --out DIR --images N --seed S [--split train] [--tars K] [--min-objects 1]
        [--max-objects 6]

The scenes are those of `alpha-clip shapes` with the same seed and split. The caption of a scene lists its objects from
left to right; `ref_exps` has the phrase and box of each object, `seudo_masks` (the spelling of the released code) its
mask. `DIR` contains `00000/000000001.png` and `.json`, ten thousand images per folder, or with `--tars` that many tars
in the WebDataset format, and `dataset.json` with the split and seed. The same seed gives the same bytes.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm.auto import tqdm

from mllm.data.shapes.drawing import MAX_OBJECTS, MIN_OBJECTS, SCENE_SIZE, Scene
from mllm.data.shapes.scenes import scenes
from mllm.files import write_json
from mllm.folders import replacing_folder

_IMAGES_PER_FOLDER = 10_000  # as in img2dataset's shards


def write(
    out: str | os.PathLike,
    count: int,
    seed: int,
    split: str = "train",
    *,
    tars: int = 0,
    min_objects: int = MIN_OBJECTS,
    max_objects: int = MAX_OBJECTS,
    progress: bool = True,
) -> None:
    """Write `count` scenes of a split.

    Args:
        out: New, empty, or a folder written by this function, which is replaced at the end.
        count: Number of scenes.
        seed: The same seed gives the same bytes.
        split: One of `mllm.data.shapes.scenes.SPLITS`.
        tars: Number of tars; with 0, the files are in folders.
        min_objects: Minimum number of objects per scene.
        max_objects: Maximum number of objects per scene.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the split is unknown, a number is out of range, or `out` contains other files.
        OSError: If the folder cannot be written.
    """
    if count < 1 or not 0 <= tars <= count:
        raise ValueError(f"expected at least 1 image and at most 1 tar per image, got {count} images and {tars} tars")
    drawn = scenes(count, seed, split, min_objects, max_objects)
    with replacing_folder(out, "shapes in GRIT's layout") as folder:
        files = _files(tqdm(drawn, total=count, desc=f"shapes {split}", disable=not progress))
        if tars:
            _write_tars(folder, files, np.linspace(0, count, tars + 1).astype(int).tolist())
        else:
            for number, contents in files:
                subfolder = folder / f"{number // _IMAGES_PER_FOLDER:05d}"
                subfolder.mkdir(exist_ok=True)
                for suffix in ("png", "json"):
                    (subfolder / f"{number:09d}.{suffix}").write_bytes(contents[suffix])
        info = {"world": "shapes", "split": split, "seed": seed, "images": count}
        write_json(folder / "dataset.json", info, indent=None)  # training reads the split


def annotation(scene: Scene) -> dict[str, Any]:
    """The JSON of a scene: the bounding boxes of the masks, in fractions of the image; objects from left to right."""
    order = sorted(range(len(scene.objects)), key=lambda index: (scene.objects[index].x, scene.objects[index].y))
    masks = coco_mask.encode(np.asfortranarray(np.stack([scene.masks[index] for index in order], axis=-1), np.uint8))
    boxes = coco_mask.toBbox(masks)
    phrases, rows, start = [scene.objects[index].phrase for index in order], [], 0
    for phrase, (x, y, width, height) in zip(phrases, boxes.tolist(), strict=True):
        box = (side / SCENE_SIZE for side in (x, y, x + width, y + height))
        rows.append([float(start), float(start + len(phrase)), *box, 1.0])  # floats, as in the published files
        start += len(phrase) + len(", ")
    return {
        "caption": ", ".join(phrases),
        "width": SCENE_SIZE,
        "height": SCENE_SIZE,
        "ref_exps": rows,
        "seudo_masks": [{"size": mask["size"], "counts": mask["counts"].decode("ascii")} for mask in masks],
    }


def _files(drawn: Iterator[tuple[np.random.Generator, Scene]]) -> Iterator[tuple[int, dict[str, bytes]]]:
    """The number of each scene, from 1, and the contents of its files by suffix."""
    for number, (_, scene) in enumerate(drawn, 1):
        png = io.BytesIO()
        Image.fromarray(scene.pixels).save(png, "PNG", compress_level=1)  # half the time, files 20% larger
        record = annotation(scene)
        contents = {"json": json.dumps(record).encode(), "txt": record["caption"].encode()}
        yield number, {"png": png.getvalue(), **contents}


def _write_tars(out: Path, files: Iterator[tuple[int, dict[str, bytes]]], bounds: Sequence[int]) -> None:
    """Write one tar per pair of successive bounds."""
    for shard, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        with tarfile.open(out / f"{shard:05d}.tar", "w") as archive:
            for _ in range(last - first):
                number, contents = next(files)
                for suffix, content in contents.items():
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
