"""What a growing tree consists of: its nodes and leaves, and the pieces of nodes that it closes into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from system.tree.record import Int32, Kind, Origin, Outcome
from system.tree.routes import Routes, recorded, unrecorded
from system.tree.token_path import TokenPath


@dataclass(slots=True)
class GrowingNode:
    parent: int
    kind: Kind
    path: TokenPath  # the parent's until the node's first token, which may copy it
    begin: int  # index of the node's first token on its path
    end: int  # one past its last
    children: list[int] = field(default_factory=list)
    leaves: int = 0
    logprob: list[NDArray[np.float32]] = field(default_factory=list)
    entropy: list[NDArray[np.float32]] = field(default_factory=list)
    version: list[Int32] = field(default_factory=list)
    closed: tuple[NDArray[np.float32], int] | None = None  # :meth:`TreeBuilder.rescore`
    teacher: NDArray[np.float32] | None = None  # :meth:`TreeBuilder.teach`
    routes: Routes | None = None  # [m, S, k] of its first m tokens, :meth:`TreeBuilder.route`
    answer: float = math.nan  # :meth:`TreeBuilder.answer`
    reward: float = 0.0  # :meth:`TreeBuilder.reward`
    # Seconds after the tree's start: opened, its first token, its last one so far; NaN: not known.
    times: tuple[float, float, float] = (math.nan, math.nan, math.nan)

    def grew(self, since_s: float) -> None:
        """Tokens came at that time; called before they are counted."""
        opened, first, _ = self.times
        self.times = (opened, since_s if self.end == self.begin else first, since_s)

    def routes_like(self, like: Routes) -> Routes:
        """[n, S, k] of all its tokens."""
        held = unrecorded(0, like) if self.routes is None else self.routes
        return np.concatenate([held, unrecorded(self.end - self.begin - len(held), like)])

    def route(self, first: int, routes: Routes) -> None:
        """Take ``routes`` of its tokens from number ``first`` of the path on; what is recorded stays."""
        self.routes = self.routes_like(routes)
        own = self.routes[first - self.begin :][: len(routes)]
        missing = ~recorded(own)
        own[missing] = routes[missing]

    def unrouted(self) -> int:
        """Number on the path of its first token without a record; its end: there is none."""
        if self.routes is None:
            return self.begin
        missing = np.flatnonzero(~recorded(self.routes))
        return self.begin + int(missing[0] if missing.size else len(self.routes))


@dataclass(slots=True)
class GrowingLeaf:
    node: int
    outcome: Outcome
    origin: Origin
    episode: int = -1  # -1: its own
    reward: float = math.nan
    correct: int = -1


class NodePiece(NamedTuple):
    """A node of the closed tree: the tokens of one node of the growth from depth ``begin`` to ``end``."""

    handle: int
    begin: int
    end: int
    parent: int  # index of the piece above, -1 for the root


def pieces_of(nodes: Sequence[GrowingNode]) -> tuple[list[NodePiece], dict[int, int]]:
    """(The closed tree's nodes in depth-first pre-order, the index of the one that each handle names.)

    The pieces of a node follow one another: a piece's first child is the rest of its node.
    """
    pieces: list[NodePiece] = []
    index: dict[int, int] = {}
    stack = [(0, 0, -1)]  # (handle, depth at which the rest of it begins, piece above)
    while stack:
        handle, begin, above = stack.pop()
        node = nodes[handle]
        begins = [nodes[child].begin for child in node.children]
        end = min((cut for cut in begins if cut > begin), default=node.end)
        if end > begin:
            pieces.append(NodePiece(handle, begin, end, above))
            above = len(pieces) - 1
        here = [child for child, cut in zip(node.children, begins, strict=True) if cut == end]
        stack.extend((child, end, above) for child in reversed(here))
        if end < node.end:
            stack.append((handle, end, above))
        else:
            index[handle] = above
    return pieces, index


def node_arrays(nodes: Sequence[GrowingNode], pieces: Sequence[NodePiece]) -> dict[str, Any]:
    """The arrays [J] of the closed tree's nodes that tell of its structure, and of when they grew."""
    own = [nodes[piece.handle] for piece in pieces]
    arrays: dict[str, Any] = {
        "parent": np.array([piece.parent for piece in pieces], np.int32),
        "kind": np.array([node.kind for node in own], np.int8),
    }
    if any(node.times[0] == node.times[0] for node in own):
        times = np.array([node.times for node in own], np.float32).reshape(-1, 3)
        cuts = [(one.begin > node.begin, one.end < node.end) for one, node in zip(pieces, own, strict=True)]
        before, after = np.array(cuts, np.bool_).T
        times[before, :2], times[after, 2] = np.nan, np.nan
        arrays |= zip(("opened_s", "first_s", "last_s"), times.T.copy(), strict=True)
    return arrays


def token_arrays(nodes: Sequence[GrowingNode]) -> dict[str, Any]:
    """The arrays [T] of the tokens of ``nodes``, one node after the other."""
    arrays: dict[str, Any] = {
        "tokens": np.concatenate([n.path.view(n.begin, n.end) for n in nodes]),
        "logprob": np.concatenate([chunk for n in nodes for chunk in n.logprob]),
        "entropy": np.concatenate([chunk for n in nodes for chunk in n.entropy]),
        "version": np.concatenate([chunk for n in nodes for chunk in n.version]),
    }
    if any(n.closed for n in nodes):
        closed = [n.closed or (np.full(n.end - n.begin, np.nan, np.float32), -1) for n in nodes]
        sizes = [n.end - n.begin for n in nodes]
        arrays["closed_logprob"] = np.concatenate([logprob for logprob, _ in closed])
        arrays["closed_version"] = np.repeat([version for _, version in closed], sizes).astype(np.int32)
    if any(n.teacher is not None for n in nodes):
        arrays["teacher_logprob"] = np.concatenate(
            [np.full(n.end - n.begin, np.nan, np.float32) if n.teacher is None else n.teacher for n in nodes]
        )
    if (like := next((n.routes for n in nodes if n.routes is not None), None)) is not None:
        arrays["routes"] = np.concatenate([n.routes_like(like) for n in nodes])
    return arrays
