"""Credit, leaf weights and plan together, and credits that see trees and keep state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from learner_reference import learner_config, make_trees

from system.config import Config, ConfigError, PartConfig
from system.learn.batch import BatchPlanner
from system.learn.credit.base import Credit
from system.tree.record import Kind
from system.tree.stats import TreeStats


class Running(Credit):
    """r - running mean of all rewards seen, whose share of a new batch is an option."""

    def __init__(self, decay: float = 0.5) -> None:
        self.decay, self.mean = decay, 0.0

    def advantages(self, batch: Sequence[TreeStats]) -> Sequence[np.ndarray]:
        rewards = np.concatenate([tree.reward[tree.scored] for tree in batch])
        self.mean = self.decay * self.mean + (1 - self.decay) * float(rewards.mean())
        return [tree.reward - self.mean for tree in batch]

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mean = state["mean"]


def stats(seed: int = 0) -> list[TreeStats]:
    return [TreeStats.of(tree) for tree in make_trees(seed)]


def planner(
    credit: str, options: dict[str, Any] | None = None, flat: bool = False, dp: int = 1, **learn: Any
):
    config: Config = learner_config(dp=dp, **learn)
    config.learn.credit = PartConfig(credit, options or {})
    return BatchPlanner(config, flat=flat, dp=dp)


def test_every_update_gets_its_trees_and_the_weights_of_its_own_step() -> None:
    plan = planner("grpo", updates=3, kl_coef=0.1).plan(stats())
    assert [sorted({p.tree for rank in u for m in rank for p in m}) for u in plan.updates] == [
        [0],
        [1, 2],
        [3, 4],
    ]
    for update in plan.updates:  # token-mean: the multiplicities of a step sum to 1 over its tokens
        parts = [part for rank in update for micro in rank for part in micro]
        total = sum(float(p.credit[:, 2] @ stats()[p.tree].length[p.nodes]) for p in parts)
        assert total == pytest.approx(1)
    assert plan.silent == 1  # the chain has one leaf


def test_trees_without_signal_are_neither_fetched_nor_trained() -> None:
    assert planner("grpo").plan(stats()).trees(0) == [0, 2, 3, 4]
    assert planner("grpo", kl_coef=0.1).plan(stats()).trees(0) == [0, 1, 2, 3, 4]
    per_rank = [planner("grpo", dp=4).plan(stats()).trees(rank) for rank in range(4)]
    assert sorted(tree for trees in per_rank for tree in trees) == [0, 2, 3, 4]  # each by one rank


def test_hard_credit_has_no_meaning_on_flat_paths() -> None:
    with pytest.raises(ConfigError, match="arpo-hard"):
        planner("arpo-hard", flat=True)


def test_a_credit_of_ones_own_takes_options_and_keeps_state() -> None:
    one = planner("test_batch:Running", {"decay": "0.25"})
    one.plan(stats())
    other = planner("test_batch:Running", {"decay": "0.25"})
    other.credit.load_state_dict(one.credit.state_dict())
    a, b = one.plan(stats(1)), other.plan(stats(1))
    for left, right in zip(a.updates[0][0], b.updates[0][0], strict=True):
        for p, q in zip(left, right, strict=True):
            np.testing.assert_array_equal(p.credit, q.credit)
    assert one.credit.state_dict()["mean"] != 0


def test_the_example_gives_each_node_its_mean_less_its_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    batch = stats()
    made = planner("treerl_credit:ParentMean")
    (share,) = made.plan(batch).updates[0]
    trained = 0
    for part in (part for micro in share for part in micro):
        tree = batch[part.tree]
        for node, (plus, minus, mult) in zip(part.nodes, part.credit, strict=True):
            leaves = [k for k in range(tree.leaves) if node in tree.path(k)]
            above = [k for k in range(tree.leaves) if tree.parent[node] in tree.path(k)]
            if tree.kind[node] == Kind.MODEL and mult > 0:
                a = float(tree.reward[leaves].mean(dtype=float) - tree.reward[above].mean(dtype=float))
                assert plus + minus == pytest.approx(mult * a, rel=1e-5, abs=1e-9)
                trained += 1
    assert trained > 20
