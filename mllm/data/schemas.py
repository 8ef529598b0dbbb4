"""Schemas of the records in JSON files: one msgspec class for each kind of record, checked by `validate`.

Fields without a declaration are ignored. Numbers are finite and bounded: an id by 64 bits, a coordinate by 1e9 pixels.
An id can have different field names in different versions of a dataset; the first one with a value is used.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from mllm.data.json_files import is_utf8

Id = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Side = Annotated[int, Meta(ge=1, le=10**9)]  # width or height of an image in pixels
Pixels = Annotated[float, Meta(ge=-1e9, le=1e9)]
PixelBox = tuple[Pixels, Pixels, Pixels, Pixels]  # x, y, width, height
Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
FileName = Annotated[str, Meta(pattern="^[^\x00]{0,4096}$")]
MAX_SENTENCES = 10_000  # per ref: in a pickle, many refs can share one list
T = TypeVar("T")

_TYPE_NAMES = {
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "array": "a list",
    "object": "an object",
    "bool": "true or false",
    "null": "null",
}


def validate(value: Any, kind: type[T], name: object = None) -> T:
    """Convert a parsed JSON value to a schema.

    Args:
        value: The parsed value.
        kind: The schema.
        name: Name of the record, with which the error message begins.

    Raises:
        ValueError: If the value does not match the schema. The message states the field.
    """
    try:
        return msgspec.convert(value, kind)
    except _INVALID as error:
        found = _readable(error)
        raise ValueError(found if name is None else f"{name}: {found}") from None


# UnicodeEncodeError: a lone surrogate in a text with a maximum length
_INVALID = (msgspec.ValidationError, UnicodeEncodeError)


def _readable(error: Exception) -> str:
    """Msgspec's message without its notation."""
    if isinstance(error, UnicodeEncodeError):
        return "text is not valid UTF-8 (lone surrogate)"
    message, _, field = str(error).partition(" - at ")
    message = re.sub(r"`([^`]*)`", lambda match: _type_names(match[1]), message)
    message = "text without NUL characters expected" if "matching regex" in message else message
    message = message[0].lower() + message[1:]
    field = field.replace("`", "").removeprefix("$").removeprefix(".")
    return f"{field}: {message}" if field else message


def _type_names(types: str) -> str:
    return " or ".join(_TYPE_NAMES.get(name, repr(name)) for name in types.split(" | "))


class CocoImage(Struct):
    """An image in COCO's layout; in MDETR's files, an expression."""

    id: Id
    width: Side
    height: Side
    file_name: FileName | None = None
    caption: str | None = None
    original_id: Id | None = None


class CocoAnnotation(Struct):
    """An annotation in COCO's layout."""

    id: Id
    image_id: Id
    bbox: PixelBox
    caption: str | None = None
    original_id: Id | None = None
    segmentation: Any = None


class Ref(Struct):
    """A ref of RefCOCO: the expressions of one annotation."""

    ref_id: Id
    ann_id: Id
    image_id: Id
    sentences: Annotated[list[Any], Meta(max_length=MAX_SENTENCES)] = []


class RefSentence(Struct):
    """An expression of RefCOCO."""

    sent_id: Id
    sent: str | None = None


class ParquetImage(Struct):
    """The image of a row."""

    content: bytes = msgspec.field(name="bytes")


class ParquetRow(Struct):
    """A row of lmms-lab's RefCOCOg: an image file, a box, and its expressions."""

    image: ParquetImage
    answer: list[str]
    bbox: PixelBox
    file_name: FileName | None = None


class VisualGenomeImage(Struct):
    """An entry of Visual Genome's image_data.json."""

    width: Side
    height: Side
    image_id: Id | None = None
    id: Id | None = None
    url: FileName | None = None


class VisualGenomeRegion(Struct):
    """A record of Visual Genome's region_descriptions.json."""

    x: Pixels
    y: Pixels
    width: Pixels
    height: Pixels
    region_id: Id | None = None
    id: Id | None = None
    phrase: str | None = None


class VisualGenomeQuestion(Struct):
    """A record of Visual Genome's question_answers.json."""

    qa_id: Id | None = None
    id: Id | None = None
    question: str | None = None
    answer: str | None = None
    type: str | None = None


class VisualGenomeObject(Struct):
    """An object of Visual Genome's objects.json."""

    object_id: Id
    names: Annotated[list[str], Meta(min_length=1)]


class VisualGenomeObjects(Struct):
    """An entry of Visual Genome's objects.json."""

    objects: list[VisualGenomeObject]


class Rle(Struct):
    """COCO's run-length encoding of a mask; `size` is [height, width]."""

    size: tuple[int, int]
    counts: str | list[int]


class SampleMeta(Struct):
    """The fields of a sample's `meta` that have a meaning; all others are passed on."""

    image_id: Id | str | None = None
    region_id: Id | str | None = None
    width: Side | None = None
    height: Side | None = None
    area: Share | None = None
    same_class: Count | None = None
    type: str | None = None
    split: Annotated[str, Meta(min_length=1)] | None = None


class JsonlSample(Struct, forbid_unknown_fields=True):
    """A line of a JSONL dataset."""

    image: FileName
    region: dict[str, Any]
    id: Id | str | UnsetType = UNSET
    question: str | None = None
    answer: str | list[str] | UnsetType = UNSET
    references: str | list[str] | UnsetType = UNSET
    meta: dict[str, Any] | UnsetType = UNSET


class Prediction(Struct):
    """A line of a predictions file, without its id, text and references."""

    image: str | None = None
    region: dict[str, Any] | None = None
    question: str | None = None
    prompt: str | None = None
    truncated: bool | None = None
    cut: bool | None = None  # `truncated` in version 0.1.0
    error: str | None = None
    meta: SampleMeta | None = None


class IndexInfo(Struct):
    """The `index.json` of a region index."""

    root: Annotated[str, Meta(pattern="^[^\x00]+$")]
    images: Count
    regions: Count


class DatasetInfo(Struct):
    """The `dataset.json` of a dataset that is one split."""

    split: Annotated[str, Meta(min_length=1)]
    world: str | None = None


def is_file_name(text: str) -> bool:
    """Whether text can be the name of a file and be written in a report."""
    return "\0" not in text and is_utf8(text)
