"""Predictions as COCO caption results and annotations, for other people's tools (COCOEvalCap and its like)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm.files import check_file, check_replaceable, check_unread, made_by, write_json
from mllm.folders import check_shared_folder
from mllm.locks import locked

RESULTS, ANNOTATIONS = "results.json", "annotations.json"
_KIND = "COCO export"


def write_coco(out: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write results.json ([{"image_id", "caption"}]) and annotations.json ({"images", "annotations"}) into a folder.

    COCO's image ids are whole numbers, one for each sample: they count from 1 in the order of the records, and each
    image names its sample's own id.

    Raises:
        ValueError: If one of the files is there already and this did not write it.
        OSError: If they cannot be written.
    """
    check_coco(out)
    images, annotations, results = [], [], []
    for number, record in enumerate(records, 1):
        images.append({"id": number, "file_name": record.get("image", ""), "sample_id": record["id"]})
        results.append({"image_id": number, "caption": record["prediction"]})
        for text in record["references"]:
            annotations.append({"id": len(annotations) + 1, "image_id": number, "caption": text})
    info = {"made_by": made_by(_KIND)}
    # COCO's reader wants `licenses` and `type` beside the others
    content = {"info": info, "licenses": [], "type": "captions", "images": images, "annotations": annotations}
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        check_coco(out)
        # first the file that says whose both are: whenever this is killed, the same command can be rerun
        write_json(out / ANNOTATIONS, content, indent=None)
        write_json(out / RESULTS, results, indent=None)


def check_coco(out: Path, *, reads: Iterable[str | os.PathLike] = ()) -> None:
    """Raise ValueError unless the two files may be written into a folder: they are not there, or this wrote them, and
    the folder is neither what the command reads, nor a parent of it, nor one of another command (a run).

    COCO's results are a list, which has no room for a marker: they are replaced only beside annotations that have it.
    """
    reads = list(reads)
    check_shared_folder(out, _KIND, reads=reads)
    if not out.is_dir():
        return
    check_replaceable(out / ANNOTATIONS, reads=reads, kind=_KIND)
    check_unread(check_file(out / RESULTS), reads)
    if (out / RESULTS).exists() and not (out / ANNOTATIONS).exists():
        raise ValueError(f"{out / RESULTS} exists and was not written by this command; choose another folder")
