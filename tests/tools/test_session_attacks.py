"""The attempts to break out of a call, from a session and from a fork of it; and kill -9 of any process."""

# ruff: noqa: ASYNC220, ASYNC240  (a test may look at /proc and /tmp without a thread)

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from polling import eventually
from sandboxes import running
from sessions import alive, children, descendants, name, text, wardens
from test_sandbox_attacks import FILE_ATTACKS, PROCESS_ATTACKS, TRY

from system.tools.outcome import ToolStatus
from system.tools.sandbox.sandbox import Sandbox, SandboxLimits
from system.tools.sandbox.sessions import SandboxSession, SessionLost

pytestmark = pytest.mark.asyncio(loop_scope="module")
LIMITS = SandboxLimits(memory_mb=128, file_mb=4, disk_mb=8, threads=8, branches=4)


@pytest_asyncio.fixture(loop_scope="module")
async def box() -> AsyncIterator[Sandbox]:
    async with running(Sandbox(LIMITS, namespaces=True)) as box:
        yield box


@pytest_asyncio.fixture(loop_scope="module", params=["a session", "a fork"])
async def session(request: pytest.FixtureRequest, box: Sandbox) -> AsyncIterator[SandboxSession]:
    tree = await box.tree()
    session = await tree.open()
    if request.param == "a fork":
        session = await (await session.fork()).fork()
    yield session
    await tree.close()


async def attempt(session: SandboxSession, *actions: str, setup: str = "") -> None:
    await text(session, f"{TRY}\n{setup}")
    for action in actions:
        result = await session.run(f"attempt({action!r})")
        assert "ESCAPED" not in result.stdout, action
        assert result.status is ToolStatus.OK, (action, result.text)


async def test_nothing_outside_is_read_or_changed(session: SandboxSession, outside: Path) -> None:
    (outside / "secret").write_text("secret")
    (outside / "secret").chmod(0o666)
    await attempt(session, *FILE_ATTACKS, setup=f"D = {str(outside)!r}")
    assert sorted(p.name for p in outside.iterdir()) == ["secret"]
    assert (outside / "secret").read_text() == "secret"
    for place in ("/tmp", "/dev/shm", "/var/tmp"):
        assert not Path(place, "espalier-escape").exists()


SETUP = """
LIBC = ctypes.CDLL(None, use_errno=True)
def checked(value):
    if value < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return value
def ptrace(*arguments):
    return checked(LIBC.ptrace(*arguments))
"""
OF_SESSIONS = [
    "os.kill(1, 9)",
    "os.kill(1, signal.SIGINT)",
    "os.kill(2, 9)",
    "signal.raise_signal(0)",
    "os.wait()",
    "__import__('resource').prlimit(1, 7, (0, 0))",
    "os.listdir('..')",
    "os.listdir('/scratch')",
    "open('../new', 'w')",
    "os.rename('.', '../other')",
    "socket.socketpair()[0].sendmsg([b'x'])",
    "checked(LIBC.syscall(317, 1, 8, 0))",  # seccomp
    "checked(LIBC.vfork())",
]


async def test_no_other_process_is_touched_or_started(session: SandboxSession, box: Sandbox) -> None:
    before = descendants(wardens(box)[-1])
    await attempt(
        session, *PROCESS_ATTACKS, *OF_SESSIONS, setup=f"PARENT, SERVER = {os.getpid()}, {box.pid}\n{SETUP}"
    )
    assert descendants(wardens(box)[-1]) == before


async def test_only_the_socket_to_its_warden_is_open(session: SandboxSession) -> None:
    code = """
import os, socket
found = []
for number in range(3, 1024):
    try:
        os.fstat(number)
        found.append(number)
    except OSError:
        pass
print(len(found), repr(socket.socket(fileno=os.dup(found[0])).getpeername()))
"""
    assert await text(session, code) == "1 ''"


@pytest.mark.parametrize("end", ["time.sleep(600)", "pass"])
async def test_a_thread_bomb_ends_its_session(session: SandboxSession, end: str) -> None:
    """What the kernel counts together are the threads of all sessions of a tree."""
    code = """
import threading, time
threading.stack_size(1 << 15)
try:
    for count in range(999):
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
except RuntimeError:
    print(count)
"""
    result = await session.run(code + end)
    assert result.reason == "Stopped: the program ran more than 8 threads."
    assert int(result.stdout or 0) <= LIMITS.threads * LIMITS.branches + 2
    assert not session.alive


