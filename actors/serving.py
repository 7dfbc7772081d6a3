"""An asyncio loop in a thread of its own, for actors that host an HTTP server.

Ray calls an actor's methods on Ray's threads; a server must go on answering between those calls, and must be
back after Ray restarted the actor, which re-runs ``__init__`` only.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Owns one event loop and the daemon thread that runs it."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T], deadline_s: float) -> T:
        """Run to completion from another thread.  Raises what it raises, or TimeoutError."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(deadline_s)

    def look(self) -> None:
        """Return once the loop has turned; blocks as long as it does not."""
        turned = threading.Event()
        self._loop.call_soon_threadsafe(turned.set)
        turned.wait()
