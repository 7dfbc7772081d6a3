"""The calls that a branch's newest turn makes: read, made, and their answers written behind it."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from system.engine.protocol import Finish
from system.envs.arguments import typed
from system.envs.live import BranchSession, TreeSessions
from system.envs.protocol import Acted, Message, Observation
from system.errors import leaves
from system.rollout.branch import Branch, Stopwatch
from system.rollout.context import RolloutContext
from system.rollout.schedule import Schedule
from system.rollout.syntax.base import MalformedCall, ParsedCall, bounded
from system.text import described
from system.tools.outcome import CallContext, ToolOutcome, ToolStatus
from system.tools.tool import CallRefused
from system.tree.builder import TreeBuilder
from system.tree.record import Kind, ToolCall

log = logging.getLogger(__name__)

T = TypeVar("T")


class Made(NamedTuple):
    """What a turn asked for, and what came of it."""

    tool: str  # "": a call that could not be read, or a message
    arguments: dict[str, Any]
    outcome: ToolOutcome
    answer: Observation | None = None  # of the branch's session, where it went there
    began_s: float = -1.0  # as a ToolCall's

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

    def asked(self, branch: Branch, finish: Finish) -> bool:
        """Whether the branch's newest segment, which ended so, makes a call."""
        if self._context.several_calls:
            return bool(self._context.syntax.calls(branch.segments[-1][1]))
        return isinstance(finish.matched, str)

    async def make(self, branch: Branch) -> Sequence[Made]:
        """The calls, or the message, that the branch's newest segment is.  Failures are outcomes.

        Raises :class:`.WorldFailed`.
        """
        text, again = branch.segments[-1][1], branch.calling  # under way when the tree was saved
        calls = () if branch.says else self._read(text)
        if not again:
            branch.calls += len(calls)
            branch.calling = True
        with Stopwatch(self._seconds, "tool"):
            if branch.session is not None and branch.says:
                return [await self._act(branch.session, None, text)]
            try:
                return await self._all(branch, calls, text, again)
            finally:
                branch.late = False

    def write(self, branch: Branch, made: Sequence[Made], room: int) -> None:
        """Append what the model reads of it, at most ``room`` tokens, to the branch."""
        growth, session = self._growth, branch.session
        ended = int(growth.path_tokens(branch.node)[-1]) in self._context.chat.ends
        messages = self._messages(branch, made)
        tokens = self._context.encode_answer(messages, room, ended=ended)
        node = growth.node(branch.node, Kind.TOOL)
        growth.extend(node, tokens)
        if answers := [one.answer for one in made if one.answer is not None]:
            growth.reward(branch.node, sum(answer.reward or 0.0 for answer in answers))
            branch.over = any(answer.over for answer in answers)
        for one in () if branch.says else made:
            outcome, tool = one.outcome, one.tool if one.tool in self.tools else ""
            about = (str(outcome.status), outcome.latency_s, outcome.cached, outcome.attempts, one.began_s)
            growth.call(ToolCall(node, tool, one.arguments, *about))
            branch.tools = (*branch.tools, (one.tool, str(outcome.status)))
        branch.passed = (*branch.passed, (branch.calls, len(session.journal) if session is not None else 0))
        if branch.first and self._context.chat.codec:
            branch.heard = (*branch.heard, self._context.heard(messages))
        branch.node = branch.answer = node
        branch.calling = branch.says = False

    def _read(self, text: str) -> Sequence[ParsedCall | MalformedCall]:
        syntax = self._context.syntax
        if self._context.several_calls:
            return [bounded(call) for call in syntax.calls(text)]
        return [bounded(syntax.parse(text) or MalformedCall("no tool call"))]

    def _messages(self, branch: Branch, made: Sequence[Made]) -> Sequence[Message]:
        """What the model reads.  By a chat template a message is answered by users only, and calls are by
        tools first, a message each, if an empty one.
        """
        if self._context.chat.codec is None:
            return [message for one in made for message in one.messages]
        if branch.says:
            return [replace(message, role="user") for one in made for message in one.messages]
        found: list[Message] = []
        for one in made:
            silent = not any(message.role == "tool" for message in one.messages)
            found += [Message("")] if silent and not (one.answer and one.answer.over) else []
            found += one.messages
        return sorted(found, key=lambda message: message.role != "tool")

    async def _all(
        self, branch: Branch, calls: Sequence[ParsedCall | MalformedCall], text: str, again: bool
    ) -> Sequence[Made]:
        """All ``calls`` of a turn: those into the branch's session one after the other, beside the others."""
        session, limit = branch.session, self._context.config.call_limit
        made: dict[int, Made] = {}
        runs: dict[int, ParsedCall] = {}
        acts: dict[int, ParsedCall] = {}
        for number, call in enumerate(calls):
            if isinstance(call, MalformedCall):
                made[number] = _refused("", {}, call.reason)
            elif branch.calls - len(calls) + number >= limit:
                why = f"not made: the limit of {limit} tool calls is reached"
                made[number] = _refused(call.tool, call.arguments, why)
            elif session is not None and call.tool in session.tools:
                acts[number] = call
            else:
                runs[number] = call
        lanes = [self._run(branch, call, again) for call in runs.values()]
        if session is not None and acts:
            lanes.append(self._acts(branch, session, list(acts.values()), text, again))
        found = [one for lane in await _side_by_side(lanes) for one in lane]
        made |= zip([*runs, *acts], found, strict=True)
        return [made[number] for number in range(len(calls))]

    async def _acts(
        self, branch: Branch, session: BranchSession, calls: Sequence[ParsedCall], text: str, again: bool
    ) -> Sequence[Made]:
        """Calls into a session, each an action of its own.

        A resumed run does again what was under way.  What was answered before that stands in the journal,
        from which the world is built, and is not done twice.
        """
        answered = deque(session.journal[branch.passed[-1][1] if branch.passed else 0 :] if again else ())
        made: list[Made] = []
        for call in calls:
            if any(one.answer is not None and one.answer.over for one in made):
                made.append(_refused(call.tool, call.arguments, "not made: the episode is over"))
            elif answered and answered[0].calls == _typed(session, call):
                entry = answered.popleft()
                made.append(_acted(call, entry.answer, entry.seconds))
            else:
                made.append(await self._act(session, call, text))
        return made

    async def _act(self, session: BranchSession, call: ParsedCall | None, text: str) -> Made:
        """One action in a session: a call, or what is said."""
        began, began_s = _now(), self.since_start()
        answer = await session.act((Acted(call.tool, call.arguments),) if call else (), text)
        return _acted(call, answer, _now() - began)._replace(began_s=began_s)

    async def _run(self, branch: Branch, call: ParsedCall, again: bool) -> Sequence[Made]:
        """A call of a tool that keeps no state."""
        tool, began, began_s = call.tool, _now(), self.since_start()
        context = CallContext(prompt_id=self._growth.prompt_id, branch=branch.number, again=again)
        patience_s = self._schedule.patience_s(tool)
        watch = self._spawn(self._lateness(branch, patience_s)) if patience_s < math.inf else None
        try:
            outcome = await self._context.tools.call(tool, call.arguments, context)
        except Exception as error:  # the service promises not to raise; if it does, the agent goes on
            log.exception("prompt %s: tool %s raised", self._growth.prompt_id, tool)
            detail = described(error)
            self._mishap("tool", f"{tool}: {detail}")
            text = "Error: the tool is unavailable"
            outcome = ToolOutcome(ToolStatus.UNAVAILABLE, text, _now() - began, detail=detail)
            return [Made(tool, call.arguments, outcome, began_s=began_s)]
        finally:
            if watch is not None:
                watch.cancel()
        self._schedule.answered(tool, outcome)
        return [Made(tool, call.arguments, outcome, began_s=began_s)]

    def since_start(self) -> float:
        """Seconds since the tree's."""
        return max(0.0, self._context.now() - self._growth.started_s)

    async def _lateness(self, branch: Branch, patience_s: float) -> None:
        """Its call is not answered within ``patience_s``: the tree waits no more for what it may fork."""
        await asyncio.sleep(patience_s)
        branch.late = True
        self._late()


async def _side_by_side(works: Sequence[Coroutine[Any, Any, T]]) -> Sequence[T]:
    """What the ``works`` return.  If one raises, the others are cancelled."""
    if len(works) == 1:
        return [await works[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except ExceptionGroup as errors:
        raise next(leaves(errors)) from errors
    return [task.result() for task in tasks]


def _refused(tool: str, arguments: dict[str, Any], reason: str) -> Made:
    return Made(tool, arguments, ToolOutcome(ToolStatus.REJECTED, f"Error: {reason}"))


def _acted(call: ParsedCall | None, answer: Observation, seconds: float) -> Made:
    status = answer.messages[0].status if answer.messages else ToolStatus.OK
    outcome = ToolOutcome(ToolStatus(status), "", seconds)
    return Made(call.tool if call else "", dict(call.arguments) if call else {}, outcome, answer)


def _typed(session: BranchSession, call: ParsedCall) -> tuple[Acted, ...]:
    """``call`` as it stands in a session's journal; empty: the session refuses it."""
    try:
        return (Acted(call.tool, typed(session.tools[call.tool], call.arguments)),)
    except CallRefused:
        return ()


def _now() -> float:
    return asyncio.get_running_loop().time()