async def test_as_many_threads_as_may_be(session: SandboxSession) -> None:
    code = (
        "import threading, time\nthreading.stack_size(1 << 16)\n"
        "for _ in range(8): threading.Thread(target=time.sleep, args=(0.1,)).start()"
    )
    assert await text(session, code) == ""


# --- kill -9 -----------------------------------------------------------------------------------------------


async def grown(box: Sandbox) -> tuple[list[SandboxSession], int, int, list[int]]:
    """A session and its fork, their warden, process 1, and their processes."""
    tree = await box.tree()
    parent = await tree.open()
    await text(parent, "x = 5")
    sessions = [parent, await parent.fork()]
    warden = wardens(box)[-1]
    (first,) = children(warden)
    return sessions, warden, first, descendants(first)


async def test_a_session_killed_while_idle_and_in_a_cell(box: Sandbox) -> None:
    (parent, child), _, _, _ = await grown(box)
    (pid,) = [int(line) for line in (await text(child, "import os\nos.getppid()")).splitlines()]
    assert pid > 1
    host = [p for p in descendants(wardens(box)[-1]) if name(p) == "sandbox-session"]
    os.kill(host[0], signal.SIGKILL)
    result = await parent.run("x")
    assert (result.status, result.reason) == (ToolStatus.ERROR, "The program ended its interpreter.")
    call = asyncio.create_task(child.run("import time\ntime.sleep(60)"))
    await asyncio.sleep(0.3)
    os.kill(host[1], signal.SIGKILL)
    assert (await call).reason == "The program ended its interpreter."
    with pytest.raises(SessionLost):
        await child.fork()


@pytest.mark.parametrize("who", ["warden", "first process"])
async def test_a_killed_warden_or_first_process_takes_its_tree_along_and_no_other(
    box: Sandbox, who: str
) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    (other, _), _, _, _ = await grown(box)
    (parent, child), warden, first, processes = await grown(box)
    call = asyncio.create_task(child.run("import time\ntime.sleep(60)"))
    await asyncio.sleep(0.3)
    os.kill(warden if who == "warden" else first, signal.SIGKILL)
    with pytest.raises(SessionLost):
        await call
    with pytest.raises(SessionLost):
        await parent.run("x")
    await eventually(lambda: not alive([warden, first, *processes]), 20, "a process is left")
    assert await text(other, "x") == "5"
    await eventually(
        lambda: len(os.listdir("/proc/self/fd")) <= descriptors + 2, 20, "more than the channels of two trees"
    )


async def test_trees_outlive_their_fork_server_and_new_ones_are_had(box: Sandbox) -> None:
    (parent, child), warden, first, processes = await grown(box)
    assert box.pid is not None
    os.kill(box.pid, signal.SIGKILL)
    assert await text(await child.fork(), "x") == "5"
    assert await text(parent, "x") == "5"
    (newer, _), _, _, _ = await grown(box)
    assert (await box.run("1")).text == "1"
    await asyncio.sleep(0.2)
    assert await text(newer, "x") == await text(child, "x") == "5"
    await box.close()
    await eventually(lambda: not alive([warden, first, *processes]), 20, "a process is left")


async def test_a_killed_owner_leaves_nothing() -> None:
    script = """
import asyncio
from system.tools.sandbox.sandbox import Sandbox, SandboxLimits
async def main():
    box = Sandbox(SandboxLimits(wall_s=600), namespaces=True)
    await box.start()
    session = await (await box.tree()).open()
    child = await session.fork()
    print(box.pid, flush=True)
    cells = [one.run("import time\\ntime.sleep(600)") for one in (session, child)]
    await asyncio.gather(*cells)
asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as owner:
        assert owner.stdout is not None
        line = await asyncio.to_thread(owner.stdout.readline)
        if not line:
            pytest.skip("no namespaces here")
        server = int(line)
        await asyncio.sleep(0.4)
        processes = [server, *descendants(server)]
        owner.kill()
    assert len(processes) >= 5
    await eventually(lambda: not alive(processes), 20, "a process is left")
