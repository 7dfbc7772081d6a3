"""The runs of an agent on one question, as one tree.

The root is the longest prefix of tokens that everything asked in the group has in common; what else was told
is context.  Context is merged token by token where paths agree and nothing sampled lies above; a turn stays
the one that was sampled, of its own episode.  So each path of the tree holds a chain's tokens and
log-probabilities exactly, and the learner sees nothing of agents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from system.agents.forest import Episode, Forest, Piece
from system.rollout.failure import RolloutFailed
from system.tree.builder import TreeBuilder
from system.tree.prompt import Prompt
from system.tree.record import ForkDecision, Int32, Kind, Origin, ToolCall, Tree

Turn = tuple[int, int]
"""(number of the episode, number of the piece)"""


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Tokens of a chain by one author: a turn that is trained on, or all context up to the next such turn."""

    pieces: tuple[int, ...]  # by their numbers in the forest
    ends: tuple[int, ...]  # where each of them ends in ``tokens``
    tokens: Int32  # [t]
    turn: Piece | None  # None: context
    whose: tuple[int, int] = (-1, -1)  # the (episode, piece) that sampled the turn


class _Place(NamedTuple):
    """Where a chain goes on: before token ``at`` of its run number ``run``."""

    episode: int
    chain: tuple[_Stretch, ...]
    run: int = 0
    at: int = 0

    @property
    def over(self) -> bool:
        return self.run == len(self.chain)

    @property
    def rest(self) -> Int32:
        """What is left of the run."""
        return self.chain[self.run].tokens[self.at :]

    @property
    def opens(self) -> tuple[int, ...]:
        """Equal for places that one node may begin at: by the next token of context, or by the turn."""
        run = self.chain[self.run]
        return run.whose if run.turn is not None else (int(run.tokens[self.at]),)

    def after(self, count: int) -> _Place:
        """The place ``count`` tokens on, within the run."""
        if self.at + count == self.chain[self.run].tokens.size:
            return self._replace(run=self.run + 1, at=0)
        return self._replace(at=self.at + count)


def plant_group(
    prompt: Prompt,
    episodes: Sequence[Episode],
    budget: int,
    *,
    meta: dict[str, Any] | None = None,
    started_s: float = 0.0,
    closed_s: float = 0.0,
    origins: Sequence[Origin] = (),
    same: Mapping[Turn, Turn] | None = None,
    forks: Sequence[tuple[Turn, ForkDecision]] = (),
) -> Tree:
    """One tree of ``episodes`` of the same ``prompt``: a leaf for each of an episode's chosen chains, cut
    behind its last turn that is trained on; of an episode without any, one at the root.

    ``started_s``, ``closed_s``: unix time.  ``origins``: of each episode; none: all are roots.  ``same``:
    turns that an episode was only told again -> those that were sampled.  ``forks``: what was decided at the
    beginnings of turns, whatever node they name.

    Raises :class:`RolloutFailed` where no episode has a turn to train on (``no_turn``), and where what they
    asked begins with different tokens (``no_beginning``).
    """
    asked = [
        _Place(number, chain)
        for number, one in enumerate(episodes)
        for chain in chains(one.forest, one.chosen, number, same or {})
    ]
    if not asked:
        raise RolloutFailed(prompt.id, "no_turn", f"no agent of {len(episodes)} has a turn to train on")
    root = common([place.rest for place in asked])
    if not root:
        raise RolloutFailed(
            prompt.id,
            "no_beginning",
            "what its agents asked begins with different tokens, and a tree has one root: give all requests "
            "one beginning, such as a chat template's",
        )
    growth = TreeBuilder(prompt.id, prompt.kind, asked[0].rest[:root], budget, meta, started_s)
    nodes: dict[tuple[int, int], int] = {}  # (episode, piece) -> the node that its last token is in
    ends = _grow(growth, asked, root, nodes)
    first: dict[int, int] = {}  # of a node with calls: the first episode through it
    for number, episode in enumerate(episodes):
        for node in ends.get(number, [growth.prompt]):
            leaf = growth.leaf(node, episode.outcome, origins[number] if origins else Origin.ROOT, number)
            if np.isfinite(episode.reward):
                growth.score(leaf, episode.reward, bool(episode.correct))
        for call in episode.calls:
            node = nodes.get((number, call.piece))
            if node is not None and first.setdefault(node, number) == number:  # a fork was told of it again
                growth.call(ToolCall(node, call.tool, call.arguments, "ok", 0.0))
    for (number, piece), decision in forks:
        above = episodes[number].forest.pieces[piece].parent
        if (node := nodes.get((number, above))) is not None:
            growth.fork(replace(decision, node=node))
    return growth.close(closed_s)


