from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from system.learn.credit.base import Credit, assign
from system.learn.credit.reinforce import whiten
from system.plugins import CREDITS, PluginError
from system.tree.builder import TreeBuilder
from system.tree.record import Kind, Origin, Outcome
from system.tree.stats import TreeStats

NAN = float("nan")
WHITENED = ("reinforce++", "reinforce++-baseline")  # over the batch: a group says nothing on its own
GROUPED = [name for name in CREDITS.names if name not in (*WHITENED, "none")]

# The fixture of `algorithm_vectors.json`: rewards and MODEL tokens of the leaves of four groups.
REWARDS = {"A": [1, 0, 1, 0, 0], "B": [0.25, 1, 0, 0.75], "C": [1.0], "D": [0.5, 0.5, 0.5]}
LENGTHS = {"A": [5, 6, 7, 6, 7], "B": [2, 3, 4, 3], "C": [4], "D": [2, 2, 2]}


def group(rewards: Sequence[float], lengths: Sequence[int] = ()) -> TreeStats:
    """A prompt and one MODEL node per leaf."""
    growth = TreeBuilder("p", "t", [1], budget=len(rewards))
    for reward, length in zip(rewards, lengths or [3] * len(rewards), strict=True):
        node = growth.node(growth.prompt, Kind.MODEL)
        growth.extend(node, np.zeros(length), -0.1, None, 0)
        leaf = growth.leaf(node, Outcome.STOPPED, Origin.ROOT)
        if not np.isnan(reward):
            growth.score(leaf, reward, reward > 0)
    return TreeStats.of(growth.close(0.0))


def _of(name: str, *groups: Sequence[float]) -> list[list[float]]:
    """[L] of each group; in these trees a node's own advantage is that of the leaf it ends at."""
    batch, credit = [group(g) for g in groups if len(g)], CREDITS.make(name, {})
    given = zip(assign(credit, batch), batch, strict=True)
    own = {"leaf": lambda a, tree: a, "node": lambda a, tree: a[tree.leaf]}
    own["path"] = lambda a, tree: a[np.arange(tree.leaves), tree.leaf]
    return [own[credit.per](a, tree).tolist() for a, tree in given]


def test_grpo_divides_by_the_unbiased_standard_deviation() -> None:
    (a,) = assign(CREDITS.make("grpo", {}), [group([1, 0, 0, 1])])
    std = np.sqrt(1 / 3)  # Σ(r-½)² / (4-1)
    np.testing.assert_allclose(a, np.array([0.5, -0.5, -0.5, 0.5]) / (std + 1e-6), rtol=1e-6)
    assert a.dtype == np.float32


def test_the_two_arpo_estimators_are_grpo_on_leaves() -> None:
    groups = [[1.1, 0.0, -1.0, 0.4], [0.2, 0.9]]
    assert _of("arpo-soft", *groups) == _of("arpo-hard", *groups) == _of("grpo", *groups)
    assert CREDITS.find("arpo-soft") is CREDITS.find("grpo")
    assert [name for name in CREDITS.names if CREDITS.make(name, {}).hard] == ["arpo-hard"]


def test_rloo_is_each_leaf_against_the_mean_of_the_others() -> None:
    r = np.array([1.0, 0.25, 0.0, -1.0])
    expected = [r[i] - np.delete(r, i).mean() for i in range(4)]
    np.testing.assert_allclose(_of("rloo", r.tolist())[0], expected, rtol=1e-6)


def test_dr_grpo_only_centres() -> None:
    first, second = _of("dr-grpo", [3.0, 1.0], [2.0, 2.0, 5.0])
    assert first == [1.0, -1.0]
    assert second == [-1.0, -1.0, 2.0]


def test_reinforce_plus_plus_equals_the_reference() -> None:
    """verl's compute_reinforce_plus_plus_outcome_advantage: single leaves and equal rewards learn too."""
    batch = [group(REWARDS[g], LENGTHS[g]) for g in "ABCD"]
    expected = {
        "A": [1.172046, -1.026837, 1.172046, -1.026837, -1.026837],
        "B": [-0.477116, 1.172046, -1.026837, 0.622325],
        "C": [1.172046],
        "D": [0.072605, 0.072605, 0.072605],
    }
    for a, g in zip(assign(CREDITS.make("reinforce++", {}), batch), "ABCD", strict=True):
        np.testing.assert_allclose(a, expected[g], atol=1e-6)


