"""From trees and events to one flat record of numbers: pure functions, one per group of keys.

===============  ========================================================================================
group            what it answers
===============  ========================================================================================
``train/``       the learner's step: loss and friends, reward and length of what was trained on
``learn/``       what ``learn.correction`` did to leaves: share rejected, effective sample size of the weights
``rollout/``     trees closed since the last record: reward, accuracy, length, entropy, outcomes
``tree/``        branching: fork rate, ΔH, probabilities, top-ups, sharing, shape
``flow/``        asynchrony: staleness, drops by reason, goodput, queue depth
``engine/``      the engine clients: requests by routing decision, prompt tokens, cache hits, resumed streams
``reward/``      means of the rewards' numbers by name; leaves that failed, by reason; what a judge counts
``tools/``       per tool: calls, outcome shares, latency by status; retries, joins, cache hits, open breakers
``environment/`` worlds of training and of evaluation: opened, steps, forks by kind, what went wrong
``agent/``       runs of an agent of one's own: turns, rewrites, retries, failed, late
``chat/``        turns looked at, and those that the chat template would write differently by now
``eval/``        held-out questions
``time/``        wall time, throughput, idle time by actor and cause
===============  ========================================================================================

A share lies in [0, 1]; ``_s`` is seconds.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from system.tree.record import Kind, ToolCall
from system.tree.stats import TreeStats

Metrics = dict[str, float]


def rollout_metrics(stats: Sequence[TreeStats]) -> Metrics:
    """``rollout/…`` of freshly closed trees."""
    if not stats:
        return {}
    leaves = sum(one.leaves for one in stats)
    tokens = sum(one.generated for one in stats)
    metrics = {
        "rollout/trees": float(len(stats)),
        "rollout/leaves": float(leaves),
        "rollout/tokens": float(tokens),
        "rollout/tree_s": mean(one.seconds for one in stats),
        "rollout/tree_s_max": max(one.seconds for one in stats),
        "rollout/zero_variance_share": mean(one.zero_variance for one in stats),
        # Trees that were growing while new weights arrived hold tokens of several versions.
        "rollout/mixed_version_share": mean(one.version_max > one.version_min for one in stats),
        "rollout/versions_per_tree": mean(
            one.version_max - one.version_min + 1 for one in stats if one.version_min >= 0
        ),
    }
    metrics |= _scores("rollout", stats)
    metrics |= _lengths("rollout/response", np.concatenate([one.response_tokens for one in stats]))
    known = [(one.entropy, one.generated) for one in stats if np.isfinite(one.entropy)]
    if known:
        entropy, weight = zip(*known, strict=True)
        metrics["rollout/entropy"] = float(np.average(entropy, weights=weight))
    if rescored := sum(one.rescored for one in stats):
        metrics["rollout/rescored_share"] = rescored / tokens
        metrics["rollout/rescored_gap"] = sum(one.rescored_gap for one in stats) / rescored
    places = np.concatenate([one.answer[one.kind != Kind.MODEL] for one in stats])
    if (known := np.isfinite(places)).any():  # behind how many prompts and results the answer was scored
        metrics["rollout/answer_scored_share"] = mean(known)
        metrics["rollout/answer_probability"] = mean(np.exp(places[known]))
    if any(one.step_reward.any() for one in stats):
        earned = [one.along(one.step_reward) for one in stats]
        metrics["rollout/step_reward"] = mean(np.concatenate(earned))  # part of a leaf's reward
    calls = np.concatenate([one.calls_per_leaf for one in stats])
    metrics["rollout/calls_per_leaf"] = mean(calls)
    outcomes = sum((one.outcomes for one in stats), Counter[str]())
    metrics |= {f"rollout/outcome/{name}": count / leaves for name, count in sorted(outcomes.items())}
    metrics |= guide_metrics(stats) | expert_metrics(stats) | reward_metrics(stats)
    for kind in sorted({one.task for one in stats}):
        of_kind = [one for one in stats if one.task == kind]
        metrics |= _scores(f"rollout/kind/{kind}", of_kind)
    return metrics


def guide_metrics(stats: Sequence[TreeStats]) -> Metrics:
    """``rollout/guided/…`` of trees whose sampled prompt told actions, and ``rollout/plain/…`` of the others;
    nothing where none did.
    """
    guided = [one for one in stats if one.guide]
    if not guided:
        return {}
    return {
        "rollout/guided/trees": float(len(guided)),
        "rollout/guided/actions": mean(one.guide for one in guided),
        # Of the trees, those with a right answer: the guide was enough.
        "rollout/guided/success_share": mean(bool(one.correct.any()) for one in guided),
        **_scores("rollout/guided", guided),
        **_scores("rollout/plain", [one for one in stats if not one.guide]),
    }


def expert_metrics(stats: Sequence[TreeStats]) -> Metrics:
    """``rollout/expert/…``: trees with branches that begin with an expert's turns, and the rewards of these
    branches and of the others in the same trees; nothing where there are none.
    """
    after = [(one.reward, one.after_expert) for one in stats if one.after_expert.any()]
    if not after:
        return {}
    reward, led = (np.concatenate(column) for column in zip(*after, strict=True))
    known = np.isfinite(reward)
    return {
        "rollout/expert/trees": float(len(after)),
        "rollout/expert/leaves": float(led.sum()),
        "rollout/expert/reward": mean(reward[known & led]),
        "rollout/expert/reward_beside": mean(reward[known & ~led]),
    }


def reward_metrics(stats: Sequence[TreeStats]) -> Metrics:
    """``reward/<name>``: the mean of what a reward said, unweighted, or of one of its parts; and the share of
    leaves that could not be scored.
    """
    metrics: Metrics = {}
    for name in dict.fromkeys(name for one in stats for name in one.parts):
        values = np.concatenate([one.parts[name] for one in stats if name in one.parts])
        metrics[f"reward/{name}"] = mean(values[np.isfinite(values)])
    if failed := sum(one.failed for one in stats):
        metrics["reward/failed_share"] = failed / sum(one.leaves for one in stats)
    return metrics


def reward_totals(counts: Mapping[str, float]) -> Metrics:
    """What rewards counted, and of a judge the mean seconds of an answer and the share of requests that
    nothing was sent for.
    """
    totals = dict(counts)
    for key, seconds in counts.items():
        judge, _, what = key.rpartition("/")
        if what != "answer_s":
            continue
        spared = sum(counts.get(f"{judge}/{name}", 0.0) for name in ("cache_hits", "joins"))
        if answers := counts.get(f"{judge}/answers"):
            totals[f"{judge}/latency_s"] = seconds / answers
        if asked := spared + counts.get(f"{judge}/requests", 0.0):
            totals[f"{judge}/cache_share"] = spared / asked
    return totals


def engine_totals(counts: Mapping[str, float]) -> Metrics:
    """The engine clients' counts, and the share of prompt tokens that the servers had in their caches."""
    totals = dict(counts)
    if totals.get("prompt_tokens"):
        totals["cache_hit_share"] = totals.get("cached_tokens", 0.0) / totals["prompt_tokens"]
    return totals


