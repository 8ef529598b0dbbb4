"""Predictions as COCO caption results and annotations, for other people's tools (COCOEvalCap and its like)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_coco(out: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write results.json ([{"image_id", "caption"}]) and annotations.json ({"images", "annotations"}) into a folder.

    COCO's image ids are whole numbers, one for each sample: they count from 1 in the order of the records, and each
    image names its sample's own id.

    Raises:
        ValueError: If one of the files is there already.
    """
    files = {name: out / name for name in ("results.json", "annotations.json")}
    for file in files.values():
        if file.exists():
            raise ValueError(f"{file} is there already; choose another --out, or delete it")
    images, annotations, results = [], [], []
    for number, record in enumerate(records, 1):
        images.append({"id": number, "file_name": record.get("image", ""), "sample_id": record["id"]})
        results.append({"image_id": number, "caption": record["prediction"]})
        for text in record["references"]:
            annotations.append({"id": len(annotations) + 1, "image_id": number, "caption": text})
    out.mkdir(parents=True, exist_ok=True)
    # COCO's reader wants these two beside the others
    content = {"info": {}, "licenses": [], "type": "captions", "images": images, "annotations": annotations}
    files["annotations.json"].write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    files["results.json"].write_text(json.dumps(results, ensure_ascii=False), encoding="utf-8")
