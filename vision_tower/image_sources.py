"""Images from URLs and base64 text -> bytes for the decoder."""

from __future__ import annotations

import base64
import binascii
import http.client
import os
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

_TIMEOUT = 30  # seconds without a response
_MAX_DOWNLOAD = 256 * 2**20  # bytes


def fetch(image: Any) -> Any:
    """Download or decode an image that is a URL or base64 text.

    `load_image` of Transformers is not used: its conversion to RGB turns 16-bit images white, and transparent pixels
    into arbitrary colors.

    Args:
        image: An `http(s):` or `data:` URL, base64 text, {"bytes": ..., "path": ...} as `datasets` stores images in
            messages, or any other image.

    Returns:
        The bytes of the image file; other images are returned unchanged.

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
        content = _decode_base64(body) if head.endswith(";base64") else b""
        if not content:
            raise ValueError(f"expected an image as data:image/...;base64,..., got {image[:80]!r}")
        return content
    content = _decode_base64(image)
    # a short file name can be valid base64
    return content if len(content) > 32 else image


def _decode_base64(text: str) -> bytes:
    """Decode base64 text, which may contain line breaks; empty if it is not base64."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return b""


def _download(url: str) -> bytes:
    name = " ".join(url[:200].split())
    try:
        # spaces and non-ASCII letters, which browsers quote
        quoted = urllib.parse.quote(url, safe="%!#$&'()*+,/:;=?@[]~")
        request = urllib.request.Request(quoted, headers={"User-Agent": "alpha-clip"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            content = response.read(_MAX_DOWNLOAD + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(f"cannot download the image {name}: {' '.join(str(error).split())}") from error
    if len(content) > _MAX_DOWNLOAD:
        raise ValueError(f"cannot download the image {name}: it has more than {_MAX_DOWNLOAD:,} bytes")
    return content
