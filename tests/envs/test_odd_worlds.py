"""Environments that do what none should: it costs an action, or a branch, with a name, and no other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from rollout_fakes import Segment
from test_live import LIMITS, Clock, failure, one_root, push, said
from test_rollout_in_worlds import Tallies, in_worlds, pushing
from worlds import Chains

from system.config import EnvironmentConfig
from system.envs.arguments import typed
from system.envs.live import TreeSessions
from system.envs.plain import PlainEnvironment
from system.envs.protocol import (
    Acted,
    Action,
    CannotFork,
    Environment,
    ForkKind,
    Message,
    Observation,
    Start,
    World,
    checked,
)
from system.envs.service import EnvironmentService, plain
from system.foreign import TooLate, foreign
from system.plugins import SYNTAXES, PluginError
from system.rollout.branching import Never, Random
from system.tools.outcome import ToolSpec
from system.tools.tool import CallRefused
from system.tree.prompt import Prompt
from system.tree.record import Outcome

# What a world is given is its own.


class Cart:
    """Keeps what it is handed, and changes all of it."""

    fork = "replay"

    def __init__(self, shelf: list[str] | None = None) -> None:
        self.shelf = shelf if shelf is not None else ["milk"]

    def reset(self, prompt: Prompt) -> str:
        self.cart: list[str] | None = None
        prompt.extra["customers"].append("one more")
        self.wanted = prompt.extra["wanted"]
        return f"customer {len(prompt.extra['customers'])}"

    def put(self, items: list[str]) -> str:
        """Put things into the cart."""
        if self.cart is None:
            self.cart = items
        else:
            self.cart += items
        self.wanted.pop()
        return " ".join(self.cart)

    def take(self) -> str:
        """Take the first thing from the shelf."""
        return self.shelf.pop(0)


@pytest.mark.parametrize("fork", ["deepcopy", "replay"])
async def test_a_world_keeps_and_changes_what_is_its_own_alone(
    monkeypatch: pytest.MonkeyPatch, fork: str
) -> None:
    monkeypatch.setattr(Cart, "fork", fork)
    extra: dict[str, Any] = {"customers": [], "wanted": ["a", "b", "c"]}
    prompt = Prompt("p", ({"role": "user", "content": "?"},), (), extra=extra)
    environment = PlainEnvironment("x:Cart", Cart, partial(Cart, shelf=["milk", "bread"]))
    sessions = TreeSessions(EnvironmentService(environment, LIMITS, "r", "train"), prompt, "1", 0)
    assert await sessions.begin() == "customer 1"
    session, other = sessions.root((0,)), sessions.root((1,))

    async def put(branch: Any, *items: str) -> str:
        return said(await branch.act([Acted("put", {"items": [*items]})], ""))[1]

    assert await put(session, "a") == "a"
    child = session.fork((0, 0), 1)
    assert await put(session, "b") == "a b"
    assert [entry.calls[0].arguments for entry in session.journal] == [{"items": ["a"]}, {"items": ["b"]}]
    assert await put(child, "d") == "a d"
    session.discard("to be built again")
    assert await put(session, "c") == "a b c"
    assert await put(other, "x") == "x"
    for branch in (session, other):
        assert said(await branch.act([Acted("take", {})], ""))[1] == "milk"
    assert extra == {"customers": [], "wanted": ["a", "b", "c"]}
    assert not sessions.service.counts["replay_diverged"]
    await sessions.close()


# What it raises.


class Odd(BaseException):
    """No Exception."""


KINDS = (StopIteration, StopAsyncIteration, GeneratorExit, SystemExit, Odd, CannotFork)
ODD = {kind.__name__: kind for kind in KINDS}


class Raising:
    fork = "replay"

    def reset(self, prompt: Prompt) -> None:
        """Nothing to do."""

    def fail(self, kind: str = "") -> str:
        """Fail so."""
        if kind:
            raise ODD[kind](f"so: {kind}")
        return "well"


class RaisingWorld(World):
    async def step(self, action: Action) -> Observation:
        kind = action.calls[0].arguments.get("kind")
        if kind:
            raise ODD[kind](f"so: {kind}")
        return Observation.of("well")


class RaisingEnvironment(Environment):
    tools = {"fail": ToolSpec("fail", "Fail so.", {"type": "object"}, "kind")}  # noqa: RUF012
    forks = ForkKind.REPLAY

    def open(self, start: Start) -> World:
        return RaisingWorld()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize(
    "make", [lambda: PlainEnvironment("x:Raising", Raising, Raising), RaisingEnvironment]
)
async def test_whatever_is_raised_is_the_failure_of_that_action(
    make: Callable[[], Environment], kind: str
) -> None:
    sessions, session = await one_root(make(), replace(LIMITS, step_s=20.0))
    began = time.monotonic()
    status, text = said(await session.act([Acted("fail", {"kind": kind})], ""))
    assert time.monotonic() - began < 10, "it waited for a deadline"
    assert status == "error"
    assert kind in text
    assert said(await session.act([Acted("fail", {})], "")) == ("ok", "well")
    assert len(session.journal) == 2
    await sessions.close()


# What it returns.


class Unshown:
    def __repr__(self) -> str:
        raise ValueError("no")


class Bad(Chains):
    """Answers ``given``, whatever is done."""

    def __init__(self, given: Any) -> None:
        super().__init__(ForkKind.NATIVE)
        self.given = given

    async def open(self, start: Start) -> World:
        world = await super().open(start)
        world.step = lambda action: self.given  # type: ignore[method-assign]
        return world


NO_NUMBER = "no number from"


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (None, "no Observation"),
        (b"bytes", "no Observation"),
        (5, "no Observation"),
        (Unshown(), "no Observation"),
        (Observation(None), "no tuple of Message"),  # type: ignore[arg-type]
        (Observation("text"), "no tuple of Message"),  # type: ignore[arg-type]
        (Observation(("text",)), "as a Message"),  # type: ignore[arg-type]
        (Observation((Message("x", "robot"),)), "its role is one of"),
        (Observation((Message("x", status="odd"),)), "a message that cannot be read"),
        (Observation((Message(Unshown()),)), "a message that cannot be read"),  # type: ignore[arg-type]
        (Observation((), "1"), NO_NUMBER),  # type: ignore[arg-type]
        (Observation((), Unshown()), NO_NUMBER),  # type: ignore[arg-type]
        (Observation((), 10**400), NO_NUMBER),
        (Observation((), 10**5000), NO_NUMBER),
        (Observation((), 1e300), NO_NUMBER),  # infinite in the record's 32 bits
        (Observation((), float("nan")), NO_NUMBER),
        (Observation((), np.float32("inf")), NO_NUMBER),  # type: ignore[arg-type]
        (Observation((), done="no"), "done="),  # type: ignore[arg-type]
        (Observation((), done=np.array([True, False])), "done="),  # type: ignore[arg-type]
        (Observation((), truncated=3), "truncated="),  # type: ignore[arg-type]
    ],
    ids=lambda one: one if isinstance(one, str) else type(one).__name__,
)
def test_what_cannot_be_read_costs_the_branch_by_name(given: Any, fault: str) -> None:
    async def main() -> None:
        _, session = await one_root(Bad(given))
        await session.act(push("a"), "")

    lost = failure(main())
    assert (lost.reason, fault in lost.detail) == ("bad_observation", True)


def test_what_means_one_thing_is_read() -> None:
    rewards: list[Any] = [
        1,
        0.5,
        True,
        np.float32(0.5),
        np.float64(0.25),
        np.int64(3),
        np.bool_(True),
        np.array(0.5),
    ]
    read = [checked(Observation((), reward)).reward for reward in rewards]
    assert read == [1.0, 0.5, 1.0, 0.5, 0.25, 3.0, 1.0, 0.5]
    assert {type(one) for one in read} == {float}
    over = [checked(Observation((), done=done)).done for done in (True, np.bool_(True), 1, 0, None)]  # type: ignore[arg-type]
    assert over == [True, True, True, False, False]
    assert {type(one) for one in over} == {bool}
    assert plain({"reward": np.float32(0.5), "place": np.arange(2)}) == {"reward": 0.5, "place": [0, 1]}


def test_an_odd_answer_costs_its_branch_and_not_the_tree() -> None:
    def answer(text: str, path: tuple[str, ...], role: str) -> Observation:
        answers.append(text)
        return Observation((Message(text, role),), 10**400 if len(answers) == 1 else None)

    answers: list[str] = []
    made = in_worlds(pushing, Tallies(answer=answer), policy=Never(4), leaves=3, roots=3, call_limit=2)
    tree = made.grown()
    assert sorted(Outcome(one).name for one in tree.outcome) == ["CALL_LIMIT", "CALL_LIMIT", "ENVIRONMENT"]
    assert [kind for kind, _ in tree.meta["mishaps"]] == ["bad_observation"]


class Flagged(Raising):
    done: Any = False

    def reward(self) -> Any:
        return np.float32(0.25)


async def test_a_plain_class_may_tell_numbers_of_numpy_and_no_odd_end() -> None:
    sessions, session = await one_root(PlainEnvironment("x:Flagged", Flagged, Flagged))
    held = await session.world()
    world: Any = held.world
    assert await session.result() == {"reward": 0.25}
    world._made.done = np.bool_(True)
    assert (await session.act([Acted("fail", {})], "")).done is True
    world._made.done = "over"
    with pytest.raises(Exception, match=r"bad_observation: .*done='over': say True or False"):
        await session.act([Acted("fail", {})], "")
    await sessions.close()


def test_a_final_state_that_is_nested_too_deeply_is_none() -> None:
    with pytest.raises(ValueError, match="nested more than 50 deep"):
        plain({"reward": nested(60)})
    with pytest.raises(ValueError, match=r"result\(\) returned"):
        plain({"reward": nested(5000)})


# What it compares by.


class Raises(Clock):
    def normalise(self, text: str) -> str:
        raise ODD["GeneratorExit"](text)


class Returns(Clock):
    def normalise(self, text: str) -> str:
        return None  # type: ignore[return-value]


@pytest.mark.parametrize("kind", [Raises, Returns])
def test_a_hook_that_fails_costs_the_fork_and_tells_the_remedy(kind: type[Clock]) -> None:
    async def main() -> None:
        sessions, session = await one_root(kind(ForkKind.REPLAY))
        await session.act(push("a"), "")
        child = session.fork((0, 0), 1)
        try:
            await child.act(push("b"), "")
        finally:
            assert said(await session.act(push("c"), ""))[0] == "ok"  # the parent is not concerned
            assert sessions.service.counts["bad_normalise"] == 1

    lost = failure(main())
    assert lost.reason == "bad_normalise"
    assert "a static method" in lost.detail


def test_a_hook_that_is_no_static_method_is_told_at_the_start() -> None:
    class Bound(Raising):
        def normalise(self, text: str) -> str:
            return text

    class Value(Raising):
        normalise = "text"

    for kind in (Bound, Value):
        with pytest.raises(PluginError, match="with a text alone: make it a static method"):
            PlainEnvironment("x:Odd", kind, kind)


# Arguments that go deep.


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("depth", [60, 490, 990])
def test_arguments_that_go_too_deep_are_refused_and_the_tree_goes_on(depth: int) -> None:
    """Also through a resume, which writes journals and reads them."""

    def script(text: str, rng: np.random.Generator) -> Segment:
        deep = depth if rng.random() < 0.5 else 9
        made = f'{{"name": "push", "arguments": {{"what": "p", "more": {"[" * deep + "]" * deep}}}}}'
        return Segment(f"<tool_call>{made}</tool_call>", entropy=1.0, token_s=1e-4, chunk=5000)

    environment = Tallies(ForkKind.REPLAY)
    made = in_worlds(
        script,
        environment,
        policy=Random(2, 0.7),
        leaves=6,
        roots=2,
        call_limit=4,
        max_response_tokens=20_000,
    )
    context = made.made.context
    specs = {**context.tools.specs, **environment.tools}
    made.made.context = replace(context, syntax=SYNTAXES.make("hermes", {}, specs))
    tree = made.grown(pauses=(1.0, 2.0))
    assert {Outcome(one) for one in tree.outcome} == {Outcome.CALL_LIMIT}
    status = {call.status for call in tree.calls}
    assert status == {"ok", "rejected"}


def test_a_texts_type_may_be_one_of_several_or_not_told() -> None:
    """As servers' schemas say it."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": ["string", "null"]}, "b": True, "c": {"type": "integer"}},
    }
    spec = ToolSpec("t", "", schema, "a")
    assert typed(spec, {"a": "1", "b": "2", "c": "3"}) == {"a": "1", "b": "2", "c": 3}
    with pytest.raises(CallRefused):
        typed(spec, {"c": "x"})


