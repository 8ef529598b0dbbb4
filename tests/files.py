"""Files that tests write and read: JSON, JSON lines and encoded images."""

import io
import json
from pathlib import Path

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
