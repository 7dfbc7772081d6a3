"""Trying to break out: what a sandbox must prevent, attempted for real before it is trusted.

The attempts run inside, as a program like any other; whether one got through is judged from outside where
that is possible (did the listener see a connection, does the file exist?).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable, Generator, Iterator
from pathlib import Path

from system.errors import EspalierError
from system.tools.outcome import ToolStatus
from system.tools.sandbox.result import SandboxResult
from system.tools.sandbox.scratch import remove_tree


class Escaped(EspalierError, RuntimeError):
    """A program got out, or cannot do what it must be able to; the message names the attempts."""


_SECRET = "secret"

# Each attempt must raise OSError; one that returns got through.
_ATTEMPTS = """
import json, os, socket
def tcp():
    socket.create_connection(("127.0.0.1", {port}), timeout=2)
def udp():
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", {port}))
def unix():
    socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).connect({unix!r})
def write_file():
    open({outside!r} + "/written", "w").close()
def overwrite():
    open({outside!r} + "/secret", "w").close()
def truncate():
    os.truncate({outside!r} + "/secret", 0)
def remove():
    os.unlink({outside!r} + "/secret")
def write_temporary():
    open({temporary!r}, "w").close()
def read_secret():
    open({outside!r} + "/secret").read()
def read_environment():
    open("/proc/{parent}/environ", "rb").read()
def signal():
    os.kill({parent}, 0)
def new_process():
    if os.fork() == 0:
        os._exit(0)
got_through = []
for attempt in (tcp, udp, unix, write_file, overwrite, truncate, remove, write_temporary, read_secret,
                read_environment, signal, new_process):
    try:
        attempt()
        got_through.append(attempt.__name__)
    except OSError:
        pass
with open("inside", "w") as file:
    file.write("x")
os.unlink("inside")
print(json.dumps(got_through))
"""


Run = Callable[[str], Awaitable[SandboxResult]]


def as_command(run: Run) -> Run:
    """Run a program of Python's as a command of a shell."""
    return lambda code: run(f"exec python3 - <<'espalier-ends'\n{code}\nespalier-ends")


async def verify(run: Run, *, shell: bool = False) -> None:
    """Attempt the escapes in programs that ``run`` confines, or, in a ``shell``,
    that start others and have a temporary directory of their own.

    Raises :class:`Escaped` naming those that succeeded.
    """
    outside = Path(tempfile.mkdtemp(prefix="espalier-probe-"))
    temporary = Path(tempfile.gettempdir()) / f"{outside.name}.write"
    connected = asyncio.Event()

    def connection(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    try:
        with _bait(outside) as unix:
            code = _ATTEMPTS.format(
                port=server.sockets[0].getsockname()[1],
                unix=unix,
                outside=str(outside),
                temporary=str(temporary),
                parent=os.getpid(),
            )
            result = await run(code)
            if result.status is not ToolStatus.OK:
                raise Escaped(f"a harmless program fails inside: {result.text}")
            allowed = {"new_process", "write_temporary"} if shell else set[str]()
            got_through = {*json.loads(result.stdout), *_traces(outside, temporary)} - allowed
        got_through |= {"tcp"} if connected.is_set() else set()
        if got_through:
            raise Escaped(f"not prevented: {', '.join(sorted(got_through))}")
    finally:
        server.close()
        temporary.unlink(missing_ok=True)
        await asyncio.to_thread(remove_tree, str(outside))


@contextlib.contextmanager
def _bait(outside: Path) -> Generator[str]:
    """A directory that only the sandbox protects, and a socket to connect to; yields the socket's path."""
    outside.chmod(0o777)
    secret = outside / "secret"
    secret.write_text(_SECRET)
    secret.chmod(0o666)
    with socket.socket(socket.AF_UNIX) as unix:
        path = outside / "socket"
        unix.bind(str(path))
        path.chmod(0o777)
        unix.listen()
        yield str(path)


def _traces(outside: Path, temporary: Path) -> Iterator[str]:
    """Attempts whose success shows from outside."""
    if (outside / "written").exists() or temporary.exists():
        yield "write_file"
    secret = outside / "secret"
    if not secret.exists() or secret.read_text() != _SECRET:
        yield "overwrite"
