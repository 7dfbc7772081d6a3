"""The call that a branch's newest segment ends with: read, made, and its answer written behind it."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from system.envs.live import BranchSession, TreeSessions
from system.envs.protocol import Acted, Message, Observation
from system.rollout.branch import Branch, Stopwatch
from system.rollout.context import RolloutContext
from system.rollout.schedule import Schedule
from system.rollout.syntax.base import MalformedCall, ParsedCall
from system.text import described
from system.tools.outcome import CallContext, ToolOutcome, ToolStatus
from system.tree.builder import TreeBuilder
from system.tree.record import Kind, ToolCall

log = logging.getLogger(__name__)


class Made(NamedTuple):
    """What a turn asked for, and what came of it."""

    tool: str  # "": a call that could not be read, or a message
    arguments: dict[str, Any]
    outcome: ToolOutcome
    answer: Observation | None = None  # of the branch's session, where it went there

    @property
    def messages(self) -> tuple[Message, ...]:
        """What the model reads."""
        return (Message(self.outcome.text),) if self.answer is None else self.answer.messages


class Calls:
    """Makes the calls of one tree's branches."""

    def __init__(
        self,
        context: RolloutContext,
        growth: TreeBuilder,
        schedule: Schedule,
        seconds: dict[str, float],
        mishap: Callable[[str, str], None],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        late: Callable[[], None],
        sessions: TreeSessions | None,
    ) -> None:
        """``seconds``: where the time of the tree goes; ``mishap``: is told what failed; ``spawn``: starts a
        task of the tree; ``late``: is called when a call takes longer than the schedule's patience.
        """
        self._context, self._growth, self._schedule, self._seconds = context, growth, schedule, seconds
        self._mishap, self._spawn, self._late = mishap, spawn, late
        self.tools = {*context.tools.specs, *(sessions.service.environment.tools if sessions else ())}

    async def make(self, branch: Branch) -> Made:
        """The call, or the message, that the branch's newest segment is.  Failures are outcomes.

        Raises :class:`.WorldFailed`.
        """
        again = branch.calling  # it was under way when the tree was saved
        if not again:
            branch.calls += not branch.says
            branch.calling = True
        text, session = branch.segments[-1][1], branch.session
        if session is not None and branch.says:
            return await self._act(session, (), text)
        match self._context.syntax.parse(text) or MalformedCall("no tool call"):
            case ParsedCall(tool, arguments) if session is not None and tool in session.tools:
                return await self._act(session, (Acted(tool, arguments),), text)
            case ParsedCall(tool, arguments):
                return Made(tool, arguments, await self._run(branch, tool, arguments, again))
            case MalformedCall(reason):
                return Made("", {}, ToolOutcome(ToolStatus.REJECTED, f"Error: {reason}"))

    def write(self, branch: Branch, made: Made, room: int) -> None:
        """Append what the model reads of it, at most ``room`` tokens, to the branch."""
        growth, session = self._growth, branch.session
        ended = int(growth.path_tokens(branch.node)[-1]) in self._context.chat.ends
        tokens = self._context.encode_answer(made.messages, room, ended=ended)
        node = growth.node(branch.node, Kind.TOOL)
        growth.extend(node, tokens)
        if made.answer is not None:
            growth.reward(branch.node, made.answer.reward or 0.0)
            branch.over = made.answer.over
        if not branch.says:
            outcome, tool = made.outcome, made.tool if made.tool in self.tools else ""
            about = (str(outcome.status), outcome.latency_s, outcome.cached, outcome.attempts)
            growth.call(ToolCall(node, tool, made.arguments, *about))
            branch.tools = (*branch.tools, (made.tool, str(outcome.status)))
        branch.passed = (*branch.passed, (branch.calls, len(session.journal) if session is not None else 0))
        branch.node = branch.answer = node
        branch.calling = branch.says = False

    async def _act(self, session: BranchSession, calls: tuple[Acted, ...], text: str) -> Made:
        """A resumed run does again what was under way: its world was built from what had been answered."""
        with Stopwatch(self._seconds, "tool") as clock:
            answer = await session.act(calls, text)
            taken = clock.lap()
        status = answer.messages[0].status if answer.messages else ToolStatus.OK
        outcome = ToolOutcome(ToolStatus(status), "", taken)
        return Made(*((calls[0].tool, dict(calls[0].arguments)) if calls else ("", {})), outcome, answer)

    async def _run(self, branch: Branch, tool: str, arguments: dict[str, Any], again: bool) -> ToolOutcome:
        context = CallContext(prompt_id=self._growth.prompt_id, branch=branch.number, again=again)
        patience_s = self._schedule.patience_s(tool)
        watch = self._spawn(self._lateness(branch, patience_s)) if patience_s < math.inf else None
        with Stopwatch(self._seconds, "tool") as clock:
            try:
                outcome = await self._context.tools.call(tool, arguments, context)
            except Exception as error:  # the service promises not to raise; if it does, the agent goes on
                log.exception("prompt %s: tool %s raised", self._growth.prompt_id, tool)
                detail = described(error)
                self._mishap("tool", f"{tool}: {detail}")
                text = "Error: the tool is unavailable"
                return ToolOutcome(ToolStatus.UNAVAILABLE, text, clock.lap(), detail=detail)
            finally:
                branch.late = False
                if watch is not None:
                    watch.cancel()
        self._schedule.answered(tool, outcome)
        return outcome

    async def _lateness(self, branch: Branch, patience_s: float) -> None:
        """Its call is not answered within ``patience_s``: the tree waits no more for what it may fork."""
        await asyncio.sleep(patience_s)
        branch.late = True
        self._late()
