"""Credit, and clip range, of each turn by its information gain: how much likelier the gold answer became with
the turn's tool result, under the policy of then.

A turn is what the model writes between the prompt, or a result, and the next result or the end; turn k of a
path has k results before it, and its gain is p(answer | its result) - p(answer | what came before the turn),
p the geometric mean over the answer's tokens.  A turn without a result (the last one, as a rule) has none,
nor has one where either p is unknown; it takes no part in means and deviations and adds nothing.  Statistics
of gains count a turn once for each scored leaf below it, as on flattened paths.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from system.learn.credit.base import Credit
from system.learn.credit.group import Grpo
from system.plugins import PluginError
from system.tree.plan import Per
from system.tree.record import Float64, Int64, Kind, path_sum
from system.tree.stats import TreeStats


class GainCredit(Credit):
    """A formula over the gains of one tree; ``gamma`` discounts what later turns gain."""

    per: ClassVar[Per] = "path"

    def __init__(self, gamma: float) -> None:
        if not 0 < gamma <= 1:
            raise PluginError(f"learn.credit.options.gamma={gamma:g}: it must lie above 0 and at most at 1")
        self.gamma = gamma
        self._group = Grpo()

    def advantages(self, batch: Sequence[TreeStats]) -> list[Float64]:
        outcomes = self._group.advantages(batch)
        return [self.of_tree(tree, outcome) for tree, outcome in zip(batch, outcomes, strict=True)]

    @abstractmethod
    def of_tree(self, tree: TreeStats, outcome: Float64) -> Float64:
        """[L, J] advantages; ``outcome`` [L]: GRPO's."""

    def _spread(self, tree: TreeStats, values: Float64, ends: Float64) -> tuple[Float64, Int64]:
        """[L, J] sum from each node's turn on of ``values`` [J] of the results on the path, discounted, with
        ``ends`` [L] one turn behind the last of them; and how many of these results there are.
        """
        turn = results_above(tree)
        sums = np.zeros((tree.leaves, tree.nodes))
        left = np.zeros((tree.leaves, tree.nodes), np.int64)
        for leaf in np.flatnonzero(tree.scored).tolist():
            nodes = tree.path(leaf)
            results = nodes[tree.kind[nodes] == Kind.TOOL]
            ahead = [float(ends[leaf])]  # from the turn behind the last result on, then from turns before
            for value in values[results[::-1]].tolist():
                ahead.append(value + self.gamma * ahead[-1])
            sums[leaf, nodes] = np.array(ahead[::-1])[turn[nodes]]
            left[leaf, nodes] = results.size - turn[nodes]
        return sums, left


class A2tgpo(GainCredit):
    """A_k = z(r) + α·Σ_{j ≥ k} γ^(j-k)·N_j / √n  (A²TGPO, arXiv 2605.06200): N_j the z-score of turn j's gain
    among the turns j of the tree, n the results from turn k on.  The turn of the answer has z(r) alone.

    ``alpha`` and ``gamma`` are the paper's.
    """

    def __init__(self, alpha: float = 0.3, gamma: float = 1.0) -> None:
        super().__init__(gamma)
        self.alpha = alpha

    def of_tree(self, tree: TreeStats, outcome: Float64) -> Float64:
        sums, left = self._spread(tree, normal_gains(tree), np.zeros(tree.leaves))
        return outcome[:, None] + self.alpha * sums / np.sqrt(np.maximum(left, 1))


class Igpo(GainCredit):
    """A_k = Σ_{j ≥ k} γ^(j-k)·z_j  (IGPO, arXiv 2510.14967): z_j the z-score of turn j's gain, and of the
    reward at the end, among all gains and rewards of the tree together.
    """

    def __init__(self, gamma: float = 1.0) -> None:
        super().__init__(gamma)

    def of_tree(self, tree: TreeStats, outcome: Float64) -> Float64:
        gained, below = gains(tree), tree.scored_below
        nodes = np.flatnonzero(np.isfinite(gained) & (below > 0))
        rewards = tree.reward[tree.scored].astype(np.float64)
        if rewards.size < 2:
            return np.zeros((tree.leaves, tree.nodes))
        pooled = self._group.of_group(np.concatenate([np.repeat(gained[nodes], below[nodes]), rewards]))
        normal, ends = np.zeros(tree.nodes), np.zeros(tree.leaves)
        normal[nodes] = pooled[np.cumsum(below[nodes]) - 1]
        ends[tree.scored] = pooled[pooled.size - rewards.size :]
        return self._spread(tree, normal, ends)[0]


def results_above(tree: TreeStats) -> Int64:
    """[J] tool results on the path to each node, itself left out."""
    result: NDArray[np.int64] = (tree.kind == Kind.TOOL).astype(np.int64)
    return path_sum(tree.parent, result) - result


def gains(tree: TreeStats) -> Float64:
    """[J] information gain of each TOOL node; NaN elsewhere, and where it is unknown."""
    p, before = np.exp(tree.answer), np.full(tree.nodes, np.nan)
    for node in range(1, tree.nodes):  # parents before children
        parent = int(tree.parent[node])
        written = tree.kind[parent] in (Kind.MODEL, Kind.EXPERT)  # within a turn
        before[node] = before[parent] if written else p[parent]
    return np.where(tree.kind == Kind.TOOL, p - before, np.nan)


def normal_gains(tree: TreeStats) -> Float64:
    """[J] N: z-score of each TOOL node's gain among the turns of its index in the tree, each as often as
    scored leaves lie below it; 0 elsewhere, and where a gain is unknown or there is nothing to compare.
    """
    gained, turn, below = gains(tree), results_above(tree), tree.scored_below
    group, normal = Grpo(), np.zeros(tree.nodes)
    known = np.isfinite(gained) & (below > 0)
    for k in np.unique(turn[known]):
        nodes = np.flatnonzero(known & (turn == k))
        often = below[nodes]
        normal[nodes] = group.of_group(np.repeat(gained[nodes], often))[np.cumsum(often) - 1]
    return normal


def clip_scale(tree: TreeStats, beta: float) -> Float64:
    """[J] c = 1 + β·(2σ(N) - 1) of the turn that called, N its result's :func:`normal_gains` and σ the
    logistic function; 1 of other nodes.

    A turn that another branch leaves in its middle stands in the tree in parts; the last one calls.
    """
    scale, result = np.ones(tree.nodes), np.flatnonzero(tree.kind == Kind.TOOL)
    scale[tree.parent[result]] += beta * np.tanh(normal_gains(tree)[result] / 2)  # 2σ(x) - 1 = tanh(x/2)
    return scale
