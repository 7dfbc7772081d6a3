"""How leaf losses add up to one number: the weight w of every leaf, normalised over a whole optimizer step.

The loss is Σ over leaves of w · Σ over the leaf's MODEL tokens of the token loss.  The weights must be made
from all trees of the step, over all micro-batches and data-parallel ranks, so that nothing is averaged
twice: the released ARPO code takes the mean within each micro-batch, so under dynamic batching a token's
weight there depends on its neighbours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from system.tree.record import Float32, Float64, Kind
from system.tree.stats import TreeStats


class TokenCounts(NamedTuple):
    """MODEL tokens on paths to scored leaves."""

    unique: int  # each once, as a tree learner computes them
    flat: int  # once per scored leaf through them, as a learner on flat paths would


class Aggregate(ABC):
    """The weights of one optimizer step.  A user's own is named ``learn.aggregate=package.module:Name``."""

    @abstractmethod
    def weights(self, lengths: Sequence[Float64], counts: TokenCounts, hard: bool) -> list[Float64]:
        """[L] per tree, of leaves with ``lengths`` [L] MODEL tokens; 0 where the length is.

        A leaf of length 0 was not scored or has no MODEL token.  ``hard``: whether the credit is
        (:class:`system.learn.credit.base.Credit`); a shared token then gets the mean weight of its leaves
        instead of their sum, so under ``seq-mean`` and ``constant`` sharing makes the step's total weight
        smaller.
        """


class TokenMean(Aggregate):
    """w = 1 / (tokens of the step): every token weighs the same  (DAPO, arXiv 2503.14476 §3.3).

    A shared token counts once per scored leaf through it, as if the paths were flat; with hard attribution,
    where it has multiplicity 1, it counts once.
    """

    def weights(self, lengths: Sequence[Float64], counts: TokenCounts, hard: bool) -> list[Float64]:
        total = counts.unique if hard else counts.flat
        return [(o > 0) / max(total, 1.0) for o in lengths]


class SequenceMean(Aggregate):
    """w = 1 / (L·|o|): mean over a leaf's tokens, then over the step's L leaves (arXiv 2402.03300 eq. 3)."""

    def weights(self, lengths: Sequence[Float64], counts: TokenCounts, hard: bool) -> list[Float64]:
        leaves = max(sum(int((o > 0).sum()) for o in lengths), 1)
        return [(o > 0) / (leaves * np.maximum(o, 1.0)) for o in lengths]


class ConstantLength(Aggregate):
    """w = 1 / (L·length_cap): no preference for short or long answers  (Dr. GRPO, arXiv 2503.20783 §3.2).

    ``length_cap``: the response-token budget of a branch, unless the options say another.
    """

    def __init__(self, length_cap: int) -> None:
        if length_cap < 1:
            raise ValueError(f"length_cap={length_cap} must be at least 1")
        self.length_cap = length_cap

    def weights(self, lengths: Sequence[Float64], counts: TokenCounts, hard: bool) -> list[Float64]:
        leaves = max(sum(int((o > 0).sum()) for o in lengths), 1)
        return [(o > 0) / (leaves * float(self.length_cap)) for o in lengths]


def leaf_weights(aggregate: Aggregate, trees: Sequence[TreeStats], *, hard: bool = False) -> list[Float32]:
    """[L] weight of each leaf of each tree of one optimizer step; 0 for leaves not scored or without MODEL
    tokens.

    ``L`` counts the leaves with a weight.
    """
    lengths = [np.where(tree.scored, tree.response_tokens, 0).astype(np.float64) for tree in trees]
    return [w.astype(np.float32) for w in aggregate.weights(lengths, counts(trees), hard)]


def counts(trees: Sequence[TreeStats]) -> TokenCounts:
    """MODEL tokens that can be trained on; flat / unique is what prefix sharing saves."""
    unique = flat = 0
    for tree in trees:
        below, model = tree.scored_below, tree.kind == Kind.MODEL
        unique += int(tree.length[model & (below > 0)].sum())
        flat += int((tree.length * below)[model].sum())
    return TokenCounts(unique, flat)