def tree_metrics(stats: Sequence[TreeStats]) -> Metrics:
    """``tree/…``: how the branching policy behaved and how much the branches share."""
    if not stats:
        return {}
    flat = sum(one.flat for one in stats)
    forked = np.concatenate([one.forked for one in stats])
    metrics = {
        "tree/roots": mean(one.roots for one in stats),
        "tree/forks": mean(one.forks for one in stats),
        "tree/top_ups": mean(one.top_ups for one in stats),
        "tree/nodes": mean(one.nodes for one in stats),
        "tree/depth": mean(one.depth for one in stats),
        "tree/decisions": mean(one.forked.size for one in stats),
    }
    if forks := sum(one.forks for one in stats):
        metrics["tree/unasked_share"] = sum(one.unasked for one in stats) / forks
    if flat:  # the least a packed forward pass must compute, against flattened paths
        metrics["tree/unique_flat_ratio"] = sum(one.unique for one in stats) / flat
    if forked.size:
        metrics["tree/fork_rate"] = mean(forked)
        probability = np.concatenate([one.probability for one in stats])
        metrics["tree/probability"] = average = mean(probability)
        # How much of the decision is ΔH's, and how much the draw's.
        metrics["tree/decisive_share"] = mean(np.abs(probability - average) > 0.1)
        metrics["tree/fork_information"] = _bits(average) - mean(_bits(probability))
        delta = np.concatenate([one.delta_h for one in stats])
        known = np.isfinite(delta)
        if known.any():
            delta, forked = delta[known], forked[known]
            p10, third, p50, two_thirds, p90 = np.percentile(delta, [10, 100 / 3, 50, 200 / 3, 90])
            metrics["tree/delta_h"] = mean(delta)
            metrics |= {"tree/delta_h_p10": p10, "tree/delta_h_p50": p50, "tree/delta_h_p90": p90}
            # Where the model is surest, and where it is least sure.
            metrics["tree/fork_rate_sure"] = mean(forked[delta <= third])
            metrics["tree/fork_rate_unsure"] = mean(forked[delta >= two_thirds])
    return {key: float(value) for key, value in metrics.items()}


def _bits(probability: Any) -> Any:
    """Entropy of a yes with this probability, in bits."""
    p = np.clip(probability, 1e-12, 1 - 1e-12)
    return -(p * np.log2(p) + (1 - p) * np.log2(1 - p))


