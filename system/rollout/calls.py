"""The call that a branch's newest segment ends with: read, and made."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from system.rollout.branch import Branch, Stopwatch
from system.rollout.context import RolloutContext
from system.rollout.schedule import Schedule
from system.rollout.syntax.base import MalformedCall, ParsedCall
from system.text import described
from system.tools.outcome import CallContext, ToolOutcome, ToolStatus

log = logging.getLogger(__name__)


class Made(NamedTuple):
    """A call, and what came of it."""

    tool: str  # "": it could not be read
    arguments: dict[str, Any]
    outcome: ToolOutcome


class Calls:
    """Makes the calls of one tree's branches."""

    def __init__(
        self,
        context: RolloutContext,
        prompt_id: str,
        schedule: Schedule,
        seconds: dict[str, float],
        mishap: Callable[[str, str], None],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        late: Callable[[], None],
    ) -> None:
        """``seconds``: where the time of the tree goes; ``mishap``: is told what failed; ``spawn``: starts a
        task of the tree; ``late``: is called when a call takes longer than the schedule's patience.
        """
        self._context, self._prompt_id, self._schedule, self._seconds = context, prompt_id, schedule, seconds
        self._mishap, self._spawn, self._late = mishap, spawn, late

    async def make(self, branch: Branch, again: bool) -> Made:
        """``again``: it was under way when the tree was saved.  Failures are outcomes."""
        match self._context.syntax.parse(branch.segments[-1][1]) or MalformedCall("no tool call"):
            case ParsedCall(tool, arguments):
                return Made(tool, arguments, await self._run(branch, tool, arguments, again))
            case MalformedCall(reason):
                return Made("", {}, ToolOutcome(ToolStatus.REJECTED, f"Error: {reason}"))

    async def _run(self, branch: Branch, tool: str, arguments: dict[str, Any], again: bool) -> ToolOutcome:
        context = CallContext(prompt_id=self._prompt_id, branch=branch.number, again=again)
        patience_s = self._schedule.patience_s(tool)
        watch = self._spawn(self._lateness(branch, patience_s)) if patience_s < math.inf else None
        with Stopwatch(self._seconds, "tool") as clock:
            try:
                outcome = await self._context.tools.call(tool, arguments, context)
            except Exception as error:  # the service promises not to raise; if it does, the agent goes on
                log.exception("prompt %s: tool %s raised", self._prompt_id, tool)
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
