"""Wardens serve one call after another: none is left more than a new one would have left it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from polling import eventually
from sandboxes import children, running

from system.tools.outcome import ToolStatus
from system.tools.sandbox.sandbox import Sandbox, SandboxLimits

LIMITS = SandboxLimits(wall_s=20.0, cpu_s=5.0, memory_mb=128, file_mb=4, disk_mb=16, threads=8)


@pytest_asyncio.fixture(params=[True, False], ids=["namespaces", "landlock"])
async def fresh(request: pytest.FixtureRequest) -> AsyncIterator[Sandbox]:
    async with running(Sandbox(LIMITS, namespaces=request.param)) as box:
        yield box


def wardens(box: Sandbox) -> list[int]:
    assert box.pid is not None
    return children(box.pid)


async def idle_warden(box: Sandbox) -> int:
    """The only one; others may still be ending."""
    await box.run("1")
    await eventually(lambda: len(wardens(box)) == 1, 20, "others are left")
    return wardens(box)[0]


# What a program finds, in so far as another one could have left it there.
LOOK = """
import os, resource, signal, sys, threading
def descriptors():
    for number in range(64):
        try:
            yield number, oct(os.fstat(number).st_mode), os.get_blocking(number)
        except OSError:
            pass
print(sorted(os.listdir()), os.stat(".").st_nlink, os.stat(".").st_size, os.statvfs(".")[2:6])
print(dict(os.environ), os.getcwd(), os.umask(0), list(descriptors()))
print(threading.active_count(), os.getpgrp() - os.getpid(), os.getsid(0) - os.getpid())
print([resource.getrlimit(kind) for kind in range(16) if kind not in (6, 9)])
print(signal.pthread_sigmask(signal.SIG_BLOCK, []), [signal.getsignal(n) for n in range(1, 65)])
print(sorted(sys.modules), sys.path, sys.getrecursionlimit(), sys.argv)
"""

FILES = {
    "files": "open('f', 'w').write('x'); os.mkdir('d'); os.symlink('/', 'l'); open('d/f', 'w')",
    "vanished": "open('f', 'w').close(); os.unlink('f'); os.mkdir('d'); os.rmdir('d')",
    "full": "n = 0\nwhile True:\n    n += 1\n    open(str(n), 'wb', 0).write(bytes(1 << 20))",
    "unnamed": "f = open('f', 'wb', 0); os.unlink('f')\nfor _ in range(3): f.write(bytes(1 << 20))",
}
HOSTILE = {
    "environment": "os.environ.clear(); os.environ['HOME'] = '/'; os.chdir('/'); os.umask(0o777)",
    "descriptors": "os.closerange(0, 1000)",
    "streams": "os.set_blocking(0, False); os.set_blocking(1, False); os.dup2(1, 2); os.write(1, b'x')",
    "forks": "[attempt(os.fork) for _ in range(100)]; attempt(lambda: os.execv('/bin/sh', ['sh']))",
    "threads": "import threading\nwhile True:\n    threading.Thread(target=time.sleep, args=(99,)).start()",
    "daemons": "import threading\nfor _ in range(4):\n"
    "    threading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
    "proc": "[attempt(lambda: open(f'/proc/{p}/mem', 'wb')) for p in ('self', 1, 2, os.getppid())]",
    "signals": "[attempt(lambda: os.kill(p, n)) for p in (0, -1, os.getppid(), 1, 2) for n in (9, 19, 15)"
    " if p != os.getpid()]",
    "handlers": "[attempt(lambda: signal.signal(n, signal.SIG_IGN)) for n in range(1, 65)]\n"
    "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65)); signal.alarm(1)",
    "limits": "import resource\n[attempt(lambda: resource.setrlimit(k, (0, 0))) for k in range(1, 16)]",
    "output": "for _ in range(3000): print('x' * 1000); print('y' * 1000, file=sys.stderr)",
    "a signal": "os.kill(os.getpid(), 9)",
    "an abort": "signal.signal(6, signal.SIG_DFL); ctypes.CDLL(None).abort()",
    "a fault": "ctypes.string_at(0)",
    "an exit": "os._exit(70)",
    "an endless loop": "import resource; resource.setrlimit(0, (1, 1))\nwhile True: pass",
    "memory": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "modules": "sys.path[:] = []; sys.modules.clear()",
    "an empty program": "",
}


@pytest.mark.parametrize("name", [*FILES, *HOSTILE])
async def test_nothing_of_a_program_is_left_for_the_next_one(fresh: Sandbox, name: str) -> None:
    warden = await idle_warden(fresh)
    before = (await fresh.run(LOOK)).stdout
    assert "HOME" in before
    begin = "import ctypes, os, signal, sys, time\ndef attempt(action):\n    try: action()\n"
    begin += "    except (OSError, ValueError): pass\n"
    await fresh.run(begin + (FILES | HOSTILE)[name], deadline_s=5.0)
    after = (await fresh.run(LOOK)).stdout
    own_directory = "/call-" in before
    if own_directory and name in FILES:  # whose names its warden has read
        await eventually(lambda: warden not in wardens(fresh), 20, "it waits for another program")
    else:
        assert wardens(fresh) == [warden]
    if own_directory:  # it has another name
        before, after = (_nameless(text) for text in (before, after))
    assert after == before
    assert (await fresh.run("print(6 * 7)")).text == "42"


def _nameless(text: str) -> str:
    """``text`` without the names of scratch directories, and of what is beside them on the disk."""
    first, *others = re.sub(r"\S*/call-[^\s']*", "HERE", text).split("\n")
    return "\n".join([first.partition("]")[0], *others])


async def test_no_file_is_made_without_a_name(fresh: Sandbox) -> None:
    """It would be the next program's to see in the counts of the file system, and no name would tell."""
    told = await fresh.run("import os\nos.open('.', os.O_TMPFILE | os.O_RDWR)")
    assert "Operation not supported" in told.text


