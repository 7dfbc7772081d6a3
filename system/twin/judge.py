"""A model of a judge: a reward that takes its time, on the virtual clock."""

from __future__ import annotations

import asyncio
import random

from system.rollout.completions import back_off_s
from system.rollout.reward import BranchView
from system.tree.prompt import Prompt


class JudgeModel:
    """Finds every answer right after ``seconds``.  The share ``failures`` of its requests fail, after as
    long, and are made again, after the back-off of the client of real judges.
    """

    def __init__(self, seconds: float, failures: float, seed: int = 0) -> None:
        self._seconds, self._failures, self._rng = seconds, failures, random.Random(seed)
        self.requests = 0

    async def score(self, prompt: Prompt, branch: BranchView) -> float:
        attempt = 0
        while True:
            self.requests += 1
            await asyncio.sleep(self._seconds)
            if self._rng.random() >= self._failures:
                return 1.0
            await asyncio.sleep(back_off_s(attempt, self._rng))
            attempt += 1
