"""In which order examples are trained on, and how fast: pure functions of the settings and the seed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from system.config import SftConfig
from system.learn.schedule import learning_rate

Rows = NDArray[np.int64]


def batches(examples: int, steps: int, batch: int, seed: int) -> list[Rows]:
    """For each of ``steps`` which of the ``examples`` it takes: pass after pass, each in an order by seed.

    All have ``batch`` of them; one may end a pass and begin the next.
    """
    rng = np.random.default_rng(seed)
    passes = -(-steps * batch // examples)
    order = np.concatenate([rng.permutation(examples) for _ in range(passes)])
    return [order[step * batch : (step + 1) * batch] for step in range(steps)]


@dataclass(frozen=True)
class Course:
    """The steps of a supervised run over so many ``examples``."""

    sft: SftConfig
    examples: int
    seed: int

    @property
    def steps(self) -> int:
        return math.ceil(self.sft.epochs * self.examples / self.sft.batch)

    def batches(self) -> list[Rows]:
        """[step] the examples it takes; the last step has what is left of the last epoch."""
        made = batches(self.examples, self.steps, self.sft.batch, self.seed)
        left = self.sft.epochs * self.examples - (self.steps - 1) * self.sft.batch
        return [*made[:-1], made[-1][:left]]

    def lr(self, step: int) -> float:
        """The learning rate of a step, from 0 on."""
        sft = self.sft
        warmup = math.ceil(sft.warmup * self.steps)
        return learning_rate(step, self.steps, sft.lr, warmup=warmup, decay=sft.lr_decay, end=sft.lr_end)

    def epoch(self, steps: int) -> float:
        """How many epochs so many steps are."""
        return min(steps * self.sft.batch / self.examples, float(self.sft.epochs))

    def due(self, steps: int, every: int) -> bool:
        """Whether something that comes ``every`` so many steps (0: at the end of each epoch), and at the end,
        comes after so many ``steps``.
        """
        if steps == self.steps:
            return True
        if every:
            return steps % every == 0
        return math.floor(self.epoch(steps)) > math.floor(self.epoch(steps - 1))
