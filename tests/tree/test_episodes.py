"""Leaves of one episode: credit is per episode, and a token weighs once, in however many of its chains."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tree_strategies import forests, of_episodes

from system.learn.aggregate import TokenMean, leaf_weights
from system.learn.credit.base import assign
from system.learn.credit.group import Grpo
from system.plugins import CREDITS
from system.tree.builder import TreeBuilder
from system.tree.pack import flatten, pack
from system.tree.plan import MicroBatch, Per, plan_update
from system.tree.record import Kind, Origin, Outcome, Tree, TreeError, validate
from system.tree.stats import TreeStats
from system.tree.store import TreeWriter, read_trees

SEEDS = st.integers(0, 2**32 - 1)
PERS = st.sampled_from(["leaf", "node", "path"])


def drawn(tree: Tree, seed: int, per: Per) -> tuple[np.ndarray, np.ndarray]:
    """Random advantages and weights of a tree's episodes, some of weight 0."""
    rng, count = np.random.default_rng(seed), int(tree.episode.max()) + 1
    shape = {"leaf": (count,), "node": (tree.n_nodes,), "path": (count, tree.n_nodes)}[per]
    return rng.normal(size=shape), rng.uniform(0.1, 1, count) * (rng.random(count) > 0.2)


def told(tree: Tree, a: np.ndarray, w: np.ndarray, per: Per) -> dict[int, np.ndarray]:
    """MODEL token id (they are unique) -> S+, S- and multiplicity, from the flattened chains: each token of
    each episode is taken from one of its chains that hold it, with the episode's advantage and weight.
    """
    node_of = np.repeat(np.arange(tree.n_nodes), np.diff(tree.start, append=tree.n_tokens))
    node = dict(zip(tree.tokens.tolist(), node_of.tolist(), strict=True))
    of_episode: dict[int, set[int]] = defaultdict(set)
    for episode, chain in zip(tree.episode.tolist(), flatten(tree), strict=True):
        of_episode[episode] |= set(chain.tokens.tolist())
    sums: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(3))
    for episode, tokens in of_episode.items():
        for token in tokens:
            at = node[token]
            gain = {"leaf": lambda: a[episode], "node": lambda: a[at], "path": lambda: a[episode, at]}[per]()  # noqa: B023
            kind = tree.kind[at]
            counts = kind == Kind.MODEL or (kind == Kind.EXPERT and gain > 0)
            sums[token] += counts * w[episode] * np.array([max(gain, 0), min(gain, 0), 1])
    return {token: values for token, values in sums.items() if values[2] > 0}


def packed(micro_batches: list[MicroBatch], trees: list[Tree]) -> dict[int, np.ndarray]:
    """MODEL token id -> S+, S- and multiplicity summed over all rows."""
    sums: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(3))
    for micro in micro_batches:
        row = pack(micro, dict(enumerate(trees)))
        for token, *values in zip(row.tokens.tolist(), row.s_plus, row.s_minus, row.mult, strict=True):
            sums[token] += values
    return {token: values for token, values in sums.items() if values[2] > 0}