async def test_each_call_has_another_user_id(fresh: Sandbox) -> None:
    ids = (
        "import os, time\nassert len({{*os.getresuid(), *os.getresgid()}}) == 1\ntime.sleep({})\nos.getuid()"
    )
    one_by_one = [(await fresh.run(ids.format(0))).text for _ in range(9)]
    if not one_by_one[0].isdigit() or int(one_by_one[0]) < 0x70000000:
        pytest.skip("no user ids of our own here")
    at_once = [one.text for one in await asyncio.gather(*(fresh.run(ids.format(0.2)) for _ in range(9)))]
    assert len(set(one_by_one)) == len(set(at_once)) == 9


# Looks for words in all memory that lies near the interpreter's own, without holding them: what it finds it
# has found.  Told are those that are there.
SEARCH = """
import ctypes, os
ends = os.pipe()
libc = ctypes.CDLL(None)
libc.sbrk.restype = ctypes.c_void_p
keep = bytes(reversed(b"enim-dna-ereh"))
def pages():
    heap = libc.sbrk(0)
    for first, last in ((heap - (8 << 20), heap), (id(keep) - (32 << 20), id(keep) + (32 << 20))):
        for page in range(first & -4096, last, 4096):
            if libc.write(ends[1], ctypes.c_void_p(page), 4096) > 0:  # an error where there is none
                yield os.read(ends[0], 4096)
found, count = set(), 0
for page in pages():
    count += 1
    for word in (b"enim-dna-ereh", WORDS):
        if word in page[::-1]:
            found.add(word)
print(count > 1000, *sorted(found))
"""


async def test_the_code_and_output_of_a_program_are_not_in_the_memory_of_the_next(fresh: Sandbox) -> None:
    """A program tells hidden tests, or their answers, to nobody."""
    for stream in ("stdout", "stderr"):
        secret = f"secret-of-{stream}"
        told = await fresh.run(f"import sys\nprint('{secret}' * 100, file=sys.{stream})")
        assert secret in told.text
        search = SEARCH.replace("WORDS", repr(secret[::-1].encode()))
        assert (await fresh.run(search)).text == "True b'enim-dna-ereh'"


async def test_a_warden_killed_in_mid_call_fails_that_call_only(fresh: Sandbox) -> None:
    server = fresh.pid
    code = "import os, time\nprint({}, flush=True)\ntime.sleep(1.5)\nprint('done')"
    calls = [asyncio.ensure_future(fresh.run(code.format(i))) for i in range(3)]
    await eventually(lambda: sum(bool(children(w)) for w in wardens(fresh)) == 3, 20, "no three calls run")
    killed = wardens(fresh)[1]
    os.kill(killed, signal.SIGKILL)
    assert [result.text for result in await asyncio.gather(*calls)] == [f"{i}\ndone" for i in range(3)]
    assert (await fresh.run("1")).text == "1"
    assert fresh.pid == server
    assert killed not in wardens(fresh)


async def test_an_idle_warden_that_was_killed_is_not_asked(fresh: Sandbox) -> None:
    for _ in range(5):  # more often than a call is tried again
        warden = await idle_warden(fresh)
        os.kill(warden, signal.SIGKILL)
        await eventually(lambda gone=warden: gone not in wardens(fresh), 20, "it is still there")
        assert (await fresh.run("1")).text == "1"


async def test_few_wardens_wait_for_the_next_call(fresh: Sandbox) -> None:
    results = await asyncio.gather(*(fresh.run(f"import time\ntime.sleep(0.3)\n{i}") for i in range(24)))
    assert [result.text for result in results] == [str(i) for i in range(24)]
    await eventually(lambda: len(wardens(fresh)) <= 2, 20, "many are left")
    kept = wardens(fresh)
    for i in range(5):
        assert (await fresh.run(str(i))).text == str(i)
    assert wardens(fresh) == kept


async def test_a_call_that_is_given_up_ends_its_warden(fresh: Sandbox) -> None:
    warden = await idle_warden(fresh)
    call = asyncio.ensure_future(fresh.run("open('f', 'w').write('x')\nimport time\ntime.sleep(600)"))
    await eventually(lambda: bool(children(warden)), 20, "it never ran")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await eventually(lambda: wardens(fresh) == [], 20, "it is still there")
    assert (await fresh.run("import os\nos.listdir()")).text == "[]"


async def test_large_codes_and_outputs(fresh: Sandbox) -> None:
    warden = await idle_warden(fresh)
    for _ in range(3):
        text = "x" * 900_000
        assert (await fresh.run(f"len('{text}')")).text == "900000"
        long = await fresh.run("print('x' * 3_000_000)")
        assert long.stdout.endswith("[output cut: 3000001 bytes in all]")
        lone = await fresh.run("print('\\ud800')\n'" + chr(0xD800) + "'")
        assert lone.status is ToolStatus.ERROR
        assert "surrogates not allowed" in lone.text
    assert wardens(fresh) == [warden]
