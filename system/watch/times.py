"""When the nodes of a tree grew, and what they waited for: stretches of time, from what the tree recorded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from system.tree.record import Float64, Kind, Tree

# What a node's time goes into: its branch waits for others, at a barrier or for its turn in a busy rollout;
# its first token is awaited; its tokens come; a call is under way, or whoever answers it; the run was not
# there (:mod:`system.rollout.snapshot`).
CAUSES = ("barrier", "waiting", "engine", "tool", "away")

LEAST_S = 1e-3  # that a branch waits for others: less is a step of the rollout

Stretch = tuple[float, float, str]
"""(begin, end, cause), seconds after the tree's start"""


@dataclass(frozen=True, slots=True)
class Times:
    """Of a tree with J nodes, in seconds after its start."""

    stretches: list[list[Stretch]]  # [J] in order, from the end of the node above on where its branch goes on
    over: list[float]  # [J] when its last token was there


def times(tree: Tree) -> Times | None:
    """None for a tree that does not say when its nodes grew.

    A part of a node that others go on from inside has the time in between as it has tokens.  A node that
    does not say when it grew (the run was resumed from an older version's) takes no time.
    """
    if not tree.timed:
        return None
    opened, first, last = _filled(tree)
    calls: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
    for call in tree.calls:
        if call.began_s >= 0:
            calls[call.node].append((call.began_s, call.began_s + call.latency_s))
    away, ended = _away(tree), set(tree.leaf.tolist())
    went_on: set[int] = set()
    found = Times([[]], [0.0])
    for node in range(1, tree.n_nodes):
        above = int(tree.parent[node])
        since, parts = found.over[above], list[Stretch]()
        # The oldest child is the branch itself, unless that ended here; others did not wait: they were not.
        same = above > 0 and above not in ended and above not in went_on
        went_on.add(above)
        asked, begin, end = float(opened[node]), float(first[node]), float(last[node])
        if tree.kind[node] == Kind.MODEL and end == end:
            parts = [(since if same else asked, asked, "barrier"), (asked, begin, "waiting")]
            parts.append((begin, end, "engine"))
        elif tree.kind[node] == Kind.TOOL and end == end:
            begun = min((one for one, _ in calls[node]), default=since)
            answered = min(max((one for _, one in calls[node]), default=asked), asked)
            parts = [(since, begun, "barrier"), (begun, answered, "tool"), (answered, end, "barrier")]
        parts = list(_ordered(parts))
        found.stretches.append([piece for part in parts for piece in _without(part, away)])
        found.over.append(parts[-1][1] if parts else since)
    return found


def scored(tree: Tree) -> list[tuple[float, float] | None]:
    """[L] when each leaf's score began and ended, seconds after the tree's start; None where unknown."""
    told: Sequence[Any] = tree.meta.get("scored_s", ())
    known = [(float(one[0]), float(one[1])) if one else None for one in told[: tree.n_leaves]]
    return known + [None] * (tree.n_leaves - len(known))


def _filled(tree: Tree) -> tuple[Float64, Float64, Float64]:
    """(opened, first, last) with the times of the parts of a node between its first and its last token."""
    opened, first, last = (one.astype(np.float64) for one in (tree.opened_s, tree.first_s, tree.last_s))
    length: NDArray[np.int64] = np.diff(tree.start, append=tree.n_tokens).astype(np.int64)
    node = 1
    while node < tree.n_nodes:
        tail = node
        while (
            np.isnan(last[tail])
            and tail + 1 < tree.n_nodes
            and tree.parent[tail + 1] == tail
            and np.isnan(opened[tail + 1])
        ):
            tail += 1
        if tail > node:
            share = np.cumsum(length[node : tail + 1])[:-1] / length[node : tail + 1].sum()
            cuts = first[node] + (last[tail] - first[node]) * share
            last[node:tail], opened[node + 1 : tail + 1], first[node + 1 : tail + 1] = cuts, cuts, cuts
        node = tail + 1
    return opened, first, last


def _ordered(parts: Iterable[Stretch]) -> Iterable[Stretch]:
    """Those that take time, none begun before the last one's end: a clock may be set back."""
    at = 0.0
    for begin, end, cause in parts:
        begin = max(begin, at)
        if end > begin + (LEAST_S if cause == "barrier" else 0.0):
            yield begin, end, cause
            at = end


def _away(tree: Tree) -> list[tuple[float, float]]:
    """(from, to) when the run was not there."""
    told: Sequence[Any] = tree.meta.get("away_s", ())
    return [(float(begin), float(end)) for begin, end in told]


def _without(part: Stretch, away: Sequence[tuple[float, float]]) -> Iterable[Stretch]:
    """``part``, with the times in ``away`` told as such."""
    begin, end, cause = part
    for since, until in away:
        low, high = max(begin, since), min(end, until)
        if low < high:
            if begin < low:
                yield begin, low, cause
            yield low, high, "away"
            begin = high
    if begin < end:
        yield begin, end, cause
