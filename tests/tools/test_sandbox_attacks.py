"""Attempts to get out of the sandbox, to exhaust the machine, or to outlive the call, one by one."""

# ruff: noqa: ASYNC220, ASYNC240  (a test may look at /proc and /tmp without a thread)

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from polling import eventually

from system.tools.outcome import ToolStatus
from system.tools.sandbox.result import SandboxResult
from system.tools.sandbox.sandbox import Sandbox, SandboxLimits

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Makes attempts, each given as an expression; prints what each raised, or ESCAPED.
TRY = """
import ctypes, os, signal, socket
def attempt(action):
    try:
        value = eval(action, globals())
    except BaseException as error:
        print(type(error).__name__, getattr(error, "errno", ""))
    else:
        print("ESCAPED", value)
"""


async def attempt(sandbox: Sandbox, *actions: str, setup: str = "") -> list[str]:
    """What each attempt raised; none may get through."""
    lines = "".join(f"attempt({action!r})\n" for action in actions)
    result = await sandbox.run(f"{TRY}\n{setup}\n{lines}")
    assert result.status is ToolStatus.OK, result.text
    answers = result.stdout.splitlines()
    assert len(answers) == len(actions)
    assert [action for action, answer in zip(actions, answers, strict=True) if "ESCAPED" in answer] == []
    return answers


@pytest.fixture(scope="module", autouse=True)
def ours() -> Iterator[None]:
    """Our temporary files lie in a directory of their own: other tests have sandboxes, too."""
    with tempfile.TemporaryDirectory(prefix="sandbox-test-") as name, pytest.MonkeyPatch.context() as patch:
        Path(name).chmod(0o1777)  # as /tmp is
        patch.setenv("TMPDIR", name)
        patch.setattr(tempfile, "tempdir", name)
        yield


def bases() -> set[Path]:
    """Directories of our sandboxes."""
    return set(Path(tempfile.gettempdir()).glob("espalier-*"))


def processes(mark: str) -> list[int]:
    """Processes of our sandboxes whose name begins with ``mark``; all of one have its directory among the
    arguments that its fork server was started with.
    """
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name, words = (entry / "comm").read_text(), (entry / "cmdline").read_text()
                if name.startswith(mark) and tempfile.gettempdir() in words:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


async def gone(mark: str, before: list[int]) -> None:
    """Return once no process named ``mark`` is left but those of ``before``; long before it would end."""
    await eventually(lambda: set(processes(mark)) <= set(before), 8, "a process is left")


# --- network -----------------------------------------------------------------------------------------------


async def test_no_socket(sandbox: Sandbox) -> None:
    families = ("AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_PACKET", "AF_VSOCK")
    kinds = ("SOCK_STREAM", "SOCK_DGRAM", "SOCK_RAW")
    actions = [f"socket.socket(socket.{family}, socket.{kind})" for family in families for kind in kinds]
    assert set(await attempt(sandbox, *actions)) == {"PermissionError 1"}


