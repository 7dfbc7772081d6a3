"""Environments whose worlds are sessions in the sandbox: one for each live branch, copied where it forks.

What cannot be copied is done again from the journal.  A bound on live sessions holds by giving up the one
that was idle longest; it is built again when its branch goes on.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from system.envs.protocol import (
    Action,
    CannotFork,
    Environment,
    ForkKind,
    Ids,
    Message,
    Observation,
    Start,
    Undone,
    World,
    WorldFailed,
)
from system.tools.outcome import ToolSpec, ToolStatus
from system.tools.sandbox.channel import SandboxUnavailable
from system.tools.sandbox.result import SandboxResult
from system.tools.sandbox.sandbox import Sandbox
from system.tools.sandbox.sessions import NotForked, SandboxSession, SessionLost, SessionTree, TreeFull
from system.tools.tool import CallRefused, ToolUnavailable, argument_error
from system.tree.prompt import Prompt

_MARGIN_S = 0.5  # by which a call's own limits come before the deadline of an action


class SessionEnvironment(Environment):
    """Opens sessions.  Its processes end with this one's."""

    forks = ForkKind.NATIVE
    has_result = False
    spec: ClassVar[ToolSpec]  # the one tool
    trial: ClassVar[tuple[str, str]]  # what a session is tried with, and what it must answer
    remedy: ClassVar[str] = ""  # what to do where the sandbox cannot be had

    def __init__(self, sandbox: Sandbox, live_sessions: int, live_mb: int, call_s: float) -> None:
        """``call_s``: for a call, within the sandbox's own limit; ``live_sessions``, ``live_mb``: the
        bounds on sessions and on the memory of their states.
        """
        self.tools = {self.spec.name: self.spec}
        self._sandbox, self.call_s = sandbox, call_s
        self.runs_at_once = sandbox.concurrency  # who waits for a place there would be late for that
        self._starting = asyncio.Lock()
        self._trees: dict[tuple[str, str, str], _Tree] = {}
        self._most, self._most_mb = live_sessions, live_mb
        self._live: dict[SessionWorld, SandboxSession] = {}
        self._idle: dict[SessionWorld, None] = {}  # those of them that wait, the one idle longest first

    async def check(self) -> None:
        """Raises :class:`.ToolUnavailable` with what is missing."""
        tree = _Tree(Prompt("check", (), ()))
        try:
            result = await (await self._session(tree, {})).run(self.trial[0])
        except SessionLost as error:
            raise ToolUnavailable(str(error)) from error
        finally:
            await tree.close()
        if result.text != self.trial[1]:
            raise ToolUnavailable(f"{self.trial[0]!r} in a session gave {result.text!r}")

    def begins(self, start: Start) -> dict[str, Any]:
        """What a session of ``start`` is opened with (:meth:`.SessionTree.open`)."""
        return {"seed": start.seed}

    async def prepare(self, session: SandboxSession, prompt: Prompt) -> None:
        """Bring a new ``session`` to where a world of ``prompt`` begins: it runs ``extra["setup"]``, of which
        the model reads nothing.  Raises :class:`.WorldFailed` where it fails, and :class:`.ToolUnavailable`.
        """
        if not (setup := text_of(prompt, "setup")):
            return
        try:
            result = await session.run(setup, deadline_s=self.call_s)
        except (SessionLost, SandboxUnavailable) as error:
            raise ToolUnavailable(str(error), delivered=False) from error
        if result.status != ToolStatus.OK:
            await session.close()
            raise wrong(prompt, "setup", result.text)

    def prompt(self, key: tuple[str, str, str]) -> Prompt:
        """Of the tree ``key``."""
        return self._trees[key].prompt

    def world(self, key: tuple[str, str, str], session: SandboxSession) -> SessionWorld:
        """A world with ``session`` in the tree ``key``."""
        return SessionWorld(self, key, session)

    async def open(self, start: Start) -> SessionWorld:
        ids = start.ids
        key = (ids.run, ids.purpose, ids.tree)
        tree = self._trees.setdefault(key, _Tree(start.prompt))
        tree.worlds += 1
        try:
            session = await self._session(tree, self.begins(start))
            await self.prepare(session, start.prompt)
            return self.world(key, session)
        except BaseException:
            await self.leave(key)
            raise

    async def leave(self, key: tuple[str, str, str]) -> None:
        """One world of a tree is closed; its processes go with the last of them."""
        tree = self._trees[key]
        tree.worlds -= 1
        if not tree.worlds:
            del self._trees[key]
            await tree.close()

    async def forked(self, key: tuple[str, str, str], session: SandboxSession) -> World:
        """A world with a copy of ``session``.  Raises :class:`CannotFork`."""
        await self.make_room(1)
        self._trees[key].worlds += 1
        try:
            return self.world(key, await session.fork())
        except BaseException as error:
            await self.leave(key)
            if isinstance(error, NotForked | SessionLost | SandboxUnavailable):
                raise CannotFork(str(error)) from error
            raise

    def rests(self, world: SessionWorld, session: SandboxSession | None) -> None:
        """``world`` waits with its session, or has none any more."""
        self.acts(world)
        self._live.pop(world, None)
        if session is not None:
            self._live[world] = session
            self._idle[world] = None

    def acts(self, world: SessionWorld) -> None:
        """``world`` needs its session."""
        self._idle.pop(world, None)

    async def make_room(self, more: int = 0) -> None:
        """For so many sessions more.  Those that run something are few, and stay."""
        while self._idle and (
            len(self._live) + more > self._most
            or sum(session.held_mb for session in self._live.values()) > self._most_mb
        ):
            await next(iter(self._idle)).park()

    async def _session(self, tree: _Tree, begins: dict[str, Any]) -> SandboxSession:
        """Raises :class:`.ToolUnavailable`."""
        await self.make_room(1)
        try:
            async with tree.changing:
                if not tree.sessions:
                    async with self._starting:
                        await self._sandbox.start()
                    tree.sessions.append(await self._sandbox.tree(packages=True))
                try:
                    return await tree.sessions[-1].open(**begins)
                except TreeFull:
                    tree.sessions.append(await self._sandbox.tree(packages=True))
                return await tree.sessions[-1].open(**begins)
        except SessionLost as error:  # its warden has died
            await tree.close()
            raise ToolUnavailable(str(error), delivered=False) from error
        except SandboxUnavailable as error:
            raise ToolUnavailable(f"{error}{self.remedy}", delivered=False) from error


