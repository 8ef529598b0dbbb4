"""The types of records in files that others wrote: one class for each kind of record, checked by `checked`.

Fields that are not named here are ignored. Numbers are finite and bounded: an id fits 64 bits, a coordinate 1e9 pixels.
An id that has several names in different versions of a data set is read by the first that has a value.
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
MOST_SENTENCES = 10_000  # of a ref: in a pickle, many refs can share one list
T = TypeVar("T")

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "array": "a list",
    "object": "an object",
    "bool": "true or false",
    "null": "null",
}


def checked(value: Any, kind: type[T], name: object = None) -> T:
    """A value as read from JSON, as what it must be.

    Raises:
        ValueError: If it is something else. The message begins with `name`, where it is given, and names the field.
    """
    try:
        return msgspec.convert(value, kind)
    except _INVALID as error:
        found = _in_plain_words(error)
        raise ValueError(found if name is None else f"{name}: {found}") from None


_INVALID = (msgspec.ValidationError, UnicodeEncodeError)  # the second of half a surrogate pair, where text has a limit


def _in_plain_words(error: Exception) -> str:
    """What msgspec found, with the field."""
    if isinstance(error, UnicodeEncodeError):
        return "text that is not UTF-8: half of a surrogate pair"
    words, _, field = str(error).partition(" - at ")
    words = re.sub(r"`([^`]*)`", lambda match: _in_words(match[1]), words)
    words = "text without NUL characters expected" if "matching regex" in words else words
    field = field.replace("`", "").removeprefix("$").removeprefix(".")
    return f"{field}: {words[0].lower()}{words[1:]}" if field else words[0].lower() + words[1:]


def _in_words(types: str) -> str:
    return " or ".join(_WORDS.get(name, repr(name)) for name in types.split(" | "))


class CocoImage(Struct):
    """An image of COCO's layout; in MDETR's files, an expression."""

    id: Id
    width: Side
    height: Side
    file_name: FileName | None = None
    caption: str | None = None
    original_id: Id | None = None


class CocoAnnotation(Struct):
    """An annotation of COCO's layout, of an image that `image_id` names."""

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
    sentences: Annotated[list[Any], Meta(max_length=MOST_SENTENCES)] = []


class Sentence(Struct):
    """An expression of RefCOCO."""

    sent_id: Id
    sent: str | None = None


class HubImage(Struct):
    """The image of a row."""

    content: bytes = msgspec.field(name="bytes")


class HubRow(Struct):
    """A row of lmms-lab's RefCOCOg: the file's bytes, a box, all expressions."""

    image: HubImage
    answer: list[str]
    bbox: PixelBox
    file_name: FileName | None = None


class GenomeImage(Struct):
    """An entry of Visual Genome's image_data.json."""

    width: Side
    height: Side
    image_id: Id | None = None
    id: Id | None = None
    url: FileName | None = None


class GenomeRegion(Struct):
    """A record of Visual Genome's region_descriptions.json."""

    x: Pixels
    y: Pixels
    width: Pixels
    height: Pixels
    region_id: Id | None = None
    id: Id | None = None
    phrase: str | None = None


class GenomeQuestion(Struct):
    """A record of Visual Genome's question_answers.json."""

    qa_id: Id | None = None
    id: Id | None = None
    question: str | None = None
    answer: str | None = None
    type: str | None = None


class GenomeObject(Struct):
    """An object of Visual Genome's objects.json."""

    object_id: Id
    names: Annotated[list[str], Meta(min_length=1)]


class GenomeObjects(Struct):
    """An entry of Visual Genome's objects.json."""

    objects: list[GenomeObject]


class Rle(Struct):
    """COCO's run lengths; size is [height, width]."""

    size: tuple[int, int]
    counts: str | list[int]


class SampleMeta(Struct):
    """What is used of a sample's meta; everything else in it is only passed on."""

    image_id: Id | str | None = None
    region_id: Id | str | None = None
    width: Side | None = None
    height: Side | None = None
    area: Share | None = None
    same_class: Count | None = None
    type: str | None = None
    split: Annotated[str, Meta(min_length=1)] | None = None


class Line(Struct, forbid_unknown_fields=True):
    """A line of one's own JSONL file."""

    image: FileName
    region: dict[str, Any]
    id: Id | str | UnsetType = UNSET
    question: str | None = None
    answer: str | list[str] | UnsetType = UNSET
    references: str | list[str] | UnsetType = UNSET
    meta: dict[str, Any] | UnsetType = UNSET


class Prediction(Struct):
    """What is used of a line of predictions, beside its id, text and references."""

    image: str | None = None
    region: dict[str, Any] | None = None
    question: str | None = None
    prompt: str | None = None
    truncated: bool | None = None
    cut: bool | None = None  # `truncated` in version 0.1.0
    error: str | None = None
    meta: SampleMeta | None = None


class IndexRecord(Struct):
    """An index's index.json."""

    root: Annotated[str, Meta(pattern="^[^\x00]+$")]
    pictures: Count
    regions: Count


class DatasetRecord(Struct):
    """A folder's dataset.json."""

    split: Annotated[str, Meta(min_length=1)]
    world: str | None = None


def is_name(words: str) -> bool:
    """Whether text can be the name of a file and be written in a report."""
    return "\0" not in words and is_utf8(words)
