"""The virtual clock: jumps, order, deadlines, deadlock."""

import asyncio
import time

import pytest

from system.awake import AwakeTimeout
from system.twin.clock import Deadlock, VirtualTimeLoop, run


def now() -> float:
    return asyncio.get_running_loop().time()


def test_a_day_passes_in_no_time() -> None:
    async def main() -> float:
        await asyncio.sleep(86_400 * 3.5)
        return now()

    began = time.perf_counter()
    assert run(main()) == 86_400 * 3.5
    assert time.perf_counter() - began < 5.0


def test_nobody_looks_whether_it_stands_still() -> None:
    """Which would be once each quarter of a second: of a century, 12 billion looks."""

    async def main() -> float:
        async with AwakeTimeout(4e9) as limit:
            await asyncio.sleep(3e9)
            return limit.left_s

    assert run(main()) == 1e9


def test_timers_fire_in_order_of_time_then_of_scheduling() -> None:
    async def main() -> list[tuple[str, float]]:
        seen: list[tuple[str, float]] = []

        async def sleeper(name: str, delay: float) -> None:
            await asyncio.sleep(delay)
            seen.append((name, now()))

        async with asyncio.TaskGroup() as group:
            for name, delay in [("c", 3.0), ("a", 0.1), ("b", 2.0), ("b2", 2.0)]:
                group.create_task(sleeper(name, delay))
        return seen

    assert run(main()) == [("a", 0.1), ("b", 2.0), ("b2", 2.0), ("c", 3.0)]


def test_deadlines_expire_in_virtual_time() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(120):
                await asyncio.sleep(121)
        return now()

    assert run(main()) == 120.0


def test_deadlock_is_an_error_and_the_tasks_are_cancelled() -> None:
    cancelled = []

    async def main() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    with pytest.raises(Deadlock, match="no timer is pending"):
        run(main())
    assert cancelled == [True]


def test_threads_run_inline_and_their_errors_travel() -> None:
    async def main() -> tuple[int, float]:
        assert isinstance(asyncio.get_running_loop(), VirtualTimeLoop)
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 // 0)
        return await asyncio.to_thread(pow, 2, 10), now()

    assert run(main()) == (1024, 0.0)
