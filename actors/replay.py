"""The replay queue's place to run: closed trees wait here, as references, until the learner takes them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from system.flow.replay import Entry, ReplayQueue, Taken


class NotFilled(RuntimeError):
    """The actor was restarted and does not know yet what it held."""


class ReplayActor:
    """Holds references, no trees.  Their owner is the conductor, which fills a restarted queue again."""

    def __init__(self, batch_trees: int, window: int, max_staleness: int) -> None:
        self._shape = (batch_trees, window, max_staleness)
        self._queue: ReplayQueue[object] | None = None
        self._changed = asyncio.Condition()

    async def fill(self, first: int, gone: Sequence[int], entries: Sequence[Entry[object]]) -> None:
        """Start from ``first``, the oldest ticket still to be trained on; ``gone`` are later ones that are
        not.
        """
        self._queue = ReplayQueue(*self._shape, first=first)
        for number in gone:
            self._queue.skip(number)
        await self.put(entries, [])

    async def put(self, entries: Sequence[Entry[object]], skipped: Sequence[int]) -> None:
        """What a refill has brought already is passed over: it may overtake a ``put`` on its way."""
        async with self._changed:
            queue = self._filled()
            for entry in entries:
                if not queue.seen(entry.number):
                    queue.put(entry)
            for number in skipped:
                if not queue.seen(number):
                    queue.skip(number)
            self._changed.notify_all()

    async def take(self, version: int, wait_s: float) -> Taken[object]:
        """A batch as soon as there is one, evictions at once, nothing after ``wait_s``."""
        async with self._changed:
            try:
                async with asyncio.timeout(wait_s):
                    while True:
                        taken = self._filled().take(version)
                        if taken.batch is not None or taken.evicted:
                            return taken
                        await self._changed.wait()
            except TimeoutError:
                return Taken(None, ())

    def _filled(self) -> ReplayQueue[object]:
        if self._queue is None:
            raise NotFilled
        return self._queue