class _Tree:
    """The sessions of one tree, and of how many worlds they are."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt, self.worlds, self.changing = prompt, 0, asyncio.Lock()
        self.sessions: list[SessionTree] = []  # further ones where one was full

    async def close(self) -> None:
        sessions, self.sessions = self.sessions, []
        for one in sessions:
            await one.close()


class SessionWorld(World):
    """A session, as long as it is there: without it an action is refused, so that the world is built anew."""

    def __init__(self, environment: SessionEnvironment, tree: tuple[str, str, str], session: SandboxSession):
        self._environment, self._tree = environment, tree
        self._session: SandboxSession | None = session
        self._seed: int | None = None  # to draw by from the next action on
        environment.rests(self, session)

    async def step(self, action: Action) -> Observation:
        messages: list[Message] = []
        spec = self._environment.spec
        for call in action.calls:
            if problem := argument_error(spec.parameters, call.arguments):
                raise CallRefused(problem)
        until = asyncio.get_running_loop().time() + action.deadline_s - _MARGIN_S
        for call in action.calls:
            result = await self._run(call.arguments[spec.primary], until)
            if self._session is None:
                raise Undone(result.text, result.status)
            messages.append(Message(result.text, status=str(result.status)))
        await self._environment.make_room()
        return Observation(tuple(messages))

    async def _run(self, code: str, until: float) -> SandboxResult:
        within_s = min(self._environment.call_s, until - asyncio.get_running_loop().time())
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
        try:
            await self.park()
        finally:  # or its tree's processes would never end
            await self._environment.leave(self._tree)

    async def park(self) -> None:
        """Do without a session."""
        session, self._session = self._session, None
        self._environment.rests(self, None)
        if session is not None:
            await session.close()

    def _rests(self, session: SandboxSession) -> None:
        self._session = session if session.alive else None
        self._environment.rests(self, self._session)


def text_of(prompt: Prompt, name: str) -> str:
    """``extra[name]`` of a question; empty where it has none.  Raises :class:`.WorldFailed` for no text."""
    text: Any = prompt.extra.get(name, "")
    if not isinstance(text, str):
        raise wrong(prompt, name, f"{text!r:.200} is no text")
    return text


def wrong(prompt: Prompt, name: str, fault: str) -> WorldFailed:
    """What is wrong with ``extra[name]`` of a question."""
    return WorldFailed("open_failed", f"question {prompt.id!r}: extra.{name}: {fault}")
