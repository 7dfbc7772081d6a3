"""Credits and clip by information gain: by hand, and a second time path by path."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_algorithms import VECTORS, made
from test_tree_is_its_paths import random_trees

from system.learn.credit.base import assign
from system.learn.credit.gain import clip_scale, normal_gains
from system.learn.objective import LossTokens
from system.plugins import CREDITS, OBJECTIVES, PluginError
from system.tree.builder import TreeBuilder
from system.tree.record import Kind, Origin, Outcome
from system.tree.stats import TreeStats


def z(values: Any) -> np.ndarray:
    """z-scores with Bessel's correction; 0 where there is nothing to compare."""
    values = np.array(values, np.float64)
    if values.size < 2 or np.ptp(values) == 0:
        return np.zeros(values.size)
    return (values - values.mean()) / (values.std(ddof=1) + 1e-6)


class Hand:
    """Three paths and an answer at once; the first two share a turn and its result::

    prompt .2 ─ first ─ .5 ┬ short                 reward 1
                           └ long ─ .4 ─ last      reward 1
              ─ other ─ .1 ─ middle ─ .6 ─ end     reward 0
              ─ direct                             reward 0
    """

    def __init__(self, unknown: bool = False) -> None:
        """``unknown``: the answer was not scored behind the result of ``long``."""
        self.growth = TreeBuilder("p", "t", [1], budget=4)
        self.growth.answer(self.growth.prompt, math.log(0.2))
        self.first = self.grow(self.growth.prompt, Kind.MODEL)
        result = self.grow(self.first, Kind.TOOL, 0.5)
        self.short = self.grow(result, Kind.MODEL)
        self.long = self.grow(result, Kind.MODEL)
        self.last = self.grow(self.grow(self.long, Kind.TOOL, None if unknown else 0.4), Kind.MODEL)
        self.other = self.grow(self.growth.prompt, Kind.MODEL)
        self.middle = self.grow(self.grow(self.other, Kind.TOOL, 0.1), Kind.MODEL)
        self.end = self.grow(self.grow(self.middle, Kind.TOOL, 0.6), Kind.MODEL)
        self.direct = self.grow(self.growth.prompt, Kind.MODEL)
        ends = [(self.short, 1.0), (self.last, 1.0), (self.end, 0.0), (self.direct, 0.0)]
        for leaf, (node, reward) in enumerate(ends):
            assert self.growth.leaf(node, Outcome.STOPPED, Origin.ROOT) == leaf
            self.growth.score(leaf, reward, reward > 0)
        self.tree = TreeStats.of(self.growth.close(0.0))

    def grow(self, above: int, kind: Kind, p: float | None = None) -> int:
        node = self.growth.node(above, kind)
        self.growth.extend(node, np.ones(2), *((-0.1, None, 0) if kind == Kind.MODEL else ()))
        if p is not None:
            self.growth.answer(node, math.log(p))
        return node


def test_a2tgpo_by_hand() -> None:
    """Turns of one index are compared, a shared one once per leaf; α, γ, and the root of how many follow."""
    hand, alpha, gamma = Hand(), 0.5, 0.9
    (a,) = assign(CREDITS.make("a2tgpo", {"alpha": alpha, "gamma": gamma}), [hand.tree])
    r = z([1, 1, 0, 0])
    n1 = z([0.3, 0.3, -0.1])  # turn 0 of the leaves short, last and end
    n2 = z([-0.1, 0.5])  # turn 1 of last and end
    assert a[0, hand.first] == pytest.approx(r[0] + alpha * n1[0], abs=1e-5)
    assert a[1, hand.first] == pytest.approx(r[1] + alpha * (n1[1] + gamma * n2[0]) / math.sqrt(2), abs=1e-5)
    assert a[1, hand.long] == pytest.approx(r[1] + alpha * n2[0], abs=1e-5)
    assert a[2, hand.other] == pytest.approx(r[2] + alpha * (n1[2] + gamma * n2[1]) / math.sqrt(2), abs=1e-5)
    assert a[2, hand.middle] == pytest.approx(r[2] + alpha * n2[1], abs=1e-5)
    for leaf, answer in enumerate([hand.short, hand.last, hand.end, hand.direct]):
        assert a[leaf, answer] == pytest.approx(r[leaf], abs=1e-6)  # the turn of the answer: outcome alone
    assert a[1, hand.long] < a[1, hand.last], "its result made the answer less likely"
    assert a[0, hand.first] > a[0, hand.short]


