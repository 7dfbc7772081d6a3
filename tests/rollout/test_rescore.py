"""Turns scored once more when they end: what the record holds of it, and what a score that fails costs."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_fakes import PROMPT, Segment, World, make_world

from system.engine.protocol import EngineError, GenerateRequest
from system.rollout.branching import Policy, Random
from system.rollout.expanding import MostUncertainTurns, UnlikelyTokens
from system.rollout.snapshot import freeze, thaw
from system.rollout.tree_rollout import TreeRollout
from system.tree.record import Kind, Tree, path_sum, token_node
from system.tree.stats import TreeStats
from system.twin.clock import run

CALL = "<think> hm </think> <search> a query </search>"
ANSWER = "<think> so </think> <answer> \\boxed{ me } </answer>"
VERSION = 9  # of the scores; the tokens are of 7


def script(text: str, rng: np.random.Generator) -> Segment:
    """One tool call and an answer; the tokens of no two segments are equally likely."""
    return Segment(ANSWER if "<result>" in text else CALL)


def world(policy: Policy | None = None, **config: Any) -> World:
    return make_world(script, policy=policy or Random(4, 0.5), **({"leaves": 6, "roots": 3} | config))


def grow(world: World, **options: Any) -> Tree:
    return run(TreeRollout(world.context, PROMPT, **({"seed": 1} | options)).run())


def sampled(tree: Tree) -> np.ndarray:
    return tree.kind[token_node(tree)] == Kind.MODEL


def leaves(tree: Tree) -> list[Any]:
    """In the order of their nodes: which of two ends first in one moment is the event loop's affair."""
    return sorted(zip(*(getattr(tree, name).tolist() for name in ("leaf", "reward", "outcome")), strict=True))


def depth(tree: Tree) -> np.ndarray:
    """[T] tokens before each on its path."""
    length = (tree.end - tree.start).astype(np.int64)
    before = path_sum(tree.parent, length) - length
    return np.repeat(before - tree.start, length) + np.arange(tree.n_tokens)


def test_off_nothing_is_asked_and_nothing_is_there() -> None:
    one = world()
    tree = grow(one)
    assert one.engine.scored == []
    assert tree.closed_logprob.size == tree.closed_version.size == 0
    assert not tree.rescored
    assert TreeStats.of(tree).rescored == 0


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 99),
    policy=st.sampled_from([Random(4, 0.5), Random(4, 1.0), MostUncertainTurns(2), UnlikelyTokens(2, 1)]),
    score_s=st.sampled_from([0.0, 0.2, 30.0]),
)
def test_every_sampled_token_has_its_score_and_the_tree_is_the_same(
    seed: int, policy: Policy, score_s: float
) -> None:
    """Also where turns are cut: each token's is that of its place on its path, as the engine here has it."""
    plain, scored = world(policy), world(policy, rescore=True)
    scored.engine.score_s = score_s
    before, tree = grow(plain, seed=seed), grow(scored, seed=seed)
    for name in ("tokens", "logprob", "version", "start", "parent", "kind"):
        np.testing.assert_array_equal(getattr(tree, name), getattr(before, name))
    assert leaves(tree) == leaves(before)
    here = sampled(tree)
    np.testing.assert_allclose(tree.closed_logprob[here], -depth(tree)[here] / 1000, atol=1e-6)
    assert (tree.closed_version[here] == VERSION).all()
    assert np.isnan(tree.closed_logprob[~here]).all()
    assert (tree.closed_version[~here] == -1).all()
    stats = TreeStats.of(tree)
    assert stats.rescored == stats.generated
    assert stats.rescored_gap == pytest.approx(
        np.abs(tree.closed_logprob - tree.logprob)[here].sum(), rel=1e-5
    )
    assert not tree.meta["mishaps"]


def test_a_turn_is_scored_when_it_ends_behind_all_that_is_before_it_where_it_was_written() -> None:
    one = world(leaves=1, roots=1, rescore=True, temperature=0.7)
    grow(one)
    assert len(one.engine.scored) == len(one.engine.requests) == 2
    for asked, wrote in zip(one.engine.scored, one.engine.requests, strict=True):
        assert asked.score_from == wrote.input_ids.size
        np.testing.assert_array_equal(asked.input_ids[: asked.score_from], wrote.input_ids)
        assert (asked.parent, asked.route) == (wrote.rid, wrote.route)
        assert asked.sampling.temperature == wrote.sampling.temperature == 0.7
        assert asked.sampling.max_new_tokens == 1


def test_evaluation_is_not_scored() -> None:
    one = world(rescore=True)
    grow(one, greedy=True)
    assert one.engine.scored == []


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), data=st.data())
def test_scores_that_fail_are_told_and_cost_no_tree(seed: int, data: st.DataObject) -> None:
    """Errors, and answers that never come: the sampled log-probability stands where no score is."""
    failing = data.draw(st.lists(st.sampled_from(["", "error", "never"]), min_size=3, max_size=3))

    def scores(request: GenerateRequest, call: int) -> Any:
        how = failing[call % len(failing)]
        if how == "error":
            return EngineError("the engine died")
        assert request.score_from
        return None if how == "never" else np.full(request.input_ids.size - request.score_from, -0.25)

    one = world(rescore=True, generate_deadline_s=20.0)
    one.engine.scores = scores
    tree = grow(one, seed=seed)
    calls = len(one.engine.scored)
    failed = sum(failing[call % len(failing)] != "" for call in range(calls))
    assert [kind for kind, _ in tree.meta["mishaps"]] == ["rescore"] * failed
    assert tree.n_leaves == 6
    assert np.isfinite(tree.reward).all()
    assert tree.rescored == (failed < calls)
    if tree.rescored:
        known = np.isfinite(tree.closed_logprob)
        assert (tree.closed_logprob[known] == np.float32(-0.25)).all()
        assert known.sum() == TreeStats.of(tree).rescored < TreeStats.of(tree).generated + (failed == 0)
    assert one.engine.running == 0


def test_a_cancelled_tree_cancels_its_scores() -> None:
    one = world(rescore=True)
    one.engine.scores = lambda *_: None

    async def main() -> None:
        task = asyncio.create_task(TreeRollout(one.context, PROMPT, seed=1).run())
        await asyncio.sleep(8)
        assert one.engine.scored
        assert one.engine.running >= len(one.engine.scored)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert one.engine.running == 0

    run(main())


@pytest.mark.parametrize("at", [0.6, 1.6, 2.4])
def test_a_saved_tree_keeps_the_scores_that_were_there(at: float) -> None:
    one = world(rescore=True)

    async def main() -> tuple[bytes, int]:
        tree = TreeRollout(one.context, PROMPT, seed=1)
        task = asyncio.create_task(tree.run())
        await asyncio.sleep(at)
        data = freeze(tree)
        arrays, _ = tree.growth.state()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return data, int(np.isfinite(arrays.get("closed_logprob", np.zeros(0))).sum())

    data, known = run(main())

    async def again() -> tuple[int, Tree]:
        tree = thaw(one.context, PROMPT, data)
        arrays, _ = tree.growth.state()
        return int(np.isfinite(arrays.get("closed_logprob", np.zeros(0))).sum()), await tree.run()

    thawed, tree = run(again())
    assert thawed == known
    assert (known > 0) == (at > 1)
    here = sampled(tree) & np.isfinite(tree.closed_logprob)
    np.testing.assert_allclose(tree.closed_logprob[here], -depth(tree)[here] / 1000, atol=1e-6)
    assert not math.isnan(TreeStats.of(tree).rescored_gap)
