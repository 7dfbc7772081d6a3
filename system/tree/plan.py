"""Which parts of which trees make which micro-batch of which data-parallel rank, from statistics alone.

All leaves below a token share its probability ratio r, so two sums per token carry the whole clipped
objective (derivation in ``PackedBatch``): S+ = Σ w·max(A, 0) and S- = Σ w·min(A, 0) over the leaves at or
below its node.  Every rank makes the same plan of the whole batch and then packs its own share
(:mod:`system.tree.pack`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from system.tree.factor import EntropyFactor
from system.tree.record import Float64, Int64, Kind, TreeError, path
from system.tree.stats import TreeStats

Floats = NDArray[np.floating[Any]]
Per = Literal["leaf", "node", "path"]  # what an advantage belongs to; see `where_read`


@dataclass(frozen=True, slots=True)
class Part:
    """An ancestor-closed set of one tree's nodes that goes into one micro-batch."""

    tree: int  # index in the batch
    nodes: Int64  # [K] in pre-order
    credit: Float64  # [K, 3] S+, S- and multiplicity of each; 0 where it is repeated as context only
    size: int  # tokens
    leaf: int = -1  # of a flattened path: whose it is, by number in the tree


MicroBatch = list[Part]


@dataclass(frozen=True, slots=True)
class Assigned:
    """What the S+ and S- of a batch are made of, per tree; as in :func:`node_credit`."""

    trees: Sequence[TreeStats]
    advantages: Sequence[Floats]
    weights: Sequence[Floats]
    per: Per
    hard: bool


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One training batch over all data-parallel ranks."""

    updates: list[list[list[MicroBatch]]]  # [optimizer step][data-parallel rank][micro-batch]
    pad_to: int  # micro-batches are padded to a multiple of this
    silent: int = 0  # trees whose advantages are all 0
    assigned: Assigned | None = None  # None: nothing was, the batch is supervised
    factor: EntropyFactor | None = None  # on each token's advantages
    clip_scale: Sequence[Float64] | None = None  # on the clip's width, [J] per tree; None: 1 everywhere

    def trees(self, dp_rank: int) -> list[int]:
        """The trees, by index in the batch, that a data-parallel rank trains on."""
        mine = (part.tree for ranks in self.updates for micro in ranks[dp_rank] for part in micro)
        return sorted(set(mine))


def where_read(tree: TreeStats, per: Per, counts: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which advantages are read where the leaves ``counts`` [L] count: their own, [L]; those of the nodes
    above them, [J]; or, for each of them, those of the nodes on its path, [L, J].
    """
    if per == "leaf":
        return counts
    if per == "node":
        return tree.sum_below(counts) > 0
    return tree.on_path & counts[:, None]


def node_credit(
    tree: TreeStats, advantage: Floats, weight: Floats, *, per: Per, hard: bool = False
) -> Float64:
    """[J, 3] S+, S- and multiplicity of each node; 0 on nodes that are neither MODEL nor EXPERT.

    The leaves are those of the statistics: an episode is one of them, and counts once for a token however
    many of its chains hold it.

    An EXPERT node has what its leaves of positive advantage give it: those that earned less than others are
    the model's fault, who went on from there (E3-TIR's stop of the gradient on expert prefixes, arXiv
    2604.09455).

    ``advantage`` is [L]; with ``per="node"`` [J], a node's own, times the weight of the leaves below it; with
    ``per="path"`` [L, J], a node's on the way to each leaf.  ``weight`` [L] is normalised over the optimizer
    step; a leaf of weight 0 is excluded (its advantages may be NaN).

    ``hard`` (ARPO's hard attribution, arXiv 2507.19849 §3.2): a token shared by d weighted leaves counts
    once, with their mean advantage and mean weight.
    """
    a, w = np.asarray(advantage, np.float64), np.asarray(weight, np.float64)
    if w.shape != (tree.leaves,):
        raise TreeError(f"{w.shape} weights for a tree with {tree.leaves} leaves")
    if not np.all(w >= 0):
        raise ValueError(f"tree of prompt {tree.prompt_id!r}: a leaf weight is negative or NaN")
    read = where_read(tree, per, w > 0)
    if a.shape != read.shape:
        raise TreeError(f"advantages of shape {a.shape} per {per} for a tree with {tree.leaves} leaves")
    a = np.where(read, a, 0.0)
    if not np.all(np.isfinite(a)):
        raise ValueError(f"tree of prompt {tree.prompt_id!r}: a weighted {per} has no finite advantage")
    count, total = tree.sum_below(np.stack([w > 0, w], axis=1)).T
    if hard or per == "node":
        if per != "node":
            summed = a.sum(0) if per == "path" else tree.sum_below(a)
            a = summed / np.maximum(count, 1)
        total = total / np.maximum(count, 1) if hard else total
        credit = np.stack([total * np.maximum(a, 0), total * np.minimum(a, 0), total], axis=1)
    elif per == "path":
        credit = np.stack([w @ np.maximum(a, 0), w @ np.minimum(a, 0), total], axis=1)
    else:
        signed = np.stack([w * np.maximum(a, 0), w * np.minimum(a, 0)], axis=1)
        credit = np.column_stack([tree.sum_below(signed), total])
    if np.any(expert := tree.kind == Kind.EXPERT):
        credit[expert, 1], credit[expert, 2] = 0, _praised(tree, a, w, total, per, hard)[expert]
    credit[(tree.kind != Kind.MODEL) & ~expert] = 0
    return credit