def test_reinforce_plus_plus_baseline_equals_the_reference_but_for_single_leaves() -> None:
    """verl's compute_reinforce_plus_plus_baseline_outcome_advantage lets a single leaf's raw reward in."""
    expected = {
        "A": [1.064987, -0.918996, 1.064987, -0.918996, -0.918996],
        "B": [-0.621398, 0.866589, -1.117394, 0.370593],
        "C": [1.85858],
        "D": [-0.125403, -0.125403, -0.125403],
    }
    centred = np.concatenate([np.array(r) - (np.mean(r) if len(r) > 1 else 0) for r in REWARDS.values()])
    tokens = np.concatenate([*LENGTHS.values()])
    np.testing.assert_allclose(whiten(centred, tokens), np.concatenate([*expected.values()]), atol=1e-6)

    batch = [group(REWARDS[g], LENGTHS[g]) for g in "ABCD"]
    a, b, c, d = assign(CREDITS.make("reinforce++-baseline", {}), batch)
    assert c.tolist() == [0.0]
    rest = np.delete(np.arange(13), 9)  # what it does to the others is the same formula without that leaf
    np.testing.assert_allclose(np.concatenate([a, b, d]), whiten(centred[rest], tokens[rest]), rtol=1e-6)


@pytest.mark.parametrize("name", CREDITS.names)
def test_unscored_leaves_get_zero_and_do_not_count(name: str) -> None:
    with_gaps = _of(name, [1.0, NAN, 0.0, NAN], [NAN, NAN], [0.5, 0.25, NAN])
    without = _of(name, [1.0, 0.0], [0.5, 0.25])
    assert with_gaps == [[without[0][0], 0.0, without[0][1], 0.0], [0.0, 0.0], [*without[1], 0.0]]


@pytest.mark.parametrize("name", GROUPED)
def test_a_lone_leaf_and_equal_rewards_say_nothing(name: str) -> None:
    groups = [[0.7], [0.1, 0.1, 0.1], [1.0, 0.0]]
    alone, equal, mixed = _of(name, *groups)
    assert alone == [0.0]
    assert equal == [0.0, 0.0, 0.0]  # exactly, though the mean of three 0.1 is not 0.1 in binary
    assert mixed[0] > 0 > mixed[1]
    assert _of(name, [0.7], [0.1, 0.1]) == [[0.0], [0.0, 0.0]]
    assert assign(CREDITS.make(name, {}), []) == []


@pytest.mark.parametrize("name", GROUPED)
def test_every_group_sums_to_zero(name: str) -> None:
    rng = np.random.default_rng(0)
    for a in _of(name, *(rng.normal(size=n) for n in (2, 5, 16))):
        assert abs(sum(a)) < 1e-5


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(PluginError, match="did you mean arpo-soft"):
        CREDITS.find("arpo-sof")
    with pytest.raises(PluginError, match=r"choose one of grpo, arpo-soft"):
        CREDITS.find("zzz")


def test_an_infinite_reward_is_refused() -> None:
    with pytest.raises(ValueError, match="infinite"):
        assign(CREDITS.make("grpo", {}), [replace(group([1.0, 0.0]), reward=np.array([np.inf, 0.0]))])


class _Wrong(Credit):
    def __init__(self, *answer: np.ndarray) -> None:
        self.answer = answer

    def advantages(self, batch: Sequence[TreeStats]) -> Sequence[np.ndarray]:
        return self.answer


class _PerNode(_Wrong):
    per = "node"


class _PerToken(_Wrong):
    per = "token"  # pyright: ignore[reportAssignmentType]


@pytest.mark.parametrize(
    ("credit", "message"),
    [
        (_Wrong(), "0 arrays of advantages for 1 trees"),
        (_Wrong(np.zeros(3)), r"shape \(3,\), not \(2,\): one per leaf"),
        (_PerNode(np.zeros(2)), r"shape \(2,\), not \(3,\): one per node"),
        (_Wrong(np.array([NAN, 0.0])), "not finite"),
        (_Wrong(np.array(["a", "b"])), "credit _Wrong: ValueError: could not convert string to float"),
        (_PerToken(np.zeros(3)), "per = 'token' is none of leaf, node"),
    ],
)
def test_a_credit_that_answers_wrongly_is_named(credit: Credit, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        assign(credit, [group([1.0, 0.0])])


def test_what_does_not_count_may_be_nan() -> None:
    assert assign(_Wrong(np.array([NAN, 2.0])), [group([NAN, 1.0])])[0].tolist() == [0.0, 2.0]
    nodes = assign(_PerNode(np.array([1.0, NAN, 2.0])), [group([NAN, 1.0])])[0]
    assert nodes.tolist() == [1.0, 0.0, 2.0]


def test_state_for_a_credit_that_keeps_none_is_refused() -> None:
    with pytest.raises(PluginError, match="Grpo has none"):
        CREDITS.make("grpo", {}).load_state_dict({"mean": 1.0})
