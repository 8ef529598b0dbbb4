"""A page of results as one HTML file: templates, thumbnails and number formats of the report and the comparison."""

from __future__ import annotations

import base64
import functools
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from PIL import Image

from eval.metrics.intervals import Difference
from eval.predictions import Prediction
from eval.results import MetricValue, label
from mllm.data.samples import ImageSource, TarMember, load_image
from mllm.files import made_by, write_file
from mllm.overlay import draw_overlay
from vision_tower import Region

# Samples are sorted by the first of these metrics that was computed. Those that are meaningful for a single sample come
# first; CIDEr depends on the other samples.
_SORT_METRICS = ("token_f1", "rouge_l", "meteor", "cider", "exact_match", "literal_match")
_THUMBNAIL_SIZE = 320  # longer side in pixels
_JPEG_QUALITY = 80  # about 20 KB per photograph
_MAX_TEXT = 300  # characters of a text that are shown


class Thumbnail(NamedTuple):
    """A small image with its region drawn on it, or why there is none."""

    uri: str | None = None
    width: int = 0
    height: int = 0
    region: str = ""
    problem: str | None = None


def write_page(path: str | os.PathLike, template: str, **content: Any) -> None:
    """Render `pages/TEMPLATE` with `content` and write it atomically; its generator is `made_by(TEMPLATE)`.

    Raises:
        ValueError: If `path` cannot be a file.
        OSError: If the file cannot be written.
    """
    text = _environment().get_template(template).render(generator=made_by(template), **content)
    # half a surrogate pair in an answer is not UTF-8: it is written as a character reference and shown as U+FFFD
    write_file(path, text.encode("utf-8", "xmlcharrefreplace"))


def thumbnail(prediction: Prediction, image_root: str | os.PathLike | None) -> Thumbnail:
    """The image of a prediction with its region outlined and the rest dimmed.

    Args:
        prediction: Its image or region may be None.
        image_root: Folder that the image is relative to; None if unknown.

    Returns:
        The image as a data URI. If it cannot be shown, `problem` states the reason.
    """
    if not prediction.image:
        return Thumbnail(problem="the predictions have no image names")
    if image_root is None:
        return Thumbnail(problem="the folder of the images was not given (--data)")
    try:
        image = load_image(_source(prediction.image, Path(image_root)))
        region = Region.from_json(prediction.region) if prediction.region else Region.whole()
        small = draw_overlay(image, region)
    except ValueError as error:
        return Thumbnail(problem=str(error))
    small.thumbnail((_THUMBNAIL_SIZE, _THUMBNAIL_SIZE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    uri = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    return Thumbnail(uri, small.width, small.height, _alt_text(prediction.region, region))


def sort_metric(names: Sequence[str]) -> str:
    """The metric that samples are sorted by, from those that were computed."""
    return next((name for name in _SORT_METRICS if name in names), names[0])


def p_value(p: float) -> str:
    """Format a p-value; a bootstrap with 1,000 resamples does not resolve values below 0.001."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _source(image: str, root: Path) -> ImageSource:
    """A path, or "tar!member"; a file with an exclamation mark in its name is a file."""
    archive, found, member = image.partition("!")
    if found and not (root / image).exists():
        return TarMember(str(root / archive), member)
    return str(root / image)


def _alt_text(stated: Any, region: Region) -> str:
    """The region in an image's alternative text; only the type of masks and polygons, which are long."""
    if not stated:
        return "region not stated"
    return str(region) if region.kind in ("box", "nbox", "whole") else f"region given as {region.kind}"


@functools.cache
def _environment() -> jinja2.Environment:
    # autoescape for every file name: text of models and datasets must never become markup
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("eval", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"x100": _x100, "signed": _signed, "interval": _interval, "p_value": p_value, "label": label}
    environment.filters["shorten"] = _shorten
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    return environment


def _x100(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _signed(value: float | None) -> str:
    # U+2212: a line can break after a hyphen
    return "–" if value is None else f"{100 * value:+.1f}".replace("-", "\u2212")


def _interval(value: MetricValue | Difference) -> str:
    """The interval in brackets, or "" if there is none."""
    return "" if value.low is None else f"[{_x100(value.low)}, {_x100(value.high)}]".replace("-", "\u2212")


def _shorten(text: str | None) -> str:
    """A text; if it is very long, its beginning and the number of omitted characters."""
    text = "" if text is None else str(text)
    if len(text) <= _MAX_TEXT:
        return text
    return f"{text[:_MAX_TEXT]} … ({len(text) - _MAX_TEXT:,} more characters)"
