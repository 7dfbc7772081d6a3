"""The numbers, against counts made by hand on the tree of ``conftest.make_tree``."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from observe_trees import NAN, make_tree

from system.observe.metrics import (
    Idle,
    idle_metrics,
    rollout_metrics,
    tool_metrics,
    train_metrics,
    tree_metrics,
)
from system.tree.record import ForkDecision, Kind, ToolCall, Tree, path_sum, subtree_sum, validate
from system.tree.stats import TreeStats


def test_tree_stats_by_hand(tree: Tree):
    stats = TreeStats.of(tree)
    assert (stats.nodes, stats.depth, stats.leaves) == (6, 4, 3)
    assert (stats.roots, stats.forks, stats.top_ups) == (2, 1, 0)
    assert stats.generated == 3 + 2 + 5 + 6
    assert stats.trainable == 3 + 2 + 5  # leaf 2 was not scored
    assert stats.unique == 4 + 3 + 2 + 2 + 5
    assert stats.flat == (4 + 3 + 2 + 2) + (4 + 3 + 2 + 5)
    assert stats.response_tokens.tolist() == [5, 8, 6]
    assert stats.response_tokens[np.isfinite(stats.reward)].tolist() == [5, 8]
    assert stats.calls_per_leaf.tolist() == [1, 1, 0]  # the fork shares its parent's call
    assert stats.rewards.tolist() == [1.0, 0.0]
    assert stats.correct.tolist() == [True, False]
    assert stats.outcomes == {"stopped": 1, "length": 1, "deadline": 1}
    assert (stats.version_min, stats.version_max) == (3, 3)
    assert stats.seconds == 2.5
    model = np.isfinite(tree.entropy)
    assert stats.entropy == pytest.approx(float(tree.entropy[model].mean()))
    assert not stats.zero_variance


def test_a_leaf_at_an_inner_node_counts_its_own_path():
    """A branch may end exactly where a sibling went on."""
    stats = TreeStats.of(replace(make_tree(), leaf=np.array([2, 4, 5], np.int32)))
    assert stats.response_tokens.tolist() == [3, 8, 6]
    assert stats.unique == 4 + 3 + 2 + 5  # node 3 has no leaf any more
    assert stats.flat == (4 + 3 + 2) + (4 + 3 + 2 + 5)


def test_two_leaves_may_share_a_node():
    stats = TreeStats.of(replace(make_tree(reward=(1.0, 0.0, 1.0)), leaf=np.array([3, 3, 5], np.int32)))
    assert stats.flat == 2 * (4 + 3 + 2 + 2) + (4 + 6)


@pytest.mark.parametrize(
    ("reward", "zero"), [((1, 1, NAN), True), ((1, 0, NAN), False), ((1, NAN, NAN), True), ((NAN,) * 3, True)]
)
def test_zero_variance_looks_at_scored_leaves_only(reward: tuple[float, ...], zero: bool):
    assert TreeStats.of(make_tree(reward=reward)).zero_variance is zero


def test_a_tree_without_a_sampled_token_has_no_versions():
    tree = make_tree()
    stats = TreeStats.of(replace(tree, kind=np.zeros_like(tree.kind)))
    assert (stats.version_min, stats.generated) == (-1, 0)
    assert math.isnan(stats.entropy)


def test_sums_over_random_trees_agree_with_walking_them():
    generator = np.random.default_rng(0)
    for nodes in (1, 2, 30):
        parent = np.array([-1, *(generator.integers(0, j) for j in range(1, nodes))], np.int32)
        value = generator.integers(0, 9, nodes)
        down, up = np.zeros(nodes, np.int64), np.zeros(nodes, np.int64)
        for node in range(nodes):
            at = node
            while at >= 0:
                up[at] += value[node]
                down[node] += value[at]
                at = int(parent[at])
        assert subtree_sum(parent, value).tolist() == up.tolist()
        assert path_sum(parent, value).tolist() == down.tolist()


def test_rollout_and_tree_keys():
    first = TreeStats.of(make_tree(reward=(1.0, 0.0, NAN)))
    second = TreeStats.of(replace(make_tree(reward=(1.0, 1.0, 1.0), task="calc"), forks=()))
    rollout = rollout_metrics([first, second])
    assert rollout["rollout/trees"] == 2
    assert rollout["rollout/reward"] == pytest.approx(4 / 5)
    assert rollout["rollout/accuracy"] == pytest.approx(4 / 5)
    assert rollout["rollout/kind/lookup/accuracy"] == pytest.approx(1 / 2)
    assert rollout["rollout/kind/calc/accuracy"] == 1
    assert rollout["rollout/zero_variance_share"] == 0.5
    assert rollout["rollout/outcome/deadline"] == pytest.approx(1 / 6)
    assert rollout["rollout/mixed_version_share"] == 0
    tree = tree_metrics([first, second])
    assert tree["tree/fork_rate"] == 1
    assert tree["tree/decisions"] == 0.5
    assert tree["tree/delta_h"] == tree["tree/delta_h_p50"] == 0.125
    assert tree["tree/unique_flat_ratio"] == pytest.approx(
        (first.unique + second.unique) / (first.flat + second.flat)
    )


def test_what_was_scored_besides_is_told_only_where_something_was():
    tree = make_tree()
    assert not any("scored" in key for key in rollout_metrics([TreeStats.of(tree)]))
    model = np.repeat(tree.kind == Kind.MODEL, tree.end - tree.start)
    some = model & (np.cumsum(model) % 2 == 1)
    place = np.flatnonzero(tree.kind != Kind.MODEL)
    answers = np.full(tree.n_nodes, np.nan, np.float32)
    answers[place[0]] = math.log(0.25)
    scored = replace(
        tree,
        closed_logprob=np.where(some, tree.logprob - np.float32(0.5), np.float32(np.nan)),
        closed_version=np.where(some, 9, -1).astype(np.int32),
        answer_logprob=answers,
    )
    validate(scored)
    found = rollout_metrics([TreeStats.of(scored)])
    assert found["rollout/rescored_share"] == pytest.approx(some.sum() / model.sum())
    assert found["rollout/rescored_gap"] == pytest.approx(0.5)
    assert found["rollout/answer_scored_share"] == pytest.approx(1 / place.size)
    assert found["rollout/answer_probability"] == pytest.approx(0.25)


def test_fork_rate_counts_decisions_not_forks():
    forks = tuple(ForkDecision(2, d, 0.5, 0.5, n) for d, n in ((0.0, 2), (1.0, 0), (NAN, 0), (2.0, 1)))
    metrics = tree_metrics([TreeStats.of(replace(make_tree(), forks=forks))])
    assert metrics["tree/fork_rate"] == 0.5
    assert metrics["tree/delta_h"] == 1.0  # an unknown ΔH is left out
    assert (metrics["tree/fork_rate_sure"], metrics["tree/fork_rate_unsure"]) == (1.0, 1.0)


def test_what_the_schedule_forked_by_itself_is_counted_apart():
    """The policy asked for one of three forks, for none of four, and for none."""
    forks = tuple(ForkDecision(2, 0.0, 0.5, 0.5, n, lent) for n, lent in ((3, 2), (4, 4), (0, 0)))
    stats = replace(TreeStats.of(replace(make_tree(), forks=forks)), forks=7)
    metrics = tree_metrics([stats])
    assert stats.unasked == 4
    assert metrics["tree/unasked_share"] == pytest.approx(4 / 7)
    assert metrics["tree/fork_rate"] == pytest.approx(1 / 3)


def test_where_the_forks_are():
    """Twelve results, of which those of the highest ΔH fork."""
    forks = tuple(ForkDecision(2, 0.1 * i, 0.5, 0.5, int(i >= 9)) for i in range(12))
    metrics = tree_metrics([TreeStats.of(replace(make_tree(), forks=forks))])
    assert metrics["tree/fork_rate"] == 0.25
    assert (metrics["tree/fork_rate_sure"], metrics["tree/fork_rate_unsure"]) == (0.0, 0.75)


def test_train_metrics_prefix_and_staleness_histogram(tree: Tree):
    metrics = train_metrics([TreeStats.of(tree)], {"loss": 0.5, "kl/ref": 0.1}, [0, 1, 1, 3])
    assert metrics["train/loss"] == 0.5
    assert metrics["kl/ref"] == 0.1
    assert metrics["train/tokens"] == 10
    assert metrics["train/leaves"] == 2
    assert metrics["train/response_tokens"] == 6.5  # the unscored leaf was not trained on
    shares = {key[-1]: value for key, value in metrics.items() if key.startswith("flow/staleness_share/")}
    assert shares == {"0": 0.25, "1": 0.5, "3": 0.25}
    assert (metrics["flow/staleness"], metrics["flow/staleness_max"]) == (1.25, 3)


def test_tool_latencies_by_status_and_calls_of_no_tool():
    calls = [ToolCall(2, "search", {}, "ok", float(s)) for s in range(1, 101)]
    calls += [
        ToolCall(2, "search", {}, "timeout", 20.0, attempts=3),
        ToolCall(2, "weekday", {}, "ok", 0.5),  # a user's own
        ToolCall(2, "", {}, "rejected", 0.0),
    ]
    metrics = tool_metrics(calls)
    assert metrics["tools/search/calls"] == 101
    assert metrics["tools/search/ok/p50_s"] == 50.5
    assert metrics["tools/search/ok/p95_s"] == pytest.approx(95.05)
    assert metrics["tools/search/ok/max_s"] == 100
    assert metrics["tools/search/timeout/share"] == pytest.approx(1 / 101)
    assert metrics["tools/unknown/calls"] == 1
    assert metrics["tools/weekday/calls"] == 1
    assert {key.split("/")[1] for key in metrics} == {"search", "weekday", "unknown"}


def test_idle_as_seconds_and_share():
    idle = Idle()
    for actor, cause, seconds, span in (
        *(("learner", "trees", 2.0, 8.0), ("engine", "update", 0.5, 5.0)),
        *(("engine", "update", 0.5, 3.0), ("engine", "waiting", 3.0, 0.0)),
    ):
        idle.add(actor, cause, seconds, span)
    metrics = idle_metrics(idle)
    assert metrics["time/idle_s/learner/trees"] == 2.0
    assert metrics["time/idle_share/engine/update"] == 0.125
    assert idle.shares() == {"engine": 0.5, "learner": 0.25}


def test_nothing_gives_nothing():
    assert rollout_metrics([]) == tree_metrics([]) == train_metrics([], {}, []) == tool_metrics([]) == {}


def test_guided_trees_are_told_apart():
    plain, guided = (TreeStats.of(make_tree(reward=reward)) for reward in ((0.0, 0.0, NAN), (1.0, 0.0, NAN)))
    assert not any("guided" in key or "plain" in key for key in rollout_metrics([plain, guided]))
    assert "train/guided_share" not in train_metrics([plain], {}, [])
    trees = [plain, replace(guided, guide=1), replace(plain, guide=2)]
    metrics = {
        key: value for key, value in rollout_metrics(trees).items() if "/guided/" in key or "/plain/" in key
    }
    assert metrics == {
        "rollout/guided/trees": 2,
        "rollout/guided/actions": 1.5,
        "rollout/guided/success_share": 0.5,
        "rollout/guided/reward": 0.25,
        "rollout/guided/reward_std": pytest.approx(3**0.5 / 4),
        "rollout/guided/accuracy": 0.25,
        "rollout/plain/reward": 0,
        "rollout/plain/reward_std": 0,
        "rollout/plain/accuracy": 0,
    }
    assert train_metrics(trees, {}, [])["train/guided_share"] == pytest.approx(2 / 3)
    assert not any("/plain/" in key for key in rollout_metrics(trees[1:]))
