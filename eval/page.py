"""A page of results as one HTML file: what the report and the comparison share, templates and small pictures."""

from __future__ import annotations

import base64
import functools
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from PIL import Image

from mllm.data.samples import ImageSource, TarMember, load_image
from mllm.files import made_by, write_file
from mllm.overlay import draw_overlay
from vision_tower import Region

# Metrics by which samples are put in order, the first there is: those whose value for one sample means something, and
# does not depend on the other samples as CIDEr's does.
_ORDERING = ("token F1", "ROUGE-L", "METEOR", "CIDEr", "exact match", "exactly right")
_SIDE = 320  # pixels of the longer side of a picture on the page
_QUALITY = 80  # of JPEG: about 20 KB a photograph
_LONGEST = 300  # characters of a text that are shown


class Picture(NamedTuple):
    """A small picture with its region drawn on it, or why there is none."""

    uri: str | None = None
    width: int = 0
    height: int = 0
    region: str = ""
    problem: str | None = None


def write_page(path: str | os.PathLike, template: str, **content: Any) -> None:
    """Write `pages/TEMPLATE` filled with `content`, atomically; its generator is `made_by(TEMPLATE)`.

    Raises:
        ValueError: If no file can be at `path`.
        OSError: If the file cannot be written.
    """
    text = _environment().get_template(template).render(generator=made_by(template), **content)
    # half a surrogate pair in a model's answer is not UTF-8: it is written as a reference, and shown as U+FFFD
    write_file(path, text.encode("utf-8", "xmlcharrefreplace"))


def picture_of(record: Mapping[str, Any], image_root: str | os.PathLike | None) -> Picture:
    """The picture of a record, its region outlined and the rest dimmed, longer side `_SIDE`.

    Args:
        record: With "image" and "region" as in `predictions.jsonl`; either may be missing.
        image_root: Folder that "image" is relative to; None when it is not known.

    Returns:
        The picture as a data URI. A page is not given up for a picture: what is wrong with it stands in "problem".
    """
    if not record.get("image"):
        return Picture(problem="the predictions do not name it")
    if image_root is None:
        return Picture(problem="the folder of the images was not given (--data)")
    try:
        image = load_image(_source(record["image"], Path(image_root)))
        region = Region.from_json(record["region"]) if record.get("region") else Region.whole()
        small = draw_overlay(image, region)
    except ValueError as error:
        return Picture(problem=str(error))
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=_QUALITY, optimize=True)
    uri = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    return Picture(uri, small.width, small.height, _described(record.get("region"), region))


def ordering_metric(names: Sequence[str]) -> str:
    """The metric by which samples are called good or bad, out of those that were computed."""
    return next((name for name in _ORDERING if name in names), names[0])


def p_value(p: float) -> str:
    """As text; a bootstrap of 1,000 resamples does not tell values under 0.001 apart."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _source(image: str, root: Path) -> ImageSource:
    """A path, or "tar!member"; a file with an exclamation mark in its name is a file."""
    archive, found, member = image.partition("!")
    if found and not (root / image).exists():
        return TarMember(str(root / archive), member)
    return str(root / image)


def _described(stated: Any, region: Region) -> str:
    """What a picture's alternative text says of the region; of masks and polygons, which go on and on, the kind."""
    if not stated:
        return "region not stated"
    return str(region) if region.kind in ("box", "nbox", "whole") else f"region given as {region.kind}"


@functools.cache
def _environment() -> jinja2.Environment:
    # autoescape for every file name: what models and data sets say is put on the page as text, never as markup
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("eval", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"x100": _x100, "signed": _signed, "interval": _interval, "p_value": p_value, "cut": _cut}
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    return environment


def _x100(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _signed(value: float | None) -> str:
    # U+2212: a hyphen can be broken off its number
    return "–" if value is None else f"{100 * value:+.1f}".replace("-", "\u2212")


def _interval(entry: Mapping[str, Any], form: Any = _x100) -> str:
    """Lower and upper end in brackets, or nothing where no interval was made."""
    if entry.get("low") is None:
        return ""
    return f"[{form(entry['low'])}, {form(entry['high'])}]".replace("-", "\u2212")


def _cut(text: str | None) -> str:
    """A text, shortened if it is very long, and saying so."""
    text = "" if text is None else str(text)
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]} … ({len(text) - _LONGEST:,} more characters)"
