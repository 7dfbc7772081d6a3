"""A factor on the advantages of a token, the same for all leaves below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from system.tree.record import Float32, Kind, TreeError
from system.tree.stats import TreeStats


@dataclass(frozen=True, slots=True)
class EntropyFactor:
    """1 + strength·(H - mean)/std of the entropy H with which a token was sampled, in nats.

    AEPO's entropy-aware advantage (arXiv 2510.14545; its code has 0.2).  There the statistics are those of a
    micro-batch, here those of the whole batch, lest they depend on the packing.  1 where H is unknown.
    """

    strength: float
    mean: float
    std: float  # with Bessel's correction; 1 where all are equal

    @classmethod
    def over(
        cls, strength: float, trees: Sequence[TreeStats], weights: Sequence[NDArray[np.floating[Any]]]
    ) -> EntropyFactor:
        """``weights`` [L] per tree: a MODEL token counts once for each leaf below it whose weight is not 0.

        Raises TreeError where no entropy is known.
        """
        total = np.zeros(3)  # how many, their sum, the sum of their squares
        for tree, weight in zip(trees, weights, strict=True):
            below = tree.sum_below(np.asarray(weight) > 0) * (tree.kind == Kind.MODEL)
            known = tree.entropy_known > 0
            each = [tree.entropy_known, tree.entropy_sum, tree.entropy_square_sum]
            total += np.array([column[known] for column in each], np.float64) @ below[known]
        count, first, second = total
        if count == 0:
            raise TreeError("learn.entropy_factor needs entropies, and the engines told none")
        variance = (second - first**2 / count) / max(count - 1, 1)
        return cls(strength, float(first / count), float(np.sqrt(variance)) if variance > 0 else 1.0)

    def of(self, entropy: Float32) -> Float32:
        """The factors of tokens of these entropies (NaN: unknown)."""
        z = (entropy.astype(np.float64) - self.mean) / self.std
        return np.where(np.isfinite(z), 1 + self.strength * z, 1).astype(np.float32)