def test_igpo_by_hand() -> None:
    hand, gamma = Hand(), 0.9
    (a,) = assign(CREDITS.make("igpo", {"gamma": gamma}), [hand.tree])
    one, two, less, other, more, *r = z([0.3, 0.3, -0.1, -0.1, 0.5, 1, 1, 0, 0])
    assert a[0, hand.first] == pytest.approx(one + gamma * r[0], abs=1e-5)
    assert a[1, hand.first] == pytest.approx(two + gamma * less + gamma**2 * r[1], abs=1e-5)
    assert a[1, hand.long] == pytest.approx(less + gamma * r[1], abs=1e-5)
    assert a[2, hand.other] == pytest.approx(other + gamma * more + gamma**2 * r[2], abs=1e-5)
    for leaf, answer in enumerate([hand.short, hand.last, hand.end, hand.direct]):
        assert a[leaf, answer] == pytest.approx(r[leaf], abs=1e-5)


def test_a2tgpo_as_derived_from_what_is_quoted_of_its_code() -> None:
    """Normal gains, advantages and clip scales of three paths of one, two and three results."""
    record = VECTORS["a2tgpo"]
    growth = TreeBuilder("p", "t", [1], budget=3)
    growth.answer(growth.prompt, math.log(0.2))
    turns: dict[str, list[int]] = {}
    for leaf, (name, raw) in enumerate(record["inputs"]["raw_ig"].items()):
        above, p, turns[name] = growth.prompt, 0.2, []
        for gain in [*raw, None]:
            turns[name].append(growth.node(above, Kind.MODEL))
            growth.extend(turns[name][-1], [1], -0.1, None, 0)
            if gain is not None:
                p += gain
                above = growth.node(turns[name][-1], Kind.TOOL)
                growth.extend(above, [1])
                growth.answer(above, math.log(p))
        reward = record["inputs"]["outcome"][name]
        assert growth.leaf(turns[name][-1], Outcome.STOPPED, Origin.ROOT) == leaf
        growth.score(leaf, reward, reward > 0)
    tree, options = TreeStats.of(growth.close(0.0)), record["hyper"]
    (a,) = assign(CREDITS.make("a2tgpo", {"alpha": options["alpha"], "gamma": options["gamma"]}), [tree])
    scale = made("a2tgpo", {"beta": options["beta"]}).clip_scale(tree)
    expected = record["expected"]
    for leaf, (name, nodes) in enumerate(turns.items()):
        results = [node + 1 for node in nodes[:-1]]
        assert normal_gains(tree)[results] == pytest.approx(expected["norm_ig"][name], abs=2e-5)
        assert a[leaf, nodes] == pytest.approx(expected["A"][name], abs=1e-5)
        assert scale[nodes] == pytest.approx(expected["clip_scale"][name], abs=1e-5)


def test_the_clip_is_wider_for_a_turn_that_gained_more_than_others() -> None:
    """1 + β·(2σ(N) - 1) of the turn that called; 1 of answers, and where there is nothing to compare."""
    hand = Hand()
    scale = clip_scale(hand.tree, 0.5)
    n1, n2 = z([0.3, 0.3, -0.1]), z([-0.1, 0.5])

    def c(n: float) -> float:
        return 1 + 0.5 * (2 / (1 + math.exp(-n)) - 1)

    calling = [(hand.first, n1[0]), (hand.long, n2[0]), (hand.other, n1[2]), (hand.middle, n2[1])]
    for node, n in calling:
        assert scale[node] == pytest.approx(c(n), abs=1e-5)
    assert scale[hand.first] > 1 > scale[hand.other]
    assert (np.delete(scale, [node for node, _ in calling]) == 1).all()
    unknown = Hand(unknown=True)
    assert clip_scale(unknown.tree, 0.5)[[unknown.long, unknown.middle]].tolist() == [1, 1]


def test_a_turns_bounds_are_scaled_on_both_sides() -> None:
    """Four turns of two tokens, whose mean ratio lies between the widest bounds and those in the middle."""
    scale = [1.0, 1.3, 0.7, 1.25]
    for sign, log_ratio in ((1, math.log(1.0045)), (-1, math.log(0.9965))):
        logprob = torch.full((8,), -1.0, dtype=torch.float64, requires_grad=True)
        ones = torch.ones(8, dtype=torch.float64)
        uneven = torch.tensor([1.5, 0.5] * 4, dtype=torch.float64) * log_ratio
        tokens = LossTokens(
            logprob=logprob,
            entropy=0 * ones,
            behaviour=logprob.detach() - uneven,
            s_plus=ones * (sign > 0),
            s_minus=-ones * (sign < 0),
            mult=ones,
            staleness=0 * ones,
            node=torch.arange(4).repeat_interleave(2),
            path=torch.zeros(8, dtype=torch.int64),
            clip_scale=torch.tensor(scale).repeat_interleave(2),
        )
        loss, statistics = made("a2tgpo").loss(tokens)
        loss.backward()
        s = math.exp(log_ratio)
        bound = [1 + 0.004 * c if sign > 0 else 1 - 0.003 * c for c in scale]
        inside = [s < b if sign > 0 else s > b for b in bound]
        assert inside == [False, True, False, True]
        held = [s if free else b for free, b in zip(inside, bound, strict=True)]
        assert float(loss) == pytest.approx(-sign * 2 * sum(held), abs=1e-6)
        assert logprob.grad is not None
        assert logprob.grad.tolist() == pytest.approx([-sign * s * free for free in inside for _ in "ab"])
        assert float(statistics.maxima["clip_scale_max"]) == pytest.approx(1.3)


