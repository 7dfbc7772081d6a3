"""Where a run's figures go besides its own directory: addresses."""

from __future__ import annotations

import re
from collections.abc import Iterator

from system.config.schema import Config

LOOPBACK = "127.0.0.1"
_OFF = ("none", "0", "")


def listen_address(text: str) -> tuple[str, int] | None:
    """Host and port of ``observe.prometheus``: ``9464`` is on this machine alone; None for off.

    Raises ValueError for what is no address.
    """
    if text.strip().lower() in _OFF:
        return None
    match = re.fullmatch(r"(?:\[?([^\[\]\s/]+?)\]?:)?(\d{1,5})", text.strip())
    if match is None or not 0 < int(match[2]) < 65536:
        raise ValueError(text)
    return match[1] or LOOPBACK, int(match[2])


def observe_problems(config: Config) -> Iterator[str]:
    """Addresses that are none."""
    text = config.observe.prometheus
    try:
        listen_address(text)
    except ValueError:
        yield (
            f"observe.prometheus={text!r} is no address to listen at: write a port (9464), "
            "host:port (0.0.0.0:9464 for every interface), or none"
        )
    if config.observe.otel != "none" and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", config.observe.otel):
        yield f"observe.otel={config.observe.otel!r} is no URL: write http://host:4318, or none"
