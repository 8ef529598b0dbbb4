"""Write the Shapes world to disk in GRIT's layout: captions, phrases of them, boxes and masks.

    alpha-clip shapes --layout grit --out DIR --images N --seed S [--split train] [--tars K] [--min-objects 1]
        [--max-objects 6]

The scenes are those of `alpha-clip shapes` with the same seed and split. A scene's caption names its objects
from left to right; `ref_exps` has each object's phrase in it and its box, `seudo_masks` (the released spelling) its
mask. `DIR` then holds `00000/000000001.png` and `.json`, ten thousand pictures a folder, or with `--tars` as many
webdataset tars; `dataset.json` says which split and seed it is. The same seed gives the same bytes.
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

from mllm.data.shapes.scenes import scenes
from mllm.data.shapes.world import MAX_OBJECTS, MIN_OBJECTS, SCENE_SIZE, Scene
from mllm.files import write_json
from mllm.folders import replacing_folder

_PICTURES_IN_FOLDER = 10_000  # as many as img2dataset puts in a shard


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
    """Write `count` scenes of a split to the folder `out`, in so many tars or, with none, in folders.

    Args:
        out: New, empty, or a folder that this wrote, which is replaced at the end.
        count: Number of scenes.
        seed: The same seed gives the same bytes.
        split: One of `mllm.data.shapes.scenes.SPLITS`.
        tars: Number of tars.
        min_objects: Fewest objects of a scene.
        max_objects: Most objects of a scene.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the split is unknown, a number is out of range, or `out` holds anything else.
        OSError: If the folder cannot be written.
    """
    if count < 1 or not 0 <= tars <= count:
        raise ValueError(f"expected at least 1 image and 0 to that many tars, got {count} and {tars}")
    drawn = scenes(count, seed, split, min_objects, max_objects)
    with replacing_folder(out, "shapes in GRIT's layout") as whole:
        files = _files(tqdm(drawn, total=count, desc=f"shapes {split}", disable=not progress))
        if tars:
            _write_tars(whole, files, np.linspace(0, count, tars + 1).astype(int).tolist())
        else:
            for number, contents in files:
                folder = whole / f"{number // _PICTURES_IN_FOLDER:05d}"
                folder.mkdir(exist_ok=True)
                for suffix in ("png", "json"):
                    (folder / f"{number:09d}.{suffix}").write_bytes(contents[suffix])
        about = {"world": "shapes", "split": split, "seed": seed, "images": count}
        write_json(whole / "dataset.json", about, indent=None)  # training reads the split from it


def annotation(scene: Scene) -> dict[str, Any]:
    """A scene's JSON: boxes around the masks, in fractions of the picture; objects from left to right."""
    order = sorted(range(len(scene.objects)), key=lambda index: (scene.objects[index].x, scene.objects[index].y))
    masks = coco_mask.encode(np.asfortranarray(np.stack([scene.masks[index] for index in order], axis=-1), np.uint8))
    boxes = coco_mask.toBbox(masks)
    phrases, rows, start = [scene.objects[index].phrase for index in order], [], 0
    for phrase, (x, y, width, height) in zip(phrases, boxes.tolist(), strict=True):
        box = (side / SCENE_SIZE for side in (x, y, x + width, y + height))
        rows.append([float(start), float(start + len(phrase)), *box, 1.0])  # floats, as the published starts are
        start += len(phrase) + len(", ")
    return {
        "caption": ", ".join(phrases),
        "width": SCENE_SIZE,
        "height": SCENE_SIZE,
        "ref_exps": rows,
        "seudo_masks": [{"size": mask["size"], "counts": mask["counts"].decode("ascii")} for mask in masks],
    }


def _files(drawn: Iterator[tuple[np.random.Generator, Scene]]) -> Iterator[tuple[int, dict[str, bytes]]]:
    """Number, from 1, and the content of each scene's files by suffix."""
    for number, (_, scene) in enumerate(drawn, 1):
        picture = io.BytesIO()
        Image.fromarray(scene.pixels).save(picture, "PNG", compress_level=1)  # in half the time, a fifth larger
        record = annotation(scene)
        contents = {"json": json.dumps(record).encode(), "txt": record["caption"].encode()}
        yield number, {"png": picture.getvalue(), **contents}


def _write_tars(out: Path, files: Iterator[tuple[int, dict[str, bytes]]], bounds: Sequence[int]) -> None:
    """Tars of the pictures from each bound to the next."""
    for shard, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        with tarfile.open(out / f"{shard:05d}.tar", "w") as archive:
            for _ in range(last - first):
                number, contents = next(files)
                for suffix, content in contents.items():
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
