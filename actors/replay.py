"""The replay queue's place to run: closed trees wait here, as references, until the learner takes them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

from actors.supervise import ActorLost, answer
from system.flow.replay import Entry, ReplayQueue, Taken

DEADLINE_S = 60.0  # one call
ATTEMPTS = 6
RETRY_S = 1.0


class NotFilled(RuntimeError):
    """The actor was restarted and does not know yet what it held."""


class ReplayActor:
    """Holds references, no trees.  Their owner is the conductor, which fills a restarted queue again."""

    def __init__(self, batch_trees: int, window: int, max_staleness: int) -> None:
        self._shape = (batch_trees, window, max_staleness)
        self._queue: ReplayQueue[object] | None = None
        self._changed = asyncio.Condition()

    async def fill(self, first: int, gone: Sequence[int], entries: Sequence[Entry[object]]) -> None:
        """Start from ``first``, the oldest ticket still to be trained on; ``gone``: later ones that are not.

        Only the first fill of an incarnation counts: a later one may know less than what has happened since.
        """
        if self._queue is not None:
            return
        self._queue = ReplayQueue(*self._shape, first=first)
        await self.put(entries, gone)

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


class Holdings(Protocol):
    """Who owns the trees that the queue refers to."""

    def holdings(self) -> tuple[int, list[int], list[Entry[Any]]]:
        """What ``fill`` takes: the oldest open ticket, later ones that are not, the closed trees."""
        ...


class ReplayHandle:
    """The actor as its user sees it: a queue that a crash of the actor does not empty."""

    def __init__(self, actor: Any, owner: Holdings) -> None:
        self._actor, self._owner = actor, owner

    async def fill(self) -> None:
        await answer(self._actor.fill.remote(*self._owner.holdings()), DEADLINE_S, "replay")

    async def put(self, entry: Entry[Any]) -> None:
        await self._call("put", [entry], [])

    async def skip(self, number: int) -> None:
        await self._call("put", [], [number])

    async def take(self, version: int, wait_s: float) -> Taken[Any]:
        return await self._call("take", version, wait_s)

    async def _call(self, method: str, *arguments: Any) -> Any:
        """Call it; an actor that was restarted is filled again first."""
        failure: Exception | None = None
        for attempt in range(ATTEMPTS):
            try:
                if failure is not None:
                    await asyncio.sleep(RETRY_S * attempt)
                    await self.fill()
                return await answer(getattr(self._actor, method).remote(*arguments), DEADLINE_S, "replay")
            except (NotFilled, ActorLost) as error:
                failure = error
        raise ActorLost(f"replay: given up after {ATTEMPTS} attempts") from failure