def _praised(tree: TreeStats, a: Floats, w: Float64, total: Float64, per: Per, hard: bool) -> Floats:
    """[J] the weight of the leaves below each node whose advantage there is positive."""
    if hard or per == "node":
        return total * (a > 0)
    return w @ (a > 0) if per == "path" else tree.sum_below(w * (a > 0))


def signed_leaves(made: Assigned, part: Part) -> Float64:
    """[K, 2] weighted leaves at or below each node of a part whose advantage there is positive, and negative.

    With ``hard``, where a token counts once, 1 of the sign of its mean.
    """
    tree, a, w = made.trees[part.tree], made.advantages[part.tree], np.asarray(made.weights[part.tree])
    if part.leaf >= 0 or made.hard:
        return (part.credit[:, :2] != 0).astype(np.float64)
    signs = np.stack([a > 0, a < 0], axis=-1)
    if made.per == "path":
        below = np.einsum("l,ljs->js", (w > 0).astype(np.float64), signs)
    elif made.per == "node":
        below = tree.sum_below(w > 0)[:, None] * signs
    else:
        below = tree.sum_below(signs & (w > 0)[:, None])
    below[tree.kind == Kind.EXPERT, 1] = 0
    return below[part.nodes]


def whole_tree(
    index: int, tree: TreeStats, weight: Floats, credit: Float64, capacity: int, drop_zero: bool = False
) -> list[Part]:
    """A tree as one part, or as several of at most ``capacity`` tokens if it does not fit.

    It is cut at node boundaries: consecutive leaves share a part as long as it fits, each part holds the
    whole root path of its tokens, and each node carries weights in the first part that holds it, only.  A
    single root-to-leaf path longer than the capacity becomes a part of its own size.  Nodes that lead to no
    weighted leaf are left out.
    """
    if drop_zero and not np.any(credit[:, :2]):
        return []
    live = tree.sum_below(np.asarray(weight) > 0) > 0
    has_live_child = np.zeros(tree.nodes, bool)
    has_live_child[tree.parent[1:][live[1:]]] = True
    parts: list[Part] = []
    done = np.zeros(tree.nodes, bool)  # nodes that carry their weights in an earlier part
    inside = np.zeros(tree.nodes, bool)  # nodes of the part being filled
    size = 0

    def finish() -> None:
        nodes = np.flatnonzero(inside)
        parts.append(Part(index, nodes, np.where(done[nodes, None], 0.0, credit[nodes]), size))
        done[nodes] = True

    for tip in np.flatnonzero(live & ~has_live_child):  # ends of the weighted paths, in depth-first order
        nodes = path(tree.parent, int(tip))
        extra = int(tree.length[nodes[~inside[nodes]]].sum())
        if size and size + extra > capacity:
            finish()
            inside[:] = False
            size, extra = 0, int(tree.length[nodes].sum())
        inside[nodes] = True
        size += extra
    if size:
        finish()
    return parts


def flat_paths(
    index: int, tree: TreeStats, advantage: Floats, weight: Floats, per: Per, drop_zero: bool = False
) -> list[Part]:
    """A part for every weighted leaf: its root path with its own weight, as if nothing were shared; of an
    episode, one for each of its chains, whose tokens weigh in the first that holds them.

    A node's own advantage (``per="node"``) stands on every path through it, so the sums over all paths are
    :func:`node_credit`'s.
    """
    parts: list[Part] = []
    done, last = np.zeros(tree.nodes, bool), -1  # nodes that an earlier chain of the same episode holds
    for end, leaf in tree.chains():
        if not weight[leaf] > 0:
            continue
        if leaf != last and tree.ends.size:
            done[:], last = False, leaf
        nodes = path(tree.parent, end)
        own = advantage[nodes] if per == "node" else advantage[leaf]
        a = own[nodes] if per == "path" else np.broadcast_to(own, nodes.shape)
        praised = (tree.kind[nodes] == Kind.EXPERT) & (a > 0)
        w = np.where((tree.kind[nodes] == Kind.MODEL) | praised, float(weight[leaf]), 0.0)
        if tree.ends.size:
            w[done[nodes]], done[nodes] = 0.0, True
        credit = np.stack([w * np.maximum(a, 0), w * np.minimum(a, 0), w], axis=1)
        if not drop_zero or np.any(credit[:, :2]):
            parts.append(Part(index, nodes, credit, int(tree.length[nodes].sum()), leaf))
    return parts


