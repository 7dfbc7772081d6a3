from __future__ import annotations

import numpy as np
import pytest

from system.learn.aggregate import counts, leaf_weights
from system.plugins import AGGREGATES, PluginError
from system.tree.builder import TreeBuilder
from system.tree.plan import plan_update
from system.tree.record import Kind, Origin, Outcome, Tree
from system.tree.stats import TreeStats


def _tree(shared: int, branches: list[tuple[int, Outcome, float | None]]) -> Tree:
    """A prompt, a shared MODEL node, a TOOL result, and one MODEL branch per (length, outcome, reward)."""
    growth = TreeBuilder("p", "t", [1, 2, 3], budget=len(branches))
    thought = growth.node(growth.prompt, Kind.MODEL)
    growth.extend(thought, np.zeros(shared), -0.1, None, 0)
    result = growth.node(thought, Kind.TOOL)
    growth.extend(result, [7] * 10)
    for length, outcome, reward in branches:
        node = growth.node(result, Kind.MODEL)
        growth.extend(node, np.zeros(length), -0.1, None, 0)
        leaf = growth.leaf(node, outcome, Origin.ROOT)
        if reward is not None:
            growth.score(leaf, reward, reward > 0)
    return growth.close(0.0)


STOPPED, DEADLINE = Outcome.STOPPED, Outcome.DEADLINE
TREES = [
    _tree(4, [(2, STOPPED, 1.0), (6, STOPPED, 0.0), (50, DEADLINE, None)]),
    _tree(1, [(3, Outcome.LENGTH, 0.0), (9, STOPPED, None), (20, DEADLINE, 1.0)]),
]
FLAT = (4 + 2) + (4 + 6) + (1 + 3)
UNIQUE = (4 + 2 + 6) + (1 + 3)
STATS = [TreeStats.of(tree) for tree in TREES]


def _weights(name: str, trees: list[Tree], hard: bool = False) -> list[np.ndarray]:
    aggregate = AGGREGATES.make(name, {}, length_cap=40)
    return leaf_weights(aggregate, [TreeStats.of(tree) for tree in trees], hard=hard)


def _mult(name: str, hard: bool = False) -> float:
    ones = [np.ones(t.n_leaves) for t in TREES]
    (share,) = plan_update(STATS, ones, _weights(name, TREES, hard), budget=30, hard=hard)
    parts = [part for micro_batch in share for part in micro_batch]
    return sum(float(p.credit[:, 2] @ STATS[p.tree].length[p.nodes]) for p in parts)


def test_token_mean_weighs_every_flat_token_alike() -> None:
    first, second = _weights("token-mean", TREES)
    np.testing.assert_allclose(first, [1 / FLAT, 1 / FLAT, 0], rtol=1e-6)
    np.testing.assert_allclose(second, [1 / FLAT, 0, 0], rtol=1e-6)
    assert counts(STATS) == (UNIQUE, FLAT)
    assert _mult("token-mean") == pytest.approx(1)


def test_token_mean_under_hard_credit_counts_each_token_once() -> None:
    first, _ = _weights("token-mean", TREES, hard=True)
    np.testing.assert_allclose(first, [1 / UNIQUE, 1 / UNIQUE, 0], rtol=1e-6)
    assert _mult("token-mean", hard=True) == pytest.approx(1)


def test_seq_mean_weighs_every_leaf_alike() -> None:
    first, second = _weights("seq-mean", TREES)
    np.testing.assert_allclose(first, [1 / (3 * 6), 1 / (3 * 10), 0], rtol=1e-6)
    np.testing.assert_allclose(second, [1 / (3 * 4), 0, 0], rtol=1e-6)
    assert _mult("seq-mean") == pytest.approx(1)


def test_constant_divides_by_the_length_cap() -> None:
    first, second = _weights("constant", TREES)
    np.testing.assert_allclose(first, [1 / 120, 1 / 120, 0], rtol=1e-6)
    np.testing.assert_allclose(second, [1 / 120, 0, 0], rtol=1e-6)
    assert _mult("constant") == pytest.approx(FLAT / 120)


@pytest.mark.parametrize("name", AGGREGATES.names)
def test_leaves_without_model_tokens_or_score_weigh_nothing(name: str) -> None:
    growth = TreeBuilder("p", "t", [1], budget=1)
    growth.score(growth.leaf(growth.prompt, Outcome.LENGTH, Origin.ROOT), -1.0, False)
    empty = growth.close(0.0)
    with_empty = _weights(name, [*TREES, empty])
    assert with_empty[2].tolist() == [0.0]
    for left, right in zip(with_empty, _weights(name, TREES), strict=False):
        np.testing.assert_array_equal(left, right)
    assert _weights(name, [empty])[0].tolist() == [0.0]
    assert _weights(name, []) == []


def test_an_unknown_name_gets_a_suggestion_and_a_bad_cap_is_refused() -> None:
    with pytest.raises(PluginError, match="did you mean seq-mean"):
        AGGREGATES.find("seqmean")
    with pytest.raises(ValueError, match="length_cap"):
        AGGREGATES.make("constant", {}, length_cap=0)
