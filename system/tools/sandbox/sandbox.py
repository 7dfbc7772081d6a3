"""Model-written Python in a real sandbox: no network, no write outside a scratch directory, hard limits.

Needs nothing but Linux and Python: no container, no root, no extra package.  What confines a call is chosen
at start from what the kernel permits, strongest first, and *tried out* before the first real call
(:mod:`.escape_test`):

1. a cell of mount, network, IPC and PID namespaces (root, or a user who may create user namespaces);
2. Landlock and seccomp alone (any user, Linux 5.13 or newer).

Both include a seccomp allow-list (no sockets, no new processes, no signals to others), Landlock where the
kernel has it, no_new_privs, no capabilities, rlimits, and an unprivileged user id when started as root.  A
call is one process: its limits hold for the whole call, and killing it leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from system.errors import EspalierError
from system.scratch import Scratch
from system.tools.outcome import ToolStatus
from system.tools.sandbox import escape_test
from system.tools.sandbox.packages import find
from system.tools.sandbox.result import SandboxResult
from system.tools.sandbox.scratch import remove_tree
from system.tools.sandbox.settings import SandboxLimits, Settings

log = logging.getLogger(__name__)

PRELOADED = (
    "bisect",
    "collections",
    "datetime",
    "decimal",
    "fractions",
    "functools",
    "heapq",
    "itertools",
    "json",
    "math",
    "operator",
    "random",
    "re",
    "statistics",
    "string",
    "typing",
)
_ROOT = str(Path(__file__).resolve().parents[3])
_BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); from system.tools.sandbox.forkserver import main; "
    "del sys.path[0]; main()"
)
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "TZ": "UTC"}  # no secrets; one order of sets
_START_DEADLINE_S = 60.0  # packages take seconds to import on a busy machine
_GRACE_S = 3.0  # what a warden may take beyond a call's wall deadline
_STOP_DEADLINE_S, _STOP_PAUSE_S = 5.0, 0.05
_MAX_CODE_BYTES = 1 << 20
_ATTEMPTS = 3  # of one call, each with a warden of its own
_SERVERS = 10  # fork servers that may die under one call before it has begun


class SandboxUnavailable(EspalierError, RuntimeError):
    """No mechanism of this machine gives the guarantees; the message says what is missing."""


class _Lost(Exception):
    """The fork server, or a call's warden, died."""