# A process that stands still.


class Thinking:
    fork = "deepcopy"

    def reset(self, prompt: Prompt) -> None:
        """Nothing to do."""

    def think(self) -> str:
        """Think for a while."""
        time.sleep(0.2)
        return "well"


class Pondering(Environment):
    """The same in steps of the event loop, as what is read from a socket comes in."""

    tools = {"think": ToolSpec("think", "Think for a while.", {"type": "object"}, "")}  # noqa: RUF012
    forks = ForkKind.REPLAY

    def open(self, start: Start) -> World:
        class Ponders(World):
            async def step(self, action: Action) -> Observation:
                for _ in range(20):
                    await asyncio.sleep(0.01)
                return Observation.of("well")

        return Ponders()


@pytest.mark.parametrize(
    "make", [lambda: PlainEnvironment("x:Thinking", Thinking, Thinking), Pondering], ids=["thread", "loop"]
)
async def test_time_in_which_the_process_stands_still_makes_no_answer_late(
    make: Callable[[], Environment],
) -> None:
    limits = replace(EnvironmentConfig(), step_s=1.2)
    sessions, session = await one_root(make(), limits)
    acting = asyncio.create_task(session.act([Acted("think", {})], ""))
    await asyncio.sleep(0.05)
    time.sleep(3.0)  # noqa: ASYNC251 (what stands still)
    assert said(await acting) == ("ok", "well")
    assert not sessions.service.counts["timeouts"]
    assert session.journal[0].seconds <= limits.step_s
    await sessions.close()


async def test_a_loop_that_is_always_late_is_waited_for_so_long_and_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("system.awake.TICK_S", 0.05)
    monkeypatch.setattr("system.awake.LATE_S", 0.01)
    waiting = asyncio.create_task(foreign(asyncio.sleep(600), 0.2))

    async def slow() -> None:
        while not waiting.done():
            time.sleep(0.08)  # noqa: ASYNC251 (what makes it late)
            await asyncio.sleep(0)

    began = time.monotonic()
    with pytest.raises(TooLate):
        await asyncio.gather(slow(), waiting)
    assert 0.8 < time.monotonic() - began < 60
