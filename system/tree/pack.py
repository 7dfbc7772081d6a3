"""From planned parts of trees to micro-batches: rows of tokens with their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from system.tree.factor import EntropyFactor
from system.tree.plan import BatchPlan, MicroBatch, Part, padded_size
from system.tree.record import OF_NODES, Float64, Kind, Tree, path, path_sum, subtree_end
from system.tree.routes import Routes, unrecorded


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch: N tokens of one or more (parts of) trees, each in depth-first pre-order, then padding.

    Token i may attend to token j iff ``j <= i < exit[j]``.  The logits at ``predictor[t]`` predict token t;
    several children of one fork share a predictor.  All weights are already normalised over the whole
    optimizer step (all micro-batches, all data-parallel ranks), so the learner only sums:

    loss = -Σ_t tis_t · (s_plus·min(r, 1+ε_hi) + s_minus·min(max(r, 1-ε_lo), c))  with r = π_θ/π_proximal.

    A token outside the loss (prompt, tool, padding, an ancestor repeated in a later part of a cut tree) has
    s_plus = s_minus = mult = 0.
    """

    tokens: NDArray[np.int32]  # [N]
    position: NDArray[np.int32]  # [N] depth along the root path, for rotary embeddings
    exit: NDArray[np.int32]  # [N] one past the last token that may attend to this one
    predictor: NDArray[np.int32]  # [N] index whose logits predict this token; -1: none (first token, padding)
    s_plus: NDArray[np.float32]  # [N] Σ w·max(A, 0) over the leaves below
    s_minus: NDArray[np.float32]  # [N] Σ w·min(A, 0) over the leaves below
    factor: NDArray[np.float32]  # [N] what S+ and S- were multiplied by; below 0 they have changed places
    clip_scale: NDArray[np.float32]  # [N] what an objective that scales its clip multiplies the width by
    mult: NDArray[np.float32]  # [N] Σ w over the scored leaves below (weighs entropy bonus, KL, diagnostics)
    logprob: NDArray[np.float32]  # [N] behaviour log-probability; NaN on EXPERT tokens, which have none
    version: NDArray[np.int32]  # [N] behaviour weight version, -1 off the loss
    guided: NDArray[np.bool_]  # [N] ``logprob`` is under another prompt than the tokens of this row, or NaN
    tree: NDArray[np.int32]  # [N] which tree of the batch, -1 for padding
    node: NDArray[np.int32]  # [N] the token's node, numbered through the row; -1 for padding
    # [N] log-probability under the weights at its node's close; the behaviour one where it was not scored
    closed: NDArray[np.float32]
    teacher: NDArray[np.float32]  # [N] log-probability under the teacher; NaN where it is not known
    routes: Routes | None  # [N, S, k] the experts of each token (:mod:`system.tree.routes`); None: no record


def pack_share(plan: BatchPlan, dp_rank: int, trees: Mapping[int, Tree]) -> list[list[PackedBatch]]:
    """[optimizer step][micro-batch] what a data-parallel rank trains on.

    ``trees``: at least those of ``plan.trees(dp_rank)``, by index in the batch.
    """
    return [
        [
            pack(micro_batch, trees, plan.pad_to, plan.factor, plan.clip_scale)
            for micro_batch in ranks[dp_rank]
        ]
        for ranks in plan.updates
    ]


def pack(
    micro_batch: MicroBatch,
    trees: Mapping[int, Tree],
    pad_to: int = 1,
    factor: EntropyFactor | None = None,
    clip_scale: Sequence[Float64] | None = None,
) -> PackedBatch:
    """One row, padded to a multiple of ``pad_to``.  ``trees``: at least those of the parts, by index;
    ``factor`` and ``clip_scale`` as in :class:`system.tree.plan.BatchPlan`.
    """
    recorded = (trees[part.tree].routes for part in micro_batch if _replayed(trees[part.tree]))
    batch = padding(padded_size(micro_batch, pad_to), next(recorded, None))
    base = 0
    for part in micro_batch:
        _write(batch, base, part, trees[part.tree], factor)
        if clip_scale is not None:
            nodes = batch.node[base : base + part.size] - batch.node[base]  # numbered within the part
            batch.clip_scale[base : base + part.size] = clip_scale[part.tree][part.nodes][nodes]
        base += part.size
    return with_credit_of(batch, micro_batch)


def _replayed(tree: Tree) -> bool:
    """Whether a tree's routes are those of the tokens that are trained: those of a guided one were chosen
    behind another prompt.
    """
    return tree.routed and not tree.guided


