"""Credit whitened over the tokens of the batch: REINFORCE++ and its variant with a group baseline.

Whitening subtracts the mean over all MODEL tokens of all scored leaves, and divides by their standard
deviation (Bessel); a leaf counts once per token of its path, shared ones included, as on flat paths.  A group
therefore need not sum to 0, and one of equal rewards gets an advantage that is not 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from system.learn.credit.base import Credit
from system.learn.credit.group import centre
from system.tree.record import Float64, Int64
from system.tree.stats import TreeStats

_VARIANCE_EPS = 1e-8


class ReinforcePlusPlus(Credit):
    """REINFORCE++ (arXiv 2501.03262) as verl's ``reinforce_plus_plus``: A = r, whitened; without a KL in the
    reward and without discount.  It needs no groups: single leaves learn too.
    """

    def advantages(self, batch: Sequence[TreeStats]) -> list[Float64]:
        return whitened(batch, [tree.scored for tree in batch], [tree.reward for tree in batch])


class ReinforcePlusPlusBaseline(Credit):
    """REINFORCE++-baseline (same paper) as verl's ``reinforce_plus_plus_baseline``: A = r - mean of the
    group, whitened.

    A group of one scored leaf has no baseline: it stays at 0 and out of the statistics.  verl lets its raw
    reward in.
    """

    def advantages(self, batch: Sequence[TreeStats]) -> list[Float64]:
        counted = [tree.scored & (tree.scored.sum() > 1) for tree in batch]
        values = [np.zeros(tree.leaves) for tree in batch]
        for tree, v, m in zip(batch, values, counted, strict=True):
            v[m] = centre(tree.reward[m].astype(np.float64))
        return whitened(batch, counted, values)


def whiten(values: Float64, tokens: Float64 | Int64) -> Float64:
    """[N] ``values``, each standing on ``tokens`` [N] tokens, to mean 0 and variance 1 over all tokens."""
    total = tokens.sum()
    if total < 2:
        return np.zeros_like(values)
    centred = values - (tokens * values).sum() / total
    return centred / np.sqrt((tokens * centred**2).sum() / (total - 1) + _VARIANCE_EPS)


def whitened(
    batch: Sequence[TreeStats], counted: Sequence[np.ndarray], values: Sequence[np.ndarray]
) -> list[Float64]:
    """[L] per tree: ``values`` whitened over the ``counted`` leaves of the batch, 0 at the others."""
    result = [np.zeros(tree.leaves) for tree in batch]
    if batch:
        pooled = np.concatenate([v[m] for v, m in zip(values, counted, strict=True)]).astype(np.float64)
        tokens = np.concatenate([t.response_tokens[m] for t, m in zip(batch, counted, strict=True)])
        ends = np.cumsum([int(m.sum()) for m in counted])[:-1]
        for a, m, w in zip(result, counted, np.split(whiten(pooled, tokens), ends), strict=True):
            a[m] = w
    return result
