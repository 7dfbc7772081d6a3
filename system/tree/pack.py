"""From closed trees to micro-batches: credit summed onto shared tokens, trees cut to size, rows packed.

All leaves below a token share its probability ratio r, so two sums per token carry the whole clipped
objective (derivation in ``PackedBatch``): S+ = Σ w·max(A, 0) and S- = Σ w·min(A, 0) over the leaves at or
below its node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from system.tree.packed import PackedBatch
from system.tree.record import Kind, Tree, TreeError, subtree_end, subtree_sum

Int = NDArray[np.int64]
Float64 = NDArray[np.float64]
Floats = NDArray[np.floating[Any]]


class TokenCounts(NamedTuple):
    """MODEL tokens on paths to scored leaves."""

    unique: int  # each once, as a tree learner computes them
    flat: int  # once per scored leaf through them, as a learner on flat paths would


@dataclass(frozen=True, slots=True)
class _Part:
    """An ancestor-closed set of one tree's nodes that goes into one micro-batch."""

    tree: int  # index among the packed trees
    nodes: Int  # [K] in pre-order
    owned: NDArray[
        np.bool_
    ]  # [K] nodes that carry their weights here; the others are repeated as context only
    size: int  # tokens


def pack(
    trees: Sequence[Tree],
    advantages: Sequence[Floats],
    weights: Sequence[Floats],
    *,
    budget: int,
    hard: bool = False,
    pad_to: int = 1,
    drop_zero: bool = False,
) -> list[PackedBatch]:
    """Pack trees into micro-batches of at most ``budget`` tokens, padding included.

    ``advantages[i]``, ``weights[i]``: [L] per leaf of tree i.  Weights are already normalised over the
    optimizer step; a leaf of weight 0 is excluded (its advantage may be NaN).  Nodes that lead to no
    weighted leaf are left out.

    ``hard`` (ARPO's hard attribution, arXiv 2507.19849 §3.2): a token shared by d weighted leaves counts
    once, with their mean advantage and mean weight.

    ``drop_zero`` leaves out trees whose tokens all have S+ = S- = 0.  They do not move a policy-gradient
    loss, but their ``mult`` is lost too: keep them when there is an entropy bonus or a KL term.

    A tree over the budget is cut at node boundaries: consecutive leaves share a part as long as it fits,
    each part holds the whole root path of its tokens, and each node carries weights in the first part that
    holds it, only.  A single root-to-leaf path longer than the budget becomes a micro-batch of its own, of
    its own size.  ``pad_to`` pads each micro-batch to a multiple.  Deterministic: first-fit decreasing over
    the parts, ties in tree order.
    """
    if budget < 1 or pad_to < 1:
        raise ValueError(f"budget={budget} and pad_to={pad_to} must be at least 1")
    credits = [
        _node_credit(tree, a, w, hard=hard) for tree, a, w in zip(trees, advantages, weights, strict=True)
    ]
    capacity = max(budget // pad_to, 1) * pad_to
    parts = [
        part
        for i, (tree, w, credit) in enumerate(zip(trees, weights, credits, strict=True))
        if not drop_zero or np.any(credit[:, :2])
        for part in _cut(i, tree, np.asarray(w), capacity)
    ]
    return [_batch(trees, credits, chosen, pad_to) for chosen in _first_fit_decreasing(parts, capacity)]


def flatten(tree: Tree) -> list[Tree]:
    """One single-path tree per leaf, in leaf order, with the path's nodes, calls and fork decisions."""
    return [_single_path(tree, leaf) for leaf in range(tree.n_leaves)]


def counts(trees: Sequence[Tree]) -> TokenCounts:
    """MODEL tokens that can be trained on; flat / unique is what prefix sharing saves."""
    unique = flat = 0
    for tree in trees:
        below = subtree_sum(tree, tree.scored.astype(np.float64))
        lengths = np.where(tree.kind == Kind.MODEL, _lengths(tree), 0)
        unique += int(lengths[below > 0].sum())
        flat += int((lengths * below).sum())
    return TokenCounts(unique, flat)


def path_model_tokens(tree: Tree) -> Int:
    """[L] MODEL tokens from the root to each leaf: |o| of the GRPO family."""
    model = np.where(tree.kind == Kind.MODEL, _lengths(tree), 0)
    for node in range(1, tree.n_nodes):  # parents before children
        model[node] += model[tree.parent[node]]
    return model[tree.leaf]


def _lengths(tree: Tree) -> Int:
    return np.diff(tree.start, append=tree.n_tokens).astype(np.int64)


def _node_credit(tree: Tree, advantage: Floats, weight: Floats, *, hard: bool) -> Float64:
    """[J, 3] S+, S- and multiplicity of each node; 0 on nodes that are not MODEL."""
    w, a = np.asarray(weight, np.float64), np.asarray(advantage, np.float64)
    if w.shape != (tree.n_leaves,) or a.shape != (tree.n_leaves,):
        raise TreeError(f"{w.shape} weights and {a.shape} advantages for a tree with {tree.n_leaves} leaves")
    if not np.all(w >= 0):
        raise ValueError(f"tree of prompt {tree.prompt_id!r}: a leaf weight is negative or NaN")
    a = np.where(w > 0, a, 0.0)
    if not np.all(np.isfinite(a)):
        raise ValueError(f"tree of prompt {tree.prompt_id!r}: a weighted leaf has no finite advantage")
    if hard:
        below = subtree_sum(tree, np.stack([w > 0, a, w], axis=1))
        mean = below[:, 1:] / np.maximum(below[:, :1], 1)
        a_node, w_node = mean[:, 0], mean[:, 1]
        credit = np.stack([w_node * np.maximum(a_node, 0), w_node * np.minimum(a_node, 0), w_node], axis=1)
    else:
        credit = subtree_sum(tree, np.stack([w * np.maximum(a, 0), w * np.minimum(a, 0), w], axis=1))
    credit[tree.kind != Kind.MODEL] = 0
    return credit


def _cut(index: int, tree: Tree, weight: Floats, capacity: int) -> list[_Part]:
    """Split a tree into parts of at most ``capacity`` tokens, or one part if it fits."""
    live = subtree_sum(tree, (weight > 0).astype(np.float64)) > 0
    lengths = _lengths(tree)
    has_live_child = np.zeros(tree.n_nodes, bool)
    has_live_child[tree.parent[1:][live[1:]]] = True
    parts: list[_Part] = []
    done = np.zeros(tree.n_nodes, bool)  # nodes that carry their weights in an earlier part
    inside = np.zeros(tree.n_nodes, bool)  # nodes of the part being filled
    size = 0

    def finish() -> None:
        nodes = np.flatnonzero(inside)
        parts.append(_Part(index, nodes, ~done[nodes], size))
        done[nodes] = True

    for tip in np.flatnonzero(live & ~has_live_child):  # ends of the weighted paths, in depth-first order
        path = _path(tree, int(tip))
        extra = int(lengths[path[~inside[path]]].sum())
        if size and size + extra > capacity:
            finish()
            inside[:] = False
            size, extra = 0, int(lengths[path].sum())
        inside[path] = True
        size += extra
    if size:
        finish()
    return parts


def _path(tree: Tree, node: int) -> Int:
    """Nodes from the root to ``node``."""
    nodes = []
    while node >= 0:
        nodes.append(node)
        node = int(tree.parent[node])
    return np.array(nodes[::-1], np.int64)


def _first_fit_decreasing(parts: list[_Part], capacity: int) -> list[list[_Part]]:
    """Group parts so that each group holds at most ``capacity`` tokens (a larger part stands alone)."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(parts)), key=lambda i: -parts[i].size):  # a stable sort: ties in tree order
        fits = next((b for b, free in enumerate(room) if parts[i].size <= free), None)
        if fits is None:
            bins.append([i])
            room.append(capacity - parts[i].size)
        else:
            bins[fits].append(i)
            room[fits] -= parts[i].size
    return [[parts[i] for i in sorted(chosen)] for chosen in bins]


def _batch(
    trees: Sequence[Tree], credits: Sequence[Float64], parts: Sequence[_Part], pad_to: int
) -> PackedBatch:
    total = sum(part.size for part in parts)
    n = -(-total // pad_to) * pad_to
    batch = PackedBatch(
        tokens=np.zeros(n, np.int32),
        position=np.zeros(n, np.int32),
        exit=np.arange(1, n + 1, dtype=np.int32),  # a padding token attends to itself: no empty softmax row
        predictor=np.full(n, -1, np.int32),
        s_plus=np.zeros(n, np.float32),
        s_minus=np.zeros(n, np.float32),
        mult=np.zeros(n, np.float32),
        logprob=np.zeros(n, np.float32),
        version=np.full(n, -1, np.int32),
        tree=np.full(n, -1, np.int32),
    )
    base = 0
    for part in parts:
        _write(batch, base, part, trees[part.tree], credits[part.tree])
        base += part.size
    return batch


def _write(batch: PackedBatch, base: int, part: _Part, tree: Tree, credit: Float64) -> None:
    """Write one part into ``batch`` from token ``base`` on."""
    nodes = part.nodes
    length = _lengths(tree)[nodes]
    end = np.cumsum(length)  # one past each node's last token, within the part
    start = end - length
    bounds = np.append(start, part.size)
    # The part's nodes are in pre-order, so a subtree is still contiguous: it stops where the whole tree's
    # does.
    leave = bounds[np.searchsorted(nodes, subtree_end(tree)[nodes])]
    parent = np.searchsorted(nodes, tree.parent[nodes])  # the root's is meaningless, and overwritten below
    depth = np.zeros(nodes.size, np.int64)  # tokens above each node
    for k in range(1, nodes.size):  # parents before children
        depth[k] = depth[parent[k]] + length[parent[k]]

    token = np.arange(part.size)
    source = np.repeat(tree.start[nodes] - start, length) + token
    predictor = base + token - 1
    predictor[start] = base + end[parent] - 1
    predictor[0] = -1

    rows = slice(base, base + part.size)
    batch.tokens[rows] = tree.tokens[source]
    batch.position[rows] = np.repeat(depth - start, length) + token
    batch.exit[rows] = base + np.repeat(leave, length)
    batch.predictor[rows] = predictor
    batch.tree[rows] = part.tree
    batch.logprob[rows] = tree.logprob[source]
    carried = np.where(part.owned[:, None], credit[nodes], 0.0)
    for k, array in enumerate((batch.s_plus, batch.s_minus, batch.mult)):
        array[rows] = np.repeat(carried[:, k], length)
    batch.version[rows] = np.where(batch.mult[rows] > 0, tree.version[source], -1)


def _single_path(tree: Tree, leaf: int) -> Tree:
    nodes = _path(tree, int(tree.leaf[leaf]))
    length = _lengths(tree)[nodes]
    start = np.cumsum(length) - length
    source = np.repeat(tree.start[nodes] - start, length) + np.arange(int(length.sum()))
    index = {int(node): k for k, node in enumerate(nodes)}
    only = slice(leaf, leaf + 1)
    return replace(
        tree,
        tokens=tree.tokens[source],
        logprob=tree.logprob[source],
        entropy=tree.entropy[source],
        version=tree.version[source],
        start=start.astype(np.int32),
        parent=np.arange(-1, nodes.size - 1, dtype=np.int32),
        kind=tree.kind[nodes],
        leaf=np.array([nodes.size - 1], np.int32),
        reward=tree.reward[only],
        correct=tree.correct[only],
        outcome=tree.outcome[only],
        origin=tree.origin[only],
        calls=tuple(replace(c, node=index[c.node]) for c in tree.calls if c.node in index),
        forks=tuple(replace(f, node=index[f.node]) for f in tree.forks if f.node in index),
    )
