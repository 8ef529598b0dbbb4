"""Files that tests write and read: JSON, JSON lines, encoded images and masks."""

import io
import json
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

ROOT = Path(__file__).resolve().parents[1]


def read_json(path):
    return json.loads(path.read_text("utf-8"))


def write_json(path, content):
    path.write_text(json.dumps(content), "utf-8")
    return path


def read_json_lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").removesuffix("\n").split("\n")]


def write_json_lines(path, records):
    """Write one record per line; strings are written as they are."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), "utf-8")
    return path


def encoded_image(image, kind="PNG", **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def encoded_mask(mask):
    """A mask (H, W) as COCO's compressed RLE, which JSON can store."""
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}
