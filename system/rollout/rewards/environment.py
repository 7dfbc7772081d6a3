"""What a branch's own world says that it is worth."""

from __future__ import annotations

import math
import numbers
from typing import Any, ClassVar

from system.rollout.reward import BranchView, Score
from system.rollout.scoring import ScoreFailed
from system.text import shown
from system.tree.prompt import Prompt


class EnvironmentReward:
    """``reward`` of the world's final state (of a plain class, its ``reward()``), or 0 where it tells none.

    What single turns earned comes to every reward by itself.  ``correct``: whether both together are at
    least ``right``.
    """

    trusted: ClassVar[bool] = True

    def __init__(self, right: float = 1.0) -> None:
        self.right = right

    def quick(self, prompt: Prompt, branch: BranchView) -> Score:
        return self.score(prompt, branch)

    def score(self, prompt: Prompt, branch: BranchView) -> Score:
        value: Any = (branch.result or {}).get("reward", 0.0)
        try:
            number = float(value) if isinstance(value, numbers.Real) else math.nan
        except OverflowError:
            number = math.nan
        if math.isnan(number):
            raise ScoreFailed(
                f"reward environment: the world's reward is {shown(value)}, no number", "number"
            )
        return Score(number, number + sum(branch.steps) >= self.right)
