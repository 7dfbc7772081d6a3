"""Branching policies that grow a tree once its branches have ended (``expands``), rather than at results.

Sources: AT²PO, arXiv 2601.04767; Tree-GRPO, arXiv 2509.21240; TreeRL, arXiv 2506.11902, and its code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from system.plugins import PluginError
from system.rollout.branching import Decision, Policy, Probe, TreeState, Turn


@dataclass(frozen=True)
class Expanding(Policy):
    """Never forks at a result; of a tree whose branches have all ended, ``width`` turns at a time are written
    once more.
    """

    width: int = 6
    expands: ClassVar[bool] = True
    lends: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.width < 1:
            raise PluginError(f"branching.options.width={self.width} must be 1 or more")

    def decide(self, probe: Probe, state: TreeState, rng: np.random.Generator) -> Decision:
        return Decision(0, 0.0, math.nan, probe.delta_h)


@dataclass(frozen=True)
class MostUncertainTurns(Expanding):
    """Expansion of the most uncertain turns: those of the highest surprise - ``penalty``·(siblings - 1)
    (AT²PO, arXiv 2601.04767 §4.1).  The released script has M = 10 roots and two rounds of ``width`` K = 6,
    so n = 22 leaves.  Where there are fewer turns than K, the best come again.
    """

    penalty: float = 0.05
    name: ClassVar[str] = "at2po"

    def expand(self, turns: Sequence[Turn], room: int, rng: np.random.Generator) -> Sequence[int]:
        score = [turn.surprise - self.penalty * (turn.siblings - 1) for turn in turns]
        return np.resize(np.argsort(-np.array(score), kind="stable"), self.width).tolist()


@dataclass(frozen=True)
class RandomTurns(Expanding):
    """Expansion of ``width`` turns at random, with repeats (Tree-GRPO, arXiv 2509.21240 §3.2: M = 2 roots and
    N = 2 nodes of each tree).
    """

    width: int = 2
    name: ClassVar[str] = "random-turns"

    def expand(self, turns: Sequence[Turn], room: int, rng: np.random.Generator) -> Sequence[int]:
        return rng.integers(len(turns), size=self.width).tolist()


@dataclass(frozen=True)
class UnlikelyTokens(Expanding):
    """Forks inside turns, where the model wrote what it held unlikely: EPTree, the growth of TreeRL (arXiv
    2506.11902 §3.2).

    Of what grew from each root, the ``tokens`` N tokens of the least log-probability are drawn once more, and
    all that follows them, ``width`` T times.  With M = ``rollout.roots`` and L rounds a tree has
    M·(1 + N·L·T) leaves; ``rollout.leaves`` says so instead of L, and of a round that is cut short every root
    has its share.  The released run: M = 6, N = 2, L = 1, T = 2, 30 leaves.  As there, the token that a fork
    began with is not drawn again, one that was forked at already may be, and where there are too few the best
    come again.  The release also spares all that follows a word like "answer"; here nothing does that.
    """

    width: int = 2
    tokens: int = 2
    name: ClassVar[str] = "treerl"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1:
            raise PluginError(f"branching.options.tokens={self.tokens} must be 1 or more")

    def expand(self, turns: Sequence[Turn], room: int, rng: np.random.Generator) -> Sequence[tuple[int, int]]:
        found: dict[int, list[tuple[float, int, int]]] = {}  # by root: (log p, turn, token)
        for number, turn in enumerate(turns):
            first = int(turn.rewrites)
            for token in np.argsort(turn.logprobs[first:], kind="stable")[: self.tokens].tolist():
                place = (float(turn.logprobs[first + token]), number, first + token)
                found.setdefault(turn.root, []).append(place)
        best = [sorted(places)[: self.tokens] for places in found.values()]
        # Every root's first, then every root's second; each T times only when all have come once.
        return [
            places[rank % len(places)][1:]
            for _ in range(self.width)
            for rank in range(self.tokens)
            for places in best
        ]