class Sandbox:
    """Runs programs, several at once, for the tasks of one event loop.  ``start`` it before the first run."""

    def __init__(
        self,
        limits: SandboxLimits | None = None,
        *,
        concurrency: int = 16,
        packages: Sequence[str] = (),
        paths: Sequence[str] = (),
        preload: Sequence[str] = PRELOADED,
        namespaces: bool | None = None,
    ):
        """``packages``: installed ones that programs may import, with what these require; nothing else of
        site-packages is readable; ``paths``: further directories of packages; ``preload``: modules imported
        once, before any call, so that a call gets them free.  So are the packages, in a fork server of their
        own for programs that name one: every fork copies the page tables of all that is loaded.
        ``namespaces``: insist on the first way of confinement, or on the second (None: the first that works).
        """
        self.limits = limits or SandboxLimits()
        self.mechanisms: list[str] = []  # what confines a call here; filled by start
        self.packages = find(packages)
        self._paths = tuple(paths)
        self._plain, self._loaded = _Line(preload), _Line((*preload, *self.packages.imported))
        names = "|".join(map(re.escape, self.packages.modules))
        self._naming = re.compile(rf"\b(?:{names})\b") if names else None
        self._slots = asyncio.Semaphore(concurrency)
        self._dying: list[_ForkServer] = []  # dead themselves, with calls that still run
        self._burials: set[asyncio.Future[None]] = set()
        self._ways = (True, False) if namespaces is None else (namespaces,)
        self._way = self._ways[0]

    async def start(self) -> None:
        """Find a way to confine programs on this machine and try it out.

        Raises :class:`SandboxUnavailable` naming, for each way, what is missing.
        """
        if sys.platform != "linux":
            raise SandboxUnavailable("the python sandbox needs Linux")
        if self.packages.missing:
            log.warning("not installed, so not offered to programs: %s", ", ".join(self.packages.missing))
        missing: list[str] = []
        for way in self._ways:
            self._way = way
            try:
                return await self._open(self._plain)
            except SandboxUnavailable as error:
                missing.append(f"with {'namespaces' if way else 'Landlock and seccomp'}: {error}")
                await self.close()
            except BaseException:
                await self.close()
                raise
        raise SandboxUnavailable("python cannot be sandboxed here: " + "; ".join(missing))

    async def run(self, code: str, *, deadline_s: float | None = None) -> SandboxResult:
        """Run ``code`` for at most ``deadline_s`` seconds (and the limits' ``wall_s``), waiting for a slot
        not counted.

        Raises :class:`SandboxUnavailable` if the sandbox itself is broken, never because of what ``code``
        does. A cancelled call is killed.
        """
        wall_s = min(self.limits.wall_s, deadline_s if deadline_s is not None else self.limits.wall_s)
        if len(code.encode(errors="replace")) > _MAX_CODE_BYTES:
            return SandboxResult(
                ToolStatus.ERROR, "", "", 1, f"the program is longer than {_MAX_CODE_BYTES} bytes"
            )
        if wall_s <= 0:
            return SandboxResult(ToolStatus.TIMEOUT, "", "", 1, "no time left to run the program")
        if not self._plain.proved:
            raise SandboxUnavailable("the sandbox has not been started")
        line = self._loaded if self._naming and self._naming.search(code) else self._plain
        if not line.proved:
            await self._open(line)
        return await self._run(line, code, wall_s)

    async def _run(self, line: _Line, code: str, wall_s: float) -> SandboxResult:
        async with self._slots:
            attempts = deaths = 0
            while attempts < _ATTEMPTS and deaths < _SERVERS:
                server = await self._running_server(line)
                try:
                    reply = await server.call({"code": code, "wall_s": wall_s}, wall_s + _GRACE_S)
                except _Lost:  # the program may run again: nothing it did has left the sandbox
                    if server.dead:  # a call that has begun outlives its fork server: this one had not
                        deaths += 1
                    else:
                        attempts += 1
                    continue
                finally:
                    self._bury()
                if "failed" in reply:
                    raise SandboxUnavailable(f"a call could not be confined: {reply['failed']}")
                return self._result(reply, wall_s)
        raise SandboxUnavailable(
            f"a call's process was lost {attempts} times, its fork server {deaths} times"
        )

    async def close(self) -> None:
        """Kill what still runs and remove every scratch directory."""
        servers, self._dying = self._dying, []
        for line in (self._plain, self._loaded):
            if line.beginning:
                line.beginning.cancel()
                await asyncio.gather(line.beginning, return_exceptions=True)
            servers += [line.server] if line.server else []
            line.beginning, line.server, line.proved = None, None, False
        for server in servers:
            await server.stop()
        await asyncio.gather(*self._burials)

    @property
    def pid(self) -> int | None:
        """The process id of the fork server for programs that name no package."""
        return self._plain.server.pid if self._plain.server else None

    async def _open(self, line: _Line) -> None:
        """Begin ``line`` if nobody has.  A caller that is cancelled leaves the beginning to the next one."""
        if line.beginning is None:
            line.beginning = asyncio.create_task(self._begin(line), name="sandbox: a fork server's beginning")
        beginning = line.beginning
        try:
            await asyncio.shield(beginning)
        except asyncio.CancelledError:
            if not beginning.cancelled():
                raise
            raise SandboxUnavailable("the sandbox has been closed") from None
        finally:
            if beginning.done() and not line.proved and line.beginning is beginning:
                line.beginning = None  # the next call may find the cause mended

    async def _begin(self, line: _Line) -> None:
        """Start the first server of a line and try to escape from it: what it imports is part of it."""
        try:
            line.server = await self._start_server(line)
            await escape_test.verify(partial(self._run, line, wall_s=self.limits.wall_s))
            line.proved = True
        except escape_test.Escaped as error:
            raise SandboxUnavailable(str(error)) from error
        finally:
            if not line.proved and line.server:
                server, line.server = line.server, None
                await server.stop()

    async def _running_server(self, line: _Line) -> _ForkServer:
        async with line.changing:
            if line.server is None:
                raise SandboxUnavailable("the sandbox has been closed")
            if line.server.dead:
                self._dying.append(line.server)
                line.server = await self._start_server(line)
            return line.server

    def _bury(self) -> None:
        """Clean up after fork servers that died, once the calls that outlived them have ended; no call waits
        for it."""
        for server in [server for server in self._dying if not server.busy]:
            self._dying.remove(server)
            burial = asyncio.ensure_future(server.stop())
            self._burials.add(burial)
            burial.add_done_callback(self._burials.discard)

    async def _start_server(self, line: _Line) -> _ForkServer:
        scratch = await asyncio.to_thread(Scratch.make, "sandbox")
        offered = (self._paths, self.packages.modules, self.packages.readable, line.preload)
        server = _ForkServer(scratch, Settings(str(scratch.path), self._way, self.limits, *offered))
        try:
            self.mechanisms = await server.greet()
        except BaseException:
            await server.stop()
            raise
        return server

    def _result(self, reply: dict[str, Any], wall_s: float) -> SandboxResult:
        limit, code = self.limits.output_chars, reply["exit_code"]
        stdout, cut_out = _shortened(reply["stdout"], reply["stdout_bytes"], limit, head=True)
        stderr, cut_err = _shortened(reply["stderr"], reply["stderr_bytes"], limit, head=False)
        status, reason = ToolStatus.OK if code == 0 else ToolStatus.ERROR, ""
        if reply["excess"]:
            status, reason = ToolStatus.ERROR, f"Stopped: {reply['excess']}."
        elif reply["timed_out"]:
            status, reason = ToolStatus.TIMEOUT, f"Stopped: the program ran longer than {wall_s:g} s."
        elif code == -signal.SIGKILL and reply["cpu_s"] >= self.limits.cpu_s - 0.5:
            status, reason = (
                ToolStatus.TIMEOUT,
                f"Stopped: the program used more than {self.limits.cpu_s:g} s of CPU time.",
            )
        elif code < 0:
            reason = f"The program was killed by {signal.Signals(-code).name}."
        elif code > 0 and not stderr:
            reason = f"The program exited with code {code}."
        return SandboxResult(
            status=status,
            stdout=stdout,
            stderr=stderr,
            exit_code=code,
            reason=reason,
            wall_s=reply["wall_s"],
            cpu_s=reply["cpu_s"],
            peak_rss_mb=reply["peak_rss_mb"],
            truncated=cut_out or cut_err,
        )


