"""Eager growth: what a tree keeps for forks is forked early, and starts as late roots only if nobody may."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_fakes import PROMPT, Segment, World, make_world, ok

from system.rollout.branch import Branch
from system.rollout.branching import Arpo, Policy, Random
from system.rollout.budget import Budget
from system.rollout.expanding import RandomTurns
from system.rollout.schedule import BarrierFree, Eager
from system.rollout.snapshot import freeze, thaw
from system.rollout.tree_rollout import TreeRollout
from system.tools.outcome import ToolOutcome, ToolStatus
from system.tree.record import Origin, Tree
from system.twin.clock import run

CALL, ANSWER = "<search> q </search>", "so"


def eager(script: Any, answer: Any, policy: Policy, schedule: str = "eager", **sizes: Any) -> World:
    """A rollout whose worker has seen calls of 1 s: 2 s is late."""
    world = make_world(script, answer, policy=policy, schedule=schedule, **sizes)
    for _ in range(16):
        world.context.schedule.answered("search", ok(seconds=1.0)[1])
    return world


def grow(world: World, seed: int = 0) -> Tree:
    async def main() -> Tree:
        tree = await TreeRollout(world.context, PROMPT, seed=seed).run()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return tree

    return run(main())


def origins(tree: Tree) -> dict[Origin, int]:
    return {origin: tree.origins(origin) for origin in Origin}


@pytest.mark.parametrize(("schedule", "at_s"), [("barrier-free", 61.0), ("eager", 2.5)], ids=str)
def test_a_late_call_holds_back_no_roots(schedule: str, at_s: float) -> None:
    """Two roots keep one leaf each for forks.  One root ends at 0.5 s; the other's call, begun then, takes a
    minute, and is late after 2 s."""
    starts: list[float] = []

    def script(text: str, rng: np.random.Generator) -> Segment:
        starts.append(asyncio.get_running_loop().time())
        return Segment(CALL if len(starts) == 1 else ANSWER, token_s=0.0, chunk=1)

    sizes = {"leaves": 4, "roots": 2, "call_limit": 1}
    tree = grow(eager(script, lambda *_: ok(seconds=60.0), Random(1, 0.0), schedule, **sizes))
    assert origins(tree) == {Origin.ROOT: 2, Origin.FORK: 0, Origin.TOP_UP: 2}
    top_ups = starts[-2:] if schedule == "barrier-free" else starts[2:4]
    assert top_ups == pytest.approx([at_s, at_s])


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_what_ended_branches_leave_is_forked_at_the_next_result(alpha: float) -> None:
    """Of four roots three end without a call; the fourth's result gets all that is left, whatever the policy
    says, at once."""
    starts: list[float] = []

    def script(text: str, rng: np.random.Generator) -> Segment:
        starts.append(asyncio.get_running_loop().time())
        return Segment(CALL if len(starts) == 1 else ANSWER, token_s=0.0, chunk=1)

    sizes = {"leaves": 8, "roots": 4, "call_limit": 1}
    tree = grow(eager(script, lambda *_: ok(seconds=1.0), Random(1, alpha), **sizes))
    assert origins(tree) == {Origin.ROOT: 4, Origin.FORK: 4, Origin.TOP_UP: 0}
    (fork,) = tree.forks
    assert (fork.forks, fork.draw < fork.probability) == (4, alpha == 1.0)
    assert fork.scheduled == (3 if alpha else 4)
    assert starts[5:] == pytest.approx([starts[4] + 0.5] * 4)  # with the first token after the result


def test_a_late_branch_that_comes_back_may_fork_and_is_waited_for_again() -> None:
    """Late at 2.5 s, back at 5.5 s; the other root ends at 7 s, before the first token after the result."""
    begun = 0

    def script(text: str, rng: np.random.Generator) -> Segment:
        nonlocal begun
        begun += 1
        if begun == 1:
            return Segment(CALL, token_s=0.0)
        if begun == 2:
            return Segment(ANSWER, first_s=7.0)
        return Segment(ANSWER, first_s=3.0)

    tree = grow(eager(script, lambda *_: ok(seconds=5.0), Random(1, 1.0), leaves=3, roots=2, call_limit=1))
    assert origins(tree) == {Origin.ROOT: 2, Origin.FORK: 1, Origin.TOP_UP: 0}


def a_branch(calls: int, calling: bool, late: bool) -> Branch:
    rng = np.random.default_rng(0)
    return Branch((0,), Origin.ROOT, 0, rng, rng, calls=calls, calling=calling, late=calling and late)


@given(
    live=st.lists(st.builds(a_branch, st.integers(0, 3), st.booleans(), st.booleans()), max_size=20),
    asked=st.integers(0, 3),
    roots=st.integers(1, 8),
    kept=st.integers(0, 16),
    begun=st.integers(0, 16),
    keep=st.floats(0.0, 2.0),
    spare=st.floats(0.0, 2.0),
    most=st.floats(0.0, 1.0),
    calls=st.integers(1, 3),
)
def test_what_is_left_after_a_result_is_in_the_shares_of_those_that_may_fork_later(
    live: list[Branch],
    asked: int,
    roots: int,
    kept: int,
    begun: int,
    keep: float,
    spare: float,
    most: float,
    calls: int,
) -> None:
    schedule, branch = Eager(keep, spare, most), a_branch(calls, calling=False, late=False)
    budget = Budget(roots + kept, roots, Counter({Origin.ROOT: roots, Origin.FORK: min(begun, kept)}))
    remaining = budget.remaining
    hopeful = sum(not one.late and (one.calling or one.calls < 3) for one in live)
    assert schedule.top_ups(live, remaining, 3) == (0 if hopeful else remaining)
    assert schedule.top_ups(live, remaining, 3) >= BarrierFree().top_ups(live, remaining, 3)
    asked = min(asked, remaining)
    lent = schedule.lent(asked, [branch, *live], budget, 3)
    later = hopeful + (calls < 3)
    shares = (keep if asked else spare) * later * kept / roots
    over = remaining - shares
    if asked and later:
        over = min(over, most * kept)
    assert 0 <= lent <= remaining - asked
    assert over - asked - 1 < lent <= max(over - asked, 0) + 1  # floors of shares and of ``most``


@given(asked=st.integers(0, 3), roots=st.integers(1, 8), kept=st.integers(0, 16))
def test_what_nobody_can_fork_later_is_forked_now(asked: int, roots: int, kept: int) -> None:
    budget = Budget(roots + kept, roots, Counter({Origin.ROOT: roots}))
    asked = min(asked, kept)
    assert asked + Eager().lent(asked, [a_branch(3, calling=False, late=False)], budget, 3) == kept


def test_policies_that_grow_ended_trees_are_lent_no_forks() -> None:
    """They say themselves where the rest of the budget goes, once a tree's branches have ended."""
    world = eager(
        lambda text, rng: Segment(CALL if rng.random() < 0.7 else ANSWER),
        lambda *_: ok(seconds=1.0),
        RandomTurns(1),
        leaves=12,
        roots=4,
    )
    tree = grow(world, seed=1)
    assert tree.forks
    assert not any(fork.forks for fork in tree.forks)
    assert origins(tree)[Origin.FORK] + origins(tree)[Origin.TOP_UP] == 8


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), p_call=st.sampled_from([0.3, 0.7, 1.0]))
def test_no_root_starts_late_while_a_branch_may_fork_in_time(seed: int, p_call: float) -> None:
    chaos = np.random.default_rng(seed)
    growing: list[TreeRollout] = []
    top_ups, hopeful = 0, 0

    def script(text: str, rng: np.random.Generator) -> Segment:
        """Asked at every segment's start: has a root just started, and might the others have forked?"""
        nonlocal top_ups, hopeful
        (tree,) = growing
        may_fork = [
            b
            for b in tree.live.values()
            if b.origin != Origin.TOP_UP and not b.late and (b.undecided or b.calls < tree.call_limit)
        ]
        if tree.budget.started[Origin.TOP_UP] > top_ups:
            top_ups = tree.budget.started[Origin.TOP_UP]
            hopeful += len(may_fork)
        return Segment(CALL if rng.random() < p_call else ANSWER, entropy=(4 * rng.random(8)).tolist())

    world = eager(
        script,
        lambda *_: ok(seconds=30.0 if chaos.random() < 0.3 else 1.0),
        Arpo(4, 0.5, 0.9),
        leaves=12,
        roots=4,
    )

    async def main() -> Tree:
        growing.append(TreeRollout(world.context, PROMPT, seed=seed))
        return await growing[0].run()

    assert run(main()).n_leaves == 12
    assert hopeful == 0