def padding(n: int, routes: Routes | None = None) -> PackedBatch:
    """A row of ``n`` tokens that nothing is learnt from.  ``routes``: of the model that it is for, if they
    are to be written.
    """
    return PackedBatch(
        tokens=np.zeros(n, np.int32),
        position=np.zeros(n, np.int32),
        exit=np.arange(1, n + 1, dtype=np.int32),  # a padding token attends to itself: no empty softmax row
        predictor=np.full(n, -1, np.int32),
        s_plus=np.zeros(n, np.float32),
        s_minus=np.zeros(n, np.float32),
        factor=np.ones(n, np.float32),
        clip_scale=np.ones(n, np.float32),
        mult=np.zeros(n, np.float32),
        logprob=np.zeros(n, np.float32),
        version=np.full(n, -1, np.int32),
        guided=np.zeros(n, np.bool_),
        tree=np.full(n, -1, np.int32),
        node=np.full(n, -1, np.int32),
        closed=np.zeros(n, np.float32),
        teacher=np.full(n, np.nan, np.float32),
        routes=None if routes is None else unrecorded(n, routes),
    )


def with_credit_of(batch: PackedBatch, micro_batch: MicroBatch) -> PackedBatch:
    """A packed row whose S+ and S- are those of ``micro_batch``: the parts it was packed from, reweighed."""
    credit = np.concatenate([part.credit for part in micro_batch])[batch.node].astype(np.float32)
    credit[batch.node < 0] = 0
    plus, minus = (batch.factor[:, None] * credit[:, :2]).T
    turned = batch.factor < 0
    return replace(batch, s_plus=np.where(turned, minus, plus), s_minus=np.where(turned, plus, minus))


def _write(batch: PackedBatch, base: int, part: Part, tree: Tree, factor: EntropyFactor | None) -> None:
    """Write one part into ``batch`` from token ``base`` on, all but its S+ and S-."""
    nodes = part.nodes
    length = (tree.end - tree.start)[nodes].astype(np.int64)
    end = np.cumsum(length)  # one past each node's last token, within the part
    start = end - length
    bounds = np.append(start, part.size)
    # The part's nodes are in pre-order, so a subtree is still contiguous: it stops where the whole tree's
    # does.
    leave = bounds[np.searchsorted(nodes, subtree_end(tree)[nodes])]
    parent = np.searchsorted(nodes, tree.parent[nodes])  # the root's is meaningless, and overwritten below
    depth = path_sum(parent, length) - length  # tokens above each node

    token = np.arange(part.size)
    source = np.repeat(tree.start[nodes] - start, length) + token
    predictor = base + token - 1
    predictor[start] = base + end[parent] - 1
    predictor[0] = -1

    expert = np.repeat(tree.kind[nodes] == Kind.EXPERT, length)
    rows = slice(base, base + part.size)
    batch.tokens[rows] = tree.tokens[source]
    batch.position[rows] = np.repeat(depth - start, length) + token
    batch.exit[rows] = base + np.repeat(leave, length)
    batch.predictor[rows] = predictor
    batch.guided[rows] = tree.guided | expert
    batch.tree[rows] = part.tree
    first = batch.node[base - 1] + 1 if base else 0
    batch.node[rows] = first + np.repeat(np.arange(nodes.size), length)
    batch.logprob[rows] = batch.closed[rows] = np.where(expert, np.nan, tree.logprob[source])
    if tree.rescored:
        closed = tree.closed_logprob[source]
        batch.closed[rows] = np.where(np.isnan(closed), batch.logprob[rows], closed)
    if tree.taught:
        batch.teacher[rows] = tree.teacher_logprob[source]
    if batch.routes is not None and _replayed(tree):
        batch.routes[rows] = tree.routes[source]
    batch.mult[rows] = np.repeat(part.credit[:, 2], length)
    if factor is not None:
        batch.factor[rows] = factor.of(tree.entropy[source])
    batch.version[rows] = np.where(batch.mult[rows] > 0, tree.version[source], -1)


def flatten(tree: Tree) -> list[Tree]:
    """One single-path tree per leaf, in leaf order, with the path's nodes, calls and fork decisions."""
    return [_single_path(tree, leaf) for leaf in range(tree.n_leaves)]


def _single_path(tree: Tree, leaf: int) -> Tree:
    nodes = path(tree.parent, int(tree.leaf[leaf]))
    length = (tree.end - tree.start)[nodes]
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
        closed_logprob=tree.closed_logprob[source] if tree.rescored else tree.closed_logprob,
        closed_version=tree.closed_version[source] if tree.rescored else tree.closed_version,
        teacher_logprob=tree.teacher_logprob[source] if tree.taught else tree.teacher_logprob,
        routes=tree.routes[source] if tree.routed else tree.routes,
        **{name: own[nodes] for name in OF_NODES if (own := getattr(tree, name)).size},
        start=start.astype(np.int32),
        parent=np.arange(-1, nodes.size - 1, dtype=np.int32),
        kind=tree.kind[nodes],
        leaf=np.array([nodes.size - 1], np.int32),
        reward=tree.reward[only],
        correct=tree.correct[only],
        outcome=tree.outcome[only],
        origin=tree.origin[only],
        episode=np.zeros(min(tree.episode.size, 1), np.int32),
        calls=tuple(replace(c, node=index[c.node]) for c in tree.calls if c.node in index),
        forks=tuple(replace(f, node=index[f.node]) for f in tree.forks if f.node in index),
    )
