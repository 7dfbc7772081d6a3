"""Sessions keep their state, fork with it, and are nobody else's."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from polling import eventually
from sandboxes import running
from sessions import alive, children, descendants, scratch_directories, state, text, wardens

from system.tools.outcome import ToolStatus
from system.tools.sandbox.sandbox import Sandbox, SandboxLimits, SandboxUnavailable
from system.tools.sandbox.sessions import NotForked, SandboxSession, SessionLost, SessionTree, TreeFull

pytestmark = pytest.mark.asyncio(loop_scope="module")
LIMITS = SandboxLimits(wall_s=20.0, cpu_s=2.0, memory_mb=128, file_mb=4, disk_mb=8, threads=8, branches=12)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def box() -> AsyncIterator[Sandbox]:
    async with running(Sandbox(LIMITS, namespaces=True)) as box:
        yield box


@pytest_asyncio.fixture(loop_scope="module")
async def tree(box: Sandbox) -> AsyncIterator[SessionTree]:
    """Whose processes are gone after the test, whatever it did."""
    before = wardens(box)
    tree = await box.tree()
    await tree.open()
    (warden,) = set(wardens(box)) - set(before)
    all_of_it = [warden, *descendants(warden)]
    yield tree
    all_of_it += descendants(warden)
    await tree.close()
    await eventually(lambda: not alive(all_of_it), 20, "a process is left")


async def refused(session: SandboxSession, why: str) -> None:
    """It cannot be forked, and goes on as if nobody had tried."""
    with pytest.raises(NotForked, match=why):
        await session.fork()
    assert session.alive


def open_files(warden: int) -> tuple[int, int]:
    """Of the warden and of this process."""
    return len(os.listdir(f"/proc/{warden}/fd")), len(os.listdir("/proc/self/fd"))


def none_more(now: tuple[int, int], then: tuple[int, int]) -> bool:
    return now[0] <= then[0] and now[1] <= then[1]


# --- cells -------------------------------------------------------------------------------------------------


async def test_state_survives_from_cell_to_cell(tree: SessionTree) -> None:
    session = await tree.open()
    await text(session, "import math\nx = 1\ndef f(n):\n    return n + x\nnumbers = iter(range(9))")
    await text(session, "x = 41; next(numbers); open('f', 'w').write('kept'); import os; os.mkdir('d')")
    assert await text(
        session, "print(math.tau > 6, next(numbers), open('f').read(), sorted(os.listdir()))\nf(1)"
    ) == ("True 1 kept ['d', 'f']\n42")
    await text(session, "os.chdir('d')")
    assert await text(session, "os.path.basename(os.getcwd())") == "'d'"


async def test_a_cell_ends_as_a_program_does_and_leaves_the_session(tree: SessionTree) -> None:
    session = await tree.open()
    assert await text(session, "x = 1\nprint(1)\nexit()\nprint(2)") == "1"
    failed = await session.run("x += 1\n1 / 0")
    assert (failed.status, failed.text.splitlines()[-1]) == (
        ToolStatus.ERROR,
        "ZeroDivisionError: division by zero",
    )
    assert (await session.run("import sys\nsys.exit(3)")).text == "The program exited with code 3."
    assert await text(session, "```python\nx\n```") == "2"
    assert "session.py" not in failed.text
    await text(session, "def half(n):\n    return n / 0")
    assert "return n / 0" in (await session.run("\nhalf(3)")).text


async def test_each_cell_has_its_own_output(tree: SessionTree) -> None:
    session = await tree.open()
    cut = await session.run("print('x' * 100_000)")
    assert cut.truncated
    assert cut.stdout.endswith("[output cut: 100001 bytes in all]")
    assert await text(session, "import sys\nsys.stdout.write('no newline')\nNone") == "no newline"
    assert await text(session, "print('next')") == "next"
    await text(session, "import os\nos.close(1); os.close(2)")
    assert await text(session, "print('there again')") == "there again"


async def test_threads_are_waited_for_and_pools_live_on(tree: SessionTree) -> None:
    session = await tree.open()
    assert await text(session, "import threading\nthreading.Timer(0.05, print, ('late',)).start()") == "late"
    await text(session, "from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(2)")
    assert await text(session, "pool.submit(pow, 2, 5).result()") == "32"
    assert await text(session, "pool.submit(pow, 2, 6).result()") == "64"


async def test_nothing_runs_between_cells(tree: SessionTree, box: Sandbox) -> None:
    session = await tree.open()
    await text(session, "import threading, time\nwhen = []")
    code = "def count():\n    while True:\n        when.append(time.monotonic()); time.sleep(0.01)"
    await text(session, f"{code}\nthreading.Thread(target=count, daemon=True).start()")
    (one,) = children(wardens(box)[-1])
    await eventually(lambda: {state(pid) for pid in children(one)} == {"T"}, 20, "one is not stopped")
    began = time.monotonic()
    await asyncio.sleep(0.5)
    ended = time.monotonic()
    goes_on = "n = len(when)\nwhile len(when) == n: time.sleep(0.01)\nwhen[-1000:]"
    counted = eval(await text(session, goes_on))
    assert counted[-1] > ended
    assert not [moment for moment in counted if began < moment < ended]


async def test_three_hundred_cells(tree: SessionTree, box: Sandbox) -> None:
    session = await tree.open()
    warden = wardens(box)[-1]
    await text(session, "total = 0")
    handles = open_files(warden)
    for i in range(300):
        await text(session, f"total += {i}\nopen('f', 'a').write('x')")
    assert await text(session, "(total, len(open('f').read()))") == f"({sum(range(300))}, 300)"
    await eventually(lambda: none_more(open_files(warden), handles), 20, "a descriptor is left")


async def test_draws_follow_the_seed(tree: SessionTree) -> None:
    code = "import random\nrandom.random()"
    one, same, other = [await tree.open(seed) for seed in (7, 7, 8)]
    drawn = [await text(session, code) for session in (one, same, other)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert (await one.run(code, seed=3)).text == (await other.run(code, seed=3)).text


# --- limits ------------------------------------------------------------------------------------------------


async def test_a_timeout_ends_that_session_alone(tree: SessionTree) -> None:
    slow, other = await tree.open(), await tree.open()
    await text(other, "x = 5")
    child = await other.fork()
    stuck = asyncio.create_task(slow.run("print('so far')\nimport time\ntime.sleep(60)", deadline_s=1.0))
    assert await text(other, "x") == "5"
    result = await stuck
    assert (result.status, result.text) == (
        ToolStatus.TIMEOUT,
        "so far\nStopped: the program ran longer than 1 s.",
    )
    assert not slow.alive
    with pytest.raises(SessionLost):
        await slow.run("1")
    assert await text(child, "x") == "5"


async def test_cpu_time_is_counted_by_the_cell(tree: SessionTree) -> None:
    session = await tree.open()
    spend = "import time\nuntil = time.process_time() + 0.9\nwhile time.process_time() < until: pass"
    for _ in range(3):  # more than one cell may take
        assert 0.7 < (await session.run(spend)).cpu_s < 1.9
    result = await session.run("while True: pass")
    assert result.status is ToolStatus.TIMEOUT
    assert "2 s of CPU" in result.text
    assert not session.alive


@pytest.mark.parametrize(
    "code", ["import ctypes\nctypes.string_at(0)", "import os\nos._exit(0)", "import os\nos.abort()"]
)
async def test_a_cell_that_ends_its_interpreter_ends_that_session_alone(tree: SessionTree, code: str) -> None:
    session = await tree.open()
    child = await session.fork()
    result = await session.run(f"print('last words', flush=True)\n{code}")
    assert result.status is ToolStatus.ERROR
    assert result.stdout == "last words\n"
    assert result.reason == "The program ended its interpreter."
    assert not session.alive
    assert await text(child, "1") == "1"


async def test_memory_and_disk_are_limited_and_the_session_lives_on(tree: SessionTree) -> None:
    session, other = await tree.open(), await tree.open()
    assert "MemoryError" in (await session.run("x = bytearray(1 << 30)")).text
    fill = "for n in range(99):\n    open(str(n), 'wb').write(bytes(1 << 20))"
    assert "No space left" in (await session.run(fill)).text
    assert await text(other, "open('f', 'wb').write(bytes(2 << 20))") == str(2 << 20)
    assert await text(session, "1") == "1"


async def test_a_tree_has_so_many_sessions_and_no_more(tree: SessionTree) -> None:
    sessions = [await tree.open() for _ in range(LIMITS.branches - 1)]
    await refused(sessions[0], "12 sessions, as many as it may have")
    with pytest.raises(TreeFull, match="as many as it may have"):
        await tree.open()
    await sessions[1].close()
    await sessions[0].fork()


# --- forks -------------------------------------------------------------------------------------------------


async def test_a_fork_has_the_state_and_then_its_own(tree: SessionTree) -> None:
    parent = await tree.open(3)
    await text(
        parent, "import os, random, threading\nx = [1]\nnumbers = (n * n for n in range(9))\nnext(numbers)"
    )
    await text(parent, "os.mkdir('d'); os.chdir('d'); open('f', 'w').write('old'); os.symlink('f', 'way')")
    child = await parent.fork()
    await text(child, "x.append(2); open('f', 'w').write('new'); open('mine', 'w')")
    await text(parent, "x.append(3)")
    look = (
        "print(x, next(numbers), open('way').read(), sorted(os.listdir()), threading.active_count())\n"
        "random.random()"
    )
    ours, theirs = [(await text(one, look)).splitlines() for one in (parent, child)]
    assert ours[0] == "[1, 3] 1 old ['f', 'way'] 1"
    assert theirs[0] == "[1, 2] 1 new ['f', 'mine', 'way'] 1"
    assert ours[1] == theirs[1]  # what the parent would have drawn


async def test_a_fork_outlives_its_parent_and_forks_again(tree: SessionTree) -> None:
    session = await tree.open()
    await text(session, "x = 0")
    for depth in range(20):
        child = await session.fork()
        await session.close()
        session = child
        await text(session, f"x += {depth}\nopen('f{depth}', 'w').write('x')")
    assert await text(session, "import os\n(x, len(os.listdir()))") == "(190, 20)"


async def test_siblings_neither_see_nor_find_each_other(tree: SessionTree) -> None:
    parent = await tree.open()
    await text(parent, "import os\nplace = os.environ['HOME']")
    child = await parent.fork()
    look = "(os.environ['HOME'], place, os.getpid(), os.getcwd() == os.environ['HOME'])"
    here, there = [eval(await text(one, look)) for one in (parent, child)]
    assert len({here[0], there[0], here[1]}) == 3
    assert here[3] is there[3] is True
    await text(parent, "open('secret', 'w').write('mine')")
    for code in (
        "open(place + '/secret').read()",
        "os.listdir(os.path.dirname(place))",
        f"os.kill({here[2]}, 0)",
        f"os.kill({here[2]}, 9)",
        "os.kill(1, 9)",
        "import resource\nresource.prlimit(1, resource.RLIMIT_CPU, (0, 0))",
        f"import resource\nresource.prlimit({here[2]}, resource.RLIMIT_CPU, (0, 0))",
        "os.wait()",
        "os.mkdir(os.path.dirname(place) + '/new')",
    ):
        result = await child.run(f"import os\n{code}")
        assert result.text.splitlines()[-1].split(":")[0] in (
            "FileNotFoundError",
            "PermissionError",
            "ChildProcessError",
        ), (code, result.text)
    assert await text(parent, "open('secret').read()") == "'mine'"
    assert "ChildProcessError" in (await parent.run("os.wait()", deadline_s=2.0)).text  # though it has one


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ("f = open('f', 'w')", "f.close()", "open files"),
        ("import socket\na, b = socket.socketpair()", "a.close(); b.close()", "open files"),
        ("import os\na, b = os.pipe(); os.dup2(a, 0); os.close(a); os.close(b)", "os.close(0)", "open files"),
        (
            "import threading, time\n"
            "t = threading.Thread(target=time.sleep, args=(0.3,), daemon=True); t.start()",
            "t.join()",
            "more than one thread",
        ),
        (
            "import ctypes\nopen('f', 'w').write('x')\nc = ctypes.CDLL(None)\nwith open('f') as f:\n"
            "    m = c.mmap(ctypes.c_void_p(1 << 32), ctypes.c_long(4096), 1, 0x12, f.fileno(), 0)",
            "c.munmap(ctypes.c_void_p(1 << 32), 4096)",
            "shares memory, or has mapped a file",
        ),
        ("import os\nopen('f', 'w'); os.link('f', 'g')", "os.unlink('g')", "two names"),
        ("import os.path\np = os.path.abspath('f')", "p = None", "path"),
        ("from pathlib import Path\np = Path('f').resolve()", "p = None", "path"),
        ("import os\nfor _ in range(50): os.mkdir('d'); os.chdir('d')", "import os", "nested"),
    ],
)
async def test_what_cannot_be_copied_is_refused_by_its_cause(
    tree: SessionTree, before: str, after: str, why: str
) -> None:
    session = await tree.open()
    await text(session, f"x = 3\n{before}")
    await refused(session, why)
    await text(session, after)
    if why not in ("nested", "path"):
        child = await session.fork()
        assert await text(child, "x") == "3"
    assert await text(session, "x") == "3"


async def test_copies_of_links_and_closed_files(tree: SessionTree) -> None:
    session = await tree.open()
    make = (
        "import os\nos.symlink('/', 'root'); os.symlink('loop', 'loop')\n"
        "os.mkdir('closed', 0); os.mkdir('d'); os.mkdir('d/e')\n"
        "os.close(os.open('unread', os.O_CREAT, 0)); open('d/-rf *', 'w').write('x' * 5000)\n"
        "for i in range(20): open(f'n{i}', 'w').write(str(i))"
    )
    await text(session, make)
    child = await session.fork()
    look = (
        "[(n, os.lstat(n).st_mode, os.lstat(n).st_uid, os.lstat(n).st_mtime_ns) for n in os.listdir()], "
        "os.readlink('root'), open('d/-rf *').read()"
    )
    assert await text(session, look) == await text(child, look)


# --- forks that a program makes, or spoils -----------------------------------------------------------------


async def test_a_program_cannot_fork(tree: SessionTree) -> None:
    session = await tree.open()
    child = await session.fork()
    for one in (session, child, await child.fork()):
        for code in ("import os\nos.fork()", "import os\nwhile True:\n    os.fork()"):
            assert "PermissionError: [Errno 1]" in (await one.run(code)).text
        raw = "import ctypes\nc = ctypes.CDLL(None)\n[c.syscall(56, flags, 0, 0, 0, 0) for flags in FLAGS]"
        flags = [17 | 0x100, 17 | 0x10000000, 17 | 0x8000, 0, 17, 0x01200011, 17 | 0x20000000]
        assert await text(one, raw.replace("FLAGS", str(flags))) == str([-1] * len(flags))


SPOILED = {
    "it forks twice": "def fork():\n    pid = real()\n    real()\n    return pid\nos.fork = fork",
    "it forks twice, and its child does not": (
        "def fork():\n    pid = real()\n    if pid:\n        real()\n    return pid\nos.fork = fork"
    ),
    "it alone keeps its child's socket": (
        "def fork():\n    pid = real()\n    if pid:\n        [os.dup(n) for n in range(3, 30) if there(n)]\n"
        "    return pid\n"
        "def there(n):\n    try:\n        return os.fstat(n)\n    except OSError:\n        return None\n"
        "os.fork = fork"
    ),
    "it never comes back": "import time\nos.fork = lambda: time.sleep(600)",
    "it ends": "os.fork = lambda: os._exit(0)",
    "a child of its own": (
        "import time\ndef fork():\n    if real() == 0:\n        while True: time.sleep(1)\n    return 7\n"
        "os.fork = fork"
    ),
    "it plays both parts": (
        "import socket, struct, time\n"
        "def fork():\n"
        "    if real() == 0:\n"
        "        while True: time.sleep(1)\n"
        "    for n in range(3, 64):\n"
        "        try:\n"
        "            message = b'{\"forked\": false}'\n"
        "            socket.socket(fileno=os.dup(n)).send(struct.pack('!I', len(message)) + message)\n"
        "        except OSError:\n"
        "            pass\n"
        "    return 7\n"
        "os.fork = fork"
    ),
    "it leaves a child and ends": (
        "import time\ndef fork():\n    if real() == 0:\n        while True: time.sleep(1)\n    os._exit(0)\n"
        "os.fork = fork"
    ),
    "it keeps its child's socket": (
        "def fork():\n    [os.dup(n) for n in range(3, 30) if there(n)]\n    return real()\n"
        "def there(n):\n    try:\n        return os.fstat(n)\n    except OSError:\n        return None\n"
        "os.fork = fork"
    ),
    "it stays in its parent's directory": "os.chdir = lambda path: None",
    "it starts a thread": (
        "import threading, time\n"
        "os.register_at_fork(after_in_child=lambda: threading.Thread(target=time.sleep, args=(9,)).start())"
    ),
}


@pytest.mark.parametrize("how", SPOILED)
async def test_a_spoiled_fork_leaves_nothing_and_nobody_else_minds(
    tree: SessionTree, box: Sandbox, how: str
) -> None:
    session, other = await tree.open(), await tree.open()
    await text(other, "x = 5")
    warden = wardens(box)[-1]
    before, places = set(descendants(warden)), set(scratch_directories(warden))
    await text(session, f"import os\nreal = os.fork\n{SPOILED[how]}")
    with pytest.raises(NotForked):
        await session.fork(1.5)
    await eventually(lambda: set(descendants(warden)) <= before, 20, "a stolen process is left")
    await eventually(lambda: set(scratch_directories(warden)) <= places, 20, "its directory is left")
    ended = 0 if session.alive else 1
    await eventually(lambda: len(before - set(descendants(warden))) == ended, 20, "it ends if it is said to")
    assert await text(await other.fork(), "x") == "5"


# --- endings -----------------------------------------------------------------------------------------------


async def test_nothing_is_left_of_sessions_that_are_closed(tree: SessionTree, box: Sandbox) -> None:
    warden = wardens(box)[-1]
    session = await tree.open()
    handles = open_files(warden)
    processes, places = descendants(warden), scratch_directories(warden)
    for _ in range(30):
        child = await session.fork()
        await text(child, "open('f', 'w').write('x')")
        await child.close()
    await eventually(lambda: none_more(open_files(warden), handles), 20, "a descriptor is left")
    await eventually(lambda: descendants(warden) == processes, 20, "a process is left")
    await eventually(lambda: len(scratch_directories(warden)) == len(places), 20, "a directory is left")


async def test_a_cancelled_cell_ends_its_session_alone(tree: SessionTree, box: Sandbox) -> None:
    session, other = await tree.open(), await tree.open()
    before = len(descendants(wardens(box)[-1]))
    call = asyncio.create_task(session.run("import time\ntime.sleep(600)"))
    await asyncio.sleep(0.3)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert not session.alive
    await eventually(lambda: len(descendants(wardens(box)[-1])) == before - 1, 20, "it still runs")
    assert await text(other, "1") == "1"


async def test_what_is_cancelled_while_it_comes_to_be_is_closed(tree: SessionTree, box: Sandbox) -> None:
    session = await tree.open()
    warden = wardens(box)[-1]
    before = len(descendants(warden))
    for coming in (tree.open(), session.fork(), tree.open(), session.fork()):
        task = asyncio.create_task(coming)
        await asyncio.sleep(0.001)
        task.cancel()
        (came,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(came, SandboxSession):  # in that moment: nobody was too late
            await came.close()
    assert await text(await session.fork(), "1") == "1"
    await eventually(lambda: len(descendants(warden)) == before + 1, 20, "a session is left")


async def test_what_comes_too_late_for_its_caller_is_closed(
    tree: SessionTree, box: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await tree.open()
    warden = wardens(box)[-1]
    before = len(descendants(warden))
    with monkeypatch.context() as patch:
        patch.setattr("system.tools.sandbox.sessions.GRACE_S", 1e-3)
        patch.setattr("system.tools.sandbox.sessions._OPEN_S", 0.0)
        os.kill(warden, signal.SIGSTOP)  # so that nothing comes in time
        try:
            for _ in range(4):
                with pytest.raises(SessionLost):
                    await tree.open()
        finally:
            os.kill(warden, signal.SIGCONT)
    assert await text(await session.fork(), "1") == "1"
    await eventually(lambda: len(descendants(warden)) == before + 1, 20, "a session is left")


async def test_many_at_once(tree: SessionTree) -> None:
    root = await tree.open()
    await text(root, "x = 1")
    forks = await asyncio.gather(*(root.fork() for _ in range(8)))
    code = "import time\nbegan = time.monotonic()\ntime.sleep(0.3)\n(x + {}, began, time.monotonic())"
    told = [
        eval(one) for one in await asyncio.gather(*(text(f, code.format(i)) for i, f in enumerate(forks)))
    ]
    assert [found for found, *_ in told] == [1 + i for i in range(8)]
    whole = max(ended for *_, ended in told) - min(began for _, began, _ in told)
    assert whole < sum(ended - began for _, began, ended in told), "not one after the other"


async def test_without_namespaces_it_is_refused_by_name() -> None:
    box = Sandbox(namespaces=False)
    await box.start()
    try:
        with pytest.raises(SandboxUnavailable, match="python sessions need namespaces"):
            await box.tree()
    finally:
        await box.close()
    with pytest.raises(SandboxUnavailable, match="not been started"):
        await Sandbox().tree()