def test_equal_seeds_grow_equal_trees() -> None:
    def grown() -> Tree:
        chaos = np.random.default_rng(6)
        return grow(
            eager(
                lambda text, rng: Segment(CALL if rng.random() < 0.6 else ANSWER, entropy=4 * rng.random(8)),
                lambda *_: ok(seconds=float(chaos.lognormal(0.0, 2.5))),
                Arpo(4, 0.5, 0.9),
                leaves=12,
                roots=4,
            ),
            seed=5,
        )

    ours, again = grown(), grown()
    assert ours.origins(Origin.FORK)
    assert ours.origins(Origin.TOP_UP)
    for column in ("tokens", "parent", "origin", "outcome"):
        np.testing.assert_array_equal(getattr(ours, column), getattr(again, column))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), pauses=st.lists(st.floats(0.0, 40.0), min_size=1, max_size=4))
def test_an_interrupted_tree_spends_its_budget_to_the_last_leaf(seed: int, pauses: list[float]) -> None:
    """Whoever is late when it is frozen: the call is made again, and may be late again."""
    chaos = np.random.default_rng(seed)
    world = eager(
        lambda text, rng: Segment(CALL if rng.random() < 0.6 else ANSWER, entropy=4 * rng.random(8)),
        lambda *_: ok(seconds=30.0 if chaos.random() < 0.5 else 1.0),
        Arpo(4, 0.5, 0.9),
        leaves=12,
        roots=4,
    )

    async def main() -> Tree:
        growing = TreeRollout(world.context, PROMPT, seed=seed)
        for pause in pauses:
            task = asyncio.ensure_future(growing.run())
            done, _ = await asyncio.wait([task], timeout=pause)
            if done:
                return task.result()
            data = freeze(growing)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            growing = thaw(world.context, PROMPT, data)
        return await growing.run()

    tree = run(main())
    assert tree.n_leaves == 12
    assert Counter(tree.origin.tolist())[Origin.ROOT] == 4


def test_patience_is_twice_the_median_of_the_tools_own_calls() -> None:
    schedule = Eager(window=20)
    for _ in range(15):
        schedule.answered("search", ok(seconds=1.0)[1])
    schedule.answered("search", ToolOutcome(ToolStatus.OK, "", 9.0, cached=True, attempts=0))  # is no call
    assert schedule.patience_s("search") == math.inf  # too few to say what is usual
    schedule.answered("search", ok(seconds=600.0)[1])
    assert schedule.patience_s("search") == 2.0
    assert schedule.patience_s("python") == math.inf
    for _ in range(20):
        schedule.answered("search", ok(seconds=3.0)[1])
    assert schedule.patience_s("search") == 6.0
