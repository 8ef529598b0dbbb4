"""Where an image comes from: URLs and base64 text -> the bytes that the decoder takes."""

from __future__ import annotations

import base64
import binascii
import http.client
import os
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

_TIMEOUT = 30  # seconds, of a download
_LARGEST_DOWNLOAD = 256 * 2**20  # bytes


def fetch(image: Any) -> Any:
    """What a URL or base64 text holds, as bytes; anything else is what the decoder takes.

    Also from `{"bytes": ..., "path": ...}`, as `datasets` writes images inside messages.

    Not through `load_image` of Transformers, whose conversion to RGB turns 16-bit images white and transparent pixels
    into whatever color they have.

    Raises:
        ValueError: If a URL cannot be downloaded, or a `data:` URL is not base64.
    """
    if isinstance(image, Mapping) and image.keys() <= {"bytes", "path"}:
        return image.get("bytes") or fetch(image.get("path"))
    if not isinstance(image, str) or os.path.isfile(image):
        return image
    scheme = image[:8].lower()
    if scheme.startswith(("http://", "https://")):
        return _download(image)
    if scheme.startswith("data:"):
        head, _, body = image.partition(",")
        content = _decoded(body) if head.endswith(";base64") else b""
        if not content:
            raise ValueError(f"expected an image as data:image/...;base64,..., got {image[:80]!r}")
        return content
    content = _decoded(image)
    # a short file name is valid base64 too
    return content if len(content) > 32 else image


def _decoded(text: str) -> bytes:
    """The bytes of base64 text, which may be wrapped into lines; none if it is not base64."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return b""


def _download(url: str) -> bytes:
    """The bytes of an image on the web."""
    shown = " ".join(url[:200].split())
    try:
        # spaces and letters of other scripts in a path, which browsers quote
        quoted = urllib.parse.quote(url, safe="%!#$&'()*+,/:;=?@[]~")
        request = urllib.request.Request(quoted, headers={"User-Agent": "alpha-clip"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            content = response.read(_LARGEST_DOWNLOAD + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(f"cannot download the image {shown}: {' '.join(str(error).split())}") from error
    if len(content) > _LARGEST_DOWNLOAD:
        raise ValueError(f"cannot download the image {shown}: it has over {_LARGEST_DOWNLOAD:,} bytes")
    return content
