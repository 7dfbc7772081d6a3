"""Credit of each step of each path against the other steps that were taken from the same state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from system.learn.credit.base import Credit
from system.learn.credit.group import DrGrpo, Grpo
from system.plugins import PluginError
from system.tree.plan import Per
from system.tree.record import Float64, Kind
from system.tree.stats import TreeStats


class GiGpo(Credit):
    """A = A_episode + ω·A_step  (GiGPO, arXiv 2505.10978 §4).

    A_episode is GRPO's over the leaves.  A_step compares the steps (MODEL nodes) of all paths that were taken
    from one state by their returns γ^(steps that follow)·r, the same way.  Here a state is the node that a
    step begins at: the prompt, or a tool's result, whose branches all saw the same; equal texts elsewhere in
    the tree are not looked for.  A step that nobody else took from its state has A_step 0.

    ``norm="mean"`` leaves out the division by the standard deviation.  The authors' code takes A_episode's
    mean over the rows of all steps, so that long paths weigh more; here every leaf counts once, as in the
    paper.  Equal rewards above 0 still teach: shorter paths have higher returns.
    """

    per: ClassVar[Per] = "path"

    def __init__(self, omega: float = 1.0, gamma: float = 0.95, norm: str = "mean_std") -> None:
        if norm not in ("mean_std", "mean"):
            raise PluginError(f"learn.credit.options.norm={norm!r}: choose mean_std or mean")
        if not 0 < gamma <= 1:
            raise PluginError(f"learn.credit.options.gamma={gamma:g}: it must lie above 0 and at most at 1")
        self.omega, self.gamma = omega, gamma
        self._group = Grpo() if norm == "mean_std" else DrGrpo()

    def advantages(self, batch: Sequence[TreeStats]) -> list[Float64]:
        episodes = self._group.advantages(batch)
        return [
            episode[:, None] + self.omega * self._steps(tree)
            for tree, episode in zip(batch, episodes, strict=True)
        ]

    def _steps(self, tree: TreeStats) -> Float64:
        """[L, J] A_step; 0 where there is no step."""
        step = tree.on_path & tree.scored[:, None] & (tree.kind == Kind.MODEL)
        # Of a node on a path, in depth-first order: the steps that follow it there.
        follow = step[:, ::-1].cumsum(axis=1)[:, ::-1] - step
        returns = np.where(step, self.gamma**follow * np.nan_to_num(tree.reward)[:, None], 0.0)
        result = np.zeros(step.shape)
        for state in np.unique(tree.parent[tree.kind == Kind.MODEL]):
            same = step & (tree.parent == state)
            if same.any():
                result[same] = self._group.of_group(returns[same])
        return result
