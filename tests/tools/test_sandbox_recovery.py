"""kill -9 of any process of the sandbox: the next call works, and so does the running one where it can."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from polling import eventually
from sandboxes import children, running

from system.tools.outcome import ToolStatus
from system.tools.sandbox.result import SandboxResult
from system.tools.sandbox.sandbox import Sandbox


@pytest_asyncio.fixture(params=[True, False], ids=["namespaces", "landlock"])
async def fresh(request: pytest.FixtureRequest) -> AsyncIterator[Sandbox]:
    async with running(Sandbox(namespaces=request.param)) as box:
        yield box


async def running_call(server: int) -> tuple[int, int]:
    """The warden and the program of the call that runs now, past the warden of one that just ended."""
    for _ in range(200):
        for warden in children(server):
            for program in children(warden):
                return warden, program
        await asyncio.sleep(0.02)
    raise AssertionError("no call appeared")


async def gone(pid: int) -> None:
    await eventually(lambda: not Path(f"/proc/{pid}").exists(), 20, "a process is left")


async def test_the_fork_server_killed_while_idle(fresh: Sandbox) -> None:
    assert fresh.pid is not None
    killed = fresh.pid
    os.kill(killed, signal.SIGKILL)
    await asyncio.sleep(0.1)
    results = await asyncio.gather(*(fresh.run(f"{i}") for i in range(8)))
    assert [result.text for result in results] == [str(i) for i in range(8)]
    assert fresh.pid != killed


async def test_the_fork_server_killed_during_a_call(fresh: Sandbox) -> None:
    assert fresh.pid is not None
    call = asyncio.ensure_future(fresh.run("import time\ntime.sleep(1.5)\nprint('done')"))
    await running_call(fresh.pid)
    os.kill(fresh.pid, signal.SIGKILL)
    assert (await call).text == "done"
    assert (await fresh.run("1")).text == "1"


async def test_a_warden_killed_during_a_call_takes_its_program_with_it(fresh: Sandbox) -> None:
    assert fresh.pid is not None
    call = asyncio.ensure_future(fresh.run("import time\ntime.sleep(1.5)\nprint('done')"))
    warden, program = await running_call(fresh.pid)
    os.kill(warden, signal.SIGKILL)
    assert (await call).text == "done"  # run again: nothing of the first has left the sandbox
    await gone(program)


async def test_a_program_killed_from_outside_is_an_error(fresh: Sandbox) -> None:
    assert fresh.pid is not None
    call = asyncio.ensure_future(fresh.run("import time\ntime.sleep(60)"))
    _, program = await running_call(fresh.pid)
    os.kill(program, signal.SIGKILL)
    result = await call
    assert result.status is ToolStatus.ERROR
    assert "SIGKILL" in result.text
    assert (await fresh.run("1")).text == "1"


async def test_a_stopped_warden_does_not_hold_a_call_for_ever(
    fresh: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("system.tools.sandbox.sessions.GRACE_S", 0.2)
    assert fresh.pid is not None
    call = asyncio.ensure_future(fresh.run("import time\ntime.sleep(1.5)\nprint('done')", deadline_s=4.0))
    warden, _ = await running_call(fresh.pid)
    os.kill(warden, signal.SIGSTOP)
    try:
        assert (await call).text == "done"
    finally:
        os.kill(warden, signal.SIGKILL)


async def test_random_kills_lose_no_call(fresh: Sandbox) -> None:
    """A killed fork server or warden costs a repetition; only a killed program is told, as an error."""
    spare = 2  # wardens to kill: a call that loses three is given up, and chance may put them all on one
    rng = random.Random(0)
    descriptors = len(os.listdir("/proc/self/fd"))

    async def one(i: int) -> SandboxResult:
        nonlocal spare
        result = await fresh.run(f"import time\ntime.sleep(0.05)\n{i}")
        if i % 8 == 0:
            assert fresh.pid is not None
            wardens = children(fresh.pid)
            programs = [program for warden in wardens for program in children(warden)]
            with contextlib.suppress(ProcessLookupError):
                victim = rng.choice([fresh.pid, *(wardens if spare else ()), *programs])
                spare -= victim in wardens
                os.kill(victim, signal.SIGKILL)
        return result

    results = await asyncio.gather(*(one(i) for i in range(80)))
    for i, result in enumerate(results):
        killed = result.text.endswith("The program was killed by SIGKILL.")
        assert killed if result.status is ToolStatus.ERROR else result.text == str(i)
    assert sum(result.status is ToolStatus.OK for result in results) >= 70
    assert (await fresh.run("1")).text == "1"
    await eventually(
        lambda: len(os.listdir("/proc/self/fd")) <= descriptors + 2, 20, "a dead server's channel is open"
    )
