"""``environment=python``: an interpreter that keeps its variables, imports and files from call to call.

One interpreter per live branch, in the sandbox, forked by the operating system where the branch forks
(:mod:`system.tools.sandbox.sessions`).  What cannot be copied so is done again from the journal: an open
file, a second thread, memory that is shared.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace

from system.config import ToolsConfig
from system.envs.protocol import (
    Action,
    CannotFork,
    Environment,
    ForkKind,
    Ids,
    Message,
    Observation,
    Start,
    World,
)
from system.tools.http_tools import PythonTool
from system.tools.sandbox.channel import SandboxUnavailable
from system.tools.sandbox.result import SandboxResult
from system.tools.sandbox.sandbox import Sandbox, SandboxLimits
from system.tools.sandbox.sessions import NotForked, PythonSession, SessionLost, SessionTree, TreeFull
from system.tools.tool import CallRefused, ToolUnavailable, argument_error

_USUAL = SandboxLimits()
_MARGIN_S = 0.5  # by which a cell's own limits come before the deadline of an action
# The place of a session's directory, and of an object in memory, are never the same twice.
_OF_THE_MOMENT = re.compile(r"(?<=/scratch/)[0-9a-f]{16}\b|\b0x[0-9a-f]{6,}\b")

SPEC = replace(
    PythonTool.spec,
    description="Run Python code and get what it prints and the value of its last expression. "
    "Variables, imports and files are there in the next call.",
    idempotent=False,
)


class PythonEnvironment(Environment):
    """Opens sessions.  Its processes end with this one's."""

    forks = ForkKind.NATIVE
    has_result = False

    def __init__(
        self,
        wall_s: float = _USUAL.wall_s,
        cpu_s: float = _USUAL.cpu_s,
        memory_mb: int = _USUAL.memory_mb,
        output_chars: int = _USUAL.output_chars,
        packages: list[str] | None = None,
        concurrency: int = 16,
        live_sessions: int = 2000,
        live_mb: int = 8192,
    ) -> None:
        """``wall_s``, ``cpu_s``, ``output_chars``: of one call; ``memory_mb``: of one session; ``packages``:
        installed ones that may be imported (None: ``tools.python_packages`` as they come); ``concurrency``:
        calls that run at once; ``live_sessions``, ``live_mb``: beyond so many sessions, or so much memory of
        their states, the one which was idle longest is given up, and built again when its branch goes on.
        """
        limits = SandboxLimits(wall_s, cpu_s, memory_mb, output_chars)
        offered = ToolsConfig().python_packages if packages is None else packages
        self._sandbox = Sandbox(limits, concurrency=concurrency, packages=offered, namespaces=True)
        self.tools = {"python": SPEC}
        self._starting = asyncio.Lock()
        self._trees: dict[tuple[str, str, str], _Tree] = {}
        self._most, self._most_mb = live_sessions, live_mb
        self._live: dict[PythonWorld, PythonSession] = {}
        self._idle: dict[PythonWorld, None] = {}  # those of them that wait, the one idle longest first

    async def check(self) -> None:
        """Raises :class:`.ToolUnavailable` with what is missing."""
        tree = _Tree()
        try:
            result = await (await self._session(tree, 0)).run("6 * 7")
        except SessionLost as error:
            raise ToolUnavailable(str(error)) from error
        finally:
            await tree.close()
        if result.text != "42":
            raise ToolUnavailable(f"`6 * 7` in a python session gave {result.text!r}")

    async def open(self, start: Start) -> World:
        ids = start.ids
        key = (ids.run, ids.purpose, ids.tree)
        tree = self._trees.setdefault(key, _Tree())
        tree.worlds += 1
        try:
            return PythonWorld(self, key, await self._session(tree, start.seed))
        except BaseException:
            await self.leave(key)
            raise

    def normalise(self, text: str) -> str:
        return _OF_THE_MOMENT.sub("…", text)

    async def leave(self, key: tuple[str, str, str]) -> None:
        """One world of a tree is closed; its processes go with the last of them."""
        tree = self._trees[key]
        tree.worlds -= 1
        if not tree.worlds:
            del self._trees[key]
            await tree.close()

    async def forked(self, key: tuple[str, str, str], session: PythonSession) -> World:
        """A world with a copy of ``session``.  Raises :class:`CannotFork`."""
        await self.make_room(1)
        self._trees[key].worlds += 1
        try:
            return PythonWorld(self, key, await session.fork())
        except BaseException as error:
            await self.leave(key)
            if isinstance(error, NotForked | SessionLost | SandboxUnavailable):
                raise CannotFork(str(error)) from error
            raise

    def rests(self, world: PythonWorld, session: PythonSession | None) -> None:
        """``world`` waits with its session, or has none any more."""
        self.acts(world)
        self._live.pop(world, None)
        if session is not None:
            self._live[world] = session
            self._idle[world] = None

    def acts(self, world: PythonWorld) -> None:
        """``world`` needs its session."""
        self._idle.pop(world, None)

    async def make_room(self, more: int = 0) -> None:
        """For so many sessions more.  Those that run something are few, and stay."""
        while self._idle and (
            len(self._live) + more > self._most
            or sum(session.held_mb for session in self._live.values()) > self._most_mb
        ):
            await next(iter(self._idle)).park()

    async def _session(self, tree: _Tree, seed: int) -> PythonSession:
        """Raises :class:`.ToolUnavailable`."""
        await self.make_room(1)
        try:
            async with tree.changing:
                if not tree.sessions:
                    async with self._starting:
                        await self._sandbox.start()
                    tree.sessions.append(await self._sandbox.tree(packages=True))
                try:
                    return await tree.sessions[-1].open(seed)
                except TreeFull:
                    tree.sessions.append(await self._sandbox.tree(packages=True))
                return await tree.sessions[-1].open(seed)
        except SessionLost as error:  # its warden has died
            await tree.close()
            raise ToolUnavailable(str(error), delivered=False) from error
        except SandboxUnavailable as error:
            remedy = "environment=tools with tools.names=[python] keeps no state, and needs no namespaces"
            raise ToolUnavailable(f"{error}: {remedy}", delivered=False) from error


