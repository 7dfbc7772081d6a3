"""The replay queue's place to run: closed trees wait here, as references, until the learner takes them."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from actors.ray_support import ActorLost, answer
from system.flow.replay import Entry, Taken
from system.flow.waiting import NotFilled, WaitingQueue

DEADLINE_S = 60.0  # one call
ATTEMPTS = 6
RETRY_S = 1.0


class ReplayActor(WaitingQueue[object]):
    """Holds references, no trees.  Their owner is the conductor, which fills a restarted queue again."""


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
