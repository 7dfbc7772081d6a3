"""What happened, in order: a running hash, so that two simulations can be compared event by event."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any


class Trace:
    """Notes events with their virtual times.  Equal digests mean the same events at the same times."""

    def __init__(self) -> None:
        self.events = 0
        self._hash = hashlib.blake2b(digest_size=16)

    def note(self, *event: Any) -> None:
        """``event``: a kind, and what identifies it; anything with a stable ``repr``."""
        now = asyncio.get_running_loop().time()
        self._hash.update(f"{now!r} {event!r}\n".encode())
        self.events += 1

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()
