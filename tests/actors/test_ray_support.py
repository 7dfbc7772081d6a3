"""Waiting for actors that are slow, that fail and that die."""

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator

import pytest
import ray

from actors.ray_support import ActorLost, answer, answers, returned, spawn

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import test modules


class Sleeper:
    def pid(self) -> int:
        return os.getpid()

    def check(self) -> None:
        pass

    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def fail(self) -> None:
        raise ZeroDivisionError("on purpose")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
async def test_failures_have_names() -> None:
    sleeper = spawn(Sleeper, "sleeper")
    assert await answer(sleeper.sleep.remote(0.0), 60, "a nap") == 0.0
    with pytest.raises(ActorLost, match=r"a long nap: no answer within 0 s"):
        await answer(sleeper.sleep.remote(2.0), 0.2, "a long nap")
    with pytest.raises(ZeroDivisionError):
        await answer(sleeper.fail.remote(), 60, "a failure")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
async def test_a_killed_actor_is_lost_once_and_then_back_if_it_may_restart() -> None:
    mortal = spawn(Sleeper, "mortal", restart=False)
    phoenix = spawn(Sleeper, "phoenix", restart=True)
    for actor in (mortal, phoenix):
        pid = await answer(actor.pid.remote(), 60, "pid")
        nap = asyncio.ensure_future(answer(actor.sleep.remote(30.0), 60, "a nap"))
        await asyncio.sleep(0.5)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ActorLost, match="a nap: the actor died"):
            await nap
    with pytest.raises(ActorLost):
        await answer(mortal.pid.remote(), 60, "pid")
    await returned(phoenix, "phoenix")
    assert await answer(phoenix.pid.remote(), 60, "pid") > 0


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
async def test_the_first_failure_ends_a_collective_wait() -> None:
    slow, failing = spawn(Sleeper, "slow"), spawn(Sleeper, "failing")
    await answers([slow.pid.remote(), failing.pid.remote()], 60, "pids")
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        await answers([slow.sleep.remote(30.0), failing.fail.remote()], 60, "collective")
    assert time.monotonic() - began < 20