def train_metrics(
    stats: Sequence[TreeStats], learner: Mapping[str, float], staleness: Sequence[int]
) -> dict[str, Any]:
    """``train/…`` and ``flow/staleness…`` of what was trained on; its bare names go under ``train/``."""
    metrics: dict[str, Any] = {key if "/" in key else f"train/{key}": value for key, value in learner.items()}
    if stats:
        metrics |= {
            "train/trees": float(len(stats)),
            "train/leaves": float(sum(one.rewards.size for one in stats)),
            "train/tokens": float(sum(one.trainable for one in stats)),
            "train/unique_tokens": float(sum(one.unique for one in stats)),
            "train/flat_tokens": float(sum(one.flat for one in stats)),
            "train/zero_variance_share": mean(one.zero_variance for one in stats),
            **({"train/guided_share": mean(map(_guided, stats))} if any(map(_guided, stats)) else {}),
        }
        metrics |= _scores("train", stats)
        metrics |= _lengths(
            "train/response", np.concatenate([one.response_tokens[np.isfinite(one.reward)] for one in stats])
        )
    if staleness:
        metrics["flow/staleness"] = mean(staleness)
        metrics["flow/staleness_max"] = float(max(staleness))
        histogram = Counter(int(one) for one in staleness)
        metrics |= {
            f"flow/staleness_share/{lag}": histogram[lag] / len(staleness) for lag in sorted(histogram)
        }
    return metrics


def tool_metrics(calls: Iterable[ToolCall]) -> Metrics:
    """``tools/<name>/…`` by tool; ``unknown`` for calls that name none."""
    by_tool: dict[str, list[ToolCall]] = defaultdict(list)
    for call in calls:
        by_tool[call.tool or "unknown"].append(call)
    metrics: Metrics = {}
    for tool, group in sorted(by_tool.items()):
        key = f"tools/{tool}"
        metrics[f"{key}/calls"] = float(len(group))
        metrics[f"{key}/cached_share"] = mean(call.cached for call in group)
        metrics[f"{key}/attempts"] = mean(call.attempts for call in group)
        for status in sorted({call.status for call in group}):
            latency = np.array([call.latency_s for call in group if call.status == status], dtype=np.float64)
            metrics[f"{key}/{status}/share"] = latency.size / len(group)
            for percent in (50, 95, 99):
                metrics[f"{key}/{status}/p{percent}_s"] = float(np.percentile(latency, percent))
            metrics[f"{key}/{status}/max_s"] = float(latency.max())
    return metrics


@dataclass
class Idle:
    """Idle time, and how long a time it was told of: the two ends of a window fall between two tellings."""

    seconds: dict[str, dict[str, float]] = field(default_factory=dict)  # actor -> cause -> waited
    spans: dict[str, float] = field(default_factory=dict)  # actor -> seconds that were told of

    def add(self, actor: str, cause: str, seconds: float, span_s: float) -> None:
        causes = self.seconds.setdefault(actor, {})
        causes[cause] = causes.get(cause, 0.0) + seconds
        self.spans[actor] = self.spans.get(actor, 0.0) + span_s

    def share(self, actor: str, seconds: float) -> float:
        """Of the actor's time, at most 1: two clocks, the actor's and ours, may differ by a moment."""
        span = self.spans[actor]
        return min(1.0, seconds / span) if span > 0 else 0.0

    def shares(self) -> dict[str, float]:
        """Actor -> the share of its time in which it waited, for whatever."""
        return {
            actor: self.share(actor, sum(causes.values())) for actor, causes in sorted(self.seconds.items())
        }


def idle_metrics(idle: Idle) -> Metrics:
    """``time/idle_s/<actor>/<cause>``, and the same as a share of the actor's time."""
    metrics: Metrics = {}
    for actor, causes in sorted(idle.seconds.items()):
        for cause, seconds in sorted(causes.items()):
            metrics[f"time/idle_s/{actor}/{cause}"] = seconds
            if idle.spans[actor] > 0:
                metrics[f"time/idle_share/{actor}/{cause}"] = idle.share(actor, seconds)
    return metrics


def mean(values: Iterable[float] | NDArray[Any]) -> float:
    """The mean; NaN of nothing."""
    array = np.fromiter(values, dtype=np.float64) if not isinstance(values, np.ndarray) else values
    return float(array.mean(dtype=np.float64)) if array.size else float("nan")


def mean_by_key(stats: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Several training steps in one record: the mean of each key over the steps that have it."""
    if len(stats) == 1:
        return dict(stats[0])
    keys = {key: None for one in stats for key in one}
    return {key: mean([float(one[key]) for one in stats if key in one]) for key in keys}


def _guided(stats: TreeStats) -> bool:
    return stats.guide > 0


def _scores(group: str, stats: Sequence[TreeStats]) -> Metrics:
    reward = np.concatenate([np.zeros(0), *(one.rewards for one in stats)])
    correct = np.concatenate([np.zeros(0, bool), *(one.correct for one in stats)])
    metrics: Metrics = {}
    if reward.size:
        metrics[f"{group}/reward"] = mean(reward)
        metrics[f"{group}/reward_std"] = float(reward.std(dtype=np.float64))
    if correct.size:
        metrics[f"{group}/accuracy"] = mean(correct)
    return metrics


def _lengths(key: str, tokens: NDArray[np.int64]) -> Metrics:
    """Comparing these between ``rollout/`` and ``train/`` shows whether training prefers short branches."""
    if not tokens.size:
        return {}
    return {
        f"{key}_tokens": mean(tokens),
        f"{key}_tokens_p90": float(np.percentile(tokens, 90)),
        f"{key}_tokens_max": float(tokens.max()),
    }
