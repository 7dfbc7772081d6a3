"""Where a tree whose branches have all ended may go on: at any turn of the model's, written once more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from system.rollout.branch import Branch
from system.rollout.branching import Policy, Turn
from system.tree.builder import TreeBuilder
from system.tree.record import Kind, Outcome


@dataclass(frozen=True, slots=True)
class Beginning:
    """A turn of the tree, and how to come to its beginning."""

    turn: Turn
    above: int  # the node at whose end the turn begins
    branch: Branch  # one that wrote it or came after it
    before: int  # segments of this branch that come before it


def expansion(
    policy: Policy,
    growth: TreeBuilder,
    ended: Sequence[tuple[Branch, Outcome]],
    room: int,
    seeds: Sequence[int],
) -> list[Beginning]:
    """Where the policy goes on in a tree all of whose branches have ``ended``: at most ``room`` places,
    drawn by ``seeds``.
    """
    found = places(growth, [branch for branch, _ in ended])
    turns, rng = [place.turn for place in found], np.random.default_rng(seeds)
    chosen = policy.expand(turns, room, rng) if found else ()
    return [found[i] for i in chosen[:room]]


def places(growth: TreeBuilder, ended: Sequence[Branch]) -> list[Beginning]:
    """Every turn with a token, once, in the order in which the branches ended, from the root down."""
    found: dict[int, tuple[int, Branch, int]] = {}  # by the turn's node
    for branch in ended:
        path = growth.path(branch.node)
        for before, (above, node) in enumerate(pairwise(path)):
            if growth.kind(node) == Kind.MODEL and growth.n_tokens(node):
                found.setdefault(node, (above, branch, before))
    siblings = Counter(above for above, _, _ in found.values())
    return [
        Beginning(Turn(growth.surprise(node), siblings[above], _calls(branch, before)), above, branch, before)
        for node, (above, branch, before) in found.items()
    ]


def _calls(branch: Branch, before: int) -> int:
    return sum(kind == Kind.TOOL for kind, _ in branch.segments[:before])
