"""The lockstep schedule: the released ARPO code's rounds, and the published figures of its rules."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rollout_fakes import PROMPT, Segment, World, make_world, ok

from system.config import settings
from system.rollout.branching import Arpo, ArpoRelease, Never, Random
from system.rollout.schedule import SCHEDULES, Lockstep, make_schedule
from system.rollout.tree_rollout import TreeRollout
from system.tree.prompt import Prompt
from system.tree.record import Origin, Tree
from system.twin.clock import run

CALL, ANSWER = "<search> q </search>", "so"


def prompts(count: int) -> list[Prompt]:
    return [replace(PROMPT, id=f"p{number}") for number in range(count)]


def grow_all(world: World, count: int) -> tuple[list[Tree], float]:
    """``count`` trees at once on one rollout, and the seconds until the last has closed."""

    async def main() -> tuple[list[Tree], float]:
        growing = (
            TreeRollout(world.context, prompt, seed=i).run() for i, prompt in enumerate(prompts(count))
        )
        trees = await asyncio.gather(*growing)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return trees, asyncio.get_running_loop().time()

    return run(main())


def rounds(world: World) -> int:
    assert isinstance(world.context.schedule, Lockstep)
    return world.context.schedule.rounds


def test_every_branch_of_every_tree_waits_for_the_slowest_tool() -> None:
    starts: list[float] = []
    calls = 0

    def answer(tool: str, arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return ok(seconds=120.0 if calls == 3 else 1.0)

    def script(text: str, rng: np.random.Generator) -> Segment:
        starts.append(asyncio.get_running_loop().time())
        return Segment(ANSWER if "<result>" in text else CALL, first_s=float(rng.random()))

    options = {"policy": Never(4), "leaves": 4, "roots": 4}
    world = make_world(script, answer, schedule="lockstep", **options)
    grow_all(world, 3)
    assert starts[:12] == [0.0] * 12
    assert len(set(starts[12:])) == 1  # the second round begins for all at once,
    assert starts[12] > 120.0  # with the slowest
    assert rounds(world) == 2
    starts.clear()
    calls = 0
    grow_all(make_world(script, answer, **options), 3)
    assert sum(time < 3.0 for time in starts) == 23  # without barriers one branch alone is late


def test_a_tree_without_a_live_branch_gets_one_root_per_round() -> None:
    world = make_world(
        lambda text, rng: Segment(ANSWER), policy=Random(4, 0.0), leaves=6, roots=2, schedule="lockstep"
    )
    (tree,), _ = grow_all(world, 1)
    assert Counter(tree.origin.tolist()) == {Origin.ROOT: 2, Origin.TOP_UP: 4}
    assert rounds(world) == 5  # both roots, then four times one root alone


def test_a_fork_begins_with_the_next_round() -> None:
    """The policy looks at the first tokens after the result, but only when all segments are there."""
    starts: list[float] = []

    def script(text: str, rng: np.random.Generator) -> Segment:
        starts.append(asyncio.get_running_loop().time())
        return Segment("a b c d e f g h" if "<result>" in text else CALL, first_s=1.0, token_s=1.0)

    world = make_world(script, policy=Random(4, 1.0), leaves=2, roots=1, schedule="lockstep")
    (tree,), _ = grow_all(world, 1)
    assert tree.origins(Origin.FORK) == 1
    assert rounds(world) == 3
    parent_took = starts[2] - starts[1]
    assert parent_took == pytest.approx(1.0 + 13.0)  # 16 pieces in chunks of three; the first costs 1 s
    child = [j for j in range(tree.n_nodes) if tree.parent[j] == tree.forks[0].node]
    assert len(child) == 2


@pytest.mark.parametrize("policy", [Arpo(4, 0.5, 0.9), ArpoRelease(0.5, 0.2)])
def test_nobody_waits_for_a_branch_that_failed(policy: Any) -> None:
    """One engine call breaks in each round; the others' round ends without it."""
    failed: list[bool] = []

    def script(text: str, rng: np.random.Generator) -> Segment:
        failed.append(len(failed) % 5 == 0)
        said = CALL if rng.random() < 0.6 else ANSWER
        return Segment(said, entropy=rng.random(8), fail_after=2 if failed[-1] else None)

    world = make_world(script, policy=policy, leaves=8, roots=4, schedule="lockstep")
    trees, _ = grow_all(world, 6)
    assert any(failed)
    assert [tree.n_leaves for tree in trees] == [8] * 6


def test_a_cancelled_tree_holds_nobody_up() -> None:
    def answer(tool: str, arguments: Any) -> Any:
        return ok(seconds=1.0 if asyncio.get_running_loop().time() > 50 else 40.0)

    world = make_world(
        lambda text, rng: Segment(ANSWER if "<result>" in text else CALL),
        answer,
        policy=Never(4),
        leaves=3,
        schedule="lockstep",
    )

    async def main() -> float:
        first, second = (
            asyncio.ensure_future(TreeRollout(world.context, p, seed=1).run()) for p in prompts(2)
        )
        await asyncio.sleep(10.0)  # both are at their tools
        first.cancel()
        await second
        assert asyncio.all_tasks() - {first} == {asyncio.current_task()}
        return asyncio.get_running_loop().time()

    assert run(main()) < 50.0


async def test_all_go_on_in_the_order_of_joining_whoever_comes_last() -> None:
    schedule, went_on = Lockstep(), list[str]()

    async def one(name: str, arrives_s: float) -> None:
        await schedule.join(name)
        await asyncio.sleep(arrives_s)
        await schedule.meet(name)
        went_on.append(name)

    await asyncio.gather(one("first", 0.01), one("second", 0.0), one("third", 0.02))
    assert went_on == ["first", "second", "third"]


def test_unknown_schedules_are_refused() -> None:
    assert settings()["rollout.schedule"].rule.choices == tuple(SCHEDULES)
    with pytest.raises(ValueError, match="bulk"):
        make_schedule("bulk")
