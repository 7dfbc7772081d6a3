"""Deadlines of tool calls: time in which the process stands still makes no answer late."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Mapping
from typing import Any

import pytest

from system.config import ToolsConfig
from system.tools.outcome import CallContext, ToolOutcome, ToolSpec, ToolStatus
from system.tools.sandbox.channel import Channel
from system.tools.service import Patience, ToolService
from system.tools.tool import ToolUnavailable


class Pondering:
    """Answers in some steps of the event loop, as what is read from a socket comes in."""

    def __init__(self, pure: bool = False, fails: int = 0) -> None:
        self.spec = ToolSpec("ponder", "", {"type": "object"}, "", pure)
        self.fails, self.left_s = fails, list[float]()

    async def run(self, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        self.left_s.append(context.deadline_s or 0.0)
        await self.check()
        if self.fails:
            self.fails -= 1
            raise ToolUnavailable("away", delivered=False)
        return ToolOutcome(ToolStatus.OK, "well")

    async def check(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0.01)


async def stand_still() -> None:
    await asyncio.sleep(0.05)
    time.sleep(3.0)  # noqa: ASYNC251 (what stands still)


@pytest.mark.parametrize("pure", [False, True])
async def test_a_call_is_not_late_for_it(pure: bool) -> None:
    tool = Pondering(pure, fails=1)
    tools = ToolService([tool], ToolsConfig(deadline_s=1.2), patience=Patience(backoff_s=0.02))
    outcome, _ = await asyncio.gather(tools.call("ponder", {}, CallContext()), stand_still())
    assert (outcome.status, outcome.text, outcome.attempts) == (ToolStatus.OK, "well", 2)
    assert tool.left_s == [pytest.approx(1.2, abs=0.1), pytest.approx(1.0, abs=0.3)], "what a tool is told"
    await tools.close()


async def test_a_check_is_not_late_for_it() -> None:
    tools = ToolService([Pondering()], ToolsConfig(deadline_s=1.2))
    await asyncio.gather(tools.check(), stand_still())


async def test_a_reply_of_the_sandbox_is_not_late_for_it() -> None:
    channel = Channel()
    loop = asyncio.get_running_loop()

    async def serve() -> None:
        """What a warden does: takes the call's socket, and answers on it."""

        channel.theirs.setblocking(False)
        while True:
            try:
                _, (call,), _, _ = socket.recv_fds(channel.theirs, 16, 1)
                break
            except BlockingIOError:
                await asyncio.sleep(0.01)
        with socket.socket(fileno=call) as there:
            there.setblocking(False)
            await loop.sock_recv(there, 1 << 16)
            for _ in range(20):
                await asyncio.sleep(0.01)
            await loop.sock_sendall(there, b'{"text": "well"}\n')

    reply, _, _ = await asyncio.gather(channel.call({"code": "1"}, 1.2), serve(), stand_still())
    assert reply == {"text": "well"}
    channel.theirs.close()
    await channel.end(1.0)


async def test_a_timeout_of_the_tools_own_is_not_told_as_the_calls_deadline() -> None:
    class Impatient(Pondering):
        async def run(self, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60.0)
            raise AssertionError("unreachable")

    tools = ToolService([Impatient()], ToolsConfig(deadline_s=60.0))
    outcome = await tools.call("ponder", {}, CallContext())
    assert outcome.status is ToolStatus.TIMEOUT
    assert outcome.text.startswith("The tool 'ponder' did not answer in time.")
