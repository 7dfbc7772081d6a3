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
import logging
import re
import sys
from collections.abc import Sequence
from functools import partial

from system.scratch import Scratch
from system.tools.outcome import ToolStatus
from system.tools.sandbox import escape_test, sessions
from system.tools.sandbox.channel import Lost, SandboxUnavailable
from system.tools.sandbox.packages import find
from system.tools.sandbox.result import SandboxResult
from system.tools.sandbox.server import ForkServer
from system.tools.sandbox.settings import SandboxLimits, Settings, Shell

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
_ATTEMPTS = 3  # of one call, each with another warden
_SERVERS = 10  # fork servers that may die under one call before it has begun


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
        shell: Shell | None = None,
    ):
        """``packages``: installed ones that programs may import, with what these require; nothing else of
        site-packages is readable; ``paths``: further directories of packages; ``preload``: modules imported
        once, before any call, so that a call gets them free.  So are the packages, in a fork server of their
        own for programs that name one: every fork copies the page tables of all that is loaded.
        ``namespaces``: insist on the first way of confinement, or on the second (None: the first that works).
        ``shell``: the sessions of its trees run commands of bash, not Python.
        """
        self.limits = limits or SandboxLimits()
        self.mechanisms: list[str] = []  # what confines a call here; filled by start
        self.packages = find(packages)
        self._paths, self._shell = tuple(paths), shell
        self._plain, self._loaded = _Line(preload), _Line((*preload, *self.packages.imported))
        names = "|".join(map(re.escape, self.packages.modules))
        self._naming = re.compile(rf"\b(?:{names})\b") if names else None
        self.concurrency, self._slots = concurrency, asyncio.Semaphore(concurrency)
        self._dying: list[ForkServer] = []  # dead themselves, with calls that still run
        self._burials: set[asyncio.Future[None]] = set()
        self._ways = (True, False) if namespaces is None else (namespaces,)
        self._way, self._missing = self._ways[0], list[str]()  # why it is none of those before it

    async def start(self) -> None:
        """Find a way to confine programs on this machine and try it out.

        Raises :class:`SandboxUnavailable` naming, for each way, what is missing.
        """
        if sys.platform != "linux":
            raise SandboxUnavailable("the python sandbox needs Linux")
        if self.packages.missing:
            log.warning("not installed, so not offered to programs: %s", ", ".join(self.packages.missing))
        missing = self._missing = list[str]()
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
        if len(code.encode(errors="replace")) > sessions.MAX_CODE_BYTES:
            return SandboxResult(
                ToolStatus.ERROR, "", "", 1, f"the program is longer than {sessions.MAX_CODE_BYTES} bytes"
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
                    reply = await server.run(code, wall_s, wall_s + sessions.GRACE_S)
                except Lost:  # the program may run again: nothing it did has left the sandbox
                    if server.dead:  # a call that has begun outlives its fork server: this one had not
                        deaths += 1
                    else:
                        attempts += 1
                    continue
                finally:
                    self._bury()
                if "failed" in reply:
                    raise SandboxUnavailable(f"a call could not be confined: {reply['failed']}")
                return SandboxResult.of(reply, self.limits, wall_s)
        raise SandboxUnavailable(
            f"a call's process was lost {attempts} times, its fork server {deaths} times"
        )

    async def tree(self, *, packages: bool = False) -> sessions.SessionTree:
        """Sessions that fork.  ``packages``: from an interpreter with the packages loaded.

        Raises :class:`SandboxUnavailable`: without namespaces there is no first process that keeps sessions
        together, and nothing that hides their files from one another.
        """
        if not self._plain.proved:
            raise SandboxUnavailable("the sandbox has not been started")
        line = self._loaded if packages and self.packages.modules else self._plain
        if not line.proved:
            await self._open(line)
        if not line.sessions_proved:
            await self._prove_sessions(line)
        return await self._tree(line)

    async def _tree(self, line: _Line) -> sessions.SessionTree:
        for _ in range(_SERVERS):
            server = await self._running_server(line)
            try:
                channel = await server.tree()
            except Lost:
                continue
            return sessions.SessionTree(server, channel, self.limits, self._slots)
        raise SandboxUnavailable(f"its fork server was lost {_SERVERS} times")

    async def _prove_sessions(self, line: _Line) -> None:
        """Try to escape from a session, and from a fork of it."""
        if not self._way:
            raise SandboxUnavailable(
                ("python sessions" if self._shell is None else "shells")
                + " need namespaces (mount, network, IPC, PID), which are not to be had here"
                + "".join(f": {reason}" for reason in self._missing)
            )
        async with line.changing_sessions:
            if line.sessions_proved:
                return
            tree = await self._tree(line)
            try:
                first = await tree.open()
                for session in (first, await first.fork()):
                    if self._shell is None:
                        await escape_test.verify(session.run)
                    else:
                        await escape_test.verify(escape_test.as_command(session.run), shell=True)
                line.sessions_proved = True
            except (escape_test.Escaped, sessions.SessionLost, sessions.NotForked) as error:
                raise SandboxUnavailable(f"its sessions cannot be confined here: {error}") from error
            finally:
                await tree.close()

    async def close(self) -> None:
        """Kill what still runs and remove every scratch directory."""
        servers, self._dying = self._dying, []
        for line in (self._plain, self._loaded):
            if line.beginning:
                line.beginning.cancel()
                await asyncio.gather(line.beginning, return_exceptions=True)
            servers += [line.server] if line.server else []
            line.beginning, line.server, line.proved, line.sessions_proved = None, None, False, False
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

    async def _running_server(self, line: _Line) -> ForkServer:
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

    async def _start_server(self, line: _Line) -> ForkServer:
        scratch = await asyncio.to_thread(Scratch.make, "sandbox")
        offered = (self._paths, self.packages.modules, self.packages.readable, line.preload)
        settings = Settings(str(scratch.path), self._way, self.limits, *offered, self._shell)
        server = ForkServer(scratch, settings)
        try:
            self.mechanisms = await server.greet()
        except BaseException:
            await server.stop()
            raise
        return server


class _Line:
    """One fork server after another that have imported the same."""

    def __init__(self, preload: Sequence[str]):
        self.preload = tuple(preload)
        self.server: ForkServer | None = None
        self.beginning: asyncio.Task[None] | None = None
        self.proved = False  # nothing escapes from the first
        self.changing = asyncio.Lock()
        self.sessions_proved, self.changing_sessions = False, asyncio.Lock()
