"""What a session does when its world is late, away, lost, or answers something else than before."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import pytest
from worlds import Chain, Chains

from system.config import EnvironmentConfig
from system.envs.live import BranchSession, TreeSessions
from system.envs.plain import PlainEnvironment
from system.envs.protocol import (
    Acted,
    Action,
    Effects,
    Environment,
    ForkKind,
    Message,
    Observation,
    Start,
    World,
    WorldFailed,
)
from system.envs.service import EnvironmentService
from system.tools.outcome import ToolStatus
from system.tools.tool import ToolUnavailable
from system.tree.prompt import Prompt
from system.twin.clock import run

PROMPT = Prompt("p", ({"role": "user", "content": "?"},), ())
LIMITS = EnvironmentConfig(step_s=5.0, retries=2)


async def one_root(
    environment: Environment, limits: EnvironmentConfig = LIMITS
) -> tuple[TreeSessions, BranchSession]:
    sessions = TreeSessions(EnvironmentService(environment, limits, "r", "train"), PROMPT, "1", 0)
    await sessions.begin()
    return sessions, sessions.root((0,))


def push(what: str, **wish: Any) -> list[Acted]:
    return [Acted("push", {"what": what, **wish})]


def look(what: str, **wish: Any) -> list[Acted]:
    return [Acted("look", {"what": what, **wish})]


def said(answer: Observation) -> tuple[str, str]:
    (message,) = answer.messages
    return message.status, message.text


def failure(work: Coroutine[Any, Any, Any]) -> WorldFailed:
    with pytest.raises(WorldFailed) as caught:
        run(work)
    return caught.value


@pytest.mark.parametrize(
    ("effects", "calls", "times", "status"),
    [  # of an action that may have arrived, and of one that cannot have
        (Effects.SESSION, push("a", refused=1), 2, "ok"),  # in a world that was built anew
        (Effects.SESSION, push("a", refused=2), 2, "unavailable"),  # once, and no more
        (Effects.SESSION, look("a", refused=2), 3, "ok"),  # it is declared to do no harm
        (Effects.NONE, push("a", refused=2), 3, "ok"),
        (Effects.OUTSIDE, push("a", refused=1), 1, "unavailable"),  # never
        (Effects.OUTSIDE, look("a", refused=2), 3, "ok"),
        (Effects.OUTSIDE, push("a", refused=2, delivered=False), 3, "ok"),
        (Effects.SESSION, push("a", refused=9, delivered=False), 3, "unavailable"),  # retries: 2
    ],
)
def test_what_may_be_sent_again(effects: Effects, calls: list[Acted], times: int, status: str) -> None:
    async def main() -> tuple[Chains, Observation, Observation]:
        environment = Chains(ForkKind.NATIVE, effects)
        sessions, session = await one_root(environment)
        answer = await session.act(calls, "")
        after = await session.act(push("b"), "")
        await sessions.close()
        await sessions.service.settle()
        assert environment.open_worlds == 0
        return environment, answer, after

    environment, answer, after = run(main())
    assert said(answer)[0] == status
    assert len(environment.acted) == times + 1
    assert said(after)[0] == "ok"
    if effects == Effects.OUTSIDE and times == 1:
        assert "may have taken effect; it was not sent again" in said(answer)[1]


def test_after_a_late_action_the_state_is_as_before() -> None:
    async def main() -> list[tuple[str, str]]:
        sessions, session = await one_root(Chains(ForkKind.NATIVE))
        answers = [await session.act(push("a"), ""), await session.act(push("b", after_s=9.0), "")]
        answers.append(await session.act(push("c"), ""))
        _, other = await one_root(Chains(ForkKind.NATIVE))
        answers += [await other.act(push("a"), ""), await other.act(push("c"), "")]
        assert sessions.service.counts["timeouts"] == sessions.service.counts["rebuilt"] == 1
        return [said(one) for one in answers]

    first, late, third, alone, then = run(main())
    assert late == ("timeout", "The tool 'push' did not answer within 5 s. The state is as before the call.")
    assert (first, third) == (alone, then)


@pytest.mark.parametrize("forks", [ForkKind.NONE, ForkKind.NATIVE])
def test_a_world_that_cannot_be_built_again_is_lost(forks: ForkKind) -> None:
    async def main() -> None:
        environment = Chains(forks, Effects.OUTSIDE if forks == ForkKind.NATIVE else Effects.SESSION)
        _, session = await one_root(environment)
        await session.act(push("a"), "")
        try:
            await session.act(push("b", after_s=9.0), "")
        except WorldFailed:
            assert len(environment.acted) == 2
            await session.act(push("c"), "")

    assert failure(main()).reason == "world_lost"


def test_a_place_to_open_a_world_is_awaited() -> None:
    async def main(fails: int) -> BranchSession:
        environment = Chains(ForkKind.NATIVE)
        environment.fails = fails
        return (await one_root(environment))[1]

    run(main(2))
    lost = failure(main(3))
    assert (lost.reason, "no room" in lost.detail) == ("open_failed", True)


class Clock(Chains):
    """Tells the time, which no second world tells again."""

    timeless = False

    async def open(self, start: Start) -> World:
        world = await super().open(start)
        world.step = self._step  # type: ignore[method-assign]
        return world

    async def _step(self, action: Action) -> Observation:
        await asyncio.sleep(1.0)
        return Observation.of(f"it is {asyncio.get_running_loop().time()}")

    def normalise(self, text: str) -> str:
        return "it is" if self.timeless else text


@pytest.mark.parametrize("timeless", [False, True])
def test_a_world_that_answers_otherwise_is_found(timeless: bool) -> None:
    async def main() -> Observation:
        environment = Clock(ForkKind.REPLAY)
        environment.timeless = timeless
        sessions, session = await one_root(environment)
        await session.act(push("a"), "")
        child = session.fork((0, 0), 1)
        try:
            return await child.act(push("b"), "")
        finally:
            await session.act(push("c"), "")  # the parent is not concerned
            assert sessions.service.counts["replay_diverged"] == (not timeless)

    if timeless:
        assert said(run(main()))[1].startswith("it is")
        return
    lost = failure(main())
    assert lost.reason == "replay_diverged"
    assert "step 1: messages was [('tool', 'ok', 'it is 1.1" in lost.detail
    assert "r/train/1/0.0 (from 0)" in lost.detail


def test_a_fork_that_would_replay_for_too_long_is_given_up() -> None:
    async def main() -> None:
        _, session = await one_root(Chains(ForkKind.REPLAY), replace(LIMITS, replay_s=3.0))
        for what in "ab":
            await session.act(push(what, before_s=2.0), "")
        child = session.fork((0, 0), 2)
        assert said(await session.act(push("c"), ""))[0] == "ok"  # the parent is not concerned
        with pytest.raises(WorldFailed) as caught:
            await child.act(push("d"), "")
        assert caught.value.reason == "fork_dear"
        assert "0.0 (from 0)" in caught.value.detail
        assert said(await session.act(push("e"), ""))[0] == "ok"

    run(main())


def test_a_fork_from_the_past_is_replayed() -> None:
    """As a policy asks for it that goes on from any turn of a tree."""

    async def main() -> tuple[Any, Any]:
        _sessions, session = await one_root(Chains(ForkKind.NATIVE))
        for what in "abc":
            await session.act(push(what), "")
        session.end("ended")
        child = session.fork((0, 0), 1)
        return (await child.result()), session.journal[0].answer.messages[0].text

    final, first = run(main())
    assert final == {"state": first}


def test_a_world_that_comes_when_nobody_waits_is_closed() -> None:
    async def main() -> None:
        environment = Chains(ForkKind.NATIVE)
        sessions = TreeSessions(EnvironmentService(environment, LIMITS, "r", "train"), PROMPT, "1", 0)
        task = asyncio.create_task(sessions.begin())
        await asyncio.sleep(environment.open_s)  # it is there in this very moment
        task.cancel()
        await asyncio.wait([task])
        await sessions.service.settle()
        assert task.cancelled()
        assert environment.open_worlds == 0

    run(main())


# A plain class: its code runs in threads, in real time.


class Heap:
    fork = "deepcopy"
    closed = 0

    def reset(self, prompt: Prompt) -> str:
        self.stones: list[str] = []
        return f"a heap for {prompt.id}"

    def lay(self, stone: str, times: int = 1, seconds: float = 0.0) -> str:
        """Lay a stone on the heap.

        stone: its name
        times (int): how often
        """
        assert threading.current_thread() is not threading.main_thread()
        self.stones += [stone] * times
        time.sleep(seconds)
        if stone == "sand":
            raise ValueError("sand is no stone")
        return " ".join(self.stones)

    @property
    def done(self) -> bool:
        return len(self.stones) >= 4

    def reward(self) -> float:
        return float(len(self.stones))

    def close(self) -> None:
        type(self).closed += 1


def heap() -> PlainEnvironment:
    return PlainEnvironment("x:Heap", Heap, Heap)


def lay(**arguments: Any) -> list[Acted]:
    return [Acted("lay", arguments)]


async def test_a_plain_class() -> None:
    Heap.closed = 0
    sessions, session = await one_root(heap())
    assert sessions.opening == "a heap for p"
    assert said(await session.act(lay(stone="a", times="2"), "")) == ("ok", "a a")  # as tags tell a number
    assert said(await session.act(lay(stone="b", weight=3), ""))[0] == "rejected"
    assert said(await session.act(lay(), ""))[0] == "rejected"
    child = session.fork((0, 0), 1)
    failed = said(await session.act(lay(stone="sand"), ""))
    assert failed == ("error", "The tool 'lay' failed: ValueError: sand is no stone")
    last = await session.act(lay(stone="c"), "")
    assert (said(last)[1], last.done) == ("a a sand c", True)
    answer = await child.act(lay(stone="d"), "")
    assert (said(answer)[1], answer.done) == ("a a d", False)
    assert await child.result() == {"reward": 3.0}
    assert await session.result() == {"reward": 4.0}
    assert sessions.service.counts["forks_native"] == 1
    await sessions.close()
    await sessions.service.settle()
    assert Heap.closed == 2


class Locked(Heap):
    def __init__(self) -> None:
        self.lock = threading.Lock()


async def test_what_cannot_be_copied_is_replayed() -> None:
    sessions, session = await one_root(PlainEnvironment("x:Locked", Locked, Locked))
    await session.act(lay(stone="a"), "")
    child = session.fork((0, 0), 1)
    await session.act(lay(stone="b"), "")
    assert said(await child.act(lay(stone="c"), ""))[1] == "a c"
    counts = sessions.service.counts
    assert (counts["forks_refused"], counts["forks_replay"], counts["forks_native"]) == (1, 1, 0)
    await sessions.close()


class Heavy(Heap):
    let_go = threading.Event()

    def lay(self, stone: str) -> str:
        """Lay a stone on the heap, a heavy one when it may be let go."""
        if stone == "heavy":
            self.let_go.wait()
        return super().lay(stone)


async def test_a_slow_method_holds_up_nobody_and_is_undone() -> None:
    Heavy.closed = 0
    environment = PlainEnvironment("x:Heavy", Heavy, Heavy)
    sessions, session = await one_root(environment, replace(LIMITS, step_s=1.5, close_s=60.0))
    try:
        late = await session.act(lay(stone="heavy"), "")
        assert said(late)[0] == ToolStatus.TIMEOUT, "the loop turns, and finds it late"
        assert said(await session.act(lay(stone="b"), "")) == ("ok", "b")
        await sessions.close()
        settled = asyncio.create_task(sessions.service.settle())
        await asyncio.sleep(0.1)
        assert not settled.done(), "that world is closed when its thread is done with it"
    finally:
        Heavy.let_go.set()
    await settled
    assert Heavy.closed == 2


def test_the_tools_of_a_plain_class() -> None:
    (spec,) = heap().tools.values()
    assert (spec.name, spec.description, spec.primary) == ("lay", "Lay a stone on the heap.", "stone")
    assert spec.parameters == {
        "type": "object",
        "properties": {
            "stone": {"type": "string", "description": "its name"},
            "times": {"type": "integer", "description": "how often"},
            "seconds": {"type": "number"},
        },
        "required": ["stone"],
        "additionalProperties": False,
    }


class Teller:
    """Answers messages, too."""

    fork = "replay"

    def reset(self, prompt: Prompt) -> None:
        self.asked = 0

    def reply(self, text: str) -> str | None:
        self.asked += 1
        return f"{text}? ({self.asked})" if self.asked < 3 else None


async def test_a_plain_class_that_answers_messages() -> None:
    _, session = await one_root(PlainEnvironment("x:Teller", Teller, Teller))
    assert (await session.act([], "hm")).messages == (Message("hm? (1)", "user"),)
    child = session.fork((0, 0), 1)
    assert (await session.act([], "so")).messages == (Message("so? (2)", "user"),)
    assert (await session.act([], "so")) == Observation(done=True)
    assert (await child.act([], "ah")).messages == (Message("ah? (2)", "user"),)
    assert await child.result() is None


def test_a_world_is_closed_once() -> None:
    async def main() -> None:
        _, session = await one_root(Chains(ForkKind.NATIVE))
        held = await session.world()
        session.end("ended")
        session.end("again")
        await asyncio.sleep(1.0)
        assert isinstance(held.world, Chain)
        assert held.world.closed

    run(main())


class Away(Chains):
    """Its worlds say ``times`` times that they are away when they are asked what they have come to."""

    def __init__(self, forks: ForkKind, effects: Effects, times: int) -> None:
        super().__init__(forks, effects)
        self.times = times

    async def open(self, start: Start) -> World:
        world = await super().open(start)
        tell: Any = world.result

        async def result() -> Any:
            self.times -= 1
            if self.times >= 0:
                raise ToolUnavailable("away")
            return await tell()

        world.result = result  # type: ignore[method-assign]
        return world


@pytest.mark.parametrize(
    ("forks", "effects", "times", "known"),
    [
        (ForkKind.REPLAY, Effects.SESSION, 1, True),
        (ForkKind.REPLAY, Effects.SESSION, 2, False),
        (ForkKind.REPLAY, Effects.OUTSIDE, 1, False),
        (ForkKind.NONE, Effects.SESSION, 1, False),
    ],
)
def test_a_world_that_is_away_at_the_end_is_built_anew_once(
    forks: ForkKind, effects: Effects, times: int, known: bool
) -> None:
    async def main() -> None:
        sessions, session = await one_root(Away(forks, effects, times))
        _, state = said(await session.act(push("a"), ""))
        try:
            assert await session.result() == {"state": state}
        finally:
            await sessions.close()
            await sessions.service.settle()

    if known:
        run(main())
    else:
        assert failure(main()).reason == "no_result"
