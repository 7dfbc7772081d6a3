"""An engine that does not take its weights: the run's end says why."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from actors.engine_monitor import EngineMonitor, Publisher
from system.engine.weights.base import PushReport

URL = "http://e"


class Learner:
    """Whose weights are refused."""

    async def publish(self, urls: Sequence[str], version: int) -> PushReport:
        return PushReport(lora_kept=0.5, failures={urls[0]: "its model is another"})


class Server:
    """Restarted: it has none of the weights."""

    url = URL

    async def info(self) -> Any:
        return SimpleNamespace(counters={}, weight_version=0, paused=True)


async def test_why_a_restarted_engine_has_not_come_back() -> None:
    kept: list[float] = []
    recorder: Any = SimpleNamespace(weights_pushed=lambda *_: None, merged=kept.append)
    learner, server, loop = Learner(), Server(), SimpleNamespace(version=3, weights=asyncio.Lock())
    engines: Mapping[str, str] = {"engine-0": URL}
    publisher = Publisher(learner, engines, recorder)  # pyright: ignore[reportArgumentType]
    made: Any = EngineMonitor
    monitor = made(engines, loop, publisher, recorder, 60.0)
    assert monitor._not_back(URL).endswith("see the run's logs/")
    assert not await monitor._tend("engine-0", server)
    assert monitor._not_back(URL).endswith("(engine.start_deadline_s): its model is another")
    assert kept == [0.5]
    loop.version, taken = 0, Server()
    taken.info = current  # pyright: ignore[reportAttributeAccessIssue]
    assert await monitor._tend("engine-0", taken)
    assert monitor._not_back(URL).endswith("see the run's logs/")


async def current() -> Any:
    return SimpleNamespace(counters={}, weight_version=0, paused=False)
