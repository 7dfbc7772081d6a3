"""The engines as the conductor sees them: do they hold the current weights, and what do they wait for?"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Protocol

from actors.ray_support import ActorLost
from system.engine.client import EngineClient
from system.engine.protocol import SPEED_COUNTERS, EngineError, EngineInfo
from system.observe.recorder import Recorder

PUSH_DEADLINE_S = 120.0  # for an engine that is back to hold the current weights, after its own start
LOOK_S = 1.0  # between looks at the engines
IDLE_COUNTER = re.compile(r"idle_(\w+)_s")  # an engine's counters of idle seconds by cause


class Publisher(Protocol):
    """Who has the weights."""

    @property
    def version(self) -> int: ...

    @property
    def weights(self) -> asyncio.Lock:
        """Held while the weights change or move."""
        ...

    async def push(self, version: int, urls: Sequence[str]) -> dict[str, str]:
        """Send the learner's weights to ``urls``; returns those that did not take them, and why."""
        ...


class EngineMonitor:
    """Keeps engines at the publisher's version; a restarted one stands paused until it has its weights.

    ``urls`` may lose members while the run goes on: engines whose node is gone.
    """

    def __init__(
        self, urls: Sequence[str], publisher: Publisher, recorder: Recorder, start_deadline_s: float
    ) -> None:
        """``start_deadline_s``: for a restarted engine to answer."""
        self.urls, self._publisher, self._recorder = urls, publisher, recorder
        self._deadline_s = start_deadline_s + PUSH_DEADLINE_S

    async def watch(self) -> None:
        """Look after the engines until cancelled.  Raises ActorLost for one that does not come back."""
        async with AsyncExitStack() as stack:
            clients = [await _client(stack, url) for url in self.urls]
            good = [time.monotonic()] * len(clients)
            while True:
                for number, client in enumerate(clients):
                    if client.urls[0] not in self.urls or await self._tend(number, client):
                        good[number] = time.monotonic()
                    elif time.monotonic() - good[number] > self._deadline_s:
                        raise ActorLost(self._not_back(client))
                await asyncio.sleep(LOOK_S)

    async def ready(self) -> None:
        """Return once every engine holds the current weights; ActorLost at the deadline."""
        async with AsyncExitStack() as stack:
            for number, url in enumerate(list(self.urls)):
                client = await _client(stack, url)
                try:
                    async with asyncio.timeout(self._deadline_s):
                        while url in self.urls and not await self._tend(number, client):  # noqa: ASYNC110
                            await asyncio.sleep(LOOK_S)
                except TimeoutError as error:
                    raise ActorLost(self._not_back(client)) from error

    async def _tend(self, number: int, client: EngineClient) -> bool:
        """Account an engine's idle time; send it the current weights if it lacks them.  True: it has them."""
        try:
            (info,) = await client.infos()
            for counter, seconds in info.counters.items():
                if cause := IDLE_COUNTER.fullmatch(counter):
                    self._recorder.idle_total(f"engine-{number}", cause[1], seconds)
            for counter in SPEED_COUNTERS:
                if counter in info.counters:
                    self._recorder.running_total(
                        f"engine-{number}", f"server/{counter}", info.counters[counter]
                    )
            if self._current(info):
                return True
            async with self._publisher.weights:
                (info,) = await client.infos()
                if not self._current(info):  # no training step was just pushing them
                    if await self._publisher.push(self._publisher.version, client.urls):
                        return False
                    await client.resume()
        except EngineError:  # it is being restarted
            return False
        return True

    def _not_back(self, client: EngineClient) -> str:
        return (
            f"engine {client.urls[0]}: not back with the current weights within {self._deadline_s:.0f} s "
            "(engine.start_deadline_s); see the run's logs/"
        )

    def _current(self, info: EngineInfo) -> bool:
        return info.weight_version == self._publisher.version and not info.paused


async def _client(stack: AsyncExitStack, url: str) -> EngineClient:
    client = EngineClient([url])
    stack.push_async_callback(client.close)
    return client
