"""Where a tree whose branches have all ended may go on: at any turn of the model's, or inside one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from system.plugins import PluginError
from system.rollout.branch import Branch
from system.rollout.branching import Policy, Turn
from system.tree.builder import TreeBuilder
from system.tree.record import Kind, Outcome


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where a turn of the tree begins, and how to come there."""

    turn: Turn
    node: int  # that holds the turn, or the rest of one that the tree forked inside
    above: int  # the node that it goes on from
    at: int  # tokens before it
    branch: Branch  # one that wrote it or came after it
    before: int  # segments of this branch that come before the turn

    def moved(self, tokens: int) -> Beginning:
        """The same with the turn's first ``tokens`` tokens kept."""
        return replace(self, above=self.node, at=self.at + tokens) if tokens else self


def expansion(
    policy: Policy,
    growth: TreeBuilder,
    ended: Sequence[tuple[Branch, Outcome]],
    room: int,
    seeds: Sequence[int],
) -> list[Beginning]:
    """Where the policy goes on in a tree all of whose branches have ``ended``: at most ``room`` places,
    drawn by ``seeds``.  Raises :class:`system.plugins.PluginError` for a choice that is no token.
    """
    found = places(growth, [branch for branch, _ in ended])
    turns, rng = [place.turn for place in found], np.random.default_rng(seeds)
    chosen = policy.expand(turns, room, rng) if found else ()
    result: list[Beginning] = []
    for one in chosen[:room]:
        turn, kept = one if isinstance(one, tuple) else (one, 0)
        if not (0 <= turn < len(found) and 0 <= kept < turns[turn].logprobs.size):
            raise PluginError(
                f"branching={type(policy).__name__}: expand() returned {one!r}: no token of the tree's turns"
            )
        result.append(found[turn].moved(kept))
    return result


def places(growth: TreeBuilder, ended: Sequence[Branch]) -> list[Beginning]:
    """Every turn with a token, once, in the order in which the branches ended, from the root down.  Where the
    tree forked inside a turn, each rest of it stands as one more.
    """
    found: dict[int, tuple[int, Branch, int]] = {}  # by the turn's node
    for branch in ended:
        before = -1
        for above, node in pairwise(growth.path(branch.node)):
            before += growth.kind(node) != Kind.MODEL or growth.kind(above) != Kind.MODEL
            if growth.kind(node) == Kind.MODEL and growth.n_tokens(node):
                found.setdefault(node, (above, branch, before))
    at = {node: growth.depth(node) - growth.n_tokens(node) for node in found}
    siblings = Counter((above, at[node]) for node, (above, _, _) in found.items())
    oldest = {(above, at[node]): node for node, (above, _, _) in reversed(found.items())}
    result: list[Beginning] = []
    for node, (above, branch, before) in found.items():
        inside, first = growth.kind(above) == Kind.MODEL, oldest[above, at[node]] == node
        turn = Turn(
            surprise=growth.surprise(node),
            siblings=siblings[above, at[node]],
            calls=sum(kind == Kind.TOOL for kind, _ in branch.segments[:before]),
            root=branch.key[0],
            logprobs=growth.logprobs(node),
            rewrites=inside or (above != growth.prompt and not first),
        )
        result.append(Beginning(turn, node, above, at[node], branch, before))
    return result
