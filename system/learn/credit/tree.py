"""Credit of each leaf from the tree around it: its subtrees, and how likely it was."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from system.learn.credit.base import Credit
from system.learn.credit.group import GroupCredit, Grpo, centre
from system.learn.credit.reinforce import whitened
from system.plugins import PluginError
from system.tree.record import Float64, Int64
from system.tree.stats import TreeStats


class TreeGrpo(Credit):
    """A = GRPO over all leaves of the prompt + GRPO over the leaves of the same root branch  (Tree-GRPO,
    arXiv 2509.21240 §3.3).

    A root branch with one scored leaf adds 0 (the authors' code adds its reward).
    """

    def __init__(self) -> None:
        self._grpo = Grpo()

    def advantages(self, batch: Sequence[TreeStats]) -> list[Float64]:
        result = self._grpo.advantages(batch)
        for tree, a in zip(batch, result, strict=True):
            branch = root_branch(tree)[tree.leaf]
            for one in np.unique(branch[tree.scored]):
                inside = tree.scored & (branch == one)
                a[inside] += self._grpo.of_group(tree.reward[inside].astype(np.float64))
        return result


class TreePo(Credit):
    """A = average over the subtrees that hold a leaf of (r - mean reward of the subtree), whitened over the
    tokens of the batch  (TreePO, arXiv 2508.17445 §2.3).

    Subtrees are those of the tree's forks, the whole tree included; one of a single scored leaf says nothing.
    (TreePO's own trees fork every 512 tokens, and its depth counts these.)  ``weight``: "average" as the
    released scripts have it, or "group_size", by the subtree's leaves, the default of the released function.
    """

    def __init__(self, weight: str = "average") -> None:
        if weight not in ("average", "group_size"):
            raise PluginError(f"learn.credit.options.weight={weight!r}: choose average or group_size")
        self.by_size = weight == "group_size"

    def advantages(self, batch: Sequence[TreeStats]) -> list[Float64]:
        counted = [tree.scored & (tree.scored.sum() > 1) for tree in batch]
        return whitened(batch, counted, [self._of_tree(tree) for tree in batch])

    def _of_tree(self, tree: TreeStats) -> Float64:
        below, mean = tree.scored_below, tree.mean_reward_below
        result = np.zeros(tree.leaves)
        if not centre(tree.reward[tree.scored].astype(np.float64)).any():
            return result
        for leaf in np.flatnonzero(tree.scored).tolist():
            nodes = tree.path(leaf)
            sizes, first = np.unique(below[nodes], return_index=True)  # subtrees are nested: one per size
            kept = sizes > 1
            if kept.any():
                weights = sizes[kept] if self.by_size else np.ones(kept.sum())
                result[leaf] = np.average(tree.reward[leaf] - mean[nodes[first[kept]]], weights=weights)
        return result


class Ucpo(GroupCredit):
    """GRPO whose advantage among the correct leaves goes to the unlikely ones: A·n·((1 - τ)/n + τ·v), v
    proportional to 1/q, q the softmax of the leaves' mean log-probabilities  (UCPO, arXiv 2605.00365).

    The sum over the correct leaves (reward above 0) stays.  ``tau``: 0.2 in the released runs.  The
    released code gives all correct leaves the advantage of the first of them; here each keeps its own.
    """

    def __init__(self, tau: float = 0.2) -> None:
        if not 0 <= tau <= 1:
            raise PluginError(f"learn.credit.options.tau={tau:g}: it must lie within 0 and 1")
        self.tau = tau

    def advantages(self, batch: Sequence[TreeStats]) -> list[Float64]:
        result = super().advantages(batch)
        for tree, a in zip(batch, result, strict=True):
            right = tree.scored & (tree.reward > 0)
            if (n := int(right.sum())) > 1:
                total = tree.along(tree.logprob)[right]
                a[right] *= n * self._shares(total / np.maximum(tree.response_tokens[right], 1))
        return result

    def of_group(self, r: Float64) -> Float64:
        centred = centre(r)
        return centred / (r.std(ddof=1) + 1e-8) if centred.any() else centred

    def _shares(self, mean_logprob: Float64) -> Float64:
        """[n] what each of the correct leaves gets of their sum."""
        q = np.exp(mean_logprob - mean_logprob.max())
        inverse = 1 / np.maximum(q / q.sum(), 1e-6)
        return (1 - self.tau) / q.size + self.tau * inverse / inverse.sum()


def root_branch(tree: TreeStats) -> Int64:
    """[J] the child of the root that each node lies below; 0 for the root."""
    branch = np.zeros(tree.nodes, np.int64)
    for node in range(1, tree.nodes):  # parents before children
        branch[node] = node if tree.parent[node] == 0 else branch[tree.parent[node]]
    return branch
