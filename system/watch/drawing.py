"""A tree as what the page draws: lanes of branches over tokens or time, with means over stretches of tokens.

Every branch has a lane.  A node's first child goes on in its parent's lane; its other children begin lanes of
their own, below, so that no two lines cross.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from system.observe.outline import told_of
from system.observe.terminal import visible
from system.text import one_line
from system.tree.record import Int32, Kind, Origin, Outcome, Tree, leaf_sum, path_sum
from system.tree.stats import TreeStats
from system.watch.times import CAUSES, scored, times

BINS = 6000  # of a drawing, about: more than a screen has pixels, in little over 100 kB


def drawing(
    tree: Tree, leaf_advantage: NDArray[np.floating[Any]], node_advantage: NDArray[np.floating[Any]]
) -> dict[str, Any]:
    """What the page needs, text aside.  Advantages are [L] and [J], NaN where unknown.

    ``nodes``, ``calls``, ``forks`` and ``leaves`` are columns.  ``begin`` counts the tokens on the path after
    the prompt (of which the root itself lies before 0); a node's stretches are number ``bin[j]`` on to the
    next node's, of ``bin_tokens`` tokens each.  ``times``: as in :class:`system.watch.times.Times`, causes by
    their numbers; None where the tree does not tell.
    """
    stats = TreeStats.of(tree)
    lane = lanes(tree.parent)
    length = np.diff(tree.start, append=tree.n_tokens)
    begin = path_sum(tree.parent, length.astype(np.int64)) - length - length[0]
    width = max(1, -(-tree.n_tokens // BINS))
    first, at = bins(tree.start, length, width)
    sampled = np.repeat(tree.kind == Kind.MODEL, length)
    scores = scored(tree)
    node_entropy = stats.entropy_sum / np.maximum(stats.entropy_known, 1)
    return {
        "prompt": visible(tree.prompt_id),
        "task": visible(tree.task),
        "meta": _meta(tree),
        "tokens": tree.n_tokens,
        "budget": tree.budget,
        "guide": tree.guide,
        "seconds": stats.seconds,
        "started_s": tree.started_s,
        "waited": {visible(str(k)): v for k, v in dict(tree.meta.get("seconds", {})).items()},
        "unique": stats.unique,
        "flat": stats.flat,
        "reward": _mean(stats.rewards),
        "spread": float(stats.rewards.std(dtype=np.float64)) if stats.rewards.size else None,
        "lanes": int(lane.max(initial=0)) + 1,
        "nodes": {
            "parent": tree.parent,
            "kind": [Kind(int(kind)).name.lower() for kind in tree.kind],
            "begin": begin,
            "length": length.astype(np.int64),
            "lane": lane,
            "advantage": node_advantage.astype(np.float64).round(4),
            "entropy": np.where(stats.entropy_known > 0, node_entropy, np.nan).round(4),
            "leaves": leaf_sum(tree.parent, tree.leaf, np.ones(tree.n_leaves)).astype(np.int64),
            "bin": at,
        },
        "bin_tokens": width,
        "bins": {
            "entropy": _means(tree.entropy, first).round(3),
            "version": np.maximum.reduceat(np.where(sampled, tree.version, -1), first),
        },
        "times": _times(tree),
        "calls": [
            {
                "node": call.node,
                "tool": visible(call.tool) or "unknown",
                "status": visible(str(call.status)),
                "latency_s": call.latency_s,
                "cached": call.cached,
                "attempts": call.attempts,
            }
            for call in tree.calls
        ],
        "forks": [
            {
                "node": fork.node,
                "delta_h": fork.delta_h,
                "probability": fork.probability,
                "draw": fork.draw,
                "forks": fork.forks,
                "scheduled": fork.scheduled,
            }
            for fork in tree.forks
        ],
        "leaves": [
            {
                "node": int(tree.leaf[leaf]),
                "reward": float(tree.reward[leaf]),
                "correct": int(tree.correct[leaf]),
                "advantage": float(leaf_advantage[leaf]),
                "outcome": _words(Outcome(int(tree.outcome[leaf])).name),
                "origin": _words(Origin(int(tree.origin[leaf])).name),
                "episode": int(tree.episode[leaf]) if tree.episode.size else -1,
                "told": one_line(told_of(tree, leaf)),
                "scored": scores[leaf],
            }
            for leaf in range(tree.n_leaves)
        ],
    }


def _times(tree: Tree) -> dict[str, Any] | None:
    """As the page has them, to a tenth of a millisecond."""
    if (found := times(tree)) is None:
        return None
    return {
        "causes": CAUSES,
        "stretches": [
            [(round(begin, 4), round(end, 4), CAUSES.index(cause)) for begin, end, cause in parts]
            for parts in found.stretches
        ],
        "over": [round(value, 4) for value in found.over],
    }


def lanes(parent: Int32) -> Int32:
    """[J] the lane of each node, from the top, of a tree in depth-first pre-order."""
    lane, taken, begun = [0] * len(parent), [False] * len(parent), 0
    for node, above in enumerate(parent.tolist()):
        if above < 0:
            continue
        if taken[above]:
            begun += 1
            lane[node] = begun
        else:
            taken[above], lane[node] = True, lane[above]
    return np.array(lane, np.int32)


def bins(
    start: Int32, length: NDArray[np.integer[Any]], width: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(first token of every stretch, [J] number of each node's first stretch) of ``width`` tokens or fewer;
    none reaches from one node into another.
    """
    each = -(-length.astype(np.int64) // width)
    number = np.cumsum(each) - each
    inside = np.arange(int(each.sum())) - np.repeat(number, each)
    return np.repeat(start.astype(np.int64), each) + inside * width, number


def _means(values: NDArray[np.float32], first: NDArray[np.int64]) -> NDArray[np.float64]:
    """The mean over the known values of every stretch; NaN without any."""
    known = np.isfinite(values)
    count = np.add.reduceat(known, first, dtype=np.int64)
    total = np.add.reduceat(np.where(known, values, 0).astype(np.float64), first)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _meta(tree: Tree) -> dict[str, str]:
    """What the question was, and its answer."""
    found: dict[str, str] = {}
    meta: Mapping[str, Any] = tree.meta
    for key in ("question", "answer", "answers", "gold"):
        if key in meta:
            value = meta[key]
            text = " | ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            found[key] = visible(text[:4000], breaks=True)
    return found


def _mean(values: NDArray[np.float32]) -> float | None:
    return float(values.mean(dtype=np.float64)) if values.size else None


def _words(name: str) -> str:
    return name.lower().replace("_", " ")
