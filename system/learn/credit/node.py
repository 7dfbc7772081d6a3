"""Credit of each MODEL node, a turn of the agent, by itself: what became of the tree below it.

V is the value of a node, from the rewards of the scored leaves at or below it.  A leaf that was not scored
takes no part, and nothing is read of a node that leads to none that was.  In a tree of one scored leaf, or of
equal rewards, everything is 0.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from system.learn.credit.base import Credit
from system.learn.credit.group import centre
from system.plugins import PluginError
from system.tree.plan import Per
from system.tree.record import Float64, Int64, Kind
from system.tree.stats import TreeStats


class NodeCredit(Credit):
    """A formula over one tree."""

    per: ClassVar[Per] = "node"

    def advantages(self, batch: Sequence[TreeStats]) -> list[Float64]:
        silent = [not centre(tree.reward[tree.scored].astype(np.float64)).any() for tree in batch]
        return [np.zeros(t.nodes) if s else self.of_tree(t) for t, s in zip(batch, silent, strict=True)]

    @abstractmethod
    def of_tree(self, tree: TreeStats) -> Float64:
        """[J] advantages; NaN where nothing is read."""


class VinePpo(NodeCredit):
    """A = V(node) - V(the fork that its branch began at), V the mean reward below: VinePPO's advantage
    (arXiv 2410.01679 §4), whose Monte Carlo rollouts are the leaves that the tree has anyway.

    Between two forks nothing is known of the value of a single turn: all turns there share one advantage
    (as the segments of SPO, arXiv 2505.23564).
    """

    def of_tree(self, tree: TreeStats) -> Float64:
        value = tree.mean_reward_below
        return value - value[fork_above(tree)]


class TreeRl(NodeCredit):
    """A = [(V(node) - V(root)) + (V(node) - V(parent))] / √n, n the leaves below, V the mean below of each
    leaf's reward against the mean of the others  (TreeRL, arXiv 2506.11902 §3.3).

    The parent is the fork that the node's branch began at.  The released code divides V by √n before it
    takes the difference to the parent, and leaves V(root) out.
    """

    def of_tree(self, tree: TreeStats) -> Float64:
        leaves = int(tree.scored.sum())
        value = tree.mean_reward_below * (leaves / (leaves - 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            return (2 * value - value[0] - value[fork_above(tree)]) / np.sqrt(tree.scored_below)


class At2po(NodeCredit):
    """Turn-wise credit of AT²PO (arXiv 2601.04767): the leaves' z-scores (1/L, not Bessel's) go up the tree,
    and children count by the softmax of their turns' entropies, -mean log-probability of the turn.

    ``advantage``: "node_value" (the released script), V itself; "diff_parent", V - V(parent); "diff_global",
    V - V(root); "diff_localglobal", their sum.  ``children="mean"`` weighs all children alike.  The paper's
    weights are H/ΣH, the code's, and ours, the softmax.  A leaf that ends at a node with children counts as
    a child with the entropy of its own turn.
    """

    def __init__(self, advantage: str = "node_value", children: str = "softmax") -> None:
        for name, value, known in (
            ("advantage", advantage, ("node_value", "diff_parent", "diff_global", "diff_localglobal")),
            ("children", children, ("softmax", "mean")),
        ):
            if value not in known:
                raise PluginError(f"learn.credit.options.{name}={value!r}: choose one of {', '.join(known)}")
        self.local = advantage in ("diff_parent", "diff_localglobal")
        self.whole = advantage in ("diff_global", "diff_localglobal")
        self.softmax = children == "softmax"

    def of_tree(self, tree: TreeStats) -> Float64:
        value = self._values(tree)
        up = np.maximum(tree.parent, 0)
        at_root = np.arange(tree.nodes) == 0
        local = np.where(at_root, 0, value[up]) if self.local else 0
        whole = np.where(at_root, 0, value[0]) if self.whole else 0
        return value * (1 + (self.local and self.whole) * ~at_root) - local - whole

    def _values(self, tree: TreeStats) -> Float64:
        r = tree.reward[tree.scored].astype(np.float64)
        z = centre(r) / (r.std() + 1e-6)
        surprise = turn_surprise(tree) if self.softmax else np.zeros(tree.nodes)
        held: list[list[tuple[float, float]]] = [[] for _ in range(tree.nodes)]  # (H, V) of each child
        of_leaf = dict(zip(np.flatnonzero(tree.scored).tolist(), z.tolist(), strict=True))
        for node, leaf in tree.chains():
            if leaf in of_leaf:
                held[node].append((float(surprise[node]), of_leaf[leaf]))
        value = np.full(tree.nodes, np.nan)
        for node in range(tree.nodes - 1, -1, -1):  # children before parents
            if held[node]:
                h, v = np.array(held[node]).T
                weight = np.exp(h - h.max())
                value[node] = (weight * v).sum() / weight.sum()
                if node:
                    held[tree.parent[node]].append((float(surprise[node]), float(value[node])))
        return value


def fork_above(tree: TreeStats) -> Int64:
    """[J] the nearest node above with more scored leaves below than the node itself; the root for the root,
    and for nodes that every scored leaf passes.
    """
    below, above = tree.scored_below, np.zeros(tree.nodes, np.int64)
    for node in range(1, tree.nodes):  # parents before children
        parent = int(tree.parent[node])
        above[node] = parent if below[parent] > below[node] else above[parent]
    return above


def turn_surprise(tree: TreeStats) -> Float64:
    """[J] -mean log-probability of a MODEL node's tokens, nats: an estimate of its turn's entropy; other
    nodes have that of the turn above them, 0 before the first.
    """
    own = -tree.logprob / np.maximum(tree.length, 1)
    for node in range(tree.nodes):
        if tree.kind[node] != Kind.MODEL:
            own[node] = own[tree.parent[node]] if node else 0.0
    return own
