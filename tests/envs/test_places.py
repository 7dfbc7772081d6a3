"""Environments that bear so many worlds at once: who waits for a place is not late for that."""

from __future__ import annotations

import asyncio
from typing import ClassVar

import pytest

from system.config import EnvironmentConfig
from system.envs.live import TreeSessions
from system.envs.protocol import Acted, Action, Environment, ForkKind, Ids, Observation, Start, World
from system.envs.python import PythonEnvironment
from system.envs.service import EnvironmentService
from system.envs.sessions import SessionWorld, _Tree
from system.envs.shell import ShellEnvironment
from system.tools.outcome import ToolSpec
from system.tools.sandbox.channel import SandboxUnavailable
from system.tree.prompt import Prompt
from system.twin.clock import run

PROMPT = Prompt("p", ({"role": "user", "content": "?"},), ())
TOOK_S = 1.5  # by whatever the server does


class Busy(Environment):
    """A server that does two things at once; copies of its worlds cost nothing."""

    tools: ClassVar = {"work": ToolSpec("work", "Work.", {"type": "object"}, "")}
    forks = ForkKind.NATIVE
    runs_at_once = 2

    def __init__(self) -> None:
        self.working = self.most = 0
        self.places = asyncio.Semaphore(2)

    async def work(self) -> None:
        async with self.places:
            self.working += 1
            self.most = max(self.most, self.working)
            await asyncio.sleep(TOOK_S)
            self.working -= 1

    async def open(self, start: Start) -> World:
        await self.work()
        return Shift(self)


class Shift(World):
    def __init__(self, environment: Busy) -> None:
        self.environment = environment

    async def step(self, action: Action) -> Observation:
        await self.environment.work()
        return Observation.of("done")

    async def result(self) -> dict[str, float]:
        await self.environment.work()
        return {"reward": 1.0}

    async def fork(self, ids: Ids) -> World:
        return Shift(self.environment)


def test_who_waits_for_a_place_is_not_late_for_that() -> None:
    async def busy() -> None:
        environment, clock = Busy(), asyncio.get_running_loop().time
        limits = EnvironmentConfig(open_s=2.0, step_s=2.0, result_s=2.0, fork_s=1.0)
        service = EnvironmentService(environment, limits, "r", "train")
        trees = [TreeSessions(service, PROMPT, str(number), 0) for number in range(7)]
        await asyncio.gather(*(tree.begin() for tree in trees))
        roots = [tree.root((0,)) for tree in trees]
        began = clock()
        acting = [asyncio.create_task(root.act([Acted("work", {})], "")) for root in roots[1:]]
        await asyncio.sleep(0.1)
        roots[0].fork((0, 1), 0)
        await asyncio.sleep(0.1)
        assert service.counts["forks_native"] == 1, "a copy waits for no place"
        answers = await asyncio.gather(*acting)
        assert [answer.messages[0].status for answer in answers] == 6 * ["ok"]
        assert clock() - began == pytest.approx(3 * TOOK_S)
        results = await asyncio.gather(*(root.result() for root in roots))
        assert results == 7 * [{"reward": 1.0}]
        assert not service.counts["timeouts"]
        assert not service.counts["no_result"]
        assert environment.most == 2
        taken = [root.journal[0].seconds for root in roots[1:]]
        assert taken == pytest.approx(6 * [TOOK_S]), "by which a replay's price is told"
        for tree in trees:
            await tree.close()
        await service.settle()

    run(busy())


class Stuck:
    """A session that its warden does not close."""

    held_mb = 0.0

    async def close(self) -> None:
        raise SandboxUnavailable("the sandbox failed")


async def test_a_tree_ends_with_its_last_world_however_that_is_closed() -> None:
    environment, key = PythonEnvironment(), ("r", "train", "1")
    tree = environment._trees[key] = _Tree(PROMPT)
    tree.worlds = 1
    world = SessionWorld(environment, key, Stuck())  # pyright: ignore[reportArgumentType]
    with pytest.raises(SandboxUnavailable):
        await world.close("its branch has ended")
    assert not environment._trees
    assert not environment._live


@pytest.mark.parametrize("kind", [PythonEnvironment, ShellEnvironment])
def test_sessions_of_the_sandbox_say_how_many_run(
    kind: type[PythonEnvironment] | type[ShellEnvironment],
) -> None:
    assert kind(concurrency=3).runs_at_once == 3
