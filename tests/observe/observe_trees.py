"""Trees small enough to count by hand."""

from __future__ import annotations

import numpy as np

from system.evals.record import Answered, Asked
from system.evals.result import EvalResult
from system.tree.prompt import Prompt
from system.tree.record import ForkDecision, Kind, Origin, Outcome, ToolCall, Tree
from system.tree.stats import TreeStats

NAN = float("nan")


def make_tree(
    prompt_id: str = "q1", reward: tuple[float, ...] = (1.0, 0.0, NAN), version: int = 3, task: str = "lookup"
) -> Tree:
    """Two roots, the first of which forks after its tool call::

    0 PROMPT 4 tokens
    ├─ 1 MODEL 3 ─ 2 TOOL 2 ┬─ 3 MODEL 2   leaf 0
    │                       └─ 4 MODEL 5   leaf 1 (fork)
    └─ 5 MODEL 6                           leaf 2 (its deadline passed unless it has a reward)
    """
    lengths = [4, 3, 2, 2, 5, 6]
    kinds = [Kind.PROMPT, Kind.MODEL, Kind.TOOL, Kind.MODEL, Kind.MODEL, Kind.MODEL]
    model = np.repeat(np.array(kinds) == Kind.MODEL, lengths)
    total = sum(lengths)
    entropy = np.where(model, np.linspace(0.0, 2.1, total), NAN).astype(np.float32)
    rewards = np.array(reward, np.float32)
    return Tree(
        prompt_id=prompt_id,
        task=task,
        tokens=np.arange(total, dtype=np.int32),
        logprob=np.where(model, -0.5, 0.0).astype(np.float32),
        entropy=entropy,
        version=np.where(model, version, -1).astype(np.int32),
        start=np.cumsum([0, *lengths[:-1]]).astype(np.int32),
        parent=np.array([-1, 0, 1, 2, 2, 0], np.int32),
        kind=np.array(kinds, np.int8),
        leaf=np.array([3, 4, 5], np.int32),
        reward=rewards,
        correct=np.where(np.isnan(rewards), -1, rewards > 0.5).astype(np.int8),
        outcome=np.array(
            [Outcome.STOPPED, Outcome.LENGTH, Outcome.DEADLINE if np.isnan(rewards[2]) else Outcome.STOPPED],
            np.int8,
        ),
        origin=np.array([Origin.ROOT, Origin.FORK, Origin.ROOT], np.int8),
        calls=(ToolCall(2, "search", {"query": "who"}, "ok", 0.25, cached=True, attempts=2),),
        forks=(ForkDecision(2, 0.125, 0.525, 0.31, 1),),
        budget=3,
        started_s=100.0,
        closed_s=102.5,
        meta={"question": "Who wrote it?", "answers": ["Ada", "A. Lovelace"]},
    )


def single(prompt_id: str, correct: int, task: str = "calc") -> TreeStats:
    """Of one prompt, one answer, as an evaluation grows them; ``correct`` -1 is an answer that never came."""
    reward = NAN if correct < 0 else float(correct)
    tree = Tree(
        prompt_id=prompt_id,
        task=task,
        tokens=np.array([1, 2, 3, 4, 5], np.int32),
        logprob=np.zeros(5, np.float32),
        entropy=np.full(5, NAN, np.float32),
        version=np.array([-1, -1, 0, 0, 0], np.int32),
        start=np.array([0, 2], np.int32),
        parent=np.array([-1, 0], np.int32),
        kind=np.array([Kind.PROMPT, Kind.MODEL], np.int8),
        leaf=np.array([1], np.int32),
        reward=np.array([reward], np.float32),
        correct=np.array([correct], np.int8),
        outcome=np.array([Outcome.STOPPED if correct >= 0 else Outcome.ENGINE_ERROR], np.int8),
        origin=np.array([Origin.ROOT], np.int8),
        budget=1,
    )
    return TreeStats.of(tree)


def evaluated(*answers: TreeStats) -> EvalResult:
    """Of :func:`single` answers."""
    return EvalResult.of(
        [Answered.of(Asked("", Prompt(one.prompt_id, (), (), kind=one.task), 0, 0), one) for one in answers]
    )
