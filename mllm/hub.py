"""Whether the Hugging Face hub is available. The one check of it, for every command."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub

_TIMEOUT = 2  # seconds


def hub_is_available() -> bool:
    """Whether a connection to the hub can be opened; assumed behind a proxy, where only a request would show it."""
    url = urlsplit(huggingface_hub.constants.ENDPOINT)
    if getproxies():
        return True
    try:
        socket.create_connection((url.hostname, url.port or 443), timeout=_TIMEOUT).close()
    except OSError:
        return False
    return True


def offline_options(name: str | os.PathLike) -> dict[str, bool]:
    """Arguments of `from_pretrained`: `local_files_only` for a hub id when the hub is not available.

    Without it Transformers retries for half a minute before it fails.
    """
    return {} if os.path.isdir(name) or hub_is_available() else {"local_files_only": True}
