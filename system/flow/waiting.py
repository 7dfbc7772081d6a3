"""The replay queue as several tasks share it: who takes waits, who puts wakes them.  asyncio, no I/O."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Generic, TypeVar

from system.flow.replay import Entry, ReplayQueue, Taken

Item = TypeVar("Item")


class NotFilled(RuntimeError):
    """The queue was started again and does not know yet what it held."""


class WaitingQueue(Generic[Item]):
    """A :class:`~system.flow.replay.ReplayQueue` to wait at.  It is usable once it has been filled."""

    def __init__(self, batch_trees: int, window: int, max_staleness: int) -> None:
        self._shape = (batch_trees, window, max_staleness)
        self._queue: ReplayQueue[Item] | None = None
        self._changed = asyncio.Condition()

    async def fill(self, first: int, gone: Sequence[int], entries: Sequence[Entry[Item]]) -> None:
        """Start from ``first``, the oldest ticket still to be trained on; ``gone``: later ones that are not.

        Only the first fill of an incarnation counts: a later one may know less than what has happened since.
        """
        if self._queue is not None:
            return
        self._queue = ReplayQueue(*self._shape, first=first)
        await self.put(entries, gone)

    async def put(self, entries: Sequence[Entry[Item]], skipped: Sequence[int]) -> None:
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

    async def take(self, version: int, wait_s: float) -> Taken[Item]:
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

    def _filled(self) -> ReplayQueue[Item]:
        if self._queue is None:
            raise NotFilled
        return self._queue