class _Line:
    """One fork server after another that have imported the same."""

    def __init__(self, preload: Sequence[str]):
        self.preload = tuple(preload)
        self.server: _ForkServer | None = None
        self.beginning: asyncio.Task[None] | None = None
        self.proved = False  # nothing escapes from the first
        self.changing = asyncio.Lock()


class _ForkServer:
    """The parent's end of :mod:`system.tools.sandbox.forkserver`."""

    def __init__(self, scratch: Scratch, settings: Settings):
        self._scratch, self._settings = scratch, settings
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        flags = ("-s", "-S", "-P")  # no user or site packages, no current directory on the path
        arguments = (_ROOT, str(theirs.fileno()), settings.to_json())
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by stop)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, *flags, "-c", _BOOT, *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                env=_ENVIRONMENT,
                cwd="/",
                start_new_session=True,
            )
        self._calls: set[socket.socket] = set()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def busy(self) -> bool:
        return bool(self._calls)

    @property
    def dead(self) -> bool:
        """Whether nobody is left at the other end of the control channel."""
        try:
            return not self._control.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    async def greet(self) -> list[str]:
        """Wait until it is ready; returns the mechanisms.  Raises SandboxUnavailable with its reason."""
        try:
            async with asyncio.timeout(_START_DEADLINE_S):
                data = await asyncio.get_running_loop().sock_recv(self._control, 1 << 16)
        except TimeoutError:
            raise SandboxUnavailable(
                f"the fork server did not start within {_START_DEADLINE_S:g} s"
            ) from None
        except OSError as error:
            raise SandboxUnavailable(f"the fork server could not be heard: {error}") from error
        if not data:
            raise SandboxUnavailable(f"the fork server died while starting: {self._last_error()}")
        hello: dict[str, Any] = json.loads(data)
        if "failed" in hello:
            raise SandboxUnavailable(hello["failed"])
        return hello["ready"]

    def _last_error(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line), "no reason given")

    async def call(self, request: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        """One request, one reply.  Raises _Lost if the server or the call's warden is dead or silent."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        self._calls.add(ours)
        try:
            ours.setblocking(False)
            try:
                async with asyncio.timeout(deadline_s):
                    with theirs:
                        await self._pass_on(theirs)
                    await loop.sock_sendall(ours, json.dumps(request).encode() + b"\n")
                    return json.loads(await _line(ours))
            except TimeoutError:
                raise _Lost from None
            except OSError as error:
                raise _Lost from error
        finally:
            self._calls.discard(ours)
            ours.close()  # tells the warden, if it still runs, to kill the program

    async def _pass_on(self, theirs: socket.socket) -> None:
        while True:
            try:
                socket.send_fds(self._control, [b"c"], [theirs.fileno()])
                return
            except BlockingIOError:  # its queue is full; it forks about a thousand times a second
                await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """End every call, then the server, then remove what they wrote."""
        for call in list(self._calls):
            with contextlib.suppress(OSError):
                call.shutdown(socket.SHUT_RDWR)
        self._control.close()
        try:
            await asyncio.to_thread(self._process.wait, _STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        self._errors.close()
        await self._remove_base()

    async def _remove_base(self) -> None:
        """A warden that has lost its fork server may still be removing its own scratch directory."""
        until = time.monotonic() + _STOP_DEADLINE_S
        try:
            while (left := until - time.monotonic()) > 0:
                try:
                    if await asyncio.to_thread(remove_tree, self._settings.base, left):
                        return
                except OSError:
                    await asyncio.sleep(_STOP_PAUSE_S)
            log.warning("the sandbox's directory %s could not be removed", self._settings.base)
        finally:
            self._scratch.release()


async def _line(channel: socket.socket) -> bytes:
    loop, data = asyncio.get_running_loop(), bytearray()
    while not data.endswith(b"\n"):
        chunk = await loop.sock_recv(channel, 1 << 16)
        if not chunk:
            raise ConnectionResetError("closed before the reply was complete")
        data += chunk
    return bytes(data)


def _shortened(text: str, total_bytes: int, limit: int, *, head: bool) -> tuple[str, bool]:
    """At most the first (``head``) or last ``limit`` characters, with a note of what is missing; whether it
    is."""
    if len(text) <= limit and total_bytes <= len(text.encode()):
        return text, False
    note = f"[output cut: {total_bytes} bytes in all]"
    return f"{text[:limit]}\n… {note}" if head else f"{note} …\n{text[-limit:]}", True