@pytest.mark.parametrize("beta", [-0.1, 1.0])
def test_a_clip_that_could_close_is_refused(beta: float) -> None:
    with pytest.raises(PluginError, match=r"learn\.objective\.options\.beta"):
        OBJECTIVES.make("a2tgpo", {"beta": beta})


def test_a_gain_that_is_unknown_is_none() -> None:
    """Neither compared nor added; its turn still counts among those that follow."""
    hand = Hand(unknown=True)
    (a,) = assign(CREDITS.make("a2tgpo", {}), [hand.tree])
    r, n1 = z([1, 1, 0, 0]), z([0.3, 0.3, -0.1])
    assert a[1, hand.first] == pytest.approx(r[1] + 0.3 * n1[1] / math.sqrt(2), abs=1e-5)
    assert a[1, hand.long] == pytest.approx(r[1], abs=1e-6)
    assert a[2, hand.middle] == pytest.approx(r[2], abs=1e-6)  # nothing left to compare its own with


@pytest.mark.parametrize("name", ["a2tgpo", "igpo"])
def test_without_scores_of_the_answer_only_the_outcome_counts(name: str) -> None:
    trees = [TreeStats.of(tree) for tree in random_trees(1)]
    for tree in trees:
        tree.answer[:] = np.nan
    for values, tree, outcome in zip(
        assign(CREDITS.make(name, {}), trees), trees, assign(CREDITS.make("grpo", {}), trees), strict=True
    ):
        expected = np.where(tree.on_path & tree.scored[:, None], outcome[:, None], 0)
        np.testing.assert_allclose(values, expected, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 1.1, -1.0])
@pytest.mark.parametrize("name", ["a2tgpo", "igpo"])
def test_a_discount_that_is_none_is_refused(name: str, gamma: float) -> None:
    with pytest.raises(PluginError, match=r"learn\.credit\.options\.gamma"):
        CREDITS.make(name, {"gamma": gamma})


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), gamma=st.sampled_from([1.0, 0.8]))
def test_both_credits_are_what_they_are_path_by_path(seed: int, gamma: float) -> None:
    """Every path by itself, as the papers have them; their statistics over the paths of one prompt."""
    alpha = 0.3
    trees = [TreeStats.of(tree) for tree in random_trees(seed)]
    found = [assign(CREDITS.make(name, {"gamma": gamma}), trees) for name in ("a2tgpo", "igpo")]
    for tree, a2tgpo, igpo in zip(trees, *found, strict=True):
        leaves = np.flatnonzero(tree.scored).tolist()
        turns: dict[int, list[list[int]]] = {}  # of each leaf, the nodes of each turn
        gain: dict[int, list[float]] = {}  # of each leaf, of each turn with a result
        for leaf in leaves:
            turns[leaf], gain[leaf], p = [[]], [], math.exp(tree.answer[0])
            for node in tree.path(leaf).tolist():
                if tree.kind[node] == Kind.MODEL:
                    turns[leaf][-1].append(node)
                elif tree.kind[node] == Kind.TOOL:
                    now = math.exp(tree.answer[node])
                    gain[leaf].append(now - p)
                    turns[leaf].append([])
                    p = now
        rewards = tree.reward[leaves].astype(np.float64)
        outcome = dict(zip(leaves, z(rewards), strict=True))
        by_turn: dict[int, list[tuple[int, float]]] = defaultdict(list)
        for leaf in leaves:
            for k, value in enumerate(gain[leaf]):
                if math.isfinite(value):
                    by_turn[k].append((leaf, value))
        normal = {
            (leaf, k): n
            for k, group in by_turn.items()
            for (leaf, _), n in zip(group, z([value for _, value in group]), strict=True)
        }
        known = [(leaf, k) for leaf in leaves for k, value in enumerate(gain[leaf]) if math.isfinite(value)]
        pool = z([*(gain[leaf][k] for leaf, k in known), *rewards]) if len(leaves) > 1 else np.zeros(99)
        pooled = dict(zip([*known, *((leaf, len(gain[leaf])) for leaf in leaves)], pool, strict=False))
        for leaf in leaves:
            results = len(gain[leaf])
            for k, nodes in enumerate(turns[leaf]):
                later = sum(gamma ** (j - k) * normal.get((leaf, j), 0) for j in range(k, results))
                expected = outcome[leaf] + alpha * later / math.sqrt(max(results - k, 1))
                np.testing.assert_allclose(a2tgpo[leaf, nodes], expected, atol=1e-4)
                total = sum(gamma ** (j - k) * pooled.get((leaf, j), 0) for j in range(k, results + 1))
                np.testing.assert_allclose(igpo[leaf, nodes], total, atol=1e-4)