def first_fit_decreasing(parts: Sequence[Part], capacity: int) -> list[MicroBatch]:
    """Micro-batches of at most ``capacity`` tokens each (a larger part stands alone).

    Deterministic: the largest part first, ties in tree order.
    """
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


def share(micro_batches: Sequence[MicroBatch], dp: int, pad_to: int) -> list[list[MicroBatch]]:
    """[data-parallel rank] its micro-batches: largest first, each to the least loaded rank.

    Some rank may get none.
    """
    load = [0] * dp
    ranks: list[list[MicroBatch]] = [[] for _ in range(dp)]
    sized = [(padded_size(micro, pad_to), micro) for micro in micro_batches]
    for size, micro in sorted(sized, key=lambda item: -item[0]):
        rank = load.index(min(load))
        load[rank] += size
        ranks[rank].append(micro)
    return ranks


def padded_size(micro_batch: MicroBatch, pad_to: int) -> int:
    """Tokens of a micro-batch, padded to a multiple of ``pad_to``."""
    return -(-sum(part.size for part in micro_batch) // pad_to) * pad_to


def plan_update(
    trees: Sequence[TreeStats],
    advantages: Sequence[Floats],
    weights: Sequence[Floats],
    *,
    budget: int,
    dp: int = 1,
    per: Per = "leaf",
    hard: bool = False,
    flat: bool = False,
    pad_to: int = 1,
    drop_zero: bool = False,
    first: int = 0,
) -> list[list[MicroBatch]]:
    """[data-parallel rank] the micro-batches of one optimizer step, of at most ``budget`` tokens each with
    their padding.

    ``advantages`` and ``weights`` as in :func:`node_credit`, one array per tree.  ``flat``: train
    root-to-leaf paths instead of trees.  ``drop_zero`` leaves out trees (paths) whose tokens all have
    S+ = S- = 0: they do not move a policy-gradient loss, but their ``mult`` is lost too, so keep them when
    there is an entropy bonus or a KL term.  ``first``: the index of ``trees[0]`` in the batch.
    """
    if budget < 1 or pad_to < 1:
        raise ValueError(f"budget={budget} and pad_to={pad_to} must be at least 1")
    capacity = max(budget // pad_to, 1) * pad_to
    parts: list[Part] = []
    for index, (tree, a, w) in enumerate(zip(trees, advantages, weights, strict=True), first):
        credit = node_credit(tree, a, w, per=per, hard=hard)
        if flat:
            parts += flat_paths(index, tree, a, w, per, drop_zero)
        else:
            parts += whole_tree(index, tree, w, credit, capacity, drop_zero)
    micro_batches = first_fit_decreasing(parts, capacity)
    trained = [micro for micro in micro_batches if any(part.credit[:, 2].any() for part in micro)]
    return share(trained, dp, pad_to)


def reweighed(plan: BatchPlan, factors: Sequence[Floats]) -> BatchPlan:
    """The same plan with each leaf's share of S+ and S- times its factor, 0 or more: [L] per tree.

    Multiplicities stay, so what weighs by them, and every denominator, still counts all leaves.  With
    ``hard``, a shared token has the mean of its leaves' advantages times factors, rejected ones included.
    """
    made = plan.assigned
    if made is None:
        raise ValueError("a supervised batch has no advantages to weigh")
    credit: list[Float64] = []
    for tree, a, w, factor in zip(made.trees, made.advantages, made.weights, factors, strict=True):
        if made.per == "node":  # each leaf below has its own share of the node's
            total, kept = tree.sum_below(np.stack([w, w * factor], axis=1)).T
            a = a * kept / np.where(total > 0, total, 1)
        else:
            a = a * (factor[:, None] if made.per == "path" else factor)
        credit.append(node_credit(tree, a, w, per=made.per, hard=made.hard))

    def weighed(part: Part) -> Part:
        if part.leaf >= 0:
            sums = part.credit[:, :2] * factors[part.tree][part.leaf]
        else:
            sums = np.where(part.credit[:, 2:] > 0, credit[part.tree][part.nodes, :2], 0)
        return replace(part, credit=np.column_stack([sums, part.credit[:, 2]]))

    updates = [
        [[[weighed(part) for part in micro] for micro in micros] for micros in ranks]
        for ranks in plan.updates
    ]
    return replace(plan, updates=updates)


def row_budget(sizes: Sequence[int], micro_tokens: int, dp: int, pad_to: int = 1) -> int:
    """Tokens per row: ``micro_tokens``, or less when that lets every data-parallel rank have a share.

    ``sizes``: tokens of each tree (or path).  Never less than the largest that ``micro_tokens`` would leave
    whole, with its padding to a multiple of ``pad_to``, so no tree is cut for balance.
    """
    whole = max((s for s in sizes if s <= micro_tokens), default=micro_tokens)
    return min(micro_tokens, -(-max(whole, -(-sum(sizes) // dp)) // pad_to) * pad_to)