def assert_same(left: dict[int, np.ndarray], right: dict[int, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_allclose(left[key], right[key], rtol=1e-5, atol=1e-6)


@given(forests(), SEEDS, PERS, st.integers(1, 300), st.booleans())
def test_a_token_weighs_once_for_each_episode_through_it(
    forest: list[Tree], seed: int, per: Per, budget: int, flat: bool
) -> None:
    trees = [of_episodes(tree, seed) for tree in forest]
    credit = [drawn(tree, seed, per) for tree in trees]
    expected: dict[int, np.ndarray] = {}
    for tree, (a, w) in zip(trees, credit, strict=True):
        expected |= told(tree, a, w, per)
    stats = [TreeStats.of(tree) for tree in trees]
    (share,) = plan_update(
        stats, [a for a, _ in credit], [w for _, w in credit], budget=budget, per=per, flat=flat
    )
    assert_same(packed(share, trees), expected)


@given(forests(max_trees=1), SEEDS)
def test_statistics_are_of_episodes(forest: list[Tree], seed: int) -> None:
    tree = of_episodes(forest[0], seed)
    stats, chains = TreeStats.of(tree), flatten(tree)
    for episode in range(stats.leaves):
        mine = [leaf for leaf, of in enumerate(tree.episode.tolist()) if of == episode]
        sampled = {t for leaf in mine for t in chains[leaf].tokens[chains[leaf].version >= 0].tolist()}
        nodes = {node for leaf in mine for node in tree.path(leaf)}
        assert stats.response_tokens[episode] == len(sampled)
        assert set(np.flatnonzero(stats.on_path[episode]).tolist()) == nodes == set(stats.path(episode))
        assert stats.calls_per_leaf[episode] == sum(call.node in nodes for call in tree.calls)
        np.testing.assert_array_equal(stats.reward[episode], tree.reward[mine[0]])
    assert stats.roots + stats.forks + stats.top_ups == stats.leaves == int(tree.episode.max()) + 1
    weights = leaf_weights(TokenMean(), [stats])[0]
    share = plan_update([stats], [-np.ones(stats.leaves)], [weights], budget=10**6)[0]
    total = sum(values[2] for values in packed(share, [tree]).values())
    assert total == pytest.approx(1.0 if (stats.scored & (stats.response_tokens > 0)).any() else 0.0)


@given(forests(max_trees=1))
def test_leaves_that_are_each_an_episode_are_leaves(forest: list[Tree]) -> None:
    plain = TreeStats.of(forest[0])
    alone = TreeStats.of(replace(forest[0], episode=np.arange(forest[0].n_leaves, dtype=np.int32)))
    for one in fields(TreeStats):
        a, b = getattr(plain, one.name), getattr(alone, one.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            assert a.tobytes() == b.tobytes()
        elif one.name != "parts":
            np.testing.assert_equal(a, b)


@given(forests(), SEEDS)
def test_every_credit_is_given_to_episodes(forest: list[Tree], seed: int) -> None:
    batch = [TreeStats.of(of_episodes(tree, seed)) for tree in forest]
    for name in CREDITS.names:
        for stats, values in zip(batch, assign(CREDITS.make(name, {}), batch), strict=True):
            assert values.shape[0] in (stats.leaves, stats.nodes)


@given(forests(), SEEDS)
def test_episodes_are_kept_by_files_and_by_a_resume(forest: list[Tree], seed: int) -> None:
    trees = [of_episodes(tree, seed) for tree in forest]
    with tempfile.TemporaryDirectory() as directory:
        with TreeWriter(directory) as writer:
            for tree in trees:
                writer.append(tree)
        back = list(read_trees(directory))
    assert [tree.episode.tolist() for tree in back] == [tree.episode.tolist() for tree in trees]


def rewriting() -> Tree:
    """Two episodes of one question: one whose client rewrote its history twice, so that it has three chains,
    and that was right; and one of a single chain that was wrong.
    """
    growth = TreeBuilder("p", "t", [1, 2], budget=2)
    for chain in range(3):
        context = growth.node(growth.prompt, Kind.TOOL)
        growth.extend(context, [10 + chain])
        node = growth.node(context, Kind.MODEL)
        growth.extend(node, [20 + chain, 30 + chain], [-1.0, -1.0], version=0)
        growth.score(growth.leaf(node, Outcome.ENDED, Origin.ROOT, episode=0), 1.0, correct=True)
    node = growth.node(growth.prompt, Kind.MODEL)
    growth.extend(node, [40, 41], [-1.0, -1.0], version=0)
    growth.score(growth.leaf(node, Outcome.ENDED, Origin.ROOT, episode=1), 0.0, correct=False)
    arrays, about = growth.state()
    return _with_rewards(TreeBuilder.restore(arrays, about)).close(0.0)


def _with_rewards(growth: TreeBuilder) -> TreeBuilder:
    for leaf, reward in enumerate((1.0, 1.0, 1.0, 0.0)):  # a saved growth keeps none
        growth.score(leaf, reward, reward > 0)
    return growth


def test_chains_of_an_episode_do_not_move_the_mean_of_its_group() -> None:
    """Fan-out breaks GRPO's groups elsewhere: of four rows, the mean would be 0.75 and the three right ones
    would share what is one success.
    """
    tree = rewriting()
    assert tree.episode.tolist() == [0, 0, 0, 1]
    stats = TreeStats.of(tree)
    (advantage,) = assign(Grpo(), [stats])
    np.testing.assert_allclose(advantage, [0.5**0.5, -(0.5**0.5)], rtol=1e-5)
    assert stats.correct.tolist() == [True, False]
    assert stats.response_tokens.tolist() == [6, 2]


@pytest.mark.parametrize(
    ("change", "defect"),
    [
        ({"episode": np.array([0, 0, 0], np.int32)}, "episode has shape"),
        ({"episode": np.array([0, 0, 0, 2], np.int32)}, "not numbered from 0"),
        ({"episode": np.array([-1, 0, 0, 1], np.int32)}, "not numbered from 0"),
        ({"episode": np.array([0, 0, 1, 1], np.int32)}, "not the same reward"),
        ({"outcome": np.array([6, 6, 0, 6], np.int8)}, "not the same outcome"),
        ({"origin": np.array([0, 0, 2, 0], np.int8)}, "not the same origin"),
    ],
)
def test_leaves_of_one_episode_must_agree(change: dict[str, np.ndarray], defect: str) -> None:
    with pytest.raises(TreeError, match=defect):
        validate(replace(rewriting(), **change))