def chains(
    forest: Forest, chosen: Sequence[int], number: int = 0, same: Mapping[Turn, Turn] | None = None
) -> list[tuple[_Stretch, ...]]:
    """The token paths to ``chosen`` pieces, each cut behind its last trained turn; none that has no such
    turn, and none that another one goes on from.  ``number``: of the episode; ``same`` as in
    :func:`plant_group`.
    """
    last = [[piece for piece in forest.path(end) if forest.pieces[piece].trained][-1:] for end in chosen]
    ends = list(dict.fromkeys(piece for found in last for piece in found))
    inner = {piece for end in ends for piece in forest.path(end)[:-1]}
    return [tuple(_runs(forest, end, number, same or {})) for end in ends if end not in inner]


def _runs(forest: Forest, end: int, number: int, same: Mapping[Turn, Turn]) -> Iterator[_Stretch]:
    by_author = groupby(forest.path(end), lambda piece: piece if forest.pieces[piece].trained else -1)
    for turn, run in by_author:
        numbers = tuple(run)
        tokens = [forest.pieces[piece].tokens for piece in numbers]
        ends = np.cumsum([len(own) for own in tokens]).tolist()
        piece = forest.pieces[turn] if turn >= 0 else None
        whose = same.get((number, turn), (number, turn))
        yield _Stretch(numbers, tuple(ends), np.concatenate(tokens), piece, whose)


def common(texts: Sequence[Int32]) -> int:
    """The length of the longest common prefix."""
    first, length = texts[0], min(text.size for text in texts)
    for text in texts[1:]:
        differs = np.flatnonzero(text[:length] != first[:length])
        length = int(differs[0]) if differs.size else length
    return length


def _grow(
    growth: TreeBuilder, asked: Sequence[_Place], root: int, nodes: dict[tuple[int, int], int]
) -> dict[int, list[int]]:
    """Everything below the first ``root`` tokens; the nodes that each episode's chains end at.  Notes in
    ``nodes`` where pieces went.
    """
    ends: dict[int, list[int]] = {}
    below = [(growth.prompt, _pass(asked, root, growth.prompt, nodes))]
    while below:
        parent, places = below.pop()
        branches: dict[tuple[int, ...], list[_Place]] = {}
        for place in places:
            if place.over:
                ends.setdefault(place.episode, []).append(parent)
            else:
                branches.setdefault(place.opens, []).append(place)
        opened = [(node := _node(growth, parent, some), some) for some in branches.values()]
        for node, some in reversed(opened):
            below.append((node, _pass(some, growth.n_tokens(node), node, nodes)))
    return ends


def _node(growth: TreeBuilder, parent: int, places: Sequence[_Place]) -> int:
    """A node of what ``places``, which open with the same, have in common."""
    run = places[0].chain[places[0].run]
    if (turn := run.turn) is None:
        node = growth.node(parent, Kind.TOOL)
        growth.extend(node, places[0].rest[: common([place.rest for place in places])])
        return node
    node = growth.node(parent, Kind.MODEL)
    growth.extend(node, turn.tokens, turn.logprob, turn.entropy, turn.version)
    growth.reward(node, turn.reward)
    return node


def _pass(places: Sequence[_Place], count: int, node: int, nodes: dict[tuple[int, int], int]) -> list[_Place]:
    """The places ``count`` tokens on, which ``node`` holds; the pieces that end there are noted."""
    for place in places:
        run = place.chain[place.run]
        for piece, end in zip(run.pieces, run.ends, strict=True):
            if place.at < end <= place.at + count:
                nodes[place.episode, piece] = node
    return [place.after(count) for place in places]
