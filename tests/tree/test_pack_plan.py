"""Plans against their definitions: what each rank trains on, and advantages of nodes on trees and paths."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tree_strategies import forests

from system.tree.pack import pack_share
from system.tree.plan import BatchPlan, MicroBatch, Per, plan_update, row_budget
from system.tree.record import Kind, Tree, leaf_sum
from system.tree.stats import TreeStats

SEEDS = st.integers(0, 2**32 - 1)


def credit(stats: list[TreeStats], seed: int, per: Per) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Random advantages and leaf weights, some 0."""
    rng = np.random.default_rng(seed)
    weights = [rng.uniform(0.1, 1, s.leaves) * (rng.random(s.leaves) > 0.2) for s in stats]
    return [rng.normal(size=s.leaves if per == "leaf" else s.nodes) for s in stats], weights


def by_node(micro_batches: list[MicroBatch]) -> dict[tuple[int, int], np.ndarray]:
    """(tree, node) -> summed (S+, S-, mult)."""
    sums: dict[tuple[int, int], np.ndarray] = defaultdict(lambda: np.zeros(3))
    for micro_batch in micro_batches:
        for part in micro_batch:
            for node, values in zip(part.nodes.tolist(), part.credit, strict=True):
                sums[part.tree, node] += values
    return {key: value for key, value in sums.items() if value[2] > 0}


def assert_same(left: dict[tuple[int, int], np.ndarray], right: dict[tuple[int, int], np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_allclose(left[key], right[key], rtol=1e-12, atol=1e-12)


@given(forests(), SEEDS, st.integers(1, 300), st.booleans())
def test_a_node_has_its_own_advantage_times_the_weight_below(
    trees: list[Tree], seed: int, budget: int, hard: bool
) -> None:
    stats = [TreeStats.of(tree) for tree in trees]
    advantages, weights = credit(stats, seed, "node")
    (share,) = plan_update(stats, advantages, weights, budget=budget, per="node", hard=hard)
    expected = {}
    for index, (s, a, w) in enumerate(zip(stats, advantages, weights, strict=True)):
        below = leaf_sum(s.parent, s.leaf, w) / (
            np.maximum(leaf_sum(s.parent, s.leaf, w > 0), 1) if hard else 1
        )
        learns = (s.kind == Kind.MODEL) | ((s.kind == Kind.EXPERT) & (a > 0))
        for node in np.flatnonzero(learns & (below > 0)):
            gain = below[node] * a[node]
            expected[index, int(node)] = np.array([max(gain, 0), min(gain, 0), below[node]])
    assert_same(by_node(share), expected)


@given(forests(), SEEDS, st.sampled_from(["leaf", "node"]), st.integers(1, 300))
def test_flat_paths_carry_what_the_tree_carries(trees: list[Tree], seed: int, per: Per, budget: int) -> None:
    stats = [TreeStats.of(tree) for tree in trees]
    given_credit = credit(stats, seed, per)
    tree_share, flat_share = (
        plan_update(stats, *given_credit, budget=budget, per=per, flat=flat)[0] for flat in (False, True)
    )
    assert_same(by_node(flat_share), by_node(tree_share))
    for part in (part for micro_batch in flat_share for part in micro_batch):
        assert stats[part.tree].parent[part.nodes[1:]].tolist() == part.nodes[:-1].tolist()  # one path


@given(forests(), SEEDS, st.integers(1, 300), st.integers(1, 9), st.integers(1, 5))
def test_ranks_share_one_step_and_need_their_own_trees_only(
    trees: list[Tree], seed: int, budget: int, pad_to: int, dp: int
) -> None:
    stats = [TreeStats.of(tree) for tree in trees]
    given_credit = credit(stats, seed, "leaf")
    alone = plan_update(stats, *given_credit, budget=budget, pad_to=pad_to)
    shares = plan_update(stats, *given_credit, budget=budget, pad_to=pad_to, dp=dp)
    assert len(shares) == dp
    assert_same(by_node([micro for share in shares for micro in share]), by_node(alone[0]))
    plan = BatchPlan([shares], pad_to)
    for rank in range(dp):
        own = {index: trees[index] for index in plan.trees(rank)}
        (packed,) = pack_share(plan, rank, own)
        assert sorted({int(t) for batch in packed for t in batch.tree if t >= 0}) == sorted(own)
        assert all(batch.mult.any() for batch in packed)
    loads = [sum(sum(p.size for p in micro) for micro in share) for share in shares]
    largest = max((sum(p.size for p in micro) for share in shares for micro in share), default=0)
    assert max(loads) <= min(loads) + largest + pad_to * max(len(share) for share in shares)


def test_rows_are_shorter_when_that_gives_every_rank_a_share() -> None:
    assert row_budget([100, 100], 4096, dp=1) == 200
    assert row_budget([100, 100], 4096, dp=2) == 100
    assert row_budget([100, 300], 4096, dp=4) == 300  # no tree is cut for balance
    assert row_budget([9000, 300], 4096, dp=4) == 2325
    assert row_budget([], 4096, dp=4) == 4096
    assert row_budget([100, 300], 4096, dp=4, pad_to=128) == 384  # nor for its padding
    assert row_budget([100, 300], 310, dp=1, pad_to=128) == 310


@pytest.mark.parametrize("shape", [(2,), (3,)])
def test_an_advantage_per_node_needs_one_for_each(shape: tuple[int, ...]) -> None:
    from system.tree.builder import TreeBuilder
    from system.tree.record import Origin, Outcome, TreeError

    growth = TreeBuilder("p", "t", [1], budget=1)
    growth.leaf(growth.prompt, Outcome.STOPPED, Origin.ROOT)
    stats = TreeStats.of(growth.close(0.0))
    with pytest.raises(TreeError, match="per node"):
        plan_update([stats], [np.zeros(shape)], [np.ones(1)], budget=9, per="node")
