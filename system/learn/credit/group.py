"""Credit of each leaf within its own group.

Notation: a group has G scored leaves with rewards r; mean and std are over them, std with Bessel's
correction (1/(G-1)).  A leaf that was not scored gets 0 and takes no part.  A group of one scored leaf, or of
equal rewards, gets exactly 0: nothing in it says that one leaf did better than another.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from statistics import NormalDist
from typing import ClassVar

import numpy as np

from system.learn.credit.base import Credit
from system.tree.record import Float64
from system.tree.stats import TreeStats

_GRPO_EPS = 1e-6
_NORMAL = NormalDist()


class GroupCredit(Credit):
    """A formula over the scored rewards of one group."""

    def advantages(self, batch: Sequence[TreeStats]) -> list[Float64]:
        result: list[Float64] = []
        for tree in batch:
            a = np.zeros(tree.leaves)
            a[tree.scored] = self.of_group(tree.reward[tree.scored].astype(np.float64))
            result.append(a)
        return result

    @abstractmethod
    def of_group(self, r: Float64) -> Float64:
        """[G] advantages for rewards [G]."""


class Grpo(GroupCredit):
    """A = (r - mean) / (std + 1e-6)  (DeepSeekMath, arXiv 2402.03300 §4.1; the epsilon of verl and of
    ARPO's code).

    On a tree, where every token is weighed by the leaves through it, this is ARPO's soft attribution (arXiv
    2507.19849 §3.2): ``arpo-soft`` is another name of it.  ARPO's released code gives a group of one mean 0
    and std 1, so A = r / (1 + 1e-6): every success alone in its group is pushed by its raw reward.  Ours
    gives it 0.
    """

    def of_group(self, r: Float64) -> Float64:
        centred = centre(r)
        return centred / (r.std(ddof=1) + _GRPO_EPS) if centred.any() else centred


class ArpoHard(Grpo):
    """GRPO with ARPO's hard attribution (arXiv 2507.19849 §3.2)."""

    hard: ClassVar[bool] = True


class Rloo(GroupCredit):
    """A = G/(G-1) · (r - mean): each leaf against the mean of the others  (RLOO, arXiv 2402.14740)."""

    def of_group(self, r: Float64) -> Float64:
        return centre(r) * (r.size / max(r.size - 1, 1))


class DrGrpo(GroupCredit):
    """A = r - mean: no division by the std, which favours groups of little spread  (arXiv 2503.20783 §3)."""

    def of_group(self, r: Float64) -> Float64:
        return centre(r)


class GaussianGrpo(GroupCredit):
    """A = Φ⁻¹((rank - 1/2) / G), equal rewards sharing the mean of their quantiles: advantages of one
    distribution whatever that of the rewards  (G²RPO, arXiv 2604.08539).

    The paper does not say where in its step of 1/G a rank stands; the middle is our choice.
    """

    def of_group(self, r: Float64) -> Float64:
        if not centre(r).any():
            return np.zeros_like(r)
        quantile = np.array([_NORMAL.inv_cdf((rank + 0.5) / r.size) for rank in range(r.size)])
        _, value, count = np.unique(r, return_inverse=True, return_counts=True)
        return (np.add.reduceat(quantile, np.cumsum(count) - count) / count)[value]


def centre(r: Float64) -> Float64:
    """r - mean; exactly 0 when all are equal, where rounding would leave noise for a small std to blow up."""
    return np.zeros_like(r) if r.size < 2 or np.ptp(r) == 0 else r - r.mean()
