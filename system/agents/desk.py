"""Sessions for agents that somebody else starts: a service asks for one, runs its agent in it, and ends it.

A group waits until an agent has come for each of its episodes, and opens the session only then, so that the
time of an episode is its agent's.  Whoever comes while no group waits is asked to come again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from system.agents.launch import AgentFailed, Ran, as_json
from system.agents.messages import Refusal
from system.agents.session import AgentSession

WAIT_S = 20.0  # a request waits so long for an episode: clients and proxies bear that


@dataclass(frozen=True, slots=True)
class GivenSession:
    """What an agent is given that has come."""

    session: AgentSession
    task: Mapping[str, Any]  # JSON


Caller = asyncio.Future[GivenSession]  # a request that waits for its answer; done: it does no more


class SessionDesk:
    """Brings together the groups that wait for agents and the agents that ask for sessions."""

    def __init__(self, token: str, idle_s: float, wait_s: float = WAIT_S) -> None:
        """``token``: what an agent's service must show; ``idle_s``: how long an agent may be silent;
        ``wait_s``: how long a request is kept waiting.
        """
        if not token:
            raise ValueError("a desk without a token would be open to all")
        self._token, self._idle_s, self._wait_s = token.encode(), idle_s, wait_s
        self._callers: deque[Caller] = deque()
        self._came = asyncio.Event()
        self._seats: WeakKeyDictionary[AgentSession, Caller] = WeakKeyDictionary()

    # The agent's side

    async def ask(self, authorization: str) -> GivenSession:
        """An episode for whoever shows this header.  Raises :class:`Refusal`: 401, or 503 where none is."""
        if not hmac.compare_digest(authorization.encode(errors="replace"), b"Bearer " + self._token):
            raise Refusal(401, "show the token of agent.token_env: Authorization: Bearer …", code="no_token")
        caller: Caller = asyncio.get_running_loop().create_future()
        self._callers.append(caller)
        self._came.set()
        try:
            return await asyncio.wait_for(caller, self._wait_s)  # which cancels it: it is passed over
        except TimeoutError as error:
            raise Refusal(503, "no episode waits for an agent now: ask again", code="no_episode") from error

    # The group's side

    async def come(self) -> Caller:
        """An agent that has come and still waits; the caller sets the deadline."""
        while True:
            while self._callers:
                if not (caller := self._callers.popleft()).done():
                    return caller
            self._came.clear()
            await self._came.wait()

    def seat(self, session: AgentSession, caller: Caller) -> None:
        """``session`` has been opened for ``caller``."""
        self._seats[session] = caller

    async def run(self, session: AgentSession, task: Mapping[str, Any]) -> Ran:
        """Give the session to its agent; return when that says that it is done.

        Raises :class:`AgentFailed` for one that is silent for too long, and a ``task`` that is no JSON.
        """
        task = json.loads(as_json(task))
        caller = self._seats.pop(session)
        while caller.done():  # it has gone since
            caller = await self.come()
        session.heard()
        caller.set_result(GivenSession(session, task))
        while not session.done.is_set():
            if (left_s := self._idle_s - session.quiet_s) <= 0:
                raise AgentFailed(f"its agent was not heard of for {self._idle_s:g} s (agent.idle_s)")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(session.done.wait(), left_s)
        return Ran()
