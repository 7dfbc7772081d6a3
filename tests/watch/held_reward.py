"""ARPO's reward, which a test may hold back: a run goes no further until the test has seen enough of it."""

import asyncio
from pathlib import Path

from system.rollout.reward import BranchView, Score
from system.rollout.rewards.arpo import ArpoReward
from system.tree.prompt import Prompt


class HeldReward:
    """Scores the first ``free`` leaves at once, and all others when the file ``until`` is there."""

    def __init__(self, free: int, until: str) -> None:
        self._free, self._until, self._reward = free, Path(until), ArpoReward()

    async def score(self, prompt: Prompt, branch: BranchView) -> Score:
        self._free -= 1
        while self._free < 0 and not self._until.exists():  # noqa: ASYNC110 (of another process)
            await asyncio.sleep(0.1)
        return self._reward.score(prompt, branch)
