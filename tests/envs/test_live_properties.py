"""What every branch is answered is what a new world answers that is given the branch's path alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import Chains

from system.config import EnvironmentConfig
from system.envs.journal import Book, read
from system.envs.line import Spot
from system.envs.live import BranchSession, TreeSessions
from system.envs.protocol import Acted, Action, ForkKind, ForkTooLate, Ids, Start
from system.envs.service import EnvironmentService
from system.tools.outcome import ToolStatus
from system.tree.prompt import Prompt
from system.twin.clock import run

PROMPT = Prompt("p", ({"role": "user", "content": "?"},), ())
LIMITS = EnvironmentConfig(step_s=5.0, fork_s=5.0, retries=2)
DELAYS = ("before_s", "after_s")


@dataclass
class Script:
    """What a branch does, drawn by its key alone: an interruption changes nothing."""

    seed: int
    trouble: float  # chance of a late, a lost or a raising action
    p_fork: float
    steps: int

    def wish(self, key: Sequence[int], step: int) -> dict[str, Any]:
        rng = self._rng(key, step, 0)
        wish: dict[str, Any] = {"what": f"{step} of {list(key)}", "before_s": float(rng.exponential(0.3))}
        wish["after_s"] = float(rng.exponential(0.3))
        if rng.random() < self.trouble:
            match int(rng.integers(4)):
                case 0:
                    wish[DELAYS[int(rng.integers(2))]] = 20.0
                case 1:
                    wish["raises"] = True
                case _:
                    wish |= {"refused": int(rng.integers(1, 5)), "delivered": bool(rng.integers(2))}
        return wish

    def forks(self, key: Sequence[int], step: int) -> int:
        rng = self._rng(key, step, 1)
        return int(rng.integers(1, 3)) if len(key) < 4 and rng.random() < self.p_fork else 0

    def thinks_s(self, key: Sequence[int], step: int) -> tuple[float, float]:
        """Before it is decided upon forks, and from there to the next action: often no time at all."""
        rng = self._rng(key, step, 2)
        first, then = rng.exponential(0.5, 2) * (rng.random(2) < 0.5)
        return float(first), float(then)

    def dies_s(self, key: Sequence[int]) -> float:
        rng = self._rng(key, 0, 3)
        return float(rng.exponential(4.0)) if rng.random() < self.trouble else 1e9

    def _rng(self, key: Sequence[int], step: int, what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, step, what, len(key), *key])


@dataclass
class Agent:
    """One branch, and what it was answered since the tree began."""

    key: tuple[int, ...]
    session: BranchSession
    seen: list[tuple[dict[str, Any], str, str]] = field(default_factory=list)  # wish, status, text
    step: int = 0
    forked: bool = False  # at its newest step
    children: int = 0


class Forest:
    """All branches of a tree, live and ended."""

    def __init__(self, script: Script, environment: Chains) -> None:
        self.script, self.environment = script, environment
        self.agents: list[Agent] = []
        self.service = EnvironmentService(environment, LIMITS, "run", "train")
        self.sessions = TreeSessions(self.service, PROMPT, "7", script.seed)

    async def grow(self, until_s: float = 1e9) -> None:
        """Until all have ended, or so long."""
        if not self.agents:
            await self.sessions.begin()
            self.agents = [Agent((i,), self.sessions.root((i,))) for i in range(2)]
        self.ended = False
        try:
            async with asyncio.timeout(until_s), asyncio.TaskGroup() as self.group:
                for agent in self.agents:
                    self.group.create_task(self._live(agent))
            self.ended = True
        except TimeoutError:
            pass
        await self.sessions.close()
        await self.service.settle()
        assert self.environment.open_worlds == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}

    def resumed(self) -> None:
        """As another process does it: from JSON alone."""
        book = Book()
        states = [one.session.state(book.write(one.session.journal)) for one in self.agents]
        states, entries = json.loads(json.dumps([states, book.entries]))
        opening = self.sessions.opening
        self.service = EnvironmentService(self.environment, LIMITS, "run", "train")
        self.sessions = TreeSessions(self.service, PROMPT, "7", self.script.seed, opening)
        known = read(entries)
        for agent, values in zip(self.agents, states, strict=True):
            agent.session = self.sessions.restored(values, known)

    async def _live(self, agent: Agent) -> None:
        script = self.script
        try:
            async with asyncio.timeout(script.dies_s(agent.key)):
                while agent.step < script.steps:
                    if agent.step and not agent.forked:
                        await asyncio.sleep(script.thinks_s(agent.key, agent.step)[0])
                        for _ in range(script.forks(agent.key, agent.step)):
                            self._fork(agent)
                        agent.forked = True
                        await asyncio.sleep(script.thinks_s(agent.key, agent.step)[1])
                    wish = script.wish(agent.key, agent.step)
                    answer = await agent.session.act([Acted("push", wish)], "")
                    (message,) = answer.messages
                    agent.seen.append((wish, message.status, message.text))
                    agent.step, agent.forked = agent.step + 1, False
        except TimeoutError:
            agent.step = script.steps  # it has died
        agent.session.end("ended")

    def _fork(self, agent: Agent) -> None:
        key = (*agent.key, agent.children)
        agent.children += 1
        session = agent.session.fork(key, len(agent.session.journal))
        child = Agent(key, session, list(agent.seen), agent.step, forked=True)
        self.agents.append(child)
        self.group.create_task(self._live(child))

    async def check(self) -> None:
        """Each branch against a world of its own."""
        for agent in self.agents:
            start = Start(Ids("", "", "", ""), PROMPT, self.sessions.seed, 1.0)
            world: Any = await self.environment.open(start)
            done = iter(agent.session.journal)
            for wish, status, text in agent.seen:
                if status not in (ToolStatus.OK, ToolStatus.ERROR):
                    continue  # without an effect
                entry = next(done)
                assert entry.calls[0].arguments == wish
                if entry.seed is not None:
                    world.reseed(entry.seed)
                calm = {key: value for key, value in wish.items() if key not in (*DELAYS, "refused")}
                try:
                    action = Action((Acted("push", calm),), "", start.ids, 1.0)
                    expected = (await world.step(action)).messages[0].text
                except ValueError as error:
                    expected = f"The tool 'push' failed: ValueError: {error}"
                assert text == expected, agent.key
            assert next(done, None) is None
            await world.close("")
        seeds = [entry.seed for agent in self.agents for entry in agent.session.journal if entry.seed]
        paths = {tuple(entry.seed for entry in agent.session.journal if entry.seed) for agent in self.agents}
        acted = [agent for agent in self.agents if agent.session.journal]
        assert len(set(seeds)) >= len(paths) - 1  # every fork that acted had a seed of its own
        assert all(agent.session.journal[0].seed is None for agent in acted if len(agent.key) == 1)


def grown(script: Script, forks: ForkKind, stops: Sequence[float] = (), stubborn: bool = False) -> Forest:
    async def main() -> Forest:
        forest = Forest(script, Chains(forks, stubborn=stubborn))
        for stop in stops:
            await forest.grow(stop)
            forest.resumed()
        await forest.grow()
        assert forest.ended
        await forest.check()
        return forest

    return run(main())


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_a_branch_sees_what_its_path_alone_brings_about(data: st.DataObject) -> None:
    script = Script(
        data.draw(st.integers(0, 2**32 - 1), "seed"),
        data.draw(st.sampled_from([0.0, 0.2, 0.5]), "trouble"),
        data.draw(st.sampled_from([0.3, 0.7]), "p(fork)"),
        data.draw(st.integers(1, 5), "steps"),
    )
    forks = data.draw(st.sampled_from([ForkKind.NATIVE, ForkKind.SNAPSHOT, ForkKind.REPLAY]), "forks")
    stops = data.draw(st.lists(st.floats(0.05, 6.0), max_size=3), "interruptions")
    grown(script, forks, stops, data.draw(st.booleans(), "stubborn"))


@pytest.mark.parametrize("seed", range(4))
def test_all_ways_to_fork_come_to_the_same(seed: int) -> None:
    """Without accidents of time, whoever forks how."""
    script = Script(seed, 0.0, 0.6, 4)
    made = [grown(script, forks) for forks in (ForkKind.NATIVE, ForkKind.SNAPSHOT, ForkKind.REPLAY)]
    seen = [sorted((agent.key, agent.seen) for agent in forest.agents) for forest in made]
    assert seen[0] == seen[1] == seen[2]
    assert len(made[0].agents) > 4
    for forest, kind in zip(made, ("native", "snapshot", "replay"), strict=True):
        kinds = {name for name in forest.service.counts if name.startswith("forks_")}
        assert kinds == {f"forks_{kind}"}


def late(check: bool) -> Any:
    """:meth:`BranchSession.fork` as it must not be: it takes its place in the line a moment later."""

    def fork(self: BranchSession, key: Sequence[int], at: int) -> BranchSession:
        child = self._tree.forked(self, key, at)
        mine = child._line.spot()

        async def come() -> None:
            await asyncio.sleep(0.2)
            async with self._line.spot():
                await child._come(self, at if check else len(self.journal), mine, Spot(None))

        self._tree.spawn(come(), mine)
        return child

    return fork


@pytest.mark.parametrize("check", [True, False])
def test_a_fork_after_the_parents_next_action_is_found(monkeypatch: pytest.MonkeyPatch, check: bool) -> None:
    """By the session itself, which then stops by name, and, without that, by what the branches see."""
    monkeypatch.setattr(BranchSession, "fork", late(check))

    def ten() -> None:
        for seed in range(10):
            grown(Script(seed, 0.0, 0.7, 4), ForkKind.NATIVE)

    with pytest.raises((ExceptionGroup, AssertionError)) as caught:
        ten()
    if check:
        assert isinstance(caught.value, ExceptionGroup)
        assert caught.value.subgroup(ForkTooLate)
    elif isinstance(caught.value, ExceptionGroup):  # a fork of the fork did the path again
        assert "replay_diverged" in str(caught.value.exceptions[0])
