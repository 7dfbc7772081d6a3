"""Calls of a user's own part in threads."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from system.foreign import in_thread
from system.rollout.score_pool import Threads


async def test_what_a_call_raises_is_for_whoever_waits() -> None:
    class Odd(BaseException):
        """No Exception."""

    def fail(kind: type[BaseException]) -> None:
        assert threading.current_thread().name == "mine"
        raise kind("so")

    for kind, comes in ((ValueError, ValueError), (Odd, Odd), (StopIteration, RuntimeError)):
        with pytest.raises(comes, match="so"):
            await in_thread(lambda kind=kind: fail(kind), "mine")
    assert await in_thread(lambda: 7, "mine") == 7


async def test_a_thread_that_cannot_be_started_fails_its_call_and_holds_no_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Refused:
        def __init__(self, **_: Any) -> None: ...

        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr("system.foreign.Thread", Refused)
    threads = Threads(1)
    for _ in range(2):
        async with asyncio.timeout(30):
            await threads.place()
        with pytest.raises(RuntimeError, match="new thread"):
            await threads.run(lambda: 1)


async def test_a_call_that_does_not_return_keeps_its_place_until_it_does() -> None:
    threads, returns = Threads(1), threading.Event()
    await threads.place()
    waiting = threads.run(returns.wait)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await waiting
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await threads.place()
    returns.set()
    async with asyncio.timeout(30):
        await threads.place()
