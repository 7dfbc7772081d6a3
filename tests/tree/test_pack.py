"""Packing against flat paths.  Token ids are unique across a forest, so a token's weights can be looked up
by id.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tree_strategies import forests

from system.learn.aggregate import counts
from system.tree.builder import TreeBuilder
from system.tree.pack import PackedBatch, flatten
from system.tree.pack import pack as pack_row
from system.tree.plan import plan_update
from system.tree.record import Kind, Origin, Outcome, Tree, TreeError, token_node, validate
from system.tree.stats import TreeStats

Credit = tuple[list[np.ndarray], list[np.ndarray]]


def pack(
    trees: list[Tree],
    advantages: list[np.ndarray],
    weights: list[np.ndarray],
    pad_to: int = 1,
    **settings: Any,
) -> list[PackedBatch]:
    """Plan a step of one data-parallel rank from the trees' statistics, and pack it."""
    stats = [TreeStats.of(tree) for tree in trees]
    (share,) = plan_update(stats, advantages, weights, pad_to=pad_to, **settings)
    return [pack_row(micro_batch, dict(enumerate(trees)), pad_to) for micro_batch in share]


def _credit(trees: list[Tree], seed: int, dead: float = 0.2) -> Credit:
    """Random leaf advantages of both signs and weights, some 0 with advantage NaN."""
    rng = np.random.default_rng(seed)
    advantages, weights = [], []
    for tree in trees:
        a = rng.normal(size=tree.n_leaves).astype(np.float32)
        w = rng.uniform(0.1, 1, tree.n_leaves).astype(np.float32)
        off = rng.random(tree.n_leaves) < dead
        a[off], w[off] = np.nan, 0
        advantages.append(a)
        weights.append(w)
    return advantages, weights


def _by_id(batches: list[PackedBatch]) -> dict[int, np.ndarray]:
    """Token id -> summed (S+, S-, mult) over all its appearances."""
    sums: dict[int, np.ndarray] = {}
    for batch in batches:
        for i in np.flatnonzero(batch.tree >= 0):
            row = np.array([batch.s_plus[i], batch.s_minus[i], batch.mult[i]], np.float64)
            sums[int(batch.tokens[i])] = sums.get(int(batch.tokens[i]), 0) + row
    return {k: v for k, v in sums.items() if v[2] > 0}


