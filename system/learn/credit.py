"""Credit: from the rewards of a batch of groups to one advantage per leaf.  A group is one tree.

Notation: a group has G scored leaves with rewards r; mean and std are over them, std with Bessel's
correction (1/(G-1)).  A reward of NaN marks a leaf that was not scored: it gets advantage 0 and takes no
part in any statistic.  In every estimator a group of one scored leaf, or of equal rewards, gets exactly 0:
nothing in it says that one leaf did better than another.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Groups = list[NDArray[np.float64]]

_GRPO_EPS = 1e-6
_WHITEN_EPS = 1e-8


def grpo(groups: Groups) -> Groups:
    """A = (r - mean) / (std + 1e-6)  (DeepSeekMath, arXiv 2402.03300 §4.1; the epsilon of verl and of
    ARPO's code).

    ARPO's released code gives a group of one mean 0 and std 1, so A = r / (1 + 1e-6): every success alone
    in its group is pushed by its raw reward.  Ours gives it 0.
    """
    return [_scaled(r) for r in groups]


def rloo(groups: Groups) -> Groups:
    """A = G/(G-1) · (r - mean): each leaf against the mean of the others  (RLOO, arXiv 2402.14740)."""
    return [_centred(r) * (r.size / max(r.size - 1, 1)) for r in groups]


def dr_grpo(groups: Groups) -> Groups:
    """A = r - mean: no division by the std, which favours groups of little spread  (arXiv 2503.20783 §3)."""
    return [_centred(r) for r in groups]


def reinforce_plus_plus(groups: Groups) -> Groups:
    """REINFORCE++-baseline (arXiv 2501.03262): r - group mean, whitened over all leaves of the batch.

    Groups of one leaf stay at 0 and out of the batch's statistics.
    """
    centred = [_centred(r) for r in groups]
    pooled = np.concatenate([c for c in centred if c.size > 1] or [np.zeros(0)])
    if pooled.size < 2:
        return centred
    scale = np.sqrt(
        pooled.var(ddof=1) + _WHITEN_EPS
    )  # each group sums to 0, so the batch's mean is 0 already
    return [c / scale for c in centred]


@dataclass(frozen=True, slots=True)
class Estimator:
    """``hard``: shared tokens get the mean over their leaves, and count once (see ``tree.pack``)."""

    function: Callable[[Groups], Groups]
    hard: bool = False


ESTIMATORS: dict[str, Estimator] = {
    "grpo": Estimator(grpo),
    # On a tree, GRPO over the leaves with every token weighed by the leaves through it (arXiv 2507.19849
    # §3.2, "soft").
    "arpo-soft": Estimator(grpo),
    "arpo-hard": Estimator(grpo, hard=True),
    "rloo": Estimator(rloo),
    "reinforce++": Estimator(reinforce_plus_plus),
    "dr-grpo": Estimator(dr_grpo),
}


def advantages(name: str, rewards: Sequence[NDArray[np.floating]]) -> list[Float32]:
    """Leaf advantages over a training batch.

    ``rewards``: per group [L], NaN for leaves that were not scored.  Returns arrays of the same shapes, 0 at
    those leaves.  Raises ValueError for an unknown name or an infinite reward.
    """
    estimator = _estimator(name)
    scored = [~np.isnan(r) for r in rewards]
    groups = [np.asarray(r, np.float64)[m] for r, m in zip(rewards, scored, strict=True)]
    if any(np.isinf(r).any() for r in groups):
        raise ValueError("a reward is infinite")
    result = []
    for mask, values in zip(scored, estimator.function(groups), strict=True):
        leaf_advantages = np.zeros(mask.shape, np.float32)
        leaf_advantages[mask] = values
        result.append(leaf_advantages)
    return result


def is_hard(name: str) -> bool:
    """Whether ``pack`` must be told ``hard=True`` (and ``leaf_weights`` too)."""
    return _estimator(name).hard


def _estimator(name: str) -> Estimator:
    if name not in ESTIMATORS:
        close = difflib.get_close_matches(name, ESTIMATORS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(ESTIMATORS)}"
        raise ValueError(f"unknown credit {name!r}; {hint}")
    return ESTIMATORS[name]


def _centred(r: NDArray[np.float64]) -> NDArray[np.float64]:
    """r - mean; exactly 0 when all are equal, where rounding would leave noise for a small std to blow up."""
    return np.zeros_like(r) if r.size < 2 or np.ptp(r) == 0 else r - r.mean()


def _scaled(r: NDArray[np.float64]) -> NDArray[np.float64]:
    centred = _centred(r)
    return centred / (r.std(ddof=1) + _GRPO_EPS) if centred.any() else centred