async def test_no_connection_to_a_listener_on_loopback(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        await attempt(
            sandbox,
            f"socket.create_connection(('127.0.0.1', {port}), 1)",
            f"__import__('urllib.request').request.urlopen('http://127.0.0.1:{port}', timeout=1)",
        )
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


async def test_a_socketpair_reaches_no_address(sandbox: Sandbox) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        name = f"\0espalier-test-sandbox-{os.getpid()}"
        listener.bind(name)
        await attempt(
            sandbox,
            "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
            f"a.sendto(b'x', {name!r})",
            setup="a, b = socket.socketpair()",
        )
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.recv(1)


async def test_no_descriptor_is_inherited(sandbox: Sandbox) -> None:
    code = """
import os
open_ones = []
for number in range(3, 1024):
    try:
        os.fstat(number)
        open_ones.append(number)
    except OSError:
        pass
print(open_ones)
"""
    assert (await sandbox.run(code)).text == "[]"


# --- files -------------------------------------------------------------------------------------------------


FILE_ATTACKS = [
    "open(D + '/new', 'w')",
    "open(D + '/secret', 'a')",
    "open(D + '/secret').read()",
    "os.open(D + '/secret', os.O_RDONLY | os.O_TRUNC)",
    "os.truncate(D + '/secret', 0)",
    "os.unlink(D + '/secret')",
    "os.rename(D + '/secret', D + '/other')",
    "os.rename(D + '/secret', 'mine')",
    "os.link(D + '/secret', 'mine')",
    "os.symlink('x', D + '/link')",
    "os.mkdir(D + '/new')",
    "os.chmod(D + '/secret', 0o777)",
    "os.chmod(D, 0)",
    "os.chown(D + '/secret', os.getuid(), -1)",
    "os.utime(D + '/secret', (0, 0))",
    "os.setxattr(D + '/secret', 'user.x', b'x')",
    "os.mkfifo(D + '/fifo')",
    "os.listdir(D)",
    "(os.symlink(D + '/secret', 'link'), open('link').read())",
    "(os.symlink(D, 'way'), open('way/new', 'w'))",
    "(os.symlink(D + '/new', 'dangling'), open('dangling', 'w'))",
    "open('../' * 20 + D[1:] + '/secret').read()",
    "open('/tmp/espalier-escape', 'w')",
    "open('/dev/shm/espalier-escape', 'w')",
    "open('/var/tmp/espalier-escape', 'w')",
    "open(os.__file__, 'a')",
    "os.open(os.__file__, os.O_RDONLY | os.O_TRUNC)",
    "os.unlink(os.__file__)",
    "open('/dev/sda', 'rb').read(1)",
    "open('/dev/mem', 'rb').read(1)",
    "open('/etc/shadow').read()",
    "open('/etc/passwd').read()",
    "open('/proc/1/environ', 'rb').read()",
    "open('/proc/self/mem', 'rb').read(1)",
    "os.listdir('/proc')",
    "os.listdir('/sys')",
    "os.listdir(os.path.expanduser('~root'))",
    "os.chroot('.')",
    "ctypes.CDLL(None, use_errno=True).memfd_create(b'x', 0) >= 0 or os.listdir('/nonexistent')",
]


async def test_nothing_outside_is_read_or_changed(sandbox: Sandbox, outside: Path) -> None:
    (outside / "secret").write_text("secret")
    (outside / "secret").chmod(0o666)
    before = (outside / "secret").stat()
    await attempt(sandbox, *FILE_ATTACKS, setup=f"D = {str(outside)!r}")
    after = (outside / "secret").stat()
    assert sorted(p.name for p in outside.iterdir()) == ["secret"]
    assert (outside / "secret").read_text() == "secret"
    assert (before.st_mode, before.st_mtime_ns) == (after.st_mode, after.st_mtime_ns)
    assert after.st_nlink == 1
    for name in ("/tmp", "/dev/shm", "/var/tmp"):
        assert not Path(name, "espalier-escape").exists()


async def test_concurrent_calls_cannot_see_each_other(sandbox: Sandbox) -> None:
    write = (
        "import os, time\nopen('secret', 'w').write('mine')\nprint(os.getcwd(), flush=True)\ntime.sleep(1)"
    )
    writer = asyncio.ensure_future(sandbox.run(write))
    await asyncio.sleep(0.4)
    seen_by_us = Path(tempfile.gettempdir()).glob("espalier-sandbox-*/call-*/secret")  # none with namespaces
    reads = [f"open({str(path)!r}).read()" for path in seen_by_us]
    await attempt(sandbox, "os.kill(os.getpid() - 2, 0)", *reads)
    written = (await writer).stdout.strip()
    assert written.startswith("/")
    await attempt(sandbox, f"open({written + '/secret'!r}).read()")


async def test_no_secret_of_the_parent_is_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    fresh = Sandbox()
    await fresh.start()
    try:
        text = (await fresh.run("import os\nprint(dict(os.environ))")).text
    finally:
        await fresh.close()
    assert "hunter2" not in text
    assert set(eval(text)) == {"HOME", "TMPDIR", "PATH", "LANG", "TZ"}


# --- other processes ---------------------------------------------------------------------------------------


PROCESS_ATTACKS = [
    "os.kill(PARENT, 0)",
    "os.kill(PARENT, signal.SIGTERM)",
    "os.kill(SERVER, signal.SIGKILL)",
    "os.kill(-1, signal.SIGKILL)",
    "os.kill(0, signal.SIGKILL)",
    "os.kill(os.getppid(), signal.SIGKILL)",
    "os.killpg(os.getpgid(0), signal.SIGKILL)",
    "os.pidfd_open(PARENT)",
    "os.setpriority(os.PRIO_PROCESS, PARENT, 19)",
    "os.sched_setaffinity(PARENT, {0})",
    "__import__('resource').prlimit(PARENT, 7)",
    "__import__('fcntl').fcntl(0, 8, PARENT)",
    "ptrace(16, PARENT, 0, 0)",
    "ptrace(0, 0, 0, 0)",
    "os.fork()",
    "os.posix_spawn('/bin/true', ['true'], {})",
    "os.execv('/bin/sh', ['sh', '-c', 'echo ESCAPED'])",
    "__import__('subprocess').run(['/bin/true'])",
    "__import__('multiprocessing').Process(target=print).start()",
    "os.setuid(0) or os.setuid(12345)",
    "os.setsid()",
    "checked(LIBC.unshare(0x10000000))",
    "checked(LIBC.mount(b'none', b'/', b'tmpfs', 0, None))",
    "checked(LIBC.prctl(1, 0, 0, 0, 0))",
    "checked(LIBC.shmget(0, 4096, 0o1666))",
    "checked(LIBC.syscall(425, 8, 0))",
    "checked(LIBC.syscall(321, 0, 0, 0))",
    "checked(LIBC.syscall(248, b'user', b'k', b'v', 1, -1))",
    "checked(LIBC.syscall(435, 0, 0))",
]


async def test_no_other_process_is_touched_or_started(sandbox: Sandbox) -> None:
    setup = f"""
PARENT, SERVER = {os.getpid()}, {sandbox.pid}
LIBC = ctypes.CDLL(None, use_errno=True)
def checked(value):
    if value < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return value
def ptrace(*arguments):
    return checked(LIBC.ptrace(*arguments))
"""
    server = sandbox.pid
    await attempt(sandbox, *PROCESS_ATTACKS, setup=setup)
    assert (await sandbox.run("1")).status is ToolStatus.OK
    assert sandbox.pid == server


async def test_x32_and_foreign_system_calls_are_fatal_or_refused(sandbox: Sandbox) -> None:
    code = "import ctypes\nprint(ctypes.CDLL(None).syscall(0x40000000 + 41, 2, 1, 0))"
    result = await sandbox.run(code)
    assert result.exit_code == -31 or result.text == "-1"  # SIGSYS, or (not x86_64) refused


async def test_a_setsid_grandchild_does_not_outlive_the_call(sandbox: Sandbox) -> None:
    before = processes("sandbox-python")
    code = """
import os, time
try:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(600)
        os._exit(0)
except OSError:
    pass
time.sleep(600)
"""
    assert (await sandbox.run(code, deadline_s=0.5)).status is ToolStatus.TIMEOUT
    await gone("sandbox-python", before)


async def test_ignoring_signals_does_not_help(sandbox: Sandbox) -> None:
    code = """
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
while True:
    pass
"""
    result = await sandbox.run(code, deadline_s=0.5)
    assert result.status is ToolStatus.TIMEOUT
    assert result.wall_s < 5


# --- exhaustion --------------------------------------------------------------------------------------------


async def test_fork_bomb(sandbox: Sandbox) -> None:
    before = processes("sandbox")
    result = await sandbox.run("import os\nwhile True:\n    os.fork()")
    assert result.status is ToolStatus.ERROR
    assert "PermissionError" in result.text
    assert len(processes("sandbox")) <= len(before) + 2, "the call and its warden, which are about to end"
    await gone("sandbox", before)


async def test_thread_bomb(sandbox: Sandbox) -> None:
    code = """
import threading, time
count = 0
try:
    while True:
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        count += 1
        print(count)
except RuntimeError:
    pass
import os
os._exit(0)
"""
    result = await sandbox.run(code, deadline_s=10)
    assert result.status is ToolStatus.OK
    started = int(result.stdout.splitlines()[-1])
    counted = {"namespaces (mount, network, IPC, PID)", "unprivileged user id"} & set(sandbox.mechanisms)
    address_space = (sandbox.limits.memory_mb >> 3) + 1  # a thread's stack takes 8 MB of it
    assert started <= (sandbox.limits.threads if counted else address_space)


@pytest.mark.parametrize(
    "code",
    [
        "x = bytearray(1 << 30)",
        "x = []\nwhile True:\n    x.append(bytearray(1 << 20))",
        "x = 'a'\nwhile True:\n    x += x",
        "import mmap\nm = [mmap.mmap(-1, 1 << 26) for _ in range(100)]",
    ],
)
async def test_memory_bomb(sandbox: Sandbox, code: str) -> None:
    result = await sandbox.run(code)
    assert result.status is ToolStatus.ERROR
    assert "MemoryError" in result.text or "Cannot allocate memory" in result.text
    assert result.peak_rss_mb < 300


async def test_memory_that_no_address_is_left_of_cannot_be_had(sandbox: Sandbox) -> None:
    """Pages of shared memory without a file stay until all of it is unmapped."""
    code = (
        "import mmap, os\n"
        "for flags in (mmap.MAP_SHARED, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS):\n"
        "    try:\n"
        "        print(mmap.mmap(-1, 4096, flags=flags))\n"
        "    except OSError as error:\n"
        "        print(error)\n"
        "try:\n"
        "    file = open('/dev/zero', 'r+b', buffering=0)\n"
        "    print(sum(file.read(100)))\n"
        "    print(mmap.mmap(file.fileno(), 4096))\n"
        "except OSError as error:\n"
        "    print(type(error).__name__)\n"
        "len(mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))"
    )
    *refused, private = (await sandbox.run(code)).stdout.splitlines()
    assert refused[:2] == ["[Errno 12] Cannot allocate memory"] * 2
    # With namespaces it gives zeros, and cannot be mapped; without, it is not given.
    assert refused[2:] in (["0", "OSError"], ["PermissionError"])
    assert private == "4096"


async def test_huge_number_runs_into_the_deadline(sandbox: Sandbox) -> None:
    result = await sandbox.run("9 ** 9 ** 9", deadline_s=0.5)
    assert result.status in (ToolStatus.TIMEOUT, ToolStatus.ERROR)


async def test_endless_output(sandbox: Sandbox) -> None:
    result = await sandbox.run("while True:\n    print('x' * 1000)", deadline_s=0.7)
    assert result.status is ToolStatus.TIMEOUT
    assert len(result.stdout) < 2100


async def test_a_file_has_a_largest_size(sandbox: Sandbox) -> None:
    result = await sandbox.run(
        "with open('f', 'wb') as f:\n    for _ in range(64):\n        f.write(bytes(1 << 20))"
    )
    assert result.status is ToolStatus.ERROR
    assert "File too large" in result.text


@pytest.mark.parametrize(
    "code",
    [
        "while True:\n    n = len(os.listdir())\n    with open(str(n), 'wb') as f:\n        f.write(block)",
        "f = []\nwhile True:\n    f.append(open('f', 'wb', 0))\n    os.unlink('f')\n    f[-1].write(block)",
        "for n in range(10**6):\n    os.mkdir(str(n), 0o300)\n    open(f'{n}/f', 'wb').write(block)",
        "for n in range(10**6):\n    open(str(n), 'w').close()",
    ],
    ids=["files", "unlinked", "closed directories", "many"],
)
async def test_all_files_together_are_limited(sandbox: Sandbox, code: str) -> None:
    """A cell's file system is full; without one the program is stopped."""
    result = await sandbox.run(f"import os\nblock = bytes(2 << 20)\n{code}")
    assert result.status is ToolStatus.ERROR
    cell = any("namespaces" in m for m in sandbox.mechanisms)
    assert ("No space left" if cell else "Stopped: the program") in result.text


async def test_open_files_are_limited(sandbox: Sandbox) -> None:
    result = await sandbox.run("import os\nfs = [os.open('/dev/null', 0) for _ in range(200)]")
    assert "Too many open files" in result.text


# --- leaving things behind ---------------------------------------------------------------------------------


async def test_closing_every_descriptor(sandbox: Sandbox) -> None:
    result = await sandbox.run("import os\nos.closerange(0, 1000)\nprint('gone')")
    assert result.stdout == ""
    assert (await sandbox.run("2")).text == "2"


async def test_scratch_is_gone_after_the_call_however_it_was_filled(sandbox: Sandbox) -> None:
    code = """
import os
os.symlink("/", "root"); os.symlink("loop", "loop")
os.mkdir("closed", 0); os.mkdir("inside"); os.mkdir("inside/closed", 0)
open("-rf *", "w").close()
for _ in range(1200):
    try:
        os.mkdir("deep"); os.chdir("deep")
    except OSError:
        break
open("bottom", "w").close()
"""
    assert (await sandbox.run(code)).status is ToolStatus.OK
    where = (await sandbox.run("import os\nprint(os.getcwd())")).text
    assert not Path(where).exists()
    if not any("namespaces" in m for m in sandbox.mechanisms):
        base = Path(where).parent  # what takes long to remove is removed after the call was answered
        await eventually(lambda: os.listdir(base) == [], 20, "its directory is still there")


async def test_a_slow_removal_holds_up_no_call(sandbox: Sandbox) -> None:
    """Directories nested so deep that removing them takes seconds."""
    code = "import os\nwhile True:\n    os.mkdir('d'); os.chdir('d')"
    result = await sandbox.run(code, deadline_s=2.0)
    assert result.status in (ToolStatus.ERROR, ToolStatus.TIMEOUT)
    assert (await sandbox.run("6 * 7")).text == "42"


async def test_a_cancelled_call_is_killed(sandbox: Sandbox) -> None:
    before = processes("sandbox-python")
    call = asyncio.ensure_future(sandbox.run("import time\ntime.sleep(600)"))
    await eventually(lambda: set(processes("sandbox-python")) - set(before), 10, "it never ran")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await gone("sandbox-python", before)


async def test_nothing_is_left_of_a_closed_sandbox() -> None:
    before = processes("sandbox")
    there = bases()
    box = Sandbox(SandboxLimits(wall_s=600), namespaces=False)
    await box.start()
    calls = [asyncio.ensure_future(box.run("open('f', 'w')\nimport time\ntime.sleep(600)")) for _ in range(3)]
    await asyncio.sleep(0.4)
    await asyncio.wait_for(box.close(), 60)  # the calls would take ten minutes
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert not any(isinstance(result, SandboxResult) for result in results)
    await gone("sandbox", before)
    assert bases() <= there


async def test_a_killed_parent_leaves_nothing() -> None:
    before = processes("sandbox")
    there = bases()
    script = """
import asyncio
from system.tools.sandbox.sandbox import Sandbox, SandboxLimits
async def main():
    box = Sandbox(SandboxLimits(wall_s=600), namespaces=False)
    await box.start()
    print("ready", flush=True)
    await box.run("open('f', 'w')\\nimport time\\ntime.sleep(600)")
asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as parent:
        assert parent.stdout is not None
        await asyncio.to_thread(parent.stdout.readline)
        await asyncio.sleep(0.4)
        parent.kill()
    await gone("sandbox", before)
    await eventually(lambda: bases() <= there, 20, "its directory is still there")
