"""Eager growth: a tree keeps no more back than what the branches that may still fork may bring."""

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
from system.rollout.schedule import BarrierFree, Eager
from system.rollout.snapshot import freeze, thaw
from system.rollout.tree_rollout import TreeRollout
from system.tools.outcome import ToolOutcome, ToolStatus
from system.tree.record import Origin, Tree
from system.twin.clock import run

CALL, ANSWER = "<search> q </search>", "so"


def eager(script: Any, answer: Any, policy: Policy, schedule: str = "eager", **sizes: Any) -> World:
    """A rollout that keeps back whole shares, and whose worker has seen calls of 1 s: 2 s is late."""
    world = make_world(script, answer, policy=policy, schedule=schedule, **sizes)
    if schedule == "eager":
        object.__setattr__(world.context, "schedule", Eager(keep=1.0))  # contexts are frozen
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


@pytest.mark.parametrize(
    ("schedule", "at_s"), [("barrier-free", [61.0, 61.0]), ("eager", [0.5, 2.5])], ids=str
)
def test_neither_an_ended_branch_nor_a_late_call_holds_back_roots(schedule: str, at_s: list[float]) -> None:
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
    assert top_ups == pytest.approx(at_s)


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
    remaining=st.integers(0, 32),
    share=st.floats(0.0, 8.0),
    keep=st.floats(0.0, 1.0),
)
def test_what_is_kept_back_is_covered_by_branches_that_may_fork(
    live: list[Branch], remaining: int, share: float, keep: float
) -> None:
    schedule = Eager(keep)
    started = schedule.top_ups(live, remaining, 3, share)
    kept = remaining - started
    assert 0 <= started <= remaining
    may_fork = [one for one in live if not one.late and (one.calling or one.calls < 3)]
    assert kept == min(remaining, math.ceil(len(may_fork) * keep * share))  # nothing, where none may fork
    assert schedule.top_ups(live, kept, 3, share) == 0  # asked again, it starts no more
    assert kept <= remaining - BarrierFree().top_ups(
        [one for one in live if not one.late], remaining, 3, share
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), p_call=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_a_tree_keeps_back_no_more_than_its_branches_shares(seed: int, p_call: float) -> None:
    """Asked at every segment's start: of 12 leaves, 4 of them roots, 2 are kept per branch that may fork."""
    chaos = np.random.default_rng(seed)
    growing: list[TreeRollout] = []
    seen: list[tuple[int, int]] = []

    def script(text: str, rng: np.random.Generator) -> Segment:
        (tree,) = growing
        may_fork = sum((b.undecided or b.calls < tree.call_limit) and not b.late for b in tree.live.values())
        seen.append((12 - tree.started.total(), 2 * may_fork))
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
    assert all(0 <= kept <= allowed for kept, allowed in seen)


def test_equal_seeds_grow_equal_trees() -> None:
    def grown() -> Tree:
        chaos = np.random.default_rng(5)
        return grow(
            eager(
                lambda text, rng: Segment(CALL if rng.random() < 0.6 else ANSWER, entropy=4 * rng.random(8)),
                lambda *_: ok(seconds=float(chaos.lognormal(0.0, 1.5))),
                Arpo(4, 0.5, 0.9),
                leaves=12,
                roots=4,
            ),
            seed=3,
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
