"""Deadlines do not count standstills of the event loop: of a stopped process, or a suspended machine.

Where no socket is read, the loop is one of virtual time, whose clock is put forward: a standstill of any
length at once.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any

import pytest
from aiohttp import web

from system import awake
from system.awake import AwakeTimeout, AwakeTimer, awake_s
from system.http import HttpClient, HttpError
from system.serving import serve
from system.twin.clock import run as run_virtually

HOUR = 3600.0
run = partial(run_virtually, stands_still=True)


async def stand_still(after_s: float, seconds: float = HOUR) -> None:
    loop: Any = asyncio.get_running_loop()
    await asyncio.sleep(after_s)
    loop._now += seconds


def test_what_is_left_and_when_it_ends() -> None:
    async def timed() -> None:
        clock = asyncio.get_running_loop().time
        began = clock()
        left: list[float] = []
        limit = AwakeTimeout(2.5)
        try:
            async with limit:
                left.append(limit.left_s)
                await asyncio.sleep(1.75)
                left.append(limit.left_s)
                await asyncio.sleep(9.0)
        except TimeoutError:
            assert limit.expired
        assert clock() - began == pytest.approx(2.5)
        assert left == pytest.approx([2.5, 0.75])
        async with AwakeTimeout(0.5) as limit:
            limit.lift()
            await asyncio.sleep(9.0)
        with pytest.raises(TimeoutError):
            async with AwakeTimeout(0.0):
                await asyncio.sleep(9.0)
        async with AwakeTimeout(None) as limit:
            await asyncio.sleep(9.0)
        assert not limit.expired

    run(timed())


@pytest.mark.parametrize("after_s", [0.0, 0.1, 0.25, 1.3, 2.4])
def test_a_standstill_is_not_counted(after_s: float) -> None:
    """But for the moments since the last look at the clock."""

    async def timed() -> None:
        clock = asyncio.get_running_loop().time
        began, seen_s = clock(), awake_s()
        standing = asyncio.create_task(stand_still(after_s))
        limit = AwakeTimeout(2.5)
        try:
            async with limit:
                await standing
                assert 2.5 - after_s <= limit.left_s <= 2.5 - after_s + awake.TICK_S
                await asyncio.sleep(9.0)
        except TimeoutError:
            assert limit.expired
        assert 2.5 <= clock() - began - HOUR <= 2.5 + awake.TICK_S + 1e-6
        assert awake_s() - seen_s == pytest.approx(2.5)

    run(timed())


def test_a_standstill_counts_for_nobody_who_comes_later() -> None:
    async def timed() -> None:
        clock = asyncio.get_running_loop().time
        async with AwakeTimeout(9.0):
            await stand_still(1.0)
        await asyncio.sleep(1.0)
        began = clock()
        with pytest.raises(TimeoutError):
            async with AwakeTimeout(2.0):
                await asyncio.sleep(9.0)
        assert clock() - began == pytest.approx(2.0)

    run(timed())


def test_a_timer_that_is_cancelled_calls_nobody_and_leaves_the_loop_alone() -> None:
    async def timed() -> None:
        called: list[float] = []
        clock = asyncio.get_running_loop().time
        over = AwakeTimer(2.0, lambda: called.append(clock()))
        gone = AwakeTimer(1.0, lambda: called.append(clock()))
        gone.cancel()
        gone.cancel()
        await asyncio.sleep(3.0)
        over.cancel()
        assert called == pytest.approx([2.0])
        assert (gone.left_s, over.left_s) == (0.0, 0.0)
        await asyncio.sleep(1.0)
        assert not asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]

    run(timed())


def test_a_loop_that_is_always_late_is_merely_slow() -> None:
    """Ten standstills are not counted, and one more each 30 s."""

    async def timed() -> None:
        clock = asyncio.get_running_loop().time
        began = clock()

        async def hold_up() -> None:
            while True:
                await stand_still(0.0, 1.0)

        holding = asyncio.create_task(hold_up())
        with pytest.raises(TimeoutError):
            async with AwakeTimeout(30.0):
                await asyncio.sleep(HOUR)
        assert 50.0 <= clock() - began <= 56.0  # each look at the clock comes two seconds late
        holding.cancel()

    run(timed())


async def test_a_loop_that_is_a_little_late_each_time_makes_no_deadline_longer() -> None:
    async def hold_up() -> None:
        while True:
            time.sleep(0.045)  # noqa: ASYNC251 (what makes it late)
            await asyncio.sleep(0)

    holding, began = asyncio.create_task(hold_up()), time.monotonic()
    with pytest.raises(TimeoutError):
        async with AwakeTimeout(1.0):
            await asyncio.sleep(60.0)
    assert 1.0 <= time.monotonic() - began < 1.5
    holding.cancel()


async def test_a_cancellation_within_it_stays_one() -> None:
    async def waiting() -> None:
        async with AwakeTimeout(60.0):
            await asyncio.sleep(60.0)

    task = asyncio.create_task(waiting())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_answer_over_http_is_not_late_for_it() -> None:
    async def slow(_: web.Request) -> web.Response:
        for _ in range(20):
            await asyncio.sleep(0.01)
        return web.json_response({"well": True})

    async def never(_: web.Request) -> web.Response:
        await asyncio.sleep(60.0)
        raise AssertionError

    async def hold_up() -> None:
        await asyncio.sleep(0.1)
        time.sleep(3.0)  # noqa: ASYNC251 (what stands still)

    app = web.Application()
    app.router.add_get("/slow", slow)
    app.router.add_get("/never", never)
    server = await serve(app)
    async with HttpClient() as http:
        asked = http.request("GET", f"{server.url}/slow", limit_s=2.0)
        answer, _ = await asyncio.gather(asked, hold_up())
        assert answer == {"well": True}
        with pytest.raises(HttpError, match=r"no answer from .*/never within 0\.2 s"):
            await http.request("GET", f"{server.url}/never", limit_s=0.2)
    await server.close()
