"""Credit normalised by what rewards of a task have been like so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from system.learn.credit.base import Credit
from system.learn.credit.group import centre
from system.tree.record import Float64
from system.tree.stats import TreeStats

_EPS = 1e-6


class EmaGrpo(Credit):
    """A = (r - mean of the group) / (σ of the task + 1e-6), σ² = E[r²] - E[r]² from moving averages over the
    batches: tasks of large rewards do not drown the others  (EMA-GRPO, arXiv 2512.03043).

    The averages begin at the first batch of a task and are updated before they are used.  A group with an
    advantage beyond ``guard`` uses its own standard deviation (1/G) instead.  A group of one scored leaf gets
    0 and enters no average (the authors' code stops there).
    """

    def __init__(self, decay: float = 0.99, min_std: float = 1e-3, guard: float = 5.0) -> None:
        self.decay, self.min_std, self.guard = decay, min_std, guard
        self._moments: dict[str, tuple[float, float]] = {}  # task -> E[r], E[r²]

    def advantages(self, batch: Sequence[TreeStats]) -> list[Float64]:
        groups = [tree.reward[tree.scored].astype(np.float64) for tree in batch]
        rewards: dict[str, list[Float64]] = {}
        for tree, r in zip(batch, groups, strict=True):
            if r.size > 1:
                rewards.setdefault(tree.task, []).append(r)
        for task, some in rewards.items():
            self._update(task, np.concatenate(some))
        result = [np.zeros(tree.leaves) for tree in batch]
        for tree, r, a in zip(batch, groups, result, strict=True):
            if centre(r).any():
                a[tree.scored] = self._of_group(tree.task, r)
        return result

    def _update(self, task: str, r: Float64) -> None:
        new = float(r.mean()), float((r**2).mean())
        old = self._moments.get(task, new)
        first, second = (self.decay * a + (1 - self.decay) * b for a, b in zip(old, new, strict=True))
        self._moments[task] = first, second

    def _of_group(self, task: str, r: Float64) -> Float64:
        first, second = self._moments[task]
        std = max(np.sqrt(max(second - first**2, 0.0)), self.min_std)
        a = centre(r) / (std + _EPS)
        return a if np.abs(a).max() <= self.guard else centre(r) / (r.std() + _EPS)

    def state_dict(self) -> dict[str, Any]:
        return {task: list(moments) for task, moments in self._moments.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._moments = {task: (float(first), float(second)) for task, (first, second) in state.items()}
