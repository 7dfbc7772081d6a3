"""Faults of the sandbox's own processes: each costs the call that it befalls at most, and is told as such."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from polling import eventually
from sandboxes import children, running

from system.tools.sandbox import server
from system.tools.sandbox.sandbox import Sandbox, SandboxUnavailable
from system.tools.sandbox.sessions import MAX_CODE_BYTES

# Runs in the fork server before all else: what is forked off it after SIGUSR1 has the fault.
FAULT = """
import signal, time
from system.tools.sandbox import call_warden, lockdown, rooms, session_warden
def fail(*_):
    time.sleep(0.1)
    raise OSError("x" + "é" * 4096)
def begin(*_):
    {fault} = fail
signal.signal(signal.SIGUSR1, begin)
"""


@asynccontextmanager
async def failing(fault: str, namespaces: bool) -> AsyncIterator[Sandbox]:
    """A sandbox of which ``fault``, a function, fails; no warden of before is left."""
    boot, end = server._BOOT.split("del sys.path[0]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "_BOOT", f"{boot}\n{FAULT.format(fault=fault)}\ndel sys.path[0]{end}")
        async with running(Sandbox(namespaces=namespaces)) as box:
            assert box.pid is not None
            os.kill(box.pid, signal.SIGUSR1)
            for warden in children(box.pid):
                os.kill(warden, signal.SIGKILL)
            await eventually(lambda: not children(box.pid or 0), 20, "a warden is left")
            yield box


both_ways = pytest.mark.parametrize("namespaces", [True, False], ids=["namespaces", "landlock"])


@both_ways
@pytest.mark.parametrize(
    "fault", ["call_warden.CallWarden.fork", "call_warden.become_program", "lockdown.confine"]
)
async def test_a_call_that_cannot_begin_is_told_why_and_the_server_stays(
    fault: str, namespaces: bool
) -> None:
    async with failing(fault, namespaces) as box:
        before = box.pid
        for code in ("1", "2", "#" * MAX_CODE_BYTES):  # the last is longer than what a socket holds
            with pytest.raises(SandboxUnavailable, match=r"could not be confined: .*xé"):
                await box.run(code)
        assert box.pid == before


async def test_sessions_that_have_no_warden_are_told_why() -> None:
    async with failing("session_warden.SessionWarden.fork", True) as box:
        before = box.pid
        with pytest.raises(
            SandboxUnavailable, match="the warden of the session could not begin: OSError: xé"
        ):
            await box.tree()
        assert (await box.run("1")).text == "1"
        assert box.pid == before


@both_ways
async def test_what_fails_after_an_answer_is_not_the_next_calls_affair(namespaces: bool) -> None:
    """It is asked while it cleans, and others are asked then."""
    async with failing("rooms._CellRoom.clean = rooms._Directory.clean", namespaces) as box:
        for i in range(5):
            assert (await box.run(str(i))).text == str(i)
        before = box.pid
        await eventually(lambda: not children(before or 0), 20, "a warden whose room is not clean is left")


@both_ways
async def test_a_fork_server_that_fails_is_left_while_its_calls_go_on(namespaces: bool) -> None:
    async with running(Sandbox(namespaces=namespaces)) as box:
        failed = box._plain.server
        assert failed is not None
        call = asyncio.create_task(box.run("import time\ntime.sleep(3)\nprint('done')"))
        await eventually(lambda: any(map(children, children(failed.pid))), 20, "it never ran")
        ours, theirs = socket.socketpair()
        with ours, theirs:
            await failed.pass_on(b"?", theirs)  # no kind of warden
        await eventually(lambda: failed.dead, 20, "it hides that it has failed")
        assert (await box.run("1")).text == "1"
        assert not call.done()
        assert (await call).text == "done"


async def test_what_follows_a_reply_is_no_part_of_it() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.sendall(b'{"kept": [3, 3]}\nouterr{"failed": "later"}\n')
        assert await server._reply(ours) == {"stdout": "out", "stderr": "err"}