def _same(left: dict[int, np.ndarray], right: dict[int, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_allclose(left[key], right[key], rtol=2e-6, atol=1e-7)


def _naive(trees: list[Tree], credit: Credit, hard: bool) -> dict[int, np.ndarray]:
    """The definition: every leaf walks its path and adds to each MODEL token, and to each EXPERT token if its
    advantage is positive (with ``hard``: if the leaves' mean is).
    """
    through: dict[int, list[tuple[float, float]]] = {}
    expert: set[int] = set()
    for tree, advantages, weights in zip(trees, *credit, strict=True):
        for leaf, (a, w) in enumerate(zip(advantages, weights, strict=True)):
            if w == 0:
                continue
            for node in tree.path(leaf):
                if tree.kind[node] in (Kind.MODEL, Kind.EXPERT):
                    for t in range(tree.start[node], tree.end[node]):
                        if tree.kind[node] == Kind.EXPERT:
                            expert.add(int(tree.tokens[t]))
                        through.setdefault(int(tree.tokens[t]), []).append((float(a), float(w)))
    sums = {}
    for token, leaves in through.items():
        if hard:
            a, w = np.mean([a for a, _ in leaves]), np.mean([w for _, w in leaves])
            leaves = [(a, w)]
        if token in expert:
            leaves = [(a, w) for a, w in leaves if a > 0]
        sums[token] = np.array(
            [
                sum(w * max(a, 0) for a, w in leaves),
                sum(w * min(a, 0) for a, w in leaves),
                sum(w for _, w in leaves),
            ]
        )
    return {token: three for token, three in sums.items() if three[2] > 0}


@given(forests(), st.integers(0, 2**32 - 1), st.booleans(), st.integers(1, 300))
def test_packed_weights_equal_the_definition_whatever_the_budget(
    trees: list[Tree], seed: int, hard: bool, budget: int
) -> None:
    credit = _credit(trees, seed)
    batches = pack(trees, *credit, budget=budget, hard=hard)
    _same(_by_id(batches), _naive(trees, credit, hard))


@given(forests(), st.integers(0, 2**32 - 1))
def test_packing_trees_equals_packing_their_flat_paths(trees: list[Tree], seed: int) -> None:
    credit = _credit(trees, seed)
    paths = [path for tree in trees for path in flatten(tree)]
    flat = ([np.array([a]) for x in credit[0] for a in x], [np.array([w]) for x in credit[1] for w in x])
    _same(_by_id(pack(trees, *credit, budget=10_000)), _by_id(pack(paths, *flat, budget=10_000)))


@given(forests(), st.integers(0, 2**32 - 1))
def test_clipped_objective_on_the_tree_equals_the_flat_one(trees: list[Tree], seed: int) -> None:
    """Σ_leaf w·min(rA, clip(r)A), dual clip too, from (S+, S-) alone, siblings of opposite sign included."""
    credit = _credit(trees, seed, dead=0.0)
    low, high, dual = 0.2, 0.28, 3.0
    sums = _by_id(pack(trees, *credit, budget=10_000))
    ratio = dict(zip(sums, np.random.default_rng(seed).lognormal(0, 1, len(sums)), strict=True))
    packed = flat = 0.0
    for token, (plus, minus, _) in sums.items():
        r = ratio[token]
        packed += plus * min(r, 1 + high) + minus * min(max(r, 1 - low), dual)
    for tree, advantages, weights in zip(trees, *credit, strict=True):
        for path, a, w in zip(flatten(tree), advantages, weights, strict=True):
            learns = (Kind.MODEL, Kind.EXPERT) if a > 0 else (Kind.MODEL,)
            for t in np.flatnonzero(np.isin(path.kind[token_node(path)], learns)):
                r = ratio[int(path.tokens[t])]
                term = min(r * a, np.clip(r, 1 - low, 1 + high) * a)
                flat += w * (max(term, dual * a) if a < 0 else term)
    assert packed == pytest.approx(flat, rel=1e-5, abs=1e-5)


@given(forests(), st.integers(0, 2**32 - 1), st.integers(1, 120), st.integers(1, 9))
def test_every_part_is_whole_and_no_weight_is_repeated(
    trees: list[Tree], seed: int, budget: int, pad_to: int
) -> None:
    advantages, weights = _credit(trees, seed)
    batches = pack(trees, advantages, weights, budget=budget, pad_to=pad_to)
    where = {int(t): (k, i) for k, tree in enumerate(trees) for i, t in enumerate(tree.tokens)}
    seen: set[int] = set()
    capacity = max(budget // pad_to, 1) * pad_to
    for batch in batches:
        assert batch.tokens.size % pad_to == 0
        real = np.flatnonzero(batch.tree >= 0)
        routed = any(trees[k].routed and not trees[k].guided for k in batch.tree[real])
        assert routed == (batch.routes is not None)
        assert not routed or (batch.routes[real.size :] == 255).all()
        assert real.tolist() == list(range(real.size))  # padding only at the end
        if batch.tokens.size > capacity:  # only a single path may exceed the budget
            assert len(set(batch.tree[real])) == 1
            assert batch.position[real].tolist() == list(range(real.size))
        chains: list[list[int]] = []
        for i in range(batch.tokens.size):
            before = int(batch.predictor[i])
            assert before < i
            chains.append([*(chains[before] if before >= 0 else []), i])
            # The interval mask is exactly the chain of predictors, and as long as the position says.
            allowed = [j for j in range(batch.tokens.size) if j <= i < batch.exit[j]]
            assert allowed == chains[i]
            if batch.tree[i] < 0:
                assert (batch.position[i], batch.mult[i], batch.predictor[i]) == (0, 0, -1)
                continue
            assert batch.position[i] == len(chains[i]) - 1
            k, t = where[int(batch.tokens[i])]
            assert k == batch.tree[i]
            tree = trees[k]
            assert batch.tokens[chains[i]].tolist() == _path_to(tree, t)
            sampled = tree.kind[token_node(tree)[t]] != Kind.EXPERT
            if batch.routes is not None:
                known = tree.routed and not tree.guided
                assert (batch.routes[i] == (tree.routes[t] if known else 255)).all()
            assert batch.logprob[i] == tree.logprob[t] if sampled else np.isnan(batch.logprob[i])
            if batch.mult[i] > 0:
                assert int(batch.tokens[i]) not in seen
                seen.add(int(batch.tokens[i]))
                assert batch.version[i] == tree.version[t]
                assert (batch.version[i] >= 0) == sampled
            else:
                assert (batch.s_plus[i], batch.s_minus[i], batch.version[i]) == (0, 0, -1)


def _path_to(tree: Tree, token: int) -> list[int]:
    """Token ids from the root to ``token``, by walking parents."""
    node = int(token_node(tree)[token])
    ids = tree.tokens[tree.start[node] : token + 1].tolist()
    while (node := int(tree.parent[node])) >= 0:
        ids = tree.tokens[tree.start[node] : tree.end[node]].tolist() + ids
    return ids


@given(forests())
def test_flat_paths_are_valid_trees_of_the_same_tokens(trees: list[Tree]) -> None:
    for tree in trees:
        paths = flatten(tree)
        assert len(paths) == tree.n_leaves
        for leaf, path in enumerate(paths):
            validate(path)
            assert path.n_leaves == 1
            nodes = tree.path(leaf)
            assert path.kind.tolist() == tree.kind[nodes].tolist()
            assert path.tokens.tolist() == _path_to(tree, int(tree.end[nodes[-1]]) - 1)
            assert [c.arguments for c in path.calls] == [c.arguments for c in tree.calls if c.node in nodes]
            for name in ("reward", "outcome", "origin", "correct"):
                np.testing.assert_array_equal(getattr(path, name)[0], getattr(tree, name)[leaf])
            if tree.rescored:
                index = np.concatenate([np.arange(tree.start[node], tree.end[node]) for node in nodes])
                np.testing.assert_array_equal(path.closed_logprob, tree.closed_logprob[index])
                np.testing.assert_array_equal(path.closed_version, tree.closed_version[index])
            if tree.taught:
                index = np.concatenate([np.arange(tree.start[node], tree.end[node]) for node in nodes])
                np.testing.assert_array_equal(path.teacher_logprob, tree.teacher_logprob[index])
            if tree.routed:
                index = np.concatenate([np.arange(tree.start[node], tree.end[node]) for node in nodes])
                np.testing.assert_array_equal(path.routes, tree.routes[index])
            if tree.answer_logprob.size:
                np.testing.assert_array_equal(path.answer_logprob, tree.answer_logprob[nodes])


@given(forests())
def test_token_counts(trees: list[Tree]) -> None:
    credit = (
        [np.ones(t.n_leaves) for t in trees],
        [TreeStats.of(t).scored.astype(np.float64) for t in trees],
    )
    model = {int(t) for tree in trees for t in tree.tokens[tree.kind[token_node(tree)] == Kind.MODEL]}
    through = {token: row for token, row in _naive(trees, credit, hard=False).items() if token in model}
    assert counts([TreeStats.of(tree) for tree in trees]) == (
        len(through),
        round(sum(row[2] for row in through.values())),
    )
    for tree in trees:
        lengths = [int((p.kind[token_node(p)] == Kind.MODEL).sum()) for p in flatten(tree)]
        assert TreeStats.of(tree).response_tokens.tolist() == lengths


def _fork(lengths: tuple[int, ...], prompt: int = 10) -> Tree:
    """A prompt, one shared MODEL node of 4 tokens, and one branch of each length."""
    growth = TreeBuilder("p", "t", list(range(prompt)), budget=len(lengths))
    shared = growth.node(growth.prompt, Kind.MODEL)
    growth.extend(shared, [100, 101, 102, 103], -0.1, None, 0)
    for k, length in enumerate(lengths):
        node = growth.node(shared, Kind.MODEL)
        growth.extend(node, 1000 * (k + 1) + np.arange(length), -0.1, None, 0)
        growth.score(growth.leaf(node, Outcome.STOPPED, Origin.ROOT), 1.0, True)
    return growth.close(0.0)


def test_a_tree_over_the_budget_repeats_its_ancestors_without_weight() -> None:
    tree = _fork((20, 20, 20))
    ones = [np.ones(3, np.float32)]
    batches = pack([tree], ones, ones, budget=60)
    assert [b.tokens.size for b in batches] == [54, 34]  # two branches share the first part
    assert batches[0].mult[10:14].tolist() == [3] * 4
    assert batches[1].mult[:14].tolist() == [0] * 14
    assert batches[1].tokens[10:14].tolist() == [100, 101, 102, 103]
    long = pack([_fork((200, 20))], [np.ones(2)], [np.ones(2)], budget=60)
    assert sorted(b.tokens.size for b in long) == [34, 214]


def test_siblings_share_the_predictor_at_the_fork() -> None:
    (batch,) = pack([_fork((3, 3, 3))], [np.ones(3)], [np.ones(3)], budget=100)
    assert batch.predictor[[14, 17, 20]].tolist() == [13, 13, 13]
    assert batch.position[[14, 17, 20]].tolist() == [14, 14, 14]


def test_branches_without_weight_and_trees_without_signal_are_left_out() -> None:
    tree = _fork((5, 50))
    (batch,) = pack([tree], [np.array([1.0, np.nan])], [np.array([1.0, 0.0])], budget=100)
    assert batch.tokens.size == 10 + 4 + 5
    assert pack([tree], [np.ones(2)], [np.zeros(2)], budget=100) == []
    flat, signal = (np.zeros(2), np.array([1.0, -1.0]))
    weights = [np.ones(2)] * 2
    assert [set(b.tree) for b in pack([tree, tree], [flat, signal], weights, budget=70, drop_zero=True)] == [
        {1}
    ]
    assert len(pack([tree, tree], [flat, signal], weights, budget=70)) == 2


def test_hard_attribution_counts_a_shared_token_once() -> None:
    (batch,) = pack([_fork((2, 2))], [np.array([3.0, -1.0])], [np.array([0.5, 0.25])], budget=100, hard=True)
    np.testing.assert_allclose(batch.s_plus[10:14], 0.375 * 1.0)  # mean weight · mean advantage
    assert batch.s_minus[10:14].tolist() == [0] * 4
    np.testing.assert_allclose(batch.mult[10:14], 0.375)
    np.testing.assert_allclose(batch.s_plus[14:16], 1.5)


def test_first_fit_decreasing_fills_rows_and_is_deterministic() -> None:
    trees = [_fork((n,)) for n in (10, 30, 60, 40)]  # sizes 24, 44, 74, 54: in order of size, two rows do
    ones = [np.ones(1)] * 4
    batches = pack(trees, ones, ones, budget=100)
    assert [sorted(set(b.tree)) for b in batches] == [[0, 2], [1, 3]]
    again = pack(trees, ones, ones, budget=100)
    for left, right in zip(batches, again, strict=True):
        np.testing.assert_array_equal(left.tokens, right.tokens)


@pytest.mark.parametrize(
    ("advantage", "weight", "error", "message"),
    [
        ([np.nan, 0.0], [1.0, 1.0], ValueError, "no finite advantage"),
        ([0.0, 0.0], [-1.0, 1.0], ValueError, "negative or NaN"),
        ([0.0, 0.0], [np.nan, 1.0], ValueError, "negative or NaN"),
        ([0.0], [1.0, 1.0], TreeError, "2 leaves"),
    ],
)
def test_bad_credit_is_refused(advantage, weight, error, message) -> None:
    with pytest.raises(error, match=message):
        pack([_fork((2, 2))], [np.array(advantage)], [np.array(weight)], budget=100)


def test_read_only_arrays_do() -> None:
    """Arrays that come out of Ray's object store cannot be written to."""
    tree = _fork((3, 4))
    for field in dataclasses.fields(Tree):
        if isinstance(array := getattr(tree, field.name), np.ndarray):
            array.flags.writeable = False
    credit = np.array([1.0, -1.0], np.float32)
    credit.flags.writeable = False
    validate(tree)
    assert pack([tree], [credit], [abs(credit)], budget=18, hard=True)
    assert len(flatten(tree)) == 2
    assert counts([TreeStats.of(tree)]) == (4 + 3 + 4, 2 * 4 + 3 + 4)


def test_a_budget_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        pack([], [], [], budget=0)
