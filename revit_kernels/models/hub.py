"""The Hugging Face hub, or its cache alone where it cannot be reached."""

from __future__ import annotations

import socket
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

SECONDS = 5.0  # to wait for a connection


def reachable(endpoint: str) -> bool:
    """Whether somebody answers there. With a proxy, nothing is tried: only the proxy knows."""
    if getproxies():
        return True
    parts = urlsplit(endpoint)
    try:
        socket.create_connection((parts.hostname, parts.port or 443), SECONDS).close()
    except OSError:
        return False
    return True


@contextmanager
def hub_or_cache():
    """Where the hub cannot be reached, its client reads its cache alone inside, instead of retrying for a minute."""
    try:
        from huggingface_hub import constants
    except ImportError:
        yield
        return
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not reachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
