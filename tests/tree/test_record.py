from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from tree_strategies import forests

from system.tree.builder import TreeBuilder
from system.tree.record import (
    ForkDecision,
    Kind,
    Origin,
    Outcome,
    Tree,
    TreeError,
    leaf_sum,
    subtree_end,
    token_node,
    validate,
)
from system.tree.stats import TreeStats


def _descends(tree: Tree, node: int, from_: int) -> bool:
    while node >= 0:
        if node == from_:
            return True
        node = int(tree.parent[node])
    return False


@given(forests())
def test_ancestry_by_interval_equals_the_parent_walk(trees: list[Tree]) -> None:
    for tree in trees:
        end = subtree_end(tree)
        for v in range(tree.n_nodes):
            for u in range(tree.n_nodes):
                assert (v <= u < end[v]) == _descends(tree, u, v)


@given(forests())
def test_sums_over_subtrees_and_token_nodes(trees: list[Tree]) -> None:
    for tree in trees:
        values = np.arange(1.0, tree.n_leaves + 1)
        total = leaf_sum(tree.parent, tree.leaf, values)
        for v in range(tree.n_nodes):
            below = [values[k] for k in range(tree.n_leaves) if _descends(tree, int(tree.leaf[k]), v)]
            assert total[v] == sum(below)
        node = token_node(tree)
        for v in range(tree.n_nodes):
            assert np.flatnonzero(node == v).tolist() == list(range(tree.start[v], tree.end[v]))


@given(forests())
def test_scored_leaves_have_a_reward_and_a_fair_outcome(trees: list[Tree]) -> None:
    for tree in trees:
        expected = [
            bool(np.isfinite(r)) and Outcome(o).scored for r, o in zip(tree.reward, tree.outcome, strict=True)
        ]
        assert TreeStats.of(tree).scored.tolist() == expected


def _tree() -> Tree:
    """prompt(2) -> model(2) -> tool(1) -> {model(1), model(2)}"""
    growth = TreeBuilder("p", "t", [1, 2], budget=2)
    thought = growth.node(growth.prompt, Kind.MODEL)
    growth.extend(thought, [3, 4], [-0.1, -0.2], [0.5, 0.5], 0)
    result = growth.node(thought, Kind.TOOL)
    growth.extend(result, [5])
    for tokens in ([6], [7, 8]):
        node = growth.node(result, Kind.MODEL)
        growth.extend(node, tokens, -0.3, None, 1)
        growth.score(growth.leaf(node, Outcome.STOPPED, Origin.ROOT), 1.0, True)
    return growth.close(1.0)


def _with(name: str, index: int, value: float):
    def change(tree: Tree) -> Tree:
        array = getattr(tree, name).copy()
        array[index] = value
        return replace(tree, **{name: array})

    return change


def _routed(change):
    """With the records of all tokens but the first, changed."""

    def routed(tree: Tree) -> Tree:
        routes = np.tile(np.array([[0, 1], [2, 3]], np.uint8), (8, 1, 1))
        routes[0] = 255
        validate(replace(tree, routes=routes))
        return replace(tree, routes=change(routes))

    return routed


@pytest.mark.parametrize(
    ("change", "defect"),
    [
        (_with("start", 3, 4), "an empty node"),
        (_with("start", 0, 1), "does not start at token 0"),
        (_with("parent", 0, 0), "not a root"),
        (_with("parent", 3, 3), "after its parent"),
        (_with("parent", 1, -1), "after its parent"),
        (_with("kind", 0, 1), "not a PROMPT"),
        (_with("kind", 2, 0), "no known kind"),
        (_with("kind", 2, 7), "no known kind"),
        (_with("leaf", 0, 5), "names no node"),
        (_with("leaf", 0, 4), "no leaf says why"),
        (_with("version", 2, -1), "without a weight version"),
        (_with("version", 4, 0), "was not sampled"),
        (_with("logprob", 2, np.nan), "not finite"),
        (_with("logprob", 4, -1.0), "was not sampled"),
        (_with("tokens", 0, -1), "negative token id"),
        (_with("outcome", 0, 9), "unknown outcome"),
        (_with("origin", 0, 9), "unknown origin"),
        (_with("reward", 0, np.inf), "infinite reward"),
        (_with("reward", 0, np.nan), "disagree"),
        (_with("correct", 0, 2), "outside -1, 0, 1"),
        (lambda t: replace(t, reward=t.reward.astype(np.float64)), "reward is float64"),
        (lambda t: replace(t, entropy=t.entropy[:-1]), "entropy has shape"),
        (_routed(lambda r: r[:-1]), "routes of 7 tokens"),
        (_routed(lambda r: r.astype(np.int32)), "routes of type int32"),
        (_routed(lambda r: r[:, 0]), r"routes of type uint8 and shape \(8, 2\)"),
        (_routed(lambda r: np.where(np.arange(8)[:, None, None] == 5, r[..., :1], r)), "one expert twice"),
        (_routed(lambda r: np.where(r == 3, 255, r)), "recorded in some layers only"),
        (lambda t: replace(t, forks=(ForkDecision(9, 0.0, 0.5, 0.1, 0),)), "ForkDecision names node 9"),
    ],
)
def test_validate_names_the_defect(change, defect: str) -> None:
    validate(_tree())
    with pytest.raises(TreeError, match=defect):
        validate(change(_tree()))


def test_validate_finds_nodes_out_of_preorder() -> None:
    growth = TreeBuilder("p", "t", [1], budget=2)
    for _ in range(2):  # two chains of two nodes below the root: pre-order 0 1 2 3 4
        first = growth.node(growth.prompt, Kind.MODEL)
        growth.extend(first, [2], -0.1, None, 0)
        second = growth.node(first, Kind.TOOL)
        growth.extend(second, [3])
        growth.leaf(second, Outcome.STOPPED, Origin.ROOT)
    tree = growth.close(0.0)
    assert tree.parent.tolist() == [-1, 0, 1, 0, 3]
    crossed = replace(tree, parent=np.array([-1, 0, 0, 1, 2], np.int32))
    crossed = replace(crossed, kind=np.array([0, 1, 1, 2, 2], np.int8), leaf=np.array([3, 4], np.int32))
    crossed = replace(
        crossed,
        logprob=np.float32([0, -0.1, -0.1, 0, 0]),
        version=np.array([-1, 0, 0, -1, -1], np.int32),
    )
    with pytest.raises(TreeError, match="pre-order"):
        validate(crossed)
