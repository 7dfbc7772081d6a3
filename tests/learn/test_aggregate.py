from __future__ import annotations

import numpy as np
import pytest

from system.learn.aggregate import AGGREGATES, leaf_weights
from system.tree.builder import TreeBuilder
from system.tree.pack import counts, pack
from system.tree.record import Kind, Origin, Outcome, Tree


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


def _mult(name: str, hard: bool = False) -> float:
    weights = leaf_weights(name, TREES, length_cap=40, hard=hard)
    ones = [np.ones(t.n_leaves) for t in TREES]
    return sum(float(b.mult.sum()) for b in pack(TREES, ones, weights, budget=30, hard=hard))


def test_token_mean_weighs_every_flat_token_alike() -> None:
    first, second = leaf_weights("token-mean", TREES, length_cap=40)
    np.testing.assert_allclose(first, [1 / FLAT, 1 / FLAT, 0], rtol=1e-6)
    np.testing.assert_allclose(second, [1 / FLAT, 0, 0], rtol=1e-6)
    assert counts(TREES) == (UNIQUE, FLAT)
    assert _mult("token-mean") == pytest.approx(1)


def test_token_mean_under_hard_credit_counts_each_token_once() -> None:
    first, _ = leaf_weights("token-mean", TREES, length_cap=40, hard=True)
    np.testing.assert_allclose(first, [1 / UNIQUE, 1 / UNIQUE, 0], rtol=1e-6)
    assert _mult("token-mean", hard=True) == pytest.approx(1)


def test_seq_mean_weighs_every_leaf_alike() -> None:
    first, second = leaf_weights("seq-mean", TREES, length_cap=40)
    np.testing.assert_allclose(first, [1 / (3 * 6), 1 / (3 * 10), 0], rtol=1e-6)
    np.testing.assert_allclose(second, [1 / (3 * 4), 0, 0], rtol=1e-6)
    assert _mult("seq-mean") == pytest.approx(1)


def test_constant_divides_by_the_length_cap() -> None:
    first, second = leaf_weights("constant", TREES, length_cap=40)
    np.testing.assert_allclose(first, [1 / 120, 1 / 120, 0], rtol=1e-6)
    np.testing.assert_allclose(second, [1 / 120, 0, 0], rtol=1e-6)
    assert _mult("constant") == pytest.approx(FLAT / 120)


@pytest.mark.parametrize("name", AGGREGATES)
def test_leaves_without_model_tokens_or_score_weigh_nothing(name: str) -> None:
    growth = TreeBuilder("p", "t", [1], budget=1)
    growth.score(growth.leaf(growth.prompt, Outcome.LENGTH, Origin.ROOT), -1.0, False)
    empty = growth.close(0.0)
    with_empty = leaf_weights(name, [*TREES, empty], length_cap=40)
    assert with_empty[2].tolist() == [0.0]
    for left, right in zip(with_empty, leaf_weights(name, TREES, length_cap=40), strict=False):
        np.testing.assert_array_equal(left, right)
    assert leaf_weights(name, [empty], length_cap=40)[0].tolist() == [0.0]
    assert leaf_weights(name, [], length_cap=40) == []


def test_an_unknown_name_gets_a_suggestion_and_a_bad_cap_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'seq-mean'"):
        leaf_weights("seqmean", TREES, length_cap=40)
    with pytest.raises(ValueError, match="length_cap"):
        leaf_weights("constant", TREES, length_cap=0)
