"""Export predictions as COCO caption results and annotations, for tools such as COCOEvalCap."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from eval.predictions import Prediction
from mllm.files import check_file, check_replaceable, check_unread, made_by, write_json
from mllm.folders import check_shared_folder
from mllm.locks import locked

RESULTS, ANNOTATIONS = "results.json", "annotations.json"
_KIND = "COCO export"


def write_coco(out: Path, predictions: Sequence[Prediction]) -> None:
    """Write results.json ([{"image_id", "caption"}]) and annotations.json ({"images", "annotations"}) into a folder.

    COCO's image ids are integers. They count from 1 in the order of the predictions, and `sample_id` of each image is
    the id of the sample.

    Raises:
        ValueError: If one of the files exists and was not written by this command.
        OSError: If the files cannot be written.
    """
    check_coco(out)
    images, annotations, results = [], [], []
    for number, prediction in enumerate(predictions, 1):
        images.append({"id": number, "file_name": prediction.image or "", "sample_id": prediction.id})
        results.append({"image_id": number, "caption": prediction.text})
        for text in prediction.references:
            annotations.append({"id": len(annotations) + 1, "image_id": number, "caption": text})
    info = {"made_by": made_by(_KIND)}
    # COCO's reader requires `licenses` and `type`
    content = {"info": info, "licenses": [], "type": "captions", "images": images, "annotations": annotations}
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        check_coco(out)
        # the file with the marker first, so that an interrupted command can be rerun
        write_json(out / ANNOTATIONS, content, indent=None)
        write_json(out / RESULTS, results, indent=None)


def check_coco(out: Path, *, reads: Iterable[str | os.PathLike] = ()) -> None:
    """Raise ValueError unless the two files may be written to a folder.

    Existing files must be from this command, and the folder must not be, contain or belong to what the command reads,
    nor be the output of another command (a run). COCO's results are a list without a place for a marker: they are
    replaced only together with annotations that have one.
    """
    reads = list(reads)
    check_shared_folder(out, _KIND, reads=reads)
    if not out.is_dir():
        return
    check_replaceable(out / ANNOTATIONS, reads=reads, kind=_KIND)
    check_unread(check_file(out / RESULTS), reads)
    if (out / RESULTS).exists() and not (out / ANNOTATIONS).exists():
        raise ValueError(f"{out / RESULTS} exists and was not written by this command; choose another folder")
