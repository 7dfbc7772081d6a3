"""Python sessions: confined interpreters that keep their state from cell to cell, and fork.

A :class:`SessionTree` has a warden of its own, outside the confinement, and a PID namespace; its sessions are
forked from one another by the operating system, copy on write, with a copy of their scratch directory.  They
are confined as a call is (:mod:`.sandbox`), and cannot touch, see or signal each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from system.errors import EspalierError
from system.tools.outcome import ToolStatus
from system.tools.sandbox.channel import Channel, Lost, SandboxUnavailable
from system.tools.sandbox.result import SandboxResult
from system.tools.sandbox.server import ForkServer
from system.tools.sandbox.settings import SandboxLimits

GRACE_S = 3.0  # what a warden may take beyond a deadline
_OPEN_S, _CLOSE_S = 20.0, 10.0
MAX_CODE_BYTES = 1 << 20


class SessionLost(EspalierError):
    """The session is gone, through no fault of the cell that it was to run: its process was ended from
    outside, or an earlier cell had ended it."""


class NotForked(EspalierError):
    """The session cannot be forked as it is now; the message says why.  It may be replayed."""


class TreeFull(EspalierError):
    """The tree has as many sessions as it may have; another tree may be begun."""


class SessionTree:
    """Sessions that may be forked from one another.  ``close`` it."""

    def __init__(self, server: ForkServer, channel: Channel, limits: SandboxLimits, slots: asyncio.Semaphore):
        self._server, self._channel, self.limits, self.slots = server, channel, limits, slots
        self._closing: set[asyncio.Task[None]] = set()

    async def open(self, seed: int = 0, **more: Any) -> SandboxSession:
        """A new session: an interpreter, which draws by ``seed``; ``more``: what a shell begins with
        (:mod:`.shell_warden`).  Raises :class:`SessionLost` when the tree's warden has
        died, :class:`TreeFull`, and SandboxUnavailable when the session could not be confined."""
        return await self._born(self._opened(seed=seed, **more))

    async def close(self) -> None:
        """End all sessions; their processes and directories are gone when this returns."""
        if self._closing:
            await asyncio.wait(self._closing)
        await self._server.end_tree(self._channel)

    async def ask(self, within_s: float, **request: Any) -> dict[str, Any]:
        """The warden's reply, within its grace.  Raises :class:`SessionLost` or SandboxUnavailable."""
        try:
            reply = await self._channel.call(request, within_s + GRACE_S)
        except Lost as lost:
            why = f"could not begin: {lost}" if str(lost) else "died, or did not answer"
            raise SessionLost(f"the warden of the session {why}") from None
        if "failed" in reply:
            raise SandboxUnavailable(f"the sandbox failed: {reply['failed']}")
        if "full" in reply:
            raise TreeFull(reply["full"])
        if "gone" in reply:
            raise SessionLost("the session has ended")
        return reply

    async def _opened(self, **asked: Any) -> SandboxSession:
        return SandboxSession(self, (await self.ask(_OPEN_S, do="open", **asked))["session"])

    async def _born(self, coming: Awaitable[SandboxSession]) -> SandboxSession:
        """The session that is ``coming``; when nobody waits for it any more, it is closed."""
        task = asyncio.ensure_future(coming)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                turning_away = asyncio.create_task(_turn_away(task))
                self._closing.add(turning_away)
                turning_away.add_done_callback(self._closing.discard)
            raise

    async def forked(self, session: SandboxSession, within_s: float) -> SandboxSession:
        """See :meth:`SandboxSession.fork`."""
        return await self._born(self._copied(session, within_s))

    async def _copied(self, session: SandboxSession, within_s: float) -> SandboxSession:
        try:
            reply = await self.ask(within_s, do="fork", session=session.name, wall_s=within_s)
        except SessionLost:
            session.alive = False
            raise
        if "refused" in reply:
            session.alive = session.alive and not reply["ended"]
            raise NotForked(f"the session cannot be forked: {reply['refused']}")
        child = SandboxSession(self, reply["session"])
        child.held_mb = reply.get("held_mb", session.held_mb)  # a file with holes has none in a copy
        return child


class SandboxSession:
    """One interpreter with its state.  It is asked one thing at a time."""

    def __init__(self, tree: SessionTree, name: str):
        self._tree, self.name = tree, name
        self.alive = True  # False: its process has ended, and its state with it
        self.held_mb = 0.0  # memory of its state, what it still shares with other sessions included

    async def run(
        self, code: str, *, deadline_s: float | None = None, seed: int | None = None, fresh: bool = False
    ) -> SandboxResult:
        """Run a cell, within the limits of a call; ``seed``: what it draws by from now on; ``fresh``, of a
        shell: without the variables and functions of earlier commands.

        A cell that takes too long or dies ends the session (:attr:`alive`).  Raises :class:`SessionLost` when
        it was gone before, and SandboxUnavailable.  A cancelled cell ends the session.
        """
        limits = self._tree.limits
        wall_s = min(limits.wall_s, deadline_s if deadline_s is not None else limits.wall_s)
        if len(code.encode(errors="replace")) > MAX_CODE_BYTES:
            return SandboxResult(
                ToolStatus.ERROR, "", "", 1, f"the program is longer than {MAX_CODE_BYTES} bytes"
            )
        if wall_s <= 0:
            return SandboxResult(ToolStatus.TIMEOUT, "", "", 1, "no time left to run the program")
        async with self._tree.slots:
            try:
                reply = await self._tree.ask(
                    wall_s, do="run", session=self.name, code=code, wall_s=wall_s, seed=seed, fresh=fresh
                )
            except BaseException:
                self.alive = False
                raise
        self.alive, self.held_mb = not reply["ended"], reply["held_mb"]
        return SandboxResult.of(reply, limits, wall_s)

    async def fork(self, within_s: float = 10.0) -> SandboxSession:
        """A second session in the same state, with a copy of its files.  Raises :class:`NotForked`,
        :class:`SessionLost` or SandboxUnavailable."""
        return await self._tree.forked(self, within_s)

    async def close(self) -> None:
        """End it and remove its files; no error if it has ended."""
        self.alive = False
        try:
            await self._tree.ask(_CLOSE_S, do="close", session=self.name)
        except SessionLost:
            return


async def _turn_away(coming: asyncio.Future[SandboxSession]) -> None:
    try:
        session = await coming
        await session.close()
    except (NotForked, SessionLost, TreeFull, SandboxUnavailable):
        return
