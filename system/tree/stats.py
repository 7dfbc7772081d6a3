"""The numbers of one closed tree, computed once and then only added up."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from system.tree.record import Kind, Origin, Outcome, ToolCall, Tree


@dataclass(frozen=True, slots=True)
class TreeStats:
    """What metrics need of a tree with L leaves, S of them scored, and D branching decisions."""

    task: str
    nodes: int
    depth: int  # nodes on the longest root-to-leaf path
    leaves: int
    roots: int
    forks: int
    top_ups: int
    reward: NDArray[np.float32]  # [S] of scored leaves
    correct: NDArray[np.bool_]  # [C] of leaves whose answer was judged
    response_tokens: NDArray[np.int64]  # [L] MODEL tokens on each leaf's path
    scored_response_tokens: NDArray[np.int64]  # [S] the same, scored leaves only
    calls_per_leaf: NDArray[np.int64]  # [L] tool calls on each leaf's path
    generated: int  # MODEL tokens, each once
    trainable: int  # MODEL tokens with a scored leaf below, each once: what can carry a gradient
    unique: int  # tokens of any kind with a scored leaf below, each once: what a packed forward pass computes
    flat: int  # the same tokens once per scored leaf: what flattened paths would compute
    entropy: float  # mean over MODEL tokens, nats; NaN when unknown
    delta_h: NDArray[np.float64]  # [D] ΔH of each decision
    probability: NDArray[np.float64]  # [D] fork probability of each decision
    forked: NDArray[np.bool_]  # [D] whether the decision started a branch
    version_min: int  # oldest and newest weight version among MODEL tokens; -1 without any
    version_max: int
    seconds: float  # from the first root to the close
    outcomes: Counter[str]  # leaves by lower-case ``Outcome`` name
    calls: tuple[ToolCall, ...]

    @classmethod
    def of(cls, tree: Tree) -> TreeStats:
        length = np.diff(np.append(tree.start, tree.n_tokens)).astype(np.int64)
        model = tree.kind == Kind.MODEL
        scored = np.isfinite(tree.reward)
        n_scored = subtree_sum(tree.parent, np.bincount(tree.leaf[scored], minlength=tree.n_nodes))
        call_nodes = np.array([call.node for call in tree.calls], dtype=np.int64)
        response = path_sum(tree.parent, length * model)[tree.leaf]
        calls = path_sum(tree.parent, np.bincount(call_nodes, minlength=tree.n_nodes))
        depth = path_sum(tree.parent, np.ones(tree.n_nodes, dtype=np.int64))
        sampled = np.repeat(model, length)
        entropy = tree.entropy[sampled & np.isfinite(tree.entropy)]
        version = tree.version[sampled]
        return cls(
            task=tree.task,
            nodes=tree.n_nodes,
            depth=int(depth[tree.leaf].max(initial=0)),
            leaves=tree.n_leaves,
            roots=tree.origins(Origin.ROOT),
            forks=tree.origins(Origin.FORK),
            top_ups=tree.origins(Origin.TOP_UP),
            reward=tree.reward[scored],
            correct=tree.correct[tree.correct >= 0] == 1,
            response_tokens=response,
            scored_response_tokens=response[scored],
            calls_per_leaf=calls[tree.leaf],
            generated=int(length[model].sum()),
            trainable=int(length[model & (n_scored > 0)].sum()),
            unique=int(length[n_scored > 0].sum()),
            flat=int((length * n_scored).sum()),
            entropy=float(entropy.mean(dtype=np.float64)) if entropy.size else float("nan"),
            delta_h=np.array([fork.delta_h for fork in tree.forks], dtype=np.float64),
            probability=np.array([fork.probability for fork in tree.forks], dtype=np.float64),
            forked=np.array([fork.forks > 0 for fork in tree.forks], dtype=np.bool_),
            version_min=int(version.min(initial=np.iinfo(np.int32).max)) if version.size else -1,
            version_max=int(version.max(initial=-1)),
            seconds=max(0.0, tree.closed_s - tree.started_s),
            outcomes=Counter(Outcome(int(code)).name.lower() for code in tree.outcome),
            calls=tree.calls,
        )

    @property
    def zero_variance(self) -> bool:
        """All scored leaves earned the same: group-relative credit has nothing to teach here."""
        return self.reward.size == 0 or float(np.ptp(self.reward)) < 1e-6


def subtree_sum(parent: NDArray[np.int32], value: NDArray[np.int64]) -> NDArray[np.int64]:
    """[J] sum of ``value`` over each node's subtree, itself included.  Parents stand before children."""
    total, up = value.tolist(), parent.tolist()
    for node in range(len(total) - 1, 0, -1):
        if up[node] >= 0:
            total[up[node]] += total[node]
    return np.array(total, dtype=np.int64)


def path_sum(parent: NDArray[np.int32], value: NDArray[np.int64]) -> NDArray[np.int64]:
    """[J] sum of ``value`` along each node's path from the root, itself included."""
    total, up = value.tolist(), parent.tolist()
    for node in range(1, len(total)):
        if up[node] >= 0:
            total[node] += total[up[node]]
    return np.array(total, dtype=np.int64)