class _Tree:
    """The sessions of one tree, and of how many worlds they are."""

    def __init__(self) -> None:
        self.worlds, self.changing = 0, asyncio.Lock()
        self.sessions: list[SessionTree] = []  # further ones where one was full

    async def close(self) -> None:
        sessions, self.sessions = self.sessions, []
        for one in sessions:
            await one.close()


class PythonWorld(World):
    """A session, as long as it is there: without it an action is refused, so that the world is built anew."""

    def __init__(self, environment: PythonEnvironment, tree: tuple[str, str, str], session: PythonSession):
        self._environment, self._tree = environment, tree
        self._session: PythonSession | None = session
        self._seed: int | None = None  # to draw by from the next action on
        environment.rests(self, session)

    async def step(self, action: Action) -> Observation:
        messages: list[Message] = []
        for call in action.calls:
            if problem := argument_error(SPEC.parameters, call.arguments):
                raise CallRefused(problem)
        until = asyncio.get_running_loop().time() + action.deadline_s - _MARGIN_S
        for call in action.calls:
            result = await self._run(call.arguments["code"], until - asyncio.get_running_loop().time())
            if self._session is None:
                raise CallRefused(f"{result.text}\nThe state is as before the call.")
            messages.append(Message(result.text, status=str(result.status)))
        await self._environment.make_room()
        return Observation(tuple(messages))

    async def _run(self, code: str, within_s: float) -> SandboxResult:
        session, seed = self._session, self._seed
        if session is None:
            raise ToolUnavailable("its session is gone")
        self._seed = None
        self._environment.acts(self)
        try:
            return await session.run(code, deadline_s=within_s, seed=seed)
        except (SessionLost, SandboxUnavailable) as error:
            raise ToolUnavailable(str(error)) from error
        finally:
            self._rests(session)

    async def fork(self, ids: Ids) -> World:
        session = self._session
        if session is None:
            raise CannotFork("its session is gone")
        self._environment.acts(self)
        try:
            return await self._environment.forked(self._tree, session)
        finally:
            self._rests(session)

    def reseed(self, seed: int) -> None:
        self._seed = seed

    async def close(self, why: str) -> None:
        await self.park()
        await self._environment.leave(self._tree)

    async def park(self) -> None:
        """Do without a session."""
        session, self._session = self._session, None
        self._environment.rests(self, None)
        if session is not None:
            await session.close()

    def _rests(self, session: PythonSession) -> None:
        self._session = session if session.alive else None
        self._environment.rests(self, self._session)
