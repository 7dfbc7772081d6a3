"""What holds for every tree, whatever the model, the tools and the engine do."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_fakes import PROMPT, Segment, make_world, ok

from system.rollout.branching import (
    Aepo,
    Arpo,
    ArpoCalibrated,
    ArpoPaper,
    ArpoRelease,
    Never,
    Policy,
    Random,
)
from system.rollout.expanding import MostUncertainTurns, RandomTurns, UnlikelyTokens
from system.rollout.failure import RolloutFailed
from system.rollout.schedule import SCHEDULES
from system.rollout.tree_rollout import TreeRollout
from system.tools.outcome import ToolOutcome, ToolStatus
from system.tree.record import Kind, Origin, Outcome, Tree
from system.twin.clock import run

POLICIES: list[Policy] = [
    Arpo(4, 0.5, 0.9),
    ArpoPaper(3, 0.5, 0.2, 0.5),
    ArpoRelease(0.5, 0.2),
    Aepo(3, 0.6, 0.2),
    ArpoCalibrated(3, 0.6, 0.4, least=1, by="siblings"),
    Random(2, 0.8),
    MostUncertainTurns(2, width=3),
    RandomTurns(2),
    UnlikelyTokens(2),
    Never(4),
]


def check(tree: Tree, n: int, roots: int, policy: Policy) -> None:
    started = [tree.origins(origin) for origin in Origin]
    assert sum(started) == tree.n_leaves <= n
    assert policy.expands or started[Origin.FORK] == sum(d.forks for d in tree.forks)
    assert started[Origin.ROOT] == (min(roots, n) if policy.can_fork else n)
    assert all(tree.kind[d.node] == Kind.TOOL for d in tree.forks)
    scored = np.array([Outcome(o).scored for o in tree.outcome])
    np.testing.assert_array_equal(np.isfinite(tree.reward), scored)
    model = np.repeat(tree.kind == Kind.MODEL, tree.end - tree.start)
    np.testing.assert_array_equal(tree.version >= 0, model)
    np.testing.assert_array_equal(tree.logprob < 0, model)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_budget_identity_under_random_tools_failures_and_deadlines(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**32 - 1), "seed")
    n = data.draw(st.integers(1, 16), "n")
    roots = data.draw(st.integers(1, n), "roots")
    call_limit = data.draw(st.integers(0, 4), "call limit")
    policy = data.draw(st.sampled_from(POLICIES), "policy")
    p_call = data.draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]), "p(call)")
    p_fail = data.draw(st.sampled_from([0.0, 0.0, 0.1, 0.5]), "p(engine error)")
    p_hang = data.draw(st.sampled_from([0.0, 0.0, 0.1]), "p(hang)")
    slow = data.draw(st.sampled_from([1.0, 30.0]), "mean tool seconds")
    short = data.draw(st.booleans(), "short deadlines")
    schedule = data.draw(st.sampled_from(sorted(SCHEDULES)), "schedule")
    chaos = np.random.default_rng(seed)

    def script(text: str, rng: np.random.Generator) -> Segment:
        words = "<think> " + "w " * int(rng.integers(0, 12)) + "</think> "
        broken = "</search>" if rng.random() < 0.2 else "<search> q </search>"
        return Segment(
            words + (broken if rng.random() < p_call else "<answer> x </answer>"),
            entropy=rng.random(16) * 4,
            first_s=float(rng.exponential(0.5)),
            chunk=int(rng.integers(1, 7)),
            fail_after=int(rng.integers(0, 6)) if rng.random() < p_fail else None,
            hang_after=int(rng.integers(0, 6)) if rng.random() < p_hang else None,
        )

    def answer(tool: str, arguments: Any) -> tuple[float, ToolOutcome]:
        if chaos.random() < 0.1:
            raise OSError("the tool service broke its word")
        status = list(ToolStatus)[int(chaos.integers(len(ToolStatus)))]
        return float(chaos.exponential(slow)), ToolOutcome(status, "r " * int(chaos.integers(0, 40)))

    world = make_world(
        script,
        answer,
        policy=policy,
        leaves=n,
        roots=roots,
        call_limit=call_limit,
        schedule=schedule,
        max_response_tokens=int(chaos.integers(20, 200)),
        generate_deadline_s=20.0 if short else 1e6,
        branch_deadline_s=40.0 if short else 1e7,
        tree_deadline_s=60.0 if short else 1e8,
    )

    for _ in range(16):  # what eager growth calls usual: from 2 s on, calls are late
        world.context.schedule.answered("search", ok()[1])

    async def main() -> Tree | RolloutFailed:
        try:
            return await TreeRollout(world.context, PROMPT, seed=seed).run()
        except RolloutFailed as failure:
            return failure
        finally:
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert world.engine.running == world.tools.running == 0

    result = run(main())
    if isinstance(result, RolloutFailed):
        assert short or p_fail or p_hang
        return
    check(result, n, roots, policy)
    if not short:  # no deadline of the tree's can have cut it: the budget is spent to the last leaf
        assert result.n_leaves == n


def lockstep_forks(rng: np.random.Generator, p_call: float, n: int, roots: int, limit: int) -> int:
    """The rules without a clock: a live branch calls with ``p_call``, then forks with 1/2 if n allows."""
    live, used, forks = [0] * roots, roots, 0
    while live:
        following = []
        for calls in live:
            if rng.random() >= p_call or calls == limit:
                continue
            following.append(calls + 1)
            if rng.random() < 0.5 and used < n:
                following.append(calls + 1)
                used, forks = used + 1, forks + 1
        live = following
    return forks


@pytest.mark.parametrize("p_call", [0.3, 0.7])
def test_number_of_forks_follows_the_rules_of_the_paper(p_call: float) -> None:
    trees = 120
    world = make_world(
        lambda text, rng: Segment("<search> q </search>" if rng.random() < p_call else "so", chunk=8),
        lambda tool, arguments: ok("r"),
        policy=Random(4, 0.5),
        leaves=16,
        roots=8,
        call_limit=3,
    )
    grown = [run(TreeRollout(world.context, PROMPT, seed=s).run()).origins(Origin.FORK) for s in range(trees)]
    rng = np.random.default_rng(0)
    expected = [lockstep_forks(rng, p_call, 16, 8, 3) for _ in range(5_000)]
    error = np.std(expected) / np.sqrt(trees)
    assert np.mean(grown) == pytest.approx(np.mean(expected), abs=4 * error)
