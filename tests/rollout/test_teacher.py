"""On-policy distillation's questions: each node is scored once, what a failure costs, and a resumed tree."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rollout_fakes import PROMPT, ScriptedEngine, Segment, World, make_world

from system.engine.protocol import EngineError, GenerateRequest
from system.rollout.branching import Policy, Random
from system.rollout.expanding import MostUncertainTurns, UnlikelyTokens
from system.rollout.failure import RolloutFailed
from system.rollout.snapshot import freeze, thaw
from system.rollout.teacher import Teacher
from system.rollout.tree_rollout import TreeRollout
from system.tree.record import Kind, Tree, path_sum, token_node
from system.twin.clock import run

CALL = "<think> hm </think> <search> a query </search>"
ANSWER = "<think> so </think> <answer> \\boxed{ me } </answer>"


@dataclass
class ScriptedTeacher:
    """In :class:`Teacher`'s place: its servers are a scripted engine."""

    pool: ScriptedEngine
    asked: list[GenerateRequest] = field(init=False)

    def __post_init__(self) -> None:
        self.asked = self.pool.scored


def script(text: str, rng: np.random.Generator) -> Segment:
    return Segment(ANSWER if "<result>" in text else CALL)


def world(
    policy: Policy | None = None, scores: Callable[..., Any] | None = None
) -> tuple[World, ScriptedTeacher]:
    one = make_world(script, policy=policy or Random(4, 0.5), leaves=6, roots=3)
    pool = ScriptedEngine(one.tokenizer, script, "")
    if scores:
        pool.scores = scores
    teacher = ScriptedTeacher(pool)
    return replace(one, context=replace(one.context, teacher=cast(Teacher, teacher))), teacher


def grow(world: World, **options: Any) -> Tree:
    return run(TreeRollout(world.context, PROMPT, **({"seed": 1} | options)).run())


def sampled(tree: Tree) -> np.ndarray:
    return tree.kind[token_node(tree)] == Kind.MODEL


def depth(tree: Tree) -> np.ndarray:
    """[T] tokens before each on its path."""
    length = (tree.end - tree.start).astype(np.int64)
    before = path_sum(tree.parent, length) - length
    return np.repeat(before - tree.start, length) + np.arange(tree.n_tokens)


@given(
    seed=st.integers(0, 99),
    policy=st.sampled_from([Random(4, 0.5), Random(4, 1.0), MostUncertainTurns(2), UnlikelyTokens(2, 1)]),
    score_s=st.sampled_from([0.0, 0.2, 30.0]),
)
def test_every_sampled_token_is_scored_once_and_the_tree_is_the_same(
    seed: int, policy: Policy, score_s: float
) -> None:
    """A trunk that branches share costs the teacher one question."""
    plain = grow(make_world(script, policy=policy, leaves=6, roots=3), seed=seed)
    one, teacher = world(policy)
    teacher.pool.score_s = score_s
    tree = grow(one, seed=seed)
    for name in ("tokens", "logprob", "version", "start", "parent", "kind"):
        np.testing.assert_array_equal(getattr(tree, name), getattr(plain, name))
    here = sampled(tree)
    np.testing.assert_allclose(tree.teacher_logprob[here], -depth(tree)[here] / 1000, atol=1e-6)
    assert np.isnan(tree.teacher_logprob[~here]).all()
    assert sum(ask.input_ids.size - (ask.score_from or 0) for ask in teacher.asked) == here.sum()
    assert not tree.meta["mishaps"]


def test_evaluation_asks_no_teacher() -> None:
    one, teacher = world()
    assert not grow(one, greedy=True).taught
    assert teacher.asked == []


def test_a_question_that_fails_is_told_and_leaves_its_tokens_out() -> None:
    def scores(request: GenerateRequest, call: int) -> Any:
        if call % 3 == 1:
            return EngineError("the teacher's server died")
        return np.full(request.input_ids.size - (request.score_from or 0), -0.25)

    one, teacher = world(scores=scores)
    tree = grow(one)
    failed = sum(call % 3 == 1 for call in range(len(teacher.asked)))
    assert failed > 0
    assert [kind for kind, _ in tree.meta["mishaps"]] == ["teacher"] * failed
    known = np.isfinite(tree.teacher_logprob)
    assert 0 < known.sum() < sampled(tree).sum()
    assert (tree.teacher_logprob[known] == np.float32(-0.25)).all()


def test_a_tree_of_which_the_teacher_says_nothing_has_failed() -> None:
    one, _ = world(scores=lambda *_: EngineError("no route to the teacher"))
    with pytest.raises(RolloutFailed, match="teacher: no route to the teacher"):
        grow(one)


@pytest.mark.parametrize("at", [0.6, 1.6, 2.4])
def test_a_resumed_tree_has_every_token_scored(at: float) -> None:
    """Those of turns that were scored before are not asked for again."""
    one, teacher = world()

    async def main() -> bytes:
        tree = TreeRollout(one.context, PROMPT, seed=1)
        task = asyncio.create_task(tree.run())
        await asyncio.sleep(at)
        data = freeze(tree)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert teacher.pool.running == 0
        return data

    data = run(main())
    teacher.asked.clear()

    async def again() -> tuple[int, Tree]:
        tree = thaw(one.context, PROMPT, data)
        arrays, _ = tree.growth.state()
        return int(np.isfinite(arrays.get("teacher_logprob", np.zeros(0))).sum()), await tree.run()

    known, tree = run(again())
    here = sampled(tree)
    np.testing.assert_allclose(tree.teacher_logprob[here], -depth(tree)[here] / 1000, atol=1e-6)
    new = sum(ask.input_ids.size - (ask.score_from or 0) for ask in teacher.asked)
    assert new == here.sum() - known
    assert (known > 0) == (at > 1)
